"""The workers of a training: who they are, how the model is spread over them, and what they agree on."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

Sharding = Literal["ddp", "fsdp"]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Team:
    """This worker among all workers. rank: 0 to size - 1. A team of one needs no process group."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of_process_group(cls, device: torch.device) -> "Team":
        """The workers of torch.distributed's process group, which has been made."""
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def leads(self) -> bool:
        """Whether this is the one worker that writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every worker is here."""
        if self.size > 1:
            # by a sum, since barrier() of a process group would pick a device by itself
            self.sum(torch.zeros(1, device=self.device))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every worker's tensor, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any worker says so."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, on every worker, by rank. Small values only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def made_once(self, make: Callable[[], Made]) -> Made:
        """What the leading worker makes, on every worker; what it raises is raised on all, so that none waits for it.
        Small values only."""
        if self.size == 1:
            return make()
        made: Made | None = None
        fault: Exception | None = None
        if self.leads:
            try:
                made = make()
            except Exception as error:
                fault = error
        made, fault = self.gather((made, fault))[0]
        if fault is not None:
            raise fault
        return made


def device_here(gpu: int | None = None) -> torch.device:
    """The accelerator of this process, where there is one."""
    if torch.cuda.is_available():
        device = torch.device("cuda", gpu or 0)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def spread(
    model: nn.Module,
    team: Team,
    sharding: Sharding,
    bf16: bool,
    units: Iterable[nn.Module],
    in_float32: Iterable[nn.Module] = (),
) -> nn.Module:
    """Put the model on this worker's device and tie it to the other workers' copies.

    The same weights stand on every worker. ddp: each keeps the whole model; gradients are averaged in float32. fsdp:
    FSDP2, each keeps a part of every parameter, optimizer state and gradient; with `bf16`, weights travel and multiply
    in bfloat16 and gradients are summed in float32, but for the modules `in_float32`, whose weights stay as they are.

    units: the modules that FSDP2 gathers at once, from the inside out: blocks, and what is also called by itself.
    Returns: the module to call.
    """
    if team.size == 1:
        return model.to(team.device)
    if sharding == "ddp":
        model.to(team.device)
        ids = [team.device] if team.device.type == "cuda" else None
        return DistributedDataParallel(
            model,
            device_ids=ids,
            broadcast_buffers=False,  # they are constants
            find_unused_parameters=True,  # those for several speakers, for one, in a step that has none
            gradient_as_bucket_view=True,
        )
    mesh = init_device_mesh(team.device.type, (team.size,))
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else whole
    for module in in_float32 if bf16 else ():
        fully_shard(module, mesh=mesh, mp_policy=whole)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    # gathered again for the backward pass: else samples taken between two steps would leave their weights in place
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model


def bare(model: nn.Module) -> nn.Module:
    """The model inside its DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextlib.contextmanager
def syncing(model: nn.Module, last: bool) -> Iterator[None]:
    """Around the forward and backward pass of a micro-batch: gradients are exchanged with the `last` one only."""
    if isinstance(model, DistributedDataParallel):
        with contextlib.nullcontext() if last else model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    yield


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this worker holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every worker."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, the same number on every worker."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return full(nn.utils.get_total_norm(gradients))


def clip(parameters: Iterable[Tensor], norm: Tensor, most: float) -> None:
    """Scale the gradients, of which `norm` is the norm, down to a norm of `most`."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, torch.clamp(most / (norm + 1e-6), max=1.0))
