"""The workers of a training: communication, and how the model is distributed over them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from training.models.sequence_parallel import SequenceGroup

Sharding = Literal["ddp", "fsdp"]
MadeT = TypeVar("MadeT")


@dataclass(frozen=True)
class WorkerGroup:
    """All workers of a training, seen from one of them. A single worker needs no process group."""

    rank: int = 0
    """This worker's number, 0 to size - 1."""
    size: int = 1
    """Number of workers."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """This worker's device."""
    sequence: SequenceGroup | None = None
    """The workers with which this one shares its samples. None where each has samples of its own."""

    @classmethod
    def of_process_group(cls, device: torch.device, sequence_parallel: int = 1) -> "WorkerGroup":
        """The workers of torch.distributed's process group, which must be initialised.

        sequence_parallel: how many workers, neighbours by rank, share a sample. It must divide their number.
        """
        rank, size = dist.get_rank(), dist.get_world_size()
        if sequence_parallel == 1:
            return cls(rank, size, device)
        mesh = init_device_mesh(
            device.type, (size // sequence_parallel, sequence_parallel), mesh_dim_names=("data", "sequence")
        )
        own = SequenceGroup(mesh.get_group("sequence"), rank % sequence_parallel, sequence_parallel)
        return cls(rank, size, device, own)

    @property
    def sequence_parallel(self) -> int:
        """How many workers share a sample."""
        return 1 if self.sequence is None else self.sequence.size

    @property
    def data_rank(self) -> int:
        """The number of this worker's share of the data. Workers that share samples have the same one."""
        return self.rank // self.sequence_parallel

    @property
    def data_size(self) -> int:
        """How many shares of the data there are."""
        return self.size // self.sequence_parallel

    @property
    def is_leader(self) -> bool:
        """Whether this is the leading worker, rank 0, which writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every worker has called it."""
        if self.size > 1:
            # by a sum, because a process group's own barrier() would pick a device itself
            self.sum(torch.zeros(1, device=self.device))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every worker's tensor, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is True on any worker."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value by rank, on every worker. For small values only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_on_leader(self, value: Any) -> list[Any]:
        """Every worker's value by rank, on the leading worker. Empty on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_leader else None
        dist.gather_object(value, values)
        return values or []

    def run_on_leader(self, make: Callable[[], MadeT]) -> MadeT:
        """Call `make` on the leading worker and return its result on every worker. For small results only.

        An exception of `make` is raised on every worker, so that none waits for a result.
        """
        if self.size == 1:
            return make()
        made: MadeT | None = None
        fault: Exception | None = None
        if self.is_leader:
            try:
                made = make()
            except Exception as error:
                fault = error
        made, fault = self.gather((made, fault))[0]
        if fault is not None:
            raise fault
        return made


def device_here(gpu: int | None = None) -> torch.device:
    """This process's GPU, or the CPU where there is no GPU. gpu: index, the first one when None."""
    if torch.cuda.is_available():
        device = torch.device("cuda", gpu or 0)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def parallelize(
    model: nn.Module,
    group: WorkerGroup,
    sharding: Sharding,
    units: Iterable[nn.Module],
    fill: Callable[[nn.Module], None],
) -> nn.Module:
    """Give the model weights on this worker's device, and connect it to the other workers' copies.

    ddp: each worker keeps the whole model.
    fsdp (FSDP2): each worker keeps a part of every parameter, gradient and optimizer state.

    Both exchange weights and gradients in float32. A layer that multiplies in bfloat16 rounds its weights itself
    (autocast), so norms and modulation need no units of their own.

    model: its parameters are on the meta device, so that no worker ever holds the whole model. Its buffers have values.
    units: the modules that FSDP2 gathers as one unit, from the inside out: blocks, and every module that is also called
    by itself. Each of them must run in every forward pass.
    fill: gives the parameters their values, each worker those that it holds (`local_tensor`, `place_of`).

    Returns: the module to call.
    """
    shards = group.size > 1 and sharding == "fsdp"
    if shards:
        mesh = init_device_mesh(group.device.type, (group.size,))
        for unit in units:
            fully_shard(unit, mesh=mesh)
        # The root unit is resharded after the forward pass too. Otherwise sampling between two steps would leave its
        # gathered weights in place.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
    buffers = dict(model.named_buffers())
    model.to_empty(device=group.device)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        fill(model)
    if group.size == 1 or shards:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[group.device] if group.device.type == "cuda" else None,
        broadcast_buffers=False,  # they are constants
        find_unused_parameters=True,  # such as those of a layer that a step does not need
        gradient_as_bucket_view=True,
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside its DistributedDataParallel wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def autocast(bf16: bool | None, device: torch.device) -> torch.autocast:
    """The context in which a model runs, in training and in previews. bf16: the recipe's run.bf16."""
    enabled = device.type == "cuda" if bf16 is None else bf16
    # A cache would keep the rounded weights of all blocks until the end of the context.
    return torch.autocast(device.type, torch.bfloat16, enabled, cache_enabled=False)


@contextlib.contextmanager
def gradient_sync(model: nn.Module, last: bool) -> Iterator[None]:
    """The context of a micro-batch's forward and backward pass.

    ddp: workers exchange gradients in the `last` one only. fsdp: they do so in each, because a worker that waited would
    hold the gradients of the whole model.
    """
    waits = isinstance(model, DistributedDataParallel) and not last
    with cast(DistributedDataParallel, model).no_sync() if waits else contextlib.nullcontext():
        yield


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this worker holds. Other tensors are returned as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place_of(tensor: Tensor) -> tuple[slice, ...]:
    """Where this worker's part lies in the whole tensor: the index that cuts it out."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    sizes, begins = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole, on every worker. Other tensors are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, the same number on every worker."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return full_tensor(nn.utils.get_total_norm(gradients))


def clip_gradients(parameters: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale the gradients down to a norm of `max_norm`. norm: their norm."""
    gradients = [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
