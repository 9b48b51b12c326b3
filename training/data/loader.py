"""From a dataset manifest to batches: shards at any address, shuffled, grouped by shape, exactly resumable.

How a batch comes to be:

1. Planning, in one thread. `training.data.buckets.plan_batches` goes through the samples in the epoch's order and puts
   each into the bucket of its shape. It needs each sample's shape, which the shard indexes give
   (training.data.shard_index). A full bucket is a planned batch of the whole run.
2. Making, in several threads. Each worker reads its share of the planned batch. A sample with a longer clip gives a
   window of it. Conditions are dropped. The window and the dropping are drawn from the seed, the epoch and the clip id.
3. Handing out, in the plan's order. The state to resume from is the plan's state after the last batch that was handed
   out. Batches made ahead do not count.

A batch follows from its plan alone. So the number of threads, and how far ahead they work, change nothing in it.
Threads serve well here: reading, decoding and NumPy release Python's interpreter lock, and their results reach the
trainer without a copy.
"""

import hashlib
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from queue import Full, Queue
from typing import Any

import numpy as np
import torch

from data_manifests.dataset import DatasetManifest, ShardEntry, load
from data_manifests.samples import one_line
from data_manifests.storage import Storage, local_copy
from tasks.networks.latent_geometry import TEMPORAL_STRIDE, latent_frames, video_frames
from tasks.stages.latents.stage import LatentsSettings
from training.config import ConditionDropout
from training.data.batch import Batch
from training.data.buckets import (
    LoaderError,
    NoUsableSample,
    PlannedBatch,
    PlanState,
    SampleOrder,
    SamplePlace,
    plan_batches,
    uniform_draws,
    worker_share,
)
from training.data.clip_latents import ClipLatents
from training.data.collate import BatchSample, empty_batch, fill_row, not_finite_rows, replace_unreadable
from training.data.sample_reader import Bucket, SampleReader, sound_features_of
from training.data.shard_index import Entry, ShardIndex, read_index, shards_by_name, shards_storage

_log = logging.getLogger(__name__)

_MIN_SEEN = 200  # samples; the share of unreadable samples among fewer is not judged


class _UnreadableSamples:
    """Counts samples that cannot be read, and stops the run when their share is too large.

    max_share: of the samples seen. total: samples of an epoch.
    """

    def __init__(self, max_share: float, total: int) -> None:
        self._max_share, self._total = max_share, total
        self._lock = threading.Lock()
        self._seen = 0
        self._faults: dict[str, str] = {}  # by sample; a sample counts once, however many epochs meet it

    def __len__(self) -> int:
        return len(self._faults)

    @property
    def first(self) -> str:
        """The first unreadable sample and its fault. "" if there is none."""
        return next((f"{name}: {fault}" for name, fault in self._faults.items()), "")

    def add_readable(self) -> None:
        with self._lock:
            self._seen += 1

    def add(self, name: str, fault: str) -> None:
        """Count an unreadable sample. Raises LoaderError when there are too many."""
        with self._lock:
            self._seen += 1
            if name not in self._faults:
                _log.warning("skipped %s: %s", name, fault)
            self._faults[name] = fault
            seen = min(self._total, max(self._seen, _MIN_SEEN))
            if len(self._faults) > self._max_share * seen:
                first = "".join(f"\n  {name}: {fault}" for name, fault in islice(self._faults.items(), 5))
                raise LoaderError(
                    f"{len(self._faults)} samples cannot be read, of {min(self._seen, self._total)} seen; max_bad "
                    f"allows {self._max_share:.2%}. The first:{first}\n`understudy verify` checks a dataset"
                )


def tiers_within(tiers: Sequence[str], tier: str) -> tuple[str, ...]:
    """A tier and the narrower tiers, whose shards together hold all samples of the tier.

    tiers: a recipe's, widest first. Raises LoaderError for a tier that is not among them.
    """
    if tier not in tiers:
        raise LoaderError(f"there is no tier {tier!r}; the recipe's tiers are {', '.join(tiers)}")
    return tuple(tiers[list(tiers).index(tier) :])


