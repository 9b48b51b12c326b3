"""What is in a shard, without holding it: where the members of each sample lie, and of what shape their arrays are.

WebDataset's own readers give a stream, and a stream cannot be resumed at a sample, nor shared among workers sample by
sample, without reading all that is passed by. So the headers of each tar are read once, and after that any sample with
one read. Nothing is written to disk by a member's name, followed or unpickled, and no size is believed beyond the
file's.
"""

import io
import math
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from pydantic import Field, ValidationError

from data_manifests.dataset import ShardEntry
from data_manifests.lineage import Lineage
from data_manifests.samples import brief
from data_manifests.storage import Storage, answering
from data_manifests.strict import Strict

VERSION = 3  # raised whenever the same shard would give another index

_SPEAKERS_SOUNDS = ("speaker_log_mel", "speaker_whisper")
ARRAYS = ("latent", "text_embedding", "log_mel", "whisper", *_SPEAKERS_SOUNDS, "speaker_mask")
FILES = ("mp4", "flac", "guidance.json", "json")
_DTYPES = ("<f2", "<f4", "|b1")
_AXES = {
    "latent": 4, "text_embedding": 2, "log_mel": 3, "whisper": 3, "speaker_log_mel": 4, "speaker_whisper": 4,
    "speaker_mask": 4,
}  # fmt: skip
_OF_FRAMES = ("log_mel", "whisper", *_SPEAKERS_SOUNDS, "speaker_mask")  # arrays with an entry a frame
_BLOCK = tarfile.BLOCKSIZE
_MAX_MEMBER = 1 << 30  # bytes, as data_manifests.samples has it for a sample
_MAX_JSON = 1 << 22
_MAX_SIDE = 1 << 14  # pixels
_NPY_HEADER = 1 << 10  # bytes; NumPy writes 128 for a plain array
_READ_AHEAD = 4 << 20  # bytes that a remote shard is read by


class Span(NamedTuple):
    """Where a file lies: bytes from the shard's start."""

    start: int
    size: int


class ArraySpan(NamedTuple):
    """Where an array's numbers lie, C-contiguous."""

    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Entry(Strict):
    """One sample of a shard. fault: why it cannot be used, "" when it can; then the other fields are what they say.

    latent_made_by: backend and versions of the stage that made the latent.
    """

    key: str
    fault: str = ""
    tier: str = ""
    fps: int = 0
    frames: int = 0
    width: int = 0
    height: int = 0
    audio_usable: bool = False
    latent_made_by: str = ""
    arrays: dict[str, ArraySpan] = Field(default={})
    files: dict[str, Span] = Field(default={})

    @property
    def speakers(self) -> int:
        """How many speakers it names; 0 when its one sound is everybody's."""
        mask = self.arrays.get("speaker_mask")
        return mask.shape[1] if mask else 0


class ShardIndex(Strict):
    """The samples of a shard, in its order: as many as the manifest says."""

    version: int
    sha256: str
    entries: list[Entry]


def read_index(storage: Storage, shard: ShardEntry, cache: Storage | None) -> ShardIndex:
    """The index of a shard: from the cache, or read from the shard and put there.

    A shard that is missing, cut off or of another size is an index full of faults, which is not kept.

    Raises OSError when the store does not answer.
    """
    name = f"index/{shard.sha256}.json"
    if cache is not None:
        try:
            index = ShardIndex.model_validate_json(cache.read_bytes(name))
            if (index.version, index.sha256, len(index.entries)) == (VERSION, shard.sha256, shard.samples):
                return index
        except (FileNotFoundError, ValidationError):
            pass
    try:
        with answering(storage.address):
            size = storage.size(shard.name)
            options: dict[str, Any] = {} if storage.is_local else {"block_size": _READ_AHEAD}
            with storage.fs.open(storage.path(shard.name), "rb", **options) as file:
                entries, fault = _read_entries(file, min(size, shard.bytes))
    except FileNotFoundError:
        size, entries, fault = 0, [], "the shard is not there"
    if size != shard.bytes:
        fault = fault or f"the shard has {size:,} bytes, the manifest says {shard.bytes:,}"
    entries = entries[: shard.samples]
    missing = range(len(entries), shard.samples)
    entries += [Entry(key=f"sample {k}", fault=fault or "the shard has fewer samples") for k in missing]
    index = ShardIndex(version=VERSION, sha256=shard.sha256, entries=entries)
    if cache is not None and not fault:
        cache.write_bytes(name, index.model_dump_json().encode())
    return index


