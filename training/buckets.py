"""Which samples make up which batch: one sequence of batches, the same however many workers share it.

An epoch's order is known from the manifest alone: the shards in an order drawn by seed and epoch, laid end to end and
shuffled within windows of some thousand samples, so that memory stays bounded and neighbours in a batch still come from
several shards. Going through it, every sample joins the bucket of its shape, and a bucket that is full is the next
batch, of the whole run; each worker then takes its share of it. So all workers take the same number of steps, each on
samples of one shape, and what has been consumed is a place in the order together with the samples that wait in buckets
that are not full: nothing in it depends on the number of workers.

What waits at the end of an epoch stays in its bucket and is joined by samples of the next. Nothing is dropped or filled
up: every epoch gives each of its samples once, the last ones a little late.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np


class LoaderError(RuntimeError):
    """The data cannot be read as asked for; the message says what and what to do."""


class NothingToTake(LoaderError):
    """An epoch without a sample that any batch takes."""


class Place(NamedTuple):
    """A sample: the epoch that it is seen in, the number of its shard by name, its number within the shard."""

    epoch: int
    shard: int
    sample: int


@dataclass(frozen=True)
class State:
    """What has been consumed: the epochs before, the first `place` samples of the epoch's order, less what waits.

    pending: samples that were met and have not been in a batch yet, each bucket's in their order. batches: how many
    were made.
    """

    epoch: int = 0
    place: int = 0
    pending: tuple[Place, ...] = ()
    batches: int = 0

    def encode(self) -> dict[str, Any]:
        """As plain JSON values."""
        pending = [list(place) for place in self.pending]
        return {"epoch": self.epoch, "place": self.place, "pending": pending, "batches": self.batches}

    @classmethod
    def decode(cls, values: dict[str, Any]) -> "State":
        pending = tuple(Place(*place) for place in values["pending"])
        return cls(values["epoch"], values["place"], pending, values["batches"])


class Order:
    """In which order an epoch goes through the samples.

    counts: samples of each shard. window: samples that are shuffled among each other.
    """

    def __init__(self, counts: Sequence[int], seed: int, window: int) -> None:
        self.counts = np.array(counts, np.int64)
        self.total = int(self.counts.sum())
        self._seed, self._window = seed, window

    def windows(self, epoch: int, place: int = 0) -> Iterator[list[Place]]:
        """The samples from `place` on, window by window."""
        shards = _shuffled(len(self.counts), self._seed, epoch)
        ends = np.cumsum(self.counts[shards])
        for number in range(place // self._window, -(-self.total // self._window)):
            first = number * self._window
            inside = first + _shuffled(min(self._window, self.total - first), self._seed, epoch, 1 + number)
            inside = inside[max(0, place - first) :]
            which = np.searchsorted(ends, inside, side="right")
            samples = inside - (ends - self.counts[shards])[which]
            yield [Place(epoch, *at) for at in zip(shards[which].tolist(), samples.tolist(), strict=True)]


def _shuffled(count: int, *seed: int) -> np.ndarray:
    """[count] a permutation. By the generator's raw numbers, which NumPy promises never to change (NEP 19)."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count), kind="stable")


def draws(seed: int, epoch: int, key: str, count: int) -> np.ndarray:
    """[count] float64 in 0..1, up to 8, for one sample in one epoch, whoever asks and whatever came before."""
    digest = hashlib.blake2b(f"{seed} {epoch} {key}".encode("utf-8", "surrogatepass"), digest_size=8 * count).digest()
    return np.frombuffer(digest, "<u8") / 2.0**64


def share(batch: int, rank: int, ranks: int) -> slice:
    """Which samples of a batch are a worker's: in order, as even as can be."""
    return slice(batch * rank // ranks, batch * (rank + 1) // ranks)


Bucket = TypeVar("Bucket", bound=Hashable)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Planned(Generic[Bucket, Item]):
    """A batch of the whole run. bucket: its shape. samples: (place, what was found there). state: after it."""

    bucket: Bucket
    samples: list[tuple[Place, Item]]
    state: State


def plan(
    order: Order,
    find: Callable[[list[Place]], list[tuple[Bucket, Item] | None]],
    batch: int,
    state: State,
) -> Iterator[Planned[Bucket, Item]]:
    """The batches from a state on, without end.

    find: for each of some samples its bucket and whatever the batch should carry of it; None for one that no batch
        takes. It must give the same at any time.

    Raises NothingToTake when an epoch has no sample that any batch takes, LoaderError for a state of other data.
    """
    buckets: dict[Bucket, list[tuple[Place, Item]]] = {}
    for place, found in zip(state.pending, find(list(state.pending)), strict=True):
        if found is None:
            raise LoaderError("the state is of other data: a sample that it waits with cannot be used any more")
        buckets.setdefault(found[0], []).append((place, found[1]))
    epoch, at, batches = state.epoch, state.place, state.batches
    while True:
        taken, whole = False, at == 0
        for window in order.windows(epoch, at):
            for place, found in zip(window, find(window), strict=True):
                at += 1
                if found is None:
                    continue
                taken = True
                bucket = buckets.setdefault(found[0], [])
                bucket.append((place, found[1]))
                if len(bucket) == batch:
                    del buckets[found[0]]
                    batches += 1
                    pending = tuple(place for waiting in buckets.values() for place, _ in waiting)
                    yield Planned(found[0], bucket, State(epoch, at, pending, batches))
        if whole and not taken:
            raise NothingToTake("no sample of the dataset can be used")
        epoch, at = epoch + 1, 0
