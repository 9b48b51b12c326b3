"""Batches that are left out because their loss or their gradient is not finite."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from training.loop.parallel import WorkerGroup

WINDOW = 200  # batches over which their share is judged


class MicroBatchLosses(NamedTuple):
    """What a micro-batch came to."""

    keys: Sequence[str]
    """Clip ids."""
    losses: Tensor
    """[batch], each multiplied by the sample's weight, without gradient."""
    weights: Tensor
    """[batch], the samples' weights."""
    sigmas: Tensor
    """[batch], noise levels."""
    work: tuple[int, float]
    """Tokens, and FLOPs of the forward pass."""


class SkippedBatches:
    """Counts them, and tells when there are too many. max_share: of the last 200 batches."""

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self.total = 0
        """How many batches were skipped since the phase began."""
        self._latest: list[int] = []  # their numbers, of those within the window

    def add(self, step: int) -> bool:
        """Count a batch. step: steps that were taken before it. Returns whether there are too many."""
        batch = step + self.total
        self.total += 1
        self._latest = [number for number in self._latest if number > batch - WINDOW] + [batch]
        return len(self._latest) > self._max_share * WINDOW

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"total": self.total, "latest": self._latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self._latest = int(state["total"]), list(state["latest"])


def not_finite_samples(micro_batches: Sequence[MicroBatchLosses], group: WorkerGroup) -> tuple[list[str], str]:
    """The samples of a batch that is not finite, and what is not finite about it. Every worker calls it.

    They are the samples whose loss is not finite. Where all losses are finite, they are all samples of the batch.
    """
    not_finite = [
        key
        for of in micro_batches
        for key, loss in zip(of.keys, of.losses.tolist(), strict=True)
        if not math.isfinite(loss)
    ]
    samples = sorted({key for keys in group.gather(not_finite) for key in keys})
    if samples:
        return samples, f"the loss of {_listed(samples)} is not finite"
    everyone = group.gather([key for of in micro_batches for key in of.keys])
    samples = sorted({key for keys in everyone for key in keys})
    return samples, f"the gradient is not finite, over {_listed(samples)}"


def _listed(keys: Sequence[str], max_shown: int = 20) -> str:
    more = f" and {len(keys) - max_shown} more" if len(keys) > max_shown else ""
    return ", ".join(keys[:max_shown]) + more
