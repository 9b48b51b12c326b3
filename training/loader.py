"""From a dataset manifest to batches: shards at any address, shuffled, by shape, exactly resumable.

Work is done ahead by threads: reading, decoding and NumPy let go of the interpreter, and what they make needs no copy
to get to the trainer. A batch is a function of the plan (training.buckets) alone, so their number changes nothing.
"""

import hashlib
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from queue import Full, Queue
from typing import Any, NamedTuple

import numpy as np
import torch

from data_manifests.dataset import DatasetManifest, ShardEntry, load
from data_manifests.samples import brief
from data_manifests.storage import Storage
from tasks.latent_codec import STRIDE_T, latent_frames
from tasks.latents import LatentsSettings
from training.batch import Batch
from training.buckets import LoaderError, NothingToTake, Order, Place, Planned, State, draws, plan, share
from training.clip_latents import ClipLatents
from training.config import Conditions
from training.sample_reader import Arrays, Bucket, SampleReader, sound_of
from training.shard_index import Entry, ShardIndex, read_index

_log = logging.getLogger(__name__)

_FEW = 200  # samples before which a share of bad ones says little


class _Item(NamedTuple):
    """A sample that a batch will have. room: latent frames that it has beyond the batch's."""

    entry: Entry
    room: int


class _Faults:
    """Counts samples that cannot be read, and stops the run when they are too many."""

    def __init__(self, max_bad: float, total: int) -> None:
        self._max_bad, self._total = max_bad, total
        self._lock = threading.Lock()
        self._seen = 0
        self._bad: dict[str, str] = {}  # each once, however many epochs meet it

    def __len__(self) -> int:
        return len(self._bad)

    @property
    def first(self) -> str:
        """The first bad sample, and what is wrong with it; "" where there is none."""
        return next((f"{name}: {what}" for name, what in self._bad.items()), "")

    def good(self) -> None:
        with self._lock:
            self._seen += 1

    def add(self, name: str, what: str) -> None:
        """Raises LoaderError."""
        with self._lock:
            self._seen += 1
            if name not in self._bad:
                _log.warning("passed by %s: %s", name, what)
            self._bad[name] = what
            seen = min(self._total, max(self._seen, _FEW))
            if len(self._bad) > self._max_bad * seen:
                first = "".join(f"\n  {name}: {what}" for name, what in islice(self._bad.items(), 5))
                raise LoaderError(
                    f"{len(self._bad)} samples cannot be read, of {min(self._seen, self._total)} seen; at most "
                    f"{self._max_bad:.2%} may be so (max_bad). The first:{first}\n`understudy verify` checks a dataset"
                )


def tiers_within(tiers: Sequence[str], tier: str) -> tuple[str, ...]:
    """A tier and the narrower ones, whose shards together hold all its samples. tiers: a recipe's, widest first.

    Raises LoaderError for a tier that is not among them.
    """
    if tier not in tiers:
        raise LoaderError(f"there is no tier {tier!r}; the recipe's tiers are {', '.join(tiers)}")
    return tuple(tiers[list(tiers).index(tier) :])