def _read_entries(file: BinaryIO, size: int) -> tuple[list[Entry], str]:
    """The samples as far as the tar can be followed, and why it cannot be further."""
    entries: list[Entry] = []
    keys: set[str] = set()
    key, members, fault = "", dict[str, Span](), ""

    def finish() -> None:
        if members:
            entry = _entry(file, key, members)
            entries.append(Entry(key=key, fault="a sample of this key came before") if key in keys else entry)
            keys.add(key)

    for name, span in _members(file, size):
        if span is None:
            fault = name
            break
        stem, _, extension = name.partition(".")
        if stem != key:
            finish()
            key, members = stem, {}
        members[extension] = span
    finish()
    return entries, fault


def _members(file: BinaryIO, size: int) -> Iterator[tuple[str, Span | None]]:
    """Names and places of the plain files; at the end, where that is not a tar's, (what is wrong, None)."""
    at = 0
    while True:
        file.seek(at)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            yield "the shard ends without the mark of a tar's end: it is cut off", None
            return
        if not header.strip(b"\0"):
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            yield f"the shard is not a tar from byte {at:,} on ({error})", None
            return
        span = Span(at + _BLOCK, member.size)
        at += _BLOCK + -(-member.size // _BLOCK) * _BLOCK
        if member.size < 0 or at > size:
            yield f"the shard is cut off in {member.name!r}, which claims {member.size:,} bytes", None
            return
        plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.size <= _MAX_MEMBER
        if plain and member.name.isprintable() and not member.name.startswith("."):
            yield member.name, span


def _entry(file: BinaryIO, key: str, members: dict[str, Span]) -> Entry:
    """A sample from its members; whatever is wrong with it is its fault."""
    try:
        return _good_entry(file, key, members)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        return Entry(key=key, fault=f"json: {'.'.join(map(str, first['loc']))}: {first['msg']}"[:200])
    except ValueError as error:
        return Entry(key=key, fault=brief(error))


def _good_entry(file: BinaryIO, key: str, members: dict[str, Span]) -> Entry:
    if "json" not in members or members["json"].size > _MAX_JSON:
        raise ValueError("it has no json, or one that is no lineage")
    lineage = Lineage.model_validate_json(_read(file, members["json"].start, members["json"].size))
    clip = lineage.clip
    if lineage.clip_id != key:
        raise ValueError(f"its json is of another clip: {lineage.clip_id!r}")
    if max(clip.width, clip.height) > _MAX_SIDE:
        raise ValueError(f"no clip is {clip.width}x{clip.height} pixels large")
    arrays = {name: _array(file, name, members[f"{name}.npy"]) for name in ARRAYS if f"{name}.npy" in members}
    for name in _OF_FRAMES:
        if name in arrays and arrays[name].shape[0] != clip.frames:
            raise ValueError(f"{name}.npy is of {arrays[name].shape[0]} frames, the clip has {clip.frames}")
    if "speaker_mask" in arrays:
        heard = {arrays[name].shape[1] for name in _SPEAKERS_SOUNDS if name in arrays}
        if heard != {arrays["speaker_mask"].shape[1]}:
            raise ValueError(f"speaker_mask.npy needs {' or '.join(_SPEAKERS_SOUNDS)}.npy, of as many speakers")
    made_by = lineage.scores.get("latents")
    return Entry(
        key=key,
        tier=lineage.tier,
        fps=clip.fps,
        frames=clip.frames,
        width=clip.width,
        height=clip.height,
        audio_usable=lineage.audio.usable and clip.has_audio,
        latent_made_by=f"{made_by.backend} {made_by.version}" if made_by else "",
        arrays=arrays,
        files={name: members[name] for name in FILES if name in members},
    )


def _array(file: BinaryIO, name: str, span: Span) -> ArraySpan:
    """Raises ValueError for what is not a plain array of numbers, whole and of the right number of axes."""
    head = io.BytesIO(_read(file, span.start, min(span.size, _NPY_HEADER)))
    try:
        if np.lib.format.read_magic(head) != (1, 0):
            raise ValueError("of a version that holds no plain arrays")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(head, max_header_size=_NPY_HEADER)
    except ValueError as error:
        raise ValueError(f"{name}.npy: {error}") from None
    array = ArraySpan(span.start + head.tell(), dtype.str, shape) if dtype.str in _DTYPES else None
    if array is None or by_columns or len(shape) != _AXES[name] or 0 in shape:
        raise ValueError(f"{name}.npy is {dtype} {list(shape)}, no {_AXES[name]} axes of float16, float32 or bool")
    if array.start + array.size != span.start + span.size:
        raise ValueError(f"{name}.npy has {span.size:,} bytes, too many or too few for its shape {list(shape)}")
    return array


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)
