"""A sample inside a shard: read without trusting a byte of it, and held against its own lineage."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from pydantic import ValidationError

from data_manifests.lineage import Lineage

SAMPLE_RATE = 16_000  # Hz, of every clip's sound
_BLOCK = tarfile.BLOCKSIZE
_MAX_SAMPLE = 1 << 30  # bytes; a clip of some seconds with its features has a hundredth of it


class HashingReader:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """`size` bytes, or fewer at the end."""
        data = self._file.read(size)
        self.sha256.update(data)
        return data

    def skip(self, size: int) -> None:
        while size > 0 and (data := self.read(min(size, 1 << 20))):
            size -= len(data)

    def drain(self) -> None:
        while self.read(1 << 20):
            pass


class TarSamples:
    """The samples of a plain tar, read once from front to end.

    Not by tarfile's own reader: this one holds no more than a sample, believes no size beyond the file's, and meets
    links, devices, sparse files and extension headers as what they are here, faults.
    """

    def __init__(self, reader: HashingReader, size: int) -> None:
        self._reader = reader
        self._left = size
        self._faults: list[str] = []

    def take_faults(self) -> list[str]:
        faults, self._faults = self._faults, []
        return faults

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Key and members by extension; the members of a sample stand together."""
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
                self._faults.append(f"sample {key!r} is larger than any can be; member {name!r} is not looked at")
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
                self._faults.append(f"is not a tar from here on ({error}); the rest is not looked at")
                return
            padded = -(-member.size // _BLOCK) * _BLOCK
            if member.size < 0 or padded > self._left:
                self._faults.append(f"member {member.name!r} is cut off: it claims {member.size:,} bytes")
                return
            self._left -= padded
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.size > _MAX_SAMPLE:
                kind = "larger than any sample" if member.size > _MAX_SAMPLE else "not a plain file"
                self._faults.append(f"member {member.name!r} is {kind}; passed by")
                self._reader.skip(padded)
            else:
                data = self._reader.read(member.size)
                self._reader.skip(padded - member.size)
                yield member.name, data


def check_sample(key: str, members: dict[str, bytes], tier: str) -> tuple[Lineage | None, list[str]]:
    """The sample's lineage, when it can be read, and everything that is wrong with the sample.

    members: bytes by extension. tier: the one whose shard this is.
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
        faults.append("has no flac, though it has sound" if clip.has_audio else "has a flac, though it has no sound")
    for extension, data in members.items():
        if extension == "json":
            continue
        try:
            what = _check_member(extension, data, lineage)
        except Exception as error:  # whatever a broken file makes its reader raise, it is that file's fault
            what = f"cannot be opened: {brief(error)}"
        if what:
            faults.append(f"{extension}: {what}")
    return lineage, faults


def _check_member(extension: str, data: bytes, lineage: Lineage) -> str:
    """What is wrong with a member, "" when nothing is."""
    clip = lineage.clip
    if extension == "mp4":
        import av

        # the format is named, because others (playlists) would open files and addresses that they list
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
            return f"has shape {array.shape}, where the first axis is to be {clip.frames} frames"
    elif extension.endswith(".json"):
        json.loads(data)
    else:
        return "is no part of a sample"
    return ""


def brief(error: Exception) -> str:
    """An error in one line, and not a long one."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