class Loader:
    """One worker's share of each batch, without end: `for batch in loader`.

    address: of the dataset manifest, local or any fsspec address. tiers: whose shards are read; all samples of a tier
        are in its own and those of the narrower ones (`tiers_within`). frames: lengths of the samples, each 4n + 1; a
        clip gives a window of the longest that it has room for. fps: frames a second that clips must have; any when
        None.
    batch: samples of all workers together. rank, ranks: which worker of how many this is; its share of a batch is
        `training.buckets.share`, one sample more or less where the batch does not divide evenly.
    seed: of the order, the windows and the dropping of conditions. conditions: how often each is dropped.
    latents: the stage's settings, for samples whose shards lack latents or have others, and for windows that do not
        begin at a clip's start; without it latents are taken as they are, and windows begin where clips do.
    text_tokens: tokens that a text is cut off at, or filled up to. cache: a folder, local or any address, for what is
        read or made once: indexes of shards, latents. max_bad: share of samples that may be unreadable.
    shuffle: samples that are shuffled among each other. workers: threads. ahead: batches that are made beforehand.

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
        conditions: Conditions | None = None,
        latents: LatentsSettings | None = None,
        text_tokens: int = 64,
        cache: str | None = None,
        max_bad: float = 0.01,
        shuffle: int = 2048,
        workers: int = 2,
        ahead: int = 4,
    ) -> None:
        if not frames or any(count < 1 or count % STRIDE_T != 1 for count in frames):
            raise LoaderError(f"frames: {list(frames)}; a video has 4n + 1 frames, such as 81")
        if not 0 <= rank < ranks <= batch:
            raise LoaderError(f"worker {rank} of {ranks} has no part in a batch of {batch}")
        self._shards = _of_tiers(load(address), tiers, address)
        self._address = address
        self._storage = Storage(address.rpartition("/")[0] or ("/" if address.startswith("/") else "."))
        self._lengths = sorted({latent_frames(count) for count in frames}, reverse=True)
        self._batch, self._rank, self._ranks, self._fps, self._seed = batch, rank, ranks, fps, seed
        self._conditions, self._text_tokens = conditions or Conditions(), text_tokens
        self._cache = Storage(cache) if cache else None
        self._cuts = latents is not None  # a window inside of a clip takes a codec, for its first frame alone
        clip_latents = ClipLatents(latents, self._cache) if latents else None
        sound = sound_of(address, self._cache)
        self._reader = SampleReader(self._storage, self._shards, clip_latents, sound)
        self._order = Order([shard.samples for shard in self._shards], seed, shuffle)
        self._workers, self._ahead = workers, ahead
        self._state = State()
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
        self._planning = _Faults(max_bad, self._order.total)
        self._reading = _Faults(max_bad, self._order.total)
        self._indexes: OrderedDict[int, Future[ShardIndex]] = OrderedDict()
        self.left_out: Counter[str] = Counter()  # samples that can be read and are not asked for, by reason

    @property
    def bad(self) -> int:
        """Samples that could not be read so far, each once: by the plan of all workers, and in this one's batches."""
        return len(self._planning) + len(self._reading)

    @property
    def samples(self) -> int:
        """Of an epoch, as the manifest has it."""
        return self._order.total

    def state_dict(self) -> dict[str, Any]:
        """What has been consumed up to the last batch that was given: plain JSON values, the same on every worker."""
        return {**self._state.encode(), "made_with": self._made_with}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with any number of workers. Raises LoaderError for a state of other data or settings."""
        other = [name for name, value in self._made_with.items() if state["made_with"].get(name) != value]
        if other:
            raise LoaderError(
                f"the loader's state was made with other {' and '.join(other)}; go on with the same, or begin anew"
            )
        self._state = State.decode(state)

    def __iter__(self) -> Generator[Batch, None, None]:
        """From the state on; one iteration at a time. Closing it ends what is done ahead. Raises LoaderError."""
        stop = threading.Event()
        # batches in the making, and last the exception that planning ended in
        ready: Queue[tuple[State, Future[Batch]] | BaseException] = Queue(self._ahead)
        pool = ThreadPoolExecutor(self._workers, "loader")
        planner = threading.Thread(target=self._plan_ahead, args=(ready, pool, stop), name="loader-plan", daemon=True)
        planner.start()
        try:
            while True:
                following = ready.get()
                if isinstance(following, BaseException):
                    raise following
                state, batch = following
                made = batch.result()
                self._state = state
                yield made
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            planner.join()
            self._indexes.clear()

    # ---- planning ----

    def _plan_ahead(self, ready: "Queue[Any]", pool: ThreadPoolExecutor, stop: threading.Event) -> None:
        def put(what: Any) -> None:
            while not stop.is_set():
                try:
                    return ready.put(what, timeout=0.2)
                except Full:
                    continue

        try:
            for planned in plan(self._order, lambda places: self._find(places, pool), self._batch, self._state):
                put((planned.state, pool.submit(self._make, planned)))
                if stop.is_set():
                    return
        except NothingToTake as error:
            reasons = {f"cannot be read, such as {self._planning.first}": len(self._planning), **self.left_out}
            why = "; ".join(f"{count} ({reason})" for reason, count in reasons.items() if count)
            put(LoaderError(f"{error}, of {self.samples} in {self._address}: {why}"))
        except BaseException as error:
            put(error)

    def _find(self, places: list[Place], pool: ThreadPoolExecutor) -> list[tuple[Bucket, _Item] | None]:
        shards = sorted({place.shard for place in places})
        for shard in shards:
            if shard not in self._indexes:
                self._indexes[shard] = pool.submit(read_index, self._storage, self._shards[shard], self._cache)
            self._indexes.move_to_end(shard)
        try:
            indexes = {shard: self._indexes[shard].result() for shard in shards}
        except OSError as error:
            raise LoaderError(f"the shards cannot be read: {error}") from error
        # those of this window and about as many before it are kept
        room = 2 * sum(self._shards[shard].samples for shard in shards)
        while sum(self._shards[shard].samples for shard in self._indexes) > room:
            self._indexes.popitem(last=False)
        return [self._look(place, indexes[place.shard].entries[place.sample]) for place in places]

    def _look(self, place: Place, entry: Entry) -> tuple[Bucket, _Item] | None:
        try:
            if entry.fault:
                raise ValueError(entry.fault)
            (whole, channels, height, width), text_dim = self._reader.shape(entry)
        except ValueError as error:
            self._planning.add(self._name(place, entry), brief(error))
            return None
        self._planning.good()
        if self._fps is not None and entry.fps != self._fps:
            self._leave_out(f"{entry.fps} frames a second, not {self._fps}")
            return None
        length = next((length for length in self._lengths if length <= whole), None)
        if length is None:
            self._leave_out(f"shorter than {STRIDE_T * (self._lengths[-1] - 1) + 1} frames")
            return None
        room = whole - length if self._cuts else 0
        return self._reader.bucket((length, channels, height, width), text_dim, entry), _Item(entry, room)

    def _leave_out(self, reason: str) -> None:
        if not self.left_out[reason]:
            _log.info("samples are left out: %s", reason)
        self.left_out[reason] += 1

    def _name(self, place: Place, entry: Entry) -> str:
        return f"{self._shards[place.shard].name}: {entry.key}"

    # ---- making ----

    def _make(self, planned: Planned[Bucket, _Item]) -> Batch:
        samples = planned.samples[share(self._batch, self._rank, self._ranks)]
        drawn = np.stack([draws(self._seed, place.epoch, item.entry.key, 5) for place, item in samples])
        drop = self._conditions
        dropped = drawn[:, 1:] < [drop.text, drop.audio, drop.first_frame, drop.last_frame]
        batch = _empty(planned.bucket, self._text_tokens, samples, torch.from_numpy(dropped))
        faults: dict[int, str] = {}
        for row, (place, item) in enumerate(samples):
            first = int(drawn[row, 0] * (item.room + 1))
            try:
                arrays = self._reader.read(place.shard, place.sample, item.entry, planned.bucket, first)
                _fill(batch, row, arrays, self._text_tokens)
            # whatever a broken sample makes its reader raise, it is that sample's fault
            except Exception as error:
                faults[row] = brief(error)
        for name, numbers in (("latents", batch.latents), ("text", batch.text), ("sound", batch.audio)):
            # a sum is finite when all that is summed up is
            for row in torch.nonzero(~numbers.flatten(1).sum(1).isfinite()).flatten().tolist():
                faults.setdefault(row, f"its {name} have numbers that are not finite")
        for row, (place, item) in enumerate(samples):
            if row in faults:
                batch.weight[row] = 0.0
                self._reading.add(self._name(place, item.entry), faults[row])
            else:
                self._reading.good()
        _stand_in(batch)
        batch.drop_audio.logical_or_(~batch.audio_usable)
        return batch


def _of_tiers(manifest: DatasetManifest, tiers: Sequence[str], address: str) -> list[ShardEntry]:
    """The shards of some tiers, by name."""
    shards = sorted((s for s in manifest.shards if s.tier in tiers and s.samples), key=lambda shard: shard.name)
    if not shards:
        known = ", ".join(sorted(manifest.tiers)) or "none at all"
        raise LoaderError(f"{address} has no samples of tier {' or '.join(tiers)}; it has {known}")
    if len({shard.name for shard in shards}) < len(shards):
        raise LoaderError(f"{address} lists a shard twice; `understudy verify` names it")
    return shards


def _empty(bucket: Bucket, tokens: int, samples: Sequence[tuple[Place, _Item]], dropped: torch.Tensor) -> Batch:
    """dropped: [batch, 4] bool: text, audio, first and last frame."""
    count = len(samples)

    def no(*shape: int) -> torch.Tensor:
        return torch.zeros(count, *shape, dtype=torch.bool)

    return Batch(
        latents=torch.zeros(count, bucket.channels, bucket.frames, bucket.height, bucket.width),
        audio=torch.zeros(count, *bucket.audio),
        audio_usable=no(),
        text=torch.zeros(count, tokens, bucket.text_dim),
        text_mask=no(tokens),
        speaker_mask=no(bucket.speakers, bucket.frames, bucket.height, bucket.width) if bucket.speakers else None,
        drop_text=dropped[:, 0].clone(),
        drop_audio=dropped[:, 1].clone(),
        drop_first=dropped[:, 2].clone(),
        drop_last=dropped[:, 3].clone(),
        weight=torch.ones(count),
        keys=[item.entry.key for _, item in samples],
        epochs=[place.epoch for place, _ in samples],
        tiers=[item.entry.tier for _, item in samples],
        fps=float(bucket.fps),
    )


def _fill(batch: Batch, row: int, arrays: Arrays, most_tokens: int) -> None:
    batch.latents[row] = torch.from_numpy(arrays.latent).transpose(0, 1)
    tokens = min(len(arrays.text), most_tokens)
    batch.text[row, :tokens] = torch.from_numpy(arrays.text[:tokens])
    batch.text_mask[row, :tokens] = True
    if arrays.audio is not None:
        batch.audio[row] = torch.from_numpy(arrays.audio)
        batch.audio_usable[row] = True
    if batch.speaker_mask is not None and arrays.speaker_mask is not None:
        batch.speaker_mask[row] = torch.from_numpy(arrays.speaker_mask)


def _stand_in(batch: Batch) -> None:
    """Put a sample that could be read in the place of each that could not; zeros where none could."""
    good = torch.nonzero(batch.weight).flatten()
    for row in torch.nonzero(batch.weight == 0).flatten():
        for numbers in (batch.latents, batch.audio, batch.audio_usable, batch.text, batch.text_mask):
            numbers[row] = numbers[good[0]] if len(good) else 0
        if batch.speaker_mask is not None:
            batch.speaker_mask[row] = batch.speaker_mask[good[0]] if len(good) else False
