"""The index of a shard: the byte ranges of each sample's files, and the shapes of its arrays.

WebDataset's own readers give a stream. A stream cannot be resumed at a sample, or shared among workers sample by
sample, without reading everything that is skipped. So the headers of each tar are read once. After that any sample can
be read directly.

Shards are not trusted. No member's name becomes a path, no link is followed, nothing is unpickled, and no size is
believed that goes beyond the file's end.
"""

import io
import math
import tarfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from pydantic import Field, ValidationError

from data_manifests.dataset import DatasetManifest, ShardEntry
from data_manifests.lineage import Lineage
from data_manifests.samples import one_line
from data_manifests.storage import Storage, answering
from data_manifests.strict import Strict

VERSION = 3  # raised whenever the same shard would give another index

_SPEAKER_SOUNDS = ("speaker_log_mel", "speaker_whisper")
ARRAYS = ("latent", "text_embedding", "log_mel", "whisper", *_SPEAKER_SOUNDS, "speaker_mask")
FILES = ("mp4", "flac", "guidance.json", "json")
_DTYPES = ("<f2", "<f4", "|b1")
_AXES = {
    "latent": 4, "text_embedding": 2, "log_mel": 3, "whisper": 3, "speaker_log_mel": 4, "speaker_whisper": 4,
    "speaker_mask": 4,
}  # fmt: skip
_BY_FRAME = ("log_mel", "whisper", *_SPEAKER_SOUNDS, "speaker_mask")  # arrays with one entry for each frame
_BLOCK = tarfile.BLOCKSIZE
_MAX_MEMBER = 1 << 30  # bytes, the limit of data_manifests.samples for a sample
_MAX_JSON = 1 << 22  # bytes
_MAX_SIDE = 1 << 14  # pixels
_NPY_HEADER = 1 << 10  # bytes; NumPy writes 128 for a plain array
_READ_AHEAD = 4 << 20  # bytes of one request to a remote shard

# NumPy reads a header with Python's parser. That of Python 3.11 fails now and then when two threads are in it, with
# "AST constructor recursion depth mismatch" (CPython issue 106905).
HEADER_LOCK = threading.Lock()


class ByteSpan(NamedTuple):
    """The bytes of a file in a shard."""

    start: int
    """Bytes from the shard's start."""
    size: int
    """Bytes."""


class ArraySpan(NamedTuple):
    """The bytes of an array's numbers in a shard, C-contiguous."""

    start: int
    """Bytes from the shard's start."""
    dtype: str
    """NumPy's name of the type, such as "<f2"."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Entry(Strict):
    """One sample of a shard. An entry with a fault has its key and nothing else."""

    key: str
    """Clip id."""
    fault: str = ""
    """Why the sample cannot be used. "" when it can."""
    tier: str = ""
    """The narrowest tier of the sample."""
    fps: int = 0
    """Frames a second."""
    frames: int = 0
    """Frames of the clip."""
    width: int = 0
    """Pixels of a frame."""
    height: int = 0
    """Pixels of a frame."""
    audio_usable: bool = False
    """Whether training may use the sound."""
    latent_made_by: str = ""
    """Backend and versions of the stage that made the latent."""
    arrays: dict[str, ArraySpan] = Field(default={})
    """The sample's arrays by name, among ARRAYS."""
    files: dict[str, ByteSpan] = Field(default={})
    """The sample's files by extension, among FILES."""

    @property
    def speakers(self) -> int:
        """Speakers that the sample names. 0 when its one sound belongs to all people in the video."""
        mask = self.arrays.get("speaker_mask")
        return mask.shape[1] if mask else 0


class ShardIndex(Strict):
    """The samples of a shard."""

    version: int
    """VERSION of the code that made the index."""
    sha256: str
    """The shard's checksum."""
    entries: list[Entry]
    """The samples in the shard's order, as many as the manifest says."""


def shards_storage(address: str) -> Storage:
    """The storage of a dataset's shards: the folder of its manifest. address: the manifest's."""
    return Storage(address.rpartition("/")[0] or ("/" if address.startswith("/") else "."))


def shards_by_name(manifest: DatasetManifest, tiers: Sequence[str] | None = None) -> list[ShardEntry]:
    """The shards of some tiers, sorted by name. All shards when `tiers` is None."""
    chosen = [shard for shard in manifest.shards if tiers is None or shard.tier in tiers]
    return sorted(chosen, key=lambda shard: shard.name)


