"""Shards: kept clips with their audio, features and lineage, as WebDataset tars. A shard is complete or not there."""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import Field, ValidationError

from data_manifests.dataset import ShardEntry, hours_of
from data_manifests.lineage import (
    AudioUse,
    ClipFacts,
    Lineage,
    RecipeName,
    RuleResult,
    Score,
    SourceRange,
    plain,
)
from data_manifests.storage import Storage
from data_manifests.strict import Strict
from tasks.media.clip import ClipRecord

VERSION = 1  # raised whenever the same samples would give other bytes

# WebDataset turns extensions to lower case and ends keys at the first dot. A plain tar holds names of 100 characters.
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,43}")
_NAME_RULE = "a name has at most 44 lower case letters, digits, - and _, and begins with a letter or digit"
_RECORD = tarfile.RECORDSIZE


class ShardSettings(Strict):
    """How samples are packed. A change makes new shards of the same samples."""

    partitions: int = Field(default=16, ge=1, le=65_536)
    """Parts of the corpus. Each is worked through, and sharded, on its own."""
    max_samples: int = Field(default=1000, ge=1)
    """The largest number of samples in a shard."""
    max_mb: float = Field(default=1000, gt=0)
    """The largest size of a shard, in megabytes (10^6 bytes). A sample that is larger gets a shard of its own."""


@dataclass(frozen=True)
class Sample:
    """A clip on its way into a shard."""

    key: str
    """The clip_id."""
    files: tuple[tuple[str, str], ...]
    """(extension, name in the run's storage) of each file, in the order of the tar."""
    lineage: bytes
    """The encoded lineage, the sample's `json` member."""
    size: int
    """Bytes of all files together."""
    duration_s: float

    @classmethod
    def of(cls, clip: ClipRecord, lineage: Lineage, files: Mapping[str, str], size: int) -> "Sample":
        """The sample of a clip.

        files: names of the features in the storage, by extension, such as "pose.npy" or "guidance.json".
        size: bytes of video, audio and features.

        Raises ValueError when a name cannot be used in a shard.
        """
        for name in (clip.clip_id, *(extension.rpartition(".")[0] for extension in files)):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a sample or a feature: {_NAME_RULE}")
        members = [("mp4", clip.video)] + ([("flac", clip.audio)] if clip.audio else [])
        members += [(extension, files[extension]) for extension in sorted(files)]
        return cls(clip.clip_id, tuple(members), lineage.encode(), size, clip.duration_s)

    @property
    def bound(self) -> int:
        """The most bytes that the sample can take in a tar. Each member has a header and a partly filled last block."""
        return self.size + len(self.lineage) + (len(self.files) + 1) * (2 * tarfile.BLOCKSIZE - 1)


@dataclass(frozen=True)
class ShardPlan:
    """A shard that is to be written."""

    name: str
    """It has a digest of the contents: a file of this name is this shard."""
    tier: str
    partition: int
    samples: tuple[Sample, ...]
    """Sorted by key."""


def lineage(
    clip: ClipRecord,
    *,
    uri: str,
    sha256: str,
    audio_usable: bool,
    audio_reason: str,
    scores: Mapping[str, Mapping[str, Any]],
    rules: Mapping[str, Mapping[str, Any]],
    tier: str,
    recipe_name: str,
    recipe_hash: str,
    unaligned: Iterable[str] = (),
) -> Lineage:
    """A sample's lineage, from plain values. NaN and infinity become None.

    uri, sha256: of the source.
    scores: by stage, each with backend, version, fingerprint and values.
    rules: by name, each with score, value and passed, and those of min, max and one_of that the rule has.
    unaligned: names of arrays that do not have one entry a frame.

    Raises ValueError with the clip's id when a value is missing or wrong.
    """
    try:
        return Lineage(
            clip_id=clip.clip_id,
            source=SourceRange(
                uri=uri, source_id=clip.source_id, sha256=sha256, start_s=clip.start_s, end_s=clip.end_s
            ),
            clip=ClipFacts(
                fps=clip.fps,
                frames=clip.frames,
                width=clip.width,
                height=clip.height,
                duration_s=clip.duration_s,
                has_audio=bool(clip.audio),
            ),
            audio=AudioUse(usable=audio_usable, reason=audio_reason),
            metadata=dict(clip.metadata),
            scores={stage: Score.model_validate(plain(dict(score))) for stage, score in scores.items()},
            rules={name: RuleResult.model_validate(plain(dict(rule))) for name, rule in rules.items()},
            tier=tier,
            recipe=RecipeName(name=recipe_name, hash=recipe_hash),
            unaligned=sorted(unaligned),
        )
    except ValidationError as error:
        raise ValueError(f"{clip.clip_id}: its lineage has missing or wrong values: {error}") from None


