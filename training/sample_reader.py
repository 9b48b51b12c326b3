"""One sample out of a shard: only the bytes that a batch needs of it, and what the shard lacks made from its clip."""

import io
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from data_manifests.dataset import ShardEntry, load
from data_manifests.storage import Storage, answering
from tasks.latent_codec import STRIDE_T
from tasks.latents import LatentsSettings
from tasks.log_mel import COLUMNS_PER_S, frame_windows
from training.buckets import LoaderError
from training.clip_latents import ClipLatents
from training.shard_index import ArraySpan, Entry, Span, read_index

_GAP = 1 << 18  # bytes between two members that are rather read than left out by a second request


class Sound(NamedTuple):
    """What a dataset's samples have of their sound. name: of the array. columns_per_s, dim: of it; a frame has the
    window of columns that tasks.log_mel.windows gives it."""

    name: str
    columns_per_s: int
    dim: int

    def window(self, fps: int) -> int:
        """Columns a frame."""
        return -(-self.columns_per_s // fps)


LOG_MEL = Sound("log_mel", COLUMNS_PER_S, 80)


class Bucket(NamedTuple):
    """The shape of a batch's samples. frames: latent frames. height, width: of latents. speakers: 0 when the one sound
    is everybody's."""

    frames: int
    channels: int
    height: int
    width: int
    text_dim: int
    fps: int
    speakers: int
    sound: Sound = LOG_MEL

    @property
    def video_frames(self) -> int:
        return STRIDE_T * (self.frames - 1) + 1

    @property
    def audio(self) -> tuple[int, ...]:
        """[frames, window, dim], or [speakers, frames, window, dim]."""
        one = (self.video_frames, self.sound.window(self.fps), self.sound.dim)
        return (self.speakers, *one) if self.speakers else one


class Arrays(NamedTuple):
    """latent: [latent frames, channels, height, width]. audio: as the bucket has it, None where unusable. text:
    [tokens, dim], as many as there are. speaker_mask: [speakers, latent frames, height, width] bool or None. The others
    float16 or 32.
    """

    latent: np.ndarray
    audio: np.ndarray | None
    text: np.ndarray
    speaker_mask: np.ndarray | None


class SampleReader:
    """Says of what shape samples are, and reads them.

    clip_latents: makes what is not in the shards; None when all is to come from there. sound: what the samples have,
        see `sound_of`; log-mel is made of the sound itself where a shard has none.
    """

    def __init__(
        self,
        storage: Storage,
        shards: Sequence[ShardEntry],
        clip_latents: ClipLatents | None,
        sound: Sound = LOG_MEL,
    ) -> None:
        self._storage, self._shards, self._clip_latents, self._sound = storage, shards, clip_latents, sound
        self._paths = [storage.path(shard.name) for shard in shards]

    def shape(self, entry: Entry) -> tuple[tuple[int, int, int, int], int]:
        """Of a sample: its whole latent [latent frames, channels, height, width], and the numbers of a text token.

        Raises ValueError when it cannot have one, or its sound or masks do not fit.
        """
        latent, text_dim = self.latent_shape(entry)
        bucket = self.bucket(latent, text_dim, entry)
        own = f"speaker_{self._sound.name}" if entry.speakers else self._sound.name
        made_here = self._sound == LOG_MEL and not entry.speakers  # of the sample's one sound
        if entry.audio_usable and own not in entry.arrays and not made_here:
            raise ValueError(
                f"it has no {own}.npy; the dataset's first sample with usable sound is heard by {self._sound.name}, so "
                "all are, and training makes log_mel.npy alone"
            )
        for name in (self._sound.name, own):
            array = entry.arrays.get(name)
            if array is not None and array.shape[-2:] != bucket.audio[-2:]:
                raise ValueError(f"{name}.npy has windows of {list(array.shape[-2:])}, not {list(bucket.audio[-2:])}")
        mask = entry.arrays.get("speaker_mask")
        if mask is not None and mask.shape[2:] != latent[2:]:
            raise ValueError(f"speaker_mask.npy is of {list(mask.shape[2:])} latent pixels, not {list(latent[2:])}")
        return latent, text_dim

    def latent_shape(self, entry: Entry) -> tuple[tuple[int, int, int, int], int]:
        """As `shape`, whatever the sample has of sound and masks. Raises ValueError when it cannot have a latent."""
        if not self.in_shard(entry):
            if self._clip_latents is None:
                raise ValueError("it has no latent.npy and text_embedding.npy, and no codec is given to make them")
            if "mp4" not in entry.files:
                raise ValueError("it has no mp4 to make latents from")
            return self._made(entry), self._clip_latents.text_dim
        frames, channels, height, width = entry.arrays["latent"].shape
        if STRIDE_T * (frames - 1) + 1 > entry.frames:
            raise ValueError(f"its {frames} latent frames are more than its {entry.frames} frames have")
        return (frames, channels, height, width), entry.arrays["text_embedding"].shape[1]

    def bucket(self, latent: tuple[int, int, int, int], text_dim: int, entry: Entry) -> Bucket:
        """Of a sample, whose latents [latent frames, channels, height, width] may be a part of it."""
        return Bucket(*latent, text_dim, entry.fps, entry.speakers, self._sound)

    def _made(self, entry: Entry) -> tuple[int, int, int, int]:
        assert self._clip_latents is not None
        return self._clip_latents.shape(entry.frames, entry.width, entry.height)

    def in_shard(self, entry: Entry) -> bool:
        """Whether the shard's own latents are what is asked for."""
        latent, text = entry.arrays.get("latent"), entry.arrays.get("text_embedding")
        if latent is None or text is None or self._clip_latents is None:
            return latent is not None and text is not None
        asked = latent.shape == self._made(entry) and text.shape[1] == self._clip_latents.text_dim
        return asked and entry.latent_made_by == self._clip_latents.made_by

    def read(self, shard: int, number: int, entry: Entry, bucket: Bucket, first: int) -> Arrays:
        """The window of a sample that begins at a latent frame; that is the latent of its frame alone.

        Raises ValueError, OSError, and whatever a broken video makes its reader raise.
        """
        frames = slice(STRIDE_T * first, STRIDE_T * first + bucket.video_frames)
        wanted: dict[str, ArraySpan] = {}
        in_shard = self.in_shard(entry)
        if in_shard:
            wanted["latent"] = _rows(entry.arrays["latent"], slice(first, first + bucket.frames))
            wanted["text"] = entry.arrays["text_embedding"]
        audio_name = f"speaker_{self._sound.name}" if bucket.speakers else self._sound.name
        if entry.audio_usable and audio_name in entry.arrays:
            wanted["audio"] = _rows(entry.arrays[audio_name], frames)
        if bucket.speakers:
            wanted["mask"] = _rows(entry.arrays["speaker_mask"], frames)
        arrays = self._arrays(shard, wanted)
        if not in_shard or first:
            assert self._clip_latents is not None
            checksum, files = self._shards[shard].sha256, lambda: self._files(shard, entry)
            if not in_shard:
                latent, arrays["text"] = self._clip_latents.encode(checksum, number, files)
                arrays["latent"] = latent[first : first + bucket.frames].copy()
            if first:
                arrays["latent"][0] = self._clip_latents.alone(checksum, number, files)[first]
        expected = bucket[:4]
        if arrays["latent"].shape != expected or arrays["text"].shape[1:] != (bucket.text_dim,):
            raise ValueError(f"its video gives latents of {list(arrays['latent'].shape)}, not {list(expected)}")
        if entry.audio_usable and "audio" not in arrays:
            arrays["audio"] = self._log_mel(shard, entry)[frames]
        elif entry.audio_usable and bucket.speakers:
            arrays["audio"] = arrays["audio"].swapaxes(0, 1)
        mask = _by_latent(arrays["mask"]) if "mask" in arrays else None
        return Arrays(arrays["latent"], arrays.get("audio"), arrays["text"], mask)

    def latent(self, shard: int, number: int, entry: Entry) -> np.ndarray:
        """The whole latent of a sample, and nothing else of it: [latent frames, channels, height, width] float16 or 32.

        Raises as `read` does.
        """
        if self.in_shard(entry):
            return self._arrays(shard, {"latent": entry.arrays["latent"]})["latent"]
        assert self._clip_latents is not None
        return self._clip_latents.encode(self._shards[shard].sha256, number, lambda: self._files(shard, entry))[0]

    def _log_mel(self, shard: int, entry: Entry) -> np.ndarray:
        """[frames, window, mels] from the sample's sound."""
        import soundfile

        if "flac" not in entry.files:
            raise ValueError("it has no flac, though its sound is said to be usable")
        samples, _ = soundfile.read(io.BytesIO(self._bytes(shard, entry.files["flac"])), dtype="float32")
        return frame_windows(samples, entry.frames, entry.fps)

    def _files(self, shard: int, entry: Entry) -> dict[str, bytes]:
        names = [name for name in ("mp4", "guidance.json", "json") if name in entry.files]
        return {name: bytes(self._bytes(shard, entry.files[name])) for name in names}

    def _arrays(self, shard: int, wanted: dict[str, ArraySpan]) -> dict[str, np.ndarray]:
        """Read what lies near each other at once."""
        groups: list[list[str]] = []
        end = 0
        for name in sorted(wanted, key=lambda name: wanted[name].start):
            if not groups or wanted[name].start > end + _GAP:
                groups.append([])
            groups[-1].append(name)
            end = wanted[name].start + wanted[name].size
        arrays = {}
        for names in groups:
            start, last = wanted[names[0]].start, wanted[names[-1]]
            data = self._bytes(shard, Span(start, last.start + last.size - start))
            for name in names:
                span = wanted[name]
                part = memoryview(data)[span.start - start : span.start - start + span.size]
                arrays[name] = np.frombuffer(part, span.dtype).reshape(span.shape)
        return arrays

    def _bytes(self, shard: int, span: Span) -> bytearray:
        """Raises ValueError when there are not so many."""
        path = self._paths[shard]
        if self._storage.is_local:
            data = bytearray(span.size)
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                file.seek(span.start)
                read = file.readinto(data)
        else:
            with answering(self._storage.address):
                data = bytearray(self._storage.fs.cat_file(path, start=span.start, end=span.start + span.size))
            read = len(data)
        if read != span.size:
            raise ValueError("the shard ends within it")
        return data


def sound_of(address: str, cache: Storage | None) -> Sound:
    """What the samples of a dataset have of their sound, by the first whose sound is usable; log-mel where none is.
    Where that one names speakers, it is what it has of each speaker's own.

    address: of the dataset manifest. cache: as of `read_index`.

    Raises LoaderError where those have neither an array nor a sound to make log-mel of; ManifestError.
    """
    from tasks.networks.whisper import STATES_PER_S

    lacking = ""
    storage = Storage(address.rpartition("/")[0] or ("/" if address.startswith("/") else "."))
    for shard in sorted(load(address).shards, key=lambda shard: shard.name):
        try:
            entries = read_index(storage, shard, cache).entries
        except OSError as error:
            raise LoaderError(f"the shards cannot be read: {error}") from error
        for entry in entries:
            if entry.fault or not entry.audio_usable:
                continue
            states = entry.arrays.get("speaker_whisper" if entry.speakers else "whisper")
            if states is not None:
                return Sound("whisper", STATES_PER_S, states.shape[-1])
            if entry.arrays.keys() & {"log_mel", "speaker_log_mel"} or "flac" in entry.files:
                return LOG_MEL
            lacking = lacking or f"{entry.key} of {shard.name}"
    if lacking:
        raise LoaderError(
            f"{address}: no sample with usable sound, such as {lacking}, has log_mel.npy, whisper.npy, or a flac to "
            "make log_mel of; curate with the stage speech"
        )
    return LOG_MEL


def check_words(address: str, tiers: Sequence[str], settings: LatentsSettings) -> None:
    """See that the words which are to be embedded can be had, by the first shard that a training would read.

    Raises LoaderError where none of its samples has them, nor an embedding that serves; ManifestError.
    """
    if settings.text != "guidance":
        return
    storage = Storage(address.rpartition("/")[0] or ("/" if address.startswith("/") else "."))
    shard = next((shard for shard in load(address).shards if shard.tier in tiers and shard.samples), None)
    if shard is None:
        return
    reader = SampleReader(storage, [shard], ClipLatents(settings, None))
    entries = [entry for entry in read_index(storage, shard, None).entries if not entry.fault]
    with suppress(ValueError):  # a picture too small for these settings, which the loader tells of
        if any("guidance.json" in entry.files or reader.in_shard(entry) for entry in entries):
            return
    if entries:
        raise LoaderError(
            f"{address}: the recipe's training.data.latents embed the guidance (text: guidance), and the samples of "
            f"{shard.name} have no guidance.json; curate with the stage guidance, or embed the caption (text: caption)"
        )


def _by_latent(mask: np.ndarray) -> np.ndarray:
    """Where speakers are in some of the frames that a latent frame covers: of masks [frames, speakers, height, width]
    bool, [speakers, latent frames, height, width]."""
    rest = mask[1:].reshape(-1, STRIDE_T, *mask.shape[1:]).any(axis=1)
    return np.concatenate((mask[:1], rest)).swapaxes(0, 1)


def _rows(array: ArraySpan, rows: slice) -> ArraySpan:
    """Some of the first axis."""
    count, each = len(range(*rows.indices(array.shape[0]))), array.size // array.shape[0]
    return ArraySpan(array.start + rows.start * each, array.dtype, (count, *array.shape[1:]))
