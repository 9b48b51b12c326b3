"""The plan of a training's batches: which samples form which batch.

There is one sequence of batches for the whole run, whatever the number of workers.

1. Order. The order of an epoch follows from the manifest, the seed and the epoch. The shards are put in random order
   and laid end to end. Then samples are shuffled within windows of some thousand samples. So memory stays bounded, and
   the samples of a batch still come from several shards.
2. Buckets. The plan goes through the samples in that order. Each sample joins the bucket of its shape. A full bucket is
   the next batch, and each worker takes its share of it. So all workers take the same number of steps, each on samples
   of one shape.
3. Resuming. The state of the plan is the position in the order and the samples that wait in buckets. It does not depend
   on the number of workers.

Samples that wait at the end of an epoch stay in their bucket, and samples of the next epoch join them. So no sample is
dropped or repeated to fill a batch. Every epoch gives each of its samples once, the last ones a little late.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np


class LoaderError(RuntimeError):
    """The data cannot be read as the recipe asks; the message says what is wrong and what to do."""


class NoUsableSample(LoaderError):
    """No sample of an epoch can be part of a batch."""


class SamplePlace(NamedTuple):
    """A sample in one epoch."""

    epoch: int
    shard: int
    """Number of the sample's shard, when shards are sorted by name."""
    sample: int
    """Number of the sample within its shard."""


@dataclass(frozen=True)
class PlanState:
    """The point that a plan has reached. The consumed samples are those before `position`, except the pending ones."""

    epoch: int = 0
    """The current epoch. All earlier epochs are consumed, except for pending samples."""
    position: int = 0
    """Samples of the current epoch's order that the plan has passed."""
    pending: tuple[SamplePlace, ...] = ()
    """Samples that the plan has passed and that wait in a bucket, each bucket's in their order."""
    batches: int = 0
    """Batches made so far."""

    def encode(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        pending = [list(place) for place in self.pending]
        return {"epoch": self.epoch, "place": self.position, "pending": pending, "batches": self.batches}

    @classmethod
    def decode(cls, values: dict[str, Any]) -> "PlanState":
        pending = tuple(SamplePlace(*place) for place in values["pending"])
        return cls(values["epoch"], values["place"], pending, values["batches"])


class SampleOrder:
    """The order in which an epoch goes through the samples.

    counts: samples of each shard. window: how many neighbouring samples are shuffled together.
    """

    def __init__(self, counts: Sequence[int], seed: int, window: int) -> None:
        self.counts = np.array(counts, np.int64)
        self.total = int(self.counts.sum())
        self._seed, self._window = seed, window

    def windows(self, epoch: int, position: int = 0) -> Iterator[list[SamplePlace]]:
        """The samples of an epoch from `position` on, window by window."""
        shards = _permutation(len(self.counts), self._seed, epoch)
        ends = np.cumsum(self.counts[shards])
        for number in range(position // self._window, -(-self.total // self._window)):
            first = number * self._window
            inside = first + _permutation(min(self._window, self.total - first), self._seed, epoch, 1 + number)
            inside = inside[max(0, position - first) :]
            which = np.searchsorted(ends, inside, side="right")
            samples = inside - (ends - self.counts[shards])[which]
            yield [SamplePlace(epoch, *at) for at in zip(shards[which].tolist(), samples.tolist(), strict=True)]


def _permutation(count: int, *seed: int) -> np.ndarray:
    """A permutation, [count]. It uses the generator's raw numbers, which NumPy promises never to change (NEP 19)."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count), kind="stable")


def uniform_draws(seed: int, epoch: int, key: str, count: int) -> np.ndarray:
    """Random numbers of one sample in one epoch: [count] float64 in 0..1, at most 8.

    They depend on the arguments alone, not on earlier draws.
    """
    digest = hashlib.blake2b(f"{seed} {epoch} {key}".encode("utf-8", "surrogatepass"), digest_size=8 * count).digest()
    return np.frombuffer(digest, "<u8") / 2.0**64


def worker_share(batch: int, rank: int, ranks: int) -> slice:
    """The samples of a batch that one worker takes. Workers' shares are in order and differ by at most one sample."""
    return slice(batch * rank // ranks, batch * (rank + 1) // ranks)


BucketT = TypeVar("BucketT", bound=Hashable)
ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class PlannedBatch(Generic[BucketT, ItemT]):
    """A batch of the whole run."""

    bucket: BucketT
    """The shape of its samples."""
    samples: list[tuple[SamplePlace, ItemT]]
    """Each sample's place, and the item that was found for it."""
    state: PlanState
    """The plan's state after this batch."""


def plan_batches(
    order: SampleOrder,
    find_buckets: Callable[[list[SamplePlace]], list[tuple[BucketT, ItemT] | None]],
    batch_size: int,
    state: PlanState,
) -> Iterator[PlannedBatch[BucketT, ItemT]]:
    """The batches that follow a state, without end.

    find_buckets: gives each of some samples its bucket, and an item that the batch carries for it. None for a sample
        that no batch takes. It must always give the same answer for the same sample.

    Raises NoUsableSample when no sample of an epoch can be part of a batch, LoaderError for a state of other data.
    """
    buckets: dict[BucketT, list[tuple[SamplePlace, ItemT]]] = {}
    for place, found in zip(state.pending, find_buckets(list(state.pending)), strict=True):
        if found is None:
            raise LoaderError("the loader's state is of other data: a sample that waits for its batch is now unusable")
        buckets.setdefault(found[0], []).append((place, found[1]))
    epoch, position, batches = state.epoch, state.position, state.batches
    while True:
        any_usable, from_start = False, position == 0
        for window in order.windows(epoch, position):
            for place, found in zip(window, find_buckets(window), strict=True):
                position += 1
                if found is None:
                    continue
                any_usable = True
                bucket = buckets.setdefault(found[0], [])
                bucket.append((place, found[1]))
                if len(bucket) == batch_size:
                    del buckets[found[0]]
                    batches += 1
                    pending = tuple(place for waiting in buckets.values() for place, _ in waiting)
                    yield PlannedBatch(found[0], bucket, PlanState(epoch, position, pending, batches))
        if from_start and not any_usable:
            raise NoUsableSample("no sample of the dataset can be used")
        epoch, position = epoch + 1, 0