def read_index(storage: Storage, shard: ShardEntry, cache: Storage | None) -> ShardIndex:
    """The index of a shard, from the cache if it is there. Else it is read from the shard and written to the cache.

    Where a shard is missing, cut off or of another size, the entries that cannot be read have a fault. Such an index is
    not cached.

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
    """The samples up to the first fault of the tar, and that fault. "" if the tar is whole."""
    entries: list[Entry] = []
    keys: set[str] = set()
    key, members, fault = "", dict[str, ByteSpan](), ""

    def finish() -> None:
        if members:
            entry = _entry(file, key, members)
            entries.append(Entry(key=key, fault="the shard has this key twice") if key in keys else entry)
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


def _members(file: BinaryIO, size: int) -> Iterator[tuple[str, ByteSpan | None]]:
    """The plain files of a tar: (name, bytes). A tar that is damaged ends with (fault, None)."""
    at = 0
    while True:
        file.seek(at)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            yield "the shard ends without a tar's end mark: it is cut off", None
            return
        if not header.strip(b"\0"):
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            yield f"the shard is no valid tar from byte {at:,} on ({error})", None
            return
        span = ByteSpan(at + _BLOCK, member.size)
        at += _BLOCK + -(-member.size // _BLOCK) * _BLOCK
        if member.size < 0 or at > size:
            yield f"the shard is cut off in {member.name!r}, which claims {member.size:,} bytes", None
            return
        plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.size <= _MAX_MEMBER
        if plain and member.name.isprintable() and not member.name.startswith("."):
            yield member.name, span


def _entry(file: BinaryIO, key: str, members: dict[str, ByteSpan]) -> Entry:
    """The index entry of a sample. An error becomes the entry's fault."""
    try:
        return _good_entry(file, key, members)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        return Entry(key=key, fault=f"json: {'.'.join(map(str, first['loc']))}: {first['msg']}"[:200])
    except ValueError as error:
        return Entry(key=key, fault=one_line(error))


def _good_entry(file: BinaryIO, key: str, members: dict[str, ByteSpan]) -> Entry:
    """Raises ValueError, ValidationError."""
    if "json" not in members or members["json"].size > _MAX_JSON:
        raise ValueError("it has no json, or one that is too large for a lineage")
    lineage = Lineage.model_validate_json(_read(file, members["json"].start, members["json"].size))
    clip = lineage.clip
    if lineage.clip_id != key:
        raise ValueError(f"its json is of another clip: {lineage.clip_id!r}")
    if max(clip.width, clip.height) > _MAX_SIDE:
        raise ValueError(f"its json claims {clip.width}x{clip.height} pixels; a side has at most {_MAX_SIDE}")
    arrays = {name: _array(file, name, members[f"{name}.npy"]) for name in ARRAYS if f"{name}.npy" in members}
    for name in _BY_FRAME:
        if name in arrays and arrays[name].shape[0] != clip.frames:
            raise ValueError(f"{name}.npy is of {arrays[name].shape[0]} frames, the clip has {clip.frames}")
    if "speaker_mask" in arrays:
        speakers_of_sound = {arrays[name].shape[1] for name in _SPEAKER_SOUNDS if name in arrays}
        if speakers_of_sound != {arrays["speaker_mask"].shape[1]}:
            raise ValueError(f"speaker_mask.npy needs {' or '.join(_SPEAKER_SOUNDS)}.npy, of as many speakers")
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


def _array(file: BinaryIO, name: str, span: ByteSpan) -> ArraySpan:
    """The array of a .npy file. Raises ValueError unless it is whole, of plain numbers, with the expected axes."""
    head = io.BytesIO(_read(file, span.start, min(span.size, _NPY_HEADER)))
    try:
        if np.lib.format.read_magic(head) != (1, 0):
            raise ValueError("its format is not NumPy's version 1.0, which plain arrays have")
        with HEADER_LOCK:
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(head, max_header_size=_NPY_HEADER)
    except ValueError as error:
        raise ValueError(f"{name}.npy: {error}") from None
    array = ArraySpan(span.start + head.tell(), dtype.str, shape) if dtype.str in _DTYPES else None
    if array is None or fortran_order or len(shape) != _AXES[name] or 0 in shape:
        raise ValueError(
            f"{name}.npy is {dtype} {list(shape)}; expected are {_AXES[name]} axes of float16, float32 or bool"
        )
    if array.start + array.size != span.start + span.size:
        raise ValueError(f"{name}.npy has {span.size:,} bytes, too many or too few for its shape {list(shape)}")
    return array


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)
