"""What is trained, as the loop and those that start it speak of it: a job, a family of models, its data."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from training.config import Phase, TrainingRecipe
from training.parallel import Team
from training.tracking import Trackers


class TrainingError(RuntimeError):
    """A training that cannot go on: a loss that is not finite, or an output that is of another training.

    Every worker raises it at the same step; starting again would end the same way.
    """


class Losses(NamedTuple):
    """What a model makes of a batch. values: [batch] float32, each sample's loss, whatever its weight. sigmas: [batch],
    its noise level."""

    values: Tensor
    sigmas: Tensor


class Loader(Protocol):
    """A worker's share of the data."""

    def __iter__(self) -> Iterator[Any]:
        """This worker's parts of the global batches from the state on, without end, each a training.batch.Batch. Over
        all workers a step's parts are the recipe's `batch` samples, whatever the number of workers."""

    def state_dict(self) -> dict[str, Any]:
        """Where the training is in its data after the steps taken; the same on every worker."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class Learner(Protocol):
    """A family of models as the loop sees it: what is trained, on what, towards what."""

    dataset: str  # the sha256 of the dataset manifest

    def model(self, latent_scale: tuple[float, ...] | None = None) -> nn.Module:
        """The model on the CPU with new weights, the same on every worker; every worker calls it.

        latent_scale: what latents are divided by for the weights that it will be given, () for 1. None where it keeps
        its new weights; then what suits the data.
        """

    def part_of(self, name: str) -> str:
        """The part of the model that a parameter belongs to: video, text or audio."""

    def counterpart(self, name: str, part: str) -> str | None:
        """The parameter's equal in another part."""

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        """The repeated modules, which are compiled."""

    def units(self, model: Any) -> Sequence[nn.Module]:
        """The modules that FSDP gathers at once, from the inside out (training.parallel.spread)."""

    def in_float32(self, model: Any) -> Sequence[nn.Module]:
        """The modules whose weights are never rounded to bfloat16."""

    def recompute(self, model: Any) -> None:
        """Let the model compute its activations again in the backward pass."""

    def loader(self) -> Loader:
        """This worker's share of the phase's data."""

    def losses(self, model: Any, batch: Any) -> Losses:
        """Run the model on a micro-batch. A sample's loss depends on nothing but the weights, the sample, its epoch,
        the phase and the seed."""

    def work(self, batch: Any) -> tuple[int, float]:
        """Tokens in a batch, and floating point operations of its forward pass."""

    def about(self, model: Any) -> dict[str, Any]:
        """What has to be known to build the model again, kept beside its weights: its "shape", and in that its
        "latent_scale" where there can be one."""

    def sample(self, model: Any, step: int, folder: Path, trackers: Trackers | None) -> dict[str, float]:
        """Sample videos into `folder` and show them where there are trackers; gives what was measured on them."""


@dataclass(frozen=True)
class Job:
    """A phase to be trained.

    manifest: the dataset manifest's address. out: a folder that all workers share, or any fsspec address. learner:
    makes the family of models; it has to travel to other processes, as the probe has to, which tells how well a sampled
    mouth follows a sound (training.previews.Probe).
    """

    recipe: TrainingRecipe
    phase: str
    manifest: str
    out: Path | str
    learner: Callable[["Job", Team], Learner]
    probe: Callable[..., float | None] | None = None

    @property
    def folder(self) -> str:
        """The address of all that the phase leaves."""
        return f"{self.out}/{self.phase}"

    @property
    def settings(self) -> Phase:
        return self.recipe.phases[self.phase]


@dataclass(frozen=True)
class Outcome:
    """What came of a phase. done: False when it was asked to end early. step: the last one. resumed_at: the step that
    this run went on from. started_from: by part, the origin and sha256 of the weights it began with."""

    phase: str
    step: int
    done: bool
    resumed_at: int
    loss: float | None
    started_from: dict[str, Any] = field(default_factory=dict)
