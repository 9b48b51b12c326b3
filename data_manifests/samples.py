"""Reads the samples of a shard without trusting its bytes, and checks each sample against its lineage."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from pydantic import ValidationError

from data_manifests.lineage import Lineage

SAMPLE_RATE = 16_000  # Hz, of every clip's audio
_BLOCK = tarfile.BLOCKSIZE
_MAX_SAMPLE = 1 << 30  # bytes; a clip of some seconds with its features has a hundredth of this


class HashingReader:
    """Reads a file from front to end and hashes what it reads."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        """Over the bytes that have been read or skipped so far."""

    def read(self, size: int) -> bytes:
        """Read `size` bytes, or fewer at the end."""
        data = self._file.read(size)
        self.sha256.update(data)
        return data

    def skip(self, size: int) -> None:
        """Read and drop `size` bytes, or fewer at the end."""
        while size > 0 and (data := self.read(min(size, 1 << 20))):
            size -= len(data)

    def drain(self) -> None:
        """Read and drop the rest of the file."""
        while self.read(1 << 20):
            pass


class TarSamples:
    """The samples of a plain tar, read once from front to end.

    tarfile's own reader is not used. This one holds one sample in memory and no more, believes no size beyond the
    file's, and reports links, devices, sparse files and extension headers as faults.
    """

    def __init__(self, reader: HashingReader, size: int) -> None:
        """size: bytes of the file."""
        self._reader = reader
        self._left = size
        self._faults: list[str] = []

    def take_faults(self) -> list[str]:
        """The faults that have been found since the last call."""
        faults, self._faults = self._faults, []
        return faults

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yields each sample's key, and its members by extension. The members of a sample are neighbours in the tar."""
        key, members = "", dict[str, bytes]()
        for name, data in self._members():
            stem, dot, extension = name.partition(".")
            if not (stem and dot and extension) or "/" in name or "\\" in name or not name.isprintable():
                self._faults.append(f"member {name!r} is not named KEY.EXTENSION")
                continue
            if stem != key and members:
                yield key, members
                members = {}
            key = stem
            if extension in members:
                self._faults.append(f"member {name!r} is there twice")
            if len(data) + sum(map(len, members.values())) > _MAX_SAMPLE:
                self._faults.append(f"sample {key!r} is larger than any can be; member {name!r} is not checked")
                data = b""
            members[extension] = data
        if members:
            yield key, members

    def _members(self) -> Iterator[tuple[str, bytes]]:
        while True:
            header = self._reader.read(_BLOCK)
            self._left -= len(header)
            if not header.strip(b"\0"):
                if len(header) < _BLOCK:
                    self._faults.append("ends without the mark of a tar's end: it is cut off")
                return
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                self._faults.append(f"is not a tar from here on ({error}); the rest is not checked")
                return
            padded = -(-member.size // _BLOCK) * _BLOCK
            if member.size < 0 or padded > self._left:
                self._faults.append(f"member {member.name!r} is cut off: it claims {member.size:,} bytes")
                return
            self._left -= padded
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.size > _MAX_SAMPLE:
                kind = "larger than any sample" if member.size > _MAX_SAMPLE else "not a plain file"
                self._faults.append(f"member {member.name!r} is {kind}; it is skipped")
                self._reader.skip(padded)
            else:
                data = self._reader.read(member.size)
                self._reader.skip(padded - member.size)
                yield member.name, data


def check_sample(key: str, members: dict[str, bytes], tier: str) -> tuple[Lineage | None, list[str]]:
    """The sample's lineage, None when it cannot be read; and everything that is wrong with the sample.

    members: their bytes by extension. tier: the tier of the shard that holds the sample.
    """
    if "json" not in members:
        return None, ["has no json"]
    try:
        lineage = Lineage.model_validate_json(members["json"])
    except ValidationError as error:
        return None, [
            f"json: {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_input=False)
        ]
    clip = lineage.clip
    faults: list[str] = []
    if lineage.clip_id != key:
        faults.append(f"json is of another clip: {lineage.clip_id!r}")
    if lineage.tier != tier:
        faults.append(f"json says tier {lineage.tier!r}, the manifest {tier!r}")
    if abs(clip.duration_s - clip.frames / clip.fps) > 1e-6:
        faults.append(f"json: {clip.duration_s} s is not {clip.frames} frames at {clip.fps} a second")
    if not lineage.source.sha256.startswith(lineage.source.source_id):
        faults.append("json: source_id is not the beginning of the source's sha256")
    if "mp4" not in members:
        faults.append("has no mp4")
    if clip.has_audio != ("flac" in members):
        faults.append("has no flac, though it has audio" if clip.has_audio else "has a flac, though it has no audio")
    for extension, data in members.items():
        if extension == "json":
            continue
        try:
            what = _check_member(extension, data, lineage)
        except Exception as error:  # a broken file can make its reader raise any kind of error
            what = f"cannot be opened: {one_line(error)}"
        if what:
            faults.append(f"{extension}: {what}")
    return lineage, faults


def _check_member(extension: str, data: bytes, lineage: Lineage) -> str:
    """What is wrong with a member; "" when nothing is."""
    clip = lineage.clip
    if extension == "mp4":
        import av

        # only MP4, because other formats (playlists) would open the files and addresses that they list
        with av.open(io.BytesIO(data), mode="r", format="mp4") as container:
            stream = container.streams.video[0]
            frames = sum(packet.size > 0 for packet in container.demux(stream))
            if frames != clip.frames:
                return f"has {frames} frames, the json says {clip.frames}"
            if (stream.width, stream.height) != (clip.width, clip.height):
                return f"is {stream.width}x{stream.height}, the json says {clip.width}x{clip.height}"
    elif extension == "flac":
        import soundfile

        sound = soundfile.info(io.BytesIO(data))
        if (sound.format, sound.samplerate, sound.channels) != ("FLAC", SAMPLE_RATE, 1):
            return f"is {sound.format} at {sound.samplerate} Hz with {sound.channels} channels"
        if abs(sound.frames - clip.frames * SAMPLE_RATE / clip.fps) > 1:
            return f"has {sound.frames} samples for {clip.frames} frames at {clip.fps} a second"
    elif extension.endswith(".npy"):
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        if array.shape[:1] != (clip.frames,) and extension.removesuffix(".npy") not in lineage.unaligned:
            return f"has shape {array.shape}, but its first axis must be the {clip.frames} frames"
    elif extension.endswith(".json"):
        json.loads(data)
    else:
        return "is not a member of a sample"
    return ""


def one_line(error: Exception) -> str:
    """An error's message in one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