def plan_shards(samples: Iterable[Sample], settings: ShardSettings, partition: int, tier: str) -> list[ShardPlan]:
    """Distribute the samples of one partition and tier to shards, in order. Each shard is filled as far as it may be.

    samples: sorted by key. Raises ValueError when they are not sorted, or one occurs twice.
    """
    if not _NAME.fullmatch(tier):
        raise ValueError(f"{tier!r} cannot name a tier: {_NAME_RULE}")
    return [
        ShardPlan(f"shards/{tier}-{partition:05d}-{number:06d}-{_digest(group)}.tar", tier, partition, tuple(group))
        for number, group in enumerate(_groups(samples, settings))
    ]


def _groups(samples: Iterable[Sample], settings: ShardSettings) -> Iterator[list[Sample]]:
    # a tar ends with two empty blocks and is padded to a whole record
    room = settings.max_mb * 1e6 - 2 * tarfile.BLOCKSIZE - (_RECORD - 1)
    group: list[Sample] = []
    taken, last = 0, ""
    for sample in samples:
        if sample.key <= last:
            raise ValueError(f"samples must be sorted by key, each once: {sample.key!r} comes after {last!r}")
        if group and (len(group) == settings.max_samples or taken + sample.bound > room):
            yield group
            group, taken = [], 0
        group.append(sample)
        taken, last = taken + sample.bound, sample.key
    if group:
        yield group


def _digest(samples: list[Sample]) -> str:
    """12 hex digits over all that goes in: the files' names, which stand for their contents; sizes; and lineage."""
    digest = hashlib.sha256(f"shard {VERSION}".encode())
    for sample in samples:
        for part in (sample.key, *(text for file in sample.files for text in file), str(sample.size)):
            digest.update(part.encode() + b"\0")
        digest.update(hashlib.sha256(sample.lineage).digest())
    return digest.hexdigest()[:12]


def read_entry(plan: ShardPlan, storage: Storage) -> ShardEntry | None:
    """The entry of a shard that has been written completely. None when the shard must still be written.

    The entry is kept beside the shard (`.json` for `.tar`) and is written after it. A shard without an entry was left
    by a run that was killed between the two. No dataset manifest lists it yet, so it is written again.
    """
    try:
        entry = ShardEntry.model_validate_json(storage.read_bytes(_entry_name(plan)))
        return entry if entry.name == plan.name and storage.size(plan.name) == entry.bytes else None
    except (FileNotFoundError, ValidationError):
        return None


def write_shard(plan: ShardPlan, storage: Storage) -> ShardEntry:
    """Write a shard, unless it has been written already. Returns its entry.

    Raises FileNotFoundError when a sample's file is missing, ValueError when a sample is larger than planned.
    """
    existing = read_entry(plan, storage)
    if existing is not None:
        return existing
    written: list[_HashingWriter] = []
    storage.write(plan.name, lambda path: written.append(_write_tar(path, plan, storage)))
    entry = ShardEntry(
        name=plan.name,
        sha256=written[0].sha256.hexdigest(),
        bytes=written[0].size,
        samples=len(plan.samples),
        hours=hours_of(sample.duration_s for sample in plan.samples),
        tier=plan.tier,
        partition=plan.partition,
    )
    storage.write_bytes(_entry_name(plan), entry.model_dump_json().encode())
    return entry


def _entry_name(plan: ShardPlan) -> str:
    return plan.name.removesuffix(".tar") + ".json"


class _HashingWriter:
    """Writes to a file, and keeps the size and checksum of what has been written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.sha256.update(data)
        return self._file.write(data)


def _write_tar(path: Path, plan: ShardPlan, storage: Storage) -> _HashingWriter:
    with path.open("wb") as file:
        writer = _HashingWriter(file)
        # "w|" writes a stream: it never seeks back, so the checksum is that of the file
        with tarfile.open(fileobj=writer, mode="w|", format=tarfile.USTAR_FORMAT, bufsize=1 << 20) as tar:  # type: ignore[call-overload]
            for sample in plan.samples:
                size = 0
                for extension, name in sample.files:
                    with storage.local(name) as member:
                        size += _add(tar, f"{sample.key}.{extension}", member)
                if size > sample.size:
                    raise ValueError(f"{sample.key}: its files have {size:,} bytes, but {sample.size:,} were planned")
                header = _header(f"{sample.key}.json", len(sample.lineage))
                tar.addfile(header, io.BytesIO(sample.lineage))
        return writer


def _add(tar: tarfile.TarFile, name: str, path: Path) -> int:
    size = path.stat().st_size
    with path.open("rb") as file:
        tar.addfile(_header(name, size), file)
    return size


def _header(name: str, size: int) -> tarfile.TarInfo:
    """A member's header. It keeps TarInfo's zeros and empty names: no time, no machine and no user."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = size, 0o644
    return header