class Loader:
    """One worker's share of each batch, without end: `for batch in loader`.

    What is read:
        address: the dataset manifest's, local or any fsspec address.
        tiers: the tiers whose shards are read. A tier's samples are in its own shards and in those of the narrower
            tiers (`tiers_within`).
        frames: allowed video frames of a sample, each 4n + 1. A clip gives a window of the longest that fits into it.
        fps: frames a second that a clip must have. None: any.
        latents: settings of the stage `latents`. They are used for samples whose shards have no latents or others, and
            for windows that do not begin at a clip's start. None: latents are taken from the shards as they are, and
            every window begins at its clip's start.
        text_tokens: tokens of each text. Longer texts are cut off, shorter ones are padded.
        cache: a folder, local or any address, for shard indexes and for latents made here.
        max_bad: share of samples that may be unreadable.
        denied: clip ids that are left out (`read_denylist`). They may differ from those of the run that is resumed.

    Batches and workers:
        batch: samples of all workers together.
        rank, ranks: this worker's number, and the number of workers. A worker's share is
            `training.data.buckets.worker_share`. Shares differ by one sample where the batch does not divide evenly.

    Randomness:
        seed: of the order, the windows and the dropping of conditions.
        conditions: how often each condition is dropped.
        shuffle: how many neighbouring samples are shuffled together.

    Speed, without effect on the batches:
        workers: threads.
        ahead: batches that are made ahead.

    Raises ManifestError for a manifest that cannot be read, LoaderError for what it does not have, MissingBackend.
    """

    def __init__(
        self,
        address: str,
        *,
        tiers: Sequence[str],
        frames: Sequence[int],
        batch: int,
        rank: int = 0,
        ranks: int = 1,
        fps: int | None = None,
        seed: int = 0,
        conditions: ConditionDropout | None = None,
        latents: LatentsSettings | None = None,
        text_tokens: int = 64,
        cache: str | None = None,
        max_bad: float = 0.01,
        denied: Collection[str] = (),
        shuffle: int = 2048,
        workers: int = 2,
        ahead: int = 4,
    ) -> None:
        if not frames or any(count < 1 or count % TEMPORAL_STRIDE != 1 for count in frames):
            raise LoaderError(f"frames: {list(frames)}; a video has 4n + 1 frames, such as 81")
        if not 0 <= rank < ranks <= batch:
            raise LoaderError(f"worker {rank} of {ranks} has no part in a batch of {batch}")
        self._shards = _of_tiers(load(address), tiers, address)
        self._address, self._storage = address, shards_storage(address)
        self._lengths = sorted({latent_frames(count) for count in frames}, reverse=True)
        self._batch, self._rank, self._ranks, self._fps, self._seed = batch, rank, ranks, fps, seed
        self._conditions, self._text_tokens = conditions or ConditionDropout(), text_tokens
        self._cache = Storage(cache) if cache else None
        self._cuts_windows = latents is not None  # the first latent of a window inside of a clip is made by the codec
        clip_latents = ClipLatents(latents, self._cache) if latents else None
        sound = sound_features_of(address, self._cache)
        self._reader = SampleReader(self._storage, self._shards, clip_latents, sound)
        self._order = SampleOrder([shard.samples for shard in self._shards], seed, shuffle)
        self._denied = frozenset(denied)
        self._workers, self._ahead = workers, ahead
        self._state = PlanState()
        checksums = hashlib.sha256(" ".join(shard.sha256 for shard in self._shards).encode()).hexdigest()[:12]
        self._made_with = {
            "shards": checksums,
            "frames": sorted(frames),
            "fps": fps,
            "batch": batch,
            "seed": seed,
            "latents": latents.model_dump(mode="json") if latents else None,
            "shuffle": shuffle,
        }
        self._unreadable_in_plan = _UnreadableSamples(max_bad, self._order.total)
        self._unreadable_in_share = _UnreadableSamples(max_bad, self._order.total)
        self._indexes: OrderedDict[int, Future[ShardIndex]] = OrderedDict()
        self.left_out: Counter[str] = Counter()  # readable samples that the settings exclude, by reason

    @property
    def bad(self) -> int:
        """Samples that could not be read so far, each once: in the plan of all workers, and in this worker's share."""
        return len(self._unreadable_in_plan) + len(self._unreadable_in_share)

    @property
    def samples(self) -> int:
        """Samples of an epoch, according to the manifest."""
        return self._order.total

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch that was handed out: plain JSON values, the same on every worker."""
        return {**self._state.encode(), "made_with": self._made_with}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state, with any number of workers. Raises LoaderError for a state of other data or settings."""
        other = [name for name, value in self._made_with.items() if state["made_with"].get(name) != value]
        if other:
            raise LoaderError(
                f"the loader's state was made with other {' and '.join(other)}; go on with the same, or begin anew"
            )
        self._state = PlanState.decode(state)

    def __iter__(self) -> Generator[Batch, None, None]:
        """Batches from the state on. Only one iteration may run at a time. Closing it ends its threads.

        Raises LoaderError.
        """
        stop = threading.Event()
        # batches in the making with the state after each; an exception that ended the planning comes last
        ready: Queue[tuple[PlanState, Future[Batch]] | BaseException] = Queue(self._ahead)
        pool = ThreadPoolExecutor(self._workers, "loader")
        planner = threading.Thread(target=self._plan_ahead, args=(ready, pool, stop), name="loader-plan", daemon=True)
        planner.start()
        try:
            while True:
                following = ready.get()
                if isinstance(following, BaseException):
                    raise following
                state, future = following
                batch = future.result()
                self._state = state
                yield batch
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            planner.join()
            self._indexes.clear()

    # ---- planning ----

    def _plan_ahead(self, ready: "Queue[Any]", pool: ThreadPoolExecutor, stop: threading.Event) -> None:
        """Plan batches and start making them. It waits while `ready` is full, and ends when `stop` is set."""

        def put(what: Any) -> None:
            while not stop.is_set():
                try:
                    return ready.put(what, timeout=0.2)
                except Full:
                    continue

        def find_buckets(places: list[SamplePlace]) -> list[tuple[Bucket, BatchSample] | None]:
            return self._find_buckets(places, pool)

        try:
            state = self._without_denied(self._state, pool)
            for planned in plan_batches(self._order, find_buckets, self._batch, state):
                put((planned.state, pool.submit(self._make_batch, planned)))
                if stop.is_set():
                    return
        except NoUsableSample as error:
            unreadable = self._unreadable_in_plan
            reasons = {f"cannot be read, such as {unreadable.first}": len(unreadable), **self.left_out}
            why = "; ".join(f"{count} ({reason})" for reason, count in reasons.items() if count)
            put(LoaderError(f"{error}, of {self.samples} in {self._address}: {why}"))
        except BaseException as error:
            put(error)

    def _without_denied(self, state: PlanState, pool: ThreadPoolExecutor) -> PlanState:
        """A state without the waiting samples that the denylist names. They may have been added to it since."""
        if not self._denied or not state.pending:
            return state
        entries = self._entries(list(state.pending), pool)
        kept = [place for place, entry in zip(state.pending, entries, strict=True) if entry.key not in self._denied]
        return replace(state, pending=tuple(kept))

    def _find_buckets(
        self, places: list[SamplePlace], pool: ThreadPoolExecutor
    ) -> list[tuple[Bucket, BatchSample] | None]:
        entries = self._entries(places, pool)
        return [self._bucket_of(place, entry) for place, entry in zip(places, entries, strict=True)]

    def _entries(self, places: list[SamplePlace], pool: ThreadPoolExecutor) -> list[Entry]:
        """What the shard indexes say of samples. Raises LoaderError when the shards cannot be read."""
        shards = sorted({place.shard for place in places})
        for shard in shards:
            if shard not in self._indexes:
                self._indexes[shard] = pool.submit(read_index, self._storage, self._shards[shard], self._cache)
            self._indexes.move_to_end(shard)
        try:
            indexes = {shard: self._indexes[shard].result() for shard in shards}
        except OSError as error:
            raise LoaderError(f"the shards cannot be read: {error}") from error
        # memory holds the indexes of this window's shards, and about as many samples' of earlier ones
        max_samples = 2 * sum(self._shards[shard].samples for shard in shards)
        while sum(self._shards[shard].samples for shard in self._indexes) > max_samples:
            self._indexes.popitem(last=False)
        return [indexes[place.shard].entries[place.sample] for place in places]

    def _bucket_of(self, place: SamplePlace, entry: Entry) -> tuple[Bucket, BatchSample] | None:
        if entry.key in self._denied:
            self._leave_out("named in the denylist")
            return None
        try:
            if entry.fault:
                raise ValueError(entry.fault)
            (whole, channels, height, width), text_dim = self._reader.shape(entry)
        except ValueError as error:
            self._unreadable_in_plan.add(self._name(place, entry), one_line(error))
            return None
        self._unreadable_in_plan.add_readable()
        if self._fps is not None and entry.fps != self._fps:
            self._leave_out(f"{entry.fps} frames a second, not {self._fps}")
            return None
        length = next((length for length in self._lengths if length <= whole), None)
        if length is None:
            self._leave_out(f"shorter than {video_frames(self._lengths[-1])} frames")
            return None
        spare = whole - length if self._cuts_windows else 0
        return self._reader.bucket((length, channels, height, width), text_dim, entry), BatchSample(entry, spare)

    def _leave_out(self, reason: str) -> None:
        if not self.left_out[reason]:
            _log.info("samples are left out: %s", reason)
        self.left_out[reason] += 1

    def _name(self, place: SamplePlace, entry: Entry) -> str:
        return f"{self._shards[place.shard].name}: {entry.key}"

    # ---- making ----

    def _make_batch(self, planned: PlannedBatch[Bucket, BatchSample]) -> Batch:
        """This worker's share of a planned batch."""
        samples = planned.samples[worker_share(self._batch, self._rank, self._ranks)]
        draws = np.stack([uniform_draws(self._seed, place.epoch, sample.entry.key, 5) for place, sample in samples])
        dropout = self._conditions
        dropped = draws[:, 1:] < [dropout.text, dropout.audio, dropout.first_frame, dropout.last_frame]
        batch = empty_batch(planned.bucket, self._text_tokens, samples, torch.from_numpy(dropped))
        faults: dict[int, str] = {}
        for row, (place, sample) in enumerate(samples):
            first = int(draws[row, 0] * (sample.spare + 1))
            try:
                arrays = self._reader.read(place.shard, place.sample, sample.entry, planned.bucket, first)
                fill_row(batch, row, arrays, self._text_tokens)
            # a damaged sample may make its reader raise anything; it is that sample's fault
            except Exception as error:
                faults[row] = one_line(error)
        for row, fault in not_finite_rows(batch).items():
            faults.setdefault(row, fault)
        for row, (place, sample) in enumerate(samples):
            if row in faults:
                batch.weight[row] = 0.0
                self._unreadable_in_share.add(self._name(place, sample.entry), faults[row])
            else:
                self._unreadable_in_share.add_readable()
        replace_unreadable(batch)
        batch.drop_audio.logical_or_(~batch.audio_usable)
        return batch


def read_denylist(address: str) -> frozenset[str]:
    """The clip ids in a text file at any address: one a line, `#` before a comment. Raises LoaderError."""
    try:
        with local_copy(address) as path:
            lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LoaderError(f"the denylist {address} cannot be read: {one_line(error)}") from error
    return frozenset(key for line in lines if (key := line.partition("#")[0].strip()))


def _of_tiers(manifest: DatasetManifest, tiers: Sequence[str], address: str) -> list[ShardEntry]:
    """The shards of some tiers that have samples, sorted by name. Raises LoaderError."""
    shards = [shard for shard in shards_by_name(manifest, tiers) if shard.samples]
    if not shards:
        known = ", ".join(sorted(manifest.tiers)) or "none at all"
        raise LoaderError(f"{address} has no samples of tier {' or '.join(tiers)}; it has {known}")
    if len({shard.name for shard in shards}) < len(shards):
        raise LoaderError(f"{address} lists a shard twice; `understudy verify` names it")
    return shards
