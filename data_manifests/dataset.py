"""The dataset manifest: which shards a curation made, and a check that they are what the manifest says."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, ValidationError

from data_manifests.lineage import Number, RecipeName
from data_manifests.samples import HashingReader, TarSamples, check_sample, one_line
from data_manifests.seen import FirstSeen
from data_manifests.sources import ManifestError
from data_manifests.storage import Storage
from data_manifests.strict import Strict


class NoDataset(ManifestError):
    """There is no dataset manifest at an address. If one is nearby, the message says where."""


class ShardEntry(Strict):
    """One shard."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*\.tar$")
    """The file's name, relative to the manifest's folder."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the file's bytes."""
    bytes: int = Field(ge=0)
    """Size of the file."""
    samples: int = Field(ge=0)
    """Number of samples."""
    hours: Number = Field(ge=0)
    """Hours of video."""
    tier: str
    partition: int = Field(ge=0)


class TierSummary(Strict):
    """What the shards of one tier add up to."""

    samples: int = Field(ge=0)
    """Number of samples."""
    hours: Number = Field(ge=0)
    """Hours of video."""


class DatasetManifest(Strict):
    """All shards of a dataset.

    It holds no time and nothing about the machine: the same footage and recipe give the same bytes.
    """

    version: Literal[1] = 1
    recipe: RecipeName
    created_from: str
    """The address of the source manifest."""
    tiers: dict[str, TierSummary]
    """Sums over the shards, by tier."""
    shards: list[ShardEntry]
    """Sorted by name."""

    @classmethod
    def of(cls, recipe: RecipeName, created_from: str, shards: Iterable[ShardEntry]) -> "DatasetManifest":
        """A manifest of these shards, which may come in any order."""
        ordered = sorted(shards, key=lambda shard: shard.name)
        return cls(recipe=recipe, created_from=created_from, tiers=_tiers(ordered), shards=ordered)

    def encode(self) -> bytes:
        return (json.dumps(self.model_dump(), sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode("utf-8")

    def write(self, storage: Storage, name: str = "dataset.json") -> None:
        storage.write_bytes(name, self.encode())


def hours_of(seconds: Iterable[float]) -> float:
    """The sum of durations, in hours to the millionth. It does not depend on their order."""
    return round(math.fsum(seconds) / 3600, 6)


def _tiers(shards: list[ShardEntry]) -> dict[str, TierSummary]:
    return {
        tier: TierSummary(
            samples=sum(s.samples for s in shards if s.tier == tier),
            hours=round(math.fsum(s.hours for s in shards if s.tier == tier), 6),
        )
        for tier in sorted({s.tier for s in shards})
    }


def load(address: str) -> DatasetManifest:
    """Read a dataset manifest.

    Raises NoDataset when there is none, ManifestError with one line a fault when it cannot be used.
    """
    return _load(address)[1]


def _load(address: str) -> tuple[Storage, DatasetManifest]:
    folder, _, name = address.rpartition("/")
    try:
        storage = Storage(folder or ("/" if address.startswith("/") else "."))
        data = storage.read_bytes(name)
    except (FileNotFoundError, IsADirectoryError):
        raise NoDataset(_no_dataset(address)) from None
    # each file system behind fsspec raises its own kinds of errors
    except Exception as error:
        raise ManifestError(f"{address}: cannot be read: {error}") from error
    try:
        return storage, DatasetManifest.model_validate_json(data)
    except ValidationError as error:
        lines = (f"{address}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        raise ManifestError("\n".join(lines)) from None


def _no_dataset(address: str) -> str:
    inside = f"{address.rstrip('/')}/dataset.json"
    try:
        folder = Storage(address)
        found, is_folder = folder.exists("dataset.json"), bool(folder.fs.isdir(folder.root))
    except Exception:  # only a better message depends on it
        found = is_folder = False
    if found:
        return f"{address} is a folder; give its dataset manifest: {inside}"
    if is_folder:
        return f"{address} is a folder without a dataset.json; give the dataset.json that `understudy curate` wrote"
    return f"{address}: there is no such dataset manifest"


# ---- verify ----


@dataclass(frozen=True)
class Fault:
    """One fault of a dataset."""

    shard: str
    """The shard's name; empty for a fault of the manifest."""
    key: str
    """The sample's key; empty for a fault of the shard as a whole."""
    what: str
    """What is wrong."""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.shard, self.key, self.what) if part)


@dataclass
class Report:
    """What `verify` has checked, and every fault that it found."""

    shards: int = 0
    """Number of shards."""
    samples: int = 0
    """Number of samples in the shards."""
    hours: float = 0.0
    """Hours of video, as the manifest says."""
    bytes: int = 0
    """Size of the shards' files."""
    faults: list[Fault] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        count = len(self.faults)
        found = f"{count} fault{'s'[: count != 1]}" if count else "all sound"
        return f"{self.shards} shards, {self.samples} samples, {self.hours:.3f} h, {self.bytes / 1e6:.1f} MB: {found}"


def verify(address: str, deep: bool = True) -> Report:
    """Check a dataset against its manifest. Every fault is reported, and no fault stops the check.

    It checks that the shards are there, their sizes, checksums and numbers of samples, that no key occurs twice, and
    that the manifest's sums are right.

    deep: also check each sample's members against its lineage, and each shard's hours against its samples.

    Nothing from a shard is written to disk, unpickled or run, and no link in it is followed.

    Raises NoDataset when there is no manifest. A manifest that cannot be read is a fault.
    """
    report = Report()
    try:
        storage, manifest = _load(address)
    except NoDataset:
        raise
    except ManifestError as error:
        report.faults.append(Fault("", "", str(error)))
        return report
    if manifest.tiers != _tiers(manifest.shards):
        report.faults.append(Fault("", "", "the tiers' samples and hours are not the sum of their shards'"))
    seconds: list[float] = []
    with FirstSeen() as keys, FirstSeen() as names:
        for shard in manifest.shards:
            report.shards += 1
            if names.before(shard.name, "manifest"):
                report.faults.append(Fault(shard.name, "", "stands in the manifest twice"))
                continue
            try:
                for key, what in _check_shard(storage, shard, keys, deep, report):
                    report.faults.append(Fault(shard.name, key, what))
            except FileNotFoundError:
                report.faults.append(Fault(shard.name, "", "is not there"))
            except Exception as error:  # any kind of error, as in _load; the other shards can still be read
                report.faults.append(Fault(shard.name, "", f"cannot be read: {one_line(error)}"))
            seconds.append(shard.hours * 3600)
    report.hours = hours_of(seconds)
    return report


def _check_shard(
    storage: Storage, entry: ShardEntry, keys: FirstSeen, deep: bool, report: Report
) -> Iterator[tuple[str, str]]:
    """Check one shard. Yields a sample's key and what is wrong with it; the key is empty for a fault of the shard."""
    size = storage.size(entry.name)
    report.bytes += size
    if size != entry.bytes:
        yield "", f"has {size:,} bytes, the manifest says {entry.bytes:,}"
    durations: list[float] = []
    samples = 0
    with storage.fs.open(storage.path(entry.name), "rb") as file:
        reader = HashingReader(file)
        tar = TarSamples(reader, size)
        for key, members in tar:
            samples += 1
            yield from (("", what) for what in tar.take_faults())
            if first := keys.before(key, entry.name):
                yield key, f"is already in {first}" if first != entry.name else "is in this shard twice"
            if deep:
                lineage, faults = check_sample(key, members, entry.tier)
                durations += [lineage.clip.duration_s] if lineage else []
                yield from ((key, what) for what in faults)
        yield from (("", what) for what in tar.take_faults())
        reader.drain()
    report.samples += samples
    if reader.sha256.hexdigest() != entry.sha256:
        yield "", "its sha256 is not the manifest's: the bytes have changed"
    if samples != entry.samples:
        yield "", f"has {samples} samples, the manifest says {entry.samples}"
    hours = hours_of(durations)
    if deep and abs(hours - entry.hours) > 1e-6:
        yield "", f"has {hours:.6f} hours, the manifest says {entry.hours:.6f}"
