"""The interfaces of the training loop: a job, the learner of a model family, and its data."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from training.config import PhaseSettings, TrainingRecipe
from training.loop.parallel import WorkerGroup
from training.loop.tracking import Trackers


class TrainingError(RuntimeError):
    """A training cannot go on: a loss is not finite, or the output folder holds another training.

    Every worker raises it at the same step. Starting again would end the same way.
    """


class Losses(NamedTuple):
    """The losses of a micro-batch."""

    values: Tensor
    """[batch] float32, the loss of each sample, not yet multiplied by its weight."""
    sigmas: Tensor
    """[batch], the noise level of each sample."""


class BatchStream(Protocol):
    """One worker's share of the data."""

    def __iter__(self) -> Iterator[Any]:
        """This worker's share of each global batch from the state on, without end, each a training.data.batch.Batch.

        The shares of all workers together are the recipe's `batch` samples, whatever the number of workers.
        """

    def state_dict(self) -> dict[str, Any]:
        """The position in the data after the batches that were handed out; the same on every worker."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a position."""


class Learner(Protocol):
    """A model family as the training loop uses it: the model, its data and its loss."""

    dataset: str
    """The sha256 of the dataset manifest."""

    def model(self, latent_scale: tuple[float, ...] | None = None) -> nn.Module:
        """The model. Its parameters are on the meta device, without values, its buffers have theirs. Every worker calls
        it.

        latent_scale: the divisor of latents of the weights that the model will be given, () for 1. None: the model
        gets new weights, and the divisor is measured on the data.
        """

    def new_weight(self, model: Any, name: str) -> Tensor:
        """The value of a parameter before any training, [as the whole parameter] float32 on the CPU. It depends only on
        the name, the shape and the seed."""

    def part_of(self, name: str) -> str:
        """The part of the model that a parameter belongs to: video, text or audio."""

    def counterpart(self, name: str, part: str) -> str | None:
        """The parameter of `part` that corresponds to the parameter `name`. None if there is none."""

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        """The repeated blocks, which torch.compile compiles."""

    def units(self, model: Any) -> Sequence[nn.Module]:
        """The modules that FSDP gathers as one unit, from the inside out (training.loop.parallel.parallelize)."""

    def enable_activation_checkpointing(self, model: Any) -> None:
        """Let the model compute its activations again in the backward pass instead of keeping them."""

    def loader(self) -> BatchStream:
        """This worker's share of the phase's data."""

    def losses(self, model: Any, batch: Any) -> Losses:
        """Run the model on a micro-batch.

        The loss of a sample depends only on the weights, the sample, its epoch, the phase and the seed.
        """

    def work(self, batch: Any) -> tuple[int, float]:
        """The tokens of a batch, and the FLOPs of its forward pass."""

    def about(self, model: Any) -> dict[str, Any]:
        """What is needed to build the model again: its "shape", which holds its "latent_scale" where it has one.

        It is kept beside the weights.
        """

    def sample(self, model: Any, step: int, folder: Path, trackers: Trackers | None) -> dict[str, float]:
        """Sample videos into `folder` and give them to the trackers, if any. Returns what was measured on them."""


@dataclass(frozen=True)
class Job:
    """A phase to train. It can be sent to other processes, and so can its callables."""

    recipe: TrainingRecipe
    phase: str
    """Name of the phase, a key of the recipe's `phases`."""
    manifest: str
    """Address of the dataset manifest."""
    out: Path | str
    """Output folder, which all workers share: a path or any fsspec address."""
    learner: Callable[["Job", WorkerGroup], Learner]
    """Makes the learner of the model family."""
    probe: Callable[..., float | None] | None = None
    """Measures how well the mouth of a sample video follows a sound (training.generate.previews.SyncProbe). None: lip
    sync is not measured."""

    @property
    def folder(self) -> str:
        """The address of the phase's output folder."""
        return f"{self.out}/{self.phase}"

    @property
    def settings(self) -> PhaseSettings:
        """The phase's settings."""
        return self.recipe.phases[self.phase]


@dataclass(frozen=True)
class PhaseResult:
    """The outcome of a run of one phase."""

    phase: str
    """Name of the phase."""
    step: int
    """The last step."""
    done: bool
    """False when the run was asked to stop before the phase's last step."""
    resumed_at: int
    """The step of the checkpoint that the run resumed from. 0 for a new phase."""
    loss: float | None
    """The loss of the last step. None when there is none that is finite."""
    started_from: dict[str, Any] = field(default_factory=dict)
    """By part, the origin and sha256 of the weights that the phase started from."""
