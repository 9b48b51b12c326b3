"""Reads the arrays of one sample out of a shard.

Only the bytes that a batch needs are read. Arrays that the shard lacks are made from the clip: latents and the text
embedding by the codec (training.data.clip_latents), the log-mel spectrogram from the sound.

A sample's shape is known before it is read. The loader asks for it (`SampleReader.shape`) to find the sample's bucket,
and gives that bucket back when it reads the sample. A sample whose arrays turn out otherwise is an error.
"""

import io
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from data_manifests.dataset import ShardEntry, load
from data_manifests.storage import Storage, answering
from tasks.networks.latent_geometry import TEMPORAL_STRIDE, video_frames
from tasks.networks.log_mel import COLUMNS_PER_S, frame_windows
from tasks.stages.latents.stage import LatentsSettings
from training.data.buckets import LoaderError
from training.data.clip_latents import ClipLatents
from training.data.shard_index import ArraySpan, ByteSpan, Entry, read_index, shards_by_name, shards_storage

_GAP = 1 << 18  # bytes; arrays that lie closer together are read by one request, with the bytes between them


class SoundFeatures(NamedTuple):
    """The features of sound that all samples of a dataset have.

    A frame has the window of columns that tasks.networks.log_mel.windows gives it.
    """

    name: str
    """Name of the array: log_mel or whisper."""
    columns_per_s: int
    """Columns a second."""
    dim: int
    """Numbers of a column."""

    def window(self, fps: int) -> int:
        """Columns of a frame."""
        return -(-self.columns_per_s // fps)


LOG_MEL = SoundFeatures("log_mel", COLUMNS_PER_S, 80)


class Bucket(NamedTuple):
    """The shape of a batch's samples."""

    frames: int
    """Latent frames."""
    channels: int
    """Channels of latents."""
    height: int
    """Rows of latents."""
    width: int
    """Columns of latents."""
    text_dim: int
    """Numbers of a text token."""
    fps: int
    """Video frames a second."""
    speakers: int
    """Speakers with a sound and a mask each. 0: the one sound belongs to all people in the video."""
    sound: SoundFeatures = LOG_MEL

    @property
    def video_frames(self) -> int:
        """Video frames, 4n + 1."""
        return video_frames(self.frames)

    @property
    def audio(self) -> tuple[int, ...]:
        """The shape of a sample's sound: [frames, window, dim], or [speakers, frames, window, dim]."""
        of_one = (self.video_frames, self.sound.window(self.fps), self.sound.dim)
        return (self.speakers, *of_one) if self.speakers else of_one


class SampleArrays(NamedTuple):
    """The arrays of one sample. All but the mask are float16 or float32."""

    latent: np.ndarray
    """[latent frames, channels, height, width]."""
    audio: np.ndarray | None
    """Shaped as `Bucket.audio`. None where the sound is not usable."""
    text: np.ndarray
    """[tokens, dim], without padding."""
    speaker_mask: np.ndarray | None
    """[speakers, latent frames, height, width] bool. None where the sample names no speakers."""


class SampleReader:
    """Tells the shape of samples, and reads them.

    storage, shards: where samples are read from. Methods take a shard by its index in `shards`.
    clip_latents: makes latents and text embeddings that the shards lack. None: the shards must have them.
    sound: the features that all samples have (`sound_features_of`). Log-mel is made from the sound where a shard has
        none.
    """

    def __init__(
        self,
        storage: Storage,
        shards: Sequence[ShardEntry],
        clip_latents: ClipLatents | None,
        sound: SoundFeatures = LOG_MEL,
    ) -> None:
        self._storage, self._shards, self._clip_latents, self._sound = storage, shards, clip_latents, sound
        self._paths = [storage.path(shard.name) for shard in shards]

    def shape(self, entry: Entry) -> tuple[tuple[int, int, int, int], int]:
        """The shape of a sample's whole latent [latent frames, channels, height, width], and the size of a text token.

        Raises ValueError when the sample has no latent and none can be made, or its sound or masks do not fit.
        """
        latent, text_dim = self.latent_shape(entry)
        bucket = self.bucket(latent, text_dim, entry)
        audio_name = self._audio_name(entry.speakers)
        can_be_made = self._sound == LOG_MEL and not entry.speakers
        if entry.audio_usable and audio_name not in entry.arrays and not can_be_made:
            raise ValueError(
                f"it has no {audio_name}.npy; the dataset's first sample with usable sound has {self._sound.name}, so "
                "all samples need it, and training can make only log_mel.npy"
            )
        for name in (self._sound.name, audio_name):
            array = entry.arrays.get(name)
            if array is not None and array.shape[-2:] != bucket.audio[-2:]:
                raise ValueError(f"{name}.npy has windows of {list(array.shape[-2:])}, not {list(bucket.audio[-2:])}")
        mask = entry.arrays.get("speaker_mask")
        if mask is not None and mask.shape[2:] != latent[2:]:
            raise ValueError(f"speaker_mask.npy is of {list(mask.shape[2:])} latent pixels, not {list(latent[2:])}")
        return latent, text_dim

    def latent_shape(self, entry: Entry) -> tuple[tuple[int, int, int, int], int]:
        """As `shape`, without a look at sound and masks. Raises ValueError when there is no latent and none can be
        made."""
        if not self.in_shard(entry):
            if self._clip_latents is None:
                raise ValueError("it has no latent.npy and text_embedding.npy, and no codec is given to make them")
            if "mp4" not in entry.files:
                raise ValueError("it has no mp4 to make latents from")
            return self._shape_to_make(entry), self._clip_latents.text_dim
        frames, channels, height, width = entry.arrays["latent"].shape
        if video_frames(frames) > entry.frames:
            raise ValueError(f"its {frames} latent frames are more than its {entry.frames} frames have")
        return (frames, channels, height, width), entry.arrays["text_embedding"].shape[1]

    def bucket(self, latent: tuple[int, int, int, int], text_dim: int, entry: Entry) -> Bucket:
        """The bucket of a sample. latent: [latent frames, channels, height, width] of the clip or of a window."""
        return Bucket(*latent, text_dim, entry.fps, entry.speakers, self._sound)

    def _audio_name(self, speakers: int) -> str:
        return f"speaker_{self._sound.name}" if speakers else self._sound.name

    def _shape_to_make(self, entry: Entry) -> tuple[int, int, int, int]:
        """The shape of the latent that the codec makes of the clip."""
        assert self._clip_latents is not None
        return self._clip_latents.shape(entry.frames, entry.width, entry.height)

    def in_shard(self, entry: Entry) -> bool:
        """Whether the shard has the sample's latent and text embedding, made as `clip_latents` would make them."""
        latent, text = entry.arrays.get("latent"), entry.arrays.get("text_embedding")
        if latent is None or text is None or self._clip_latents is None:
            return latent is not None and text is not None
        fits = latent.shape == self._shape_to_make(entry) and text.shape[1] == self._clip_latents.text_dim
        return fits and entry.latent_made_by == self._clip_latents.made_by

    def read(self, shard: int, number: int, entry: Entry, bucket: Bucket, first: int) -> SampleArrays:
        """A sample's window of the bucket's length, beginning at latent frame `first`.

        The window's first latent is that of its first video frame alone (ClipLatents.alone).

        shard: index of the shard. number: the sample's number in it.

        Raises ValueError, OSError, and anything that a damaged video makes its reader raise.
        """
        frames = slice(TEMPORAL_STRIDE * first, TEMPORAL_STRIDE * first + bucket.video_frames)
        wanted: dict[str, ArraySpan] = {}
        in_shard = self.in_shard(entry)
        if in_shard:
            wanted["latent"] = _rows(entry.arrays["latent"], slice(first, first + bucket.frames))
            wanted["text"] = entry.arrays["text_embedding"]
        audio_name = self._audio_name(bucket.speakers)
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
            raise ValueError(f"its latents are of {list(arrays['latent'].shape)}, not {list(expected)}")
        if entry.audio_usable and "audio" not in arrays:
            arrays["audio"] = self._log_mel(shard, entry)[frames]
        elif entry.audio_usable and bucket.speakers:
            arrays["audio"] = arrays["audio"].swapaxes(0, 1)
        mask = _mask_by_latent(arrays["mask"]) if "mask" in arrays else None
        return SampleArrays(arrays["latent"], arrays.get("audio"), arrays["text"], mask)

    def latent(self, shard: int, number: int, entry: Entry) -> np.ndarray:
        """The whole latent of a sample: [latent frames, channels, height, width] float16 or float32.

        Raises as `read` does.
        """
        if self.in_shard(entry):
            return self._arrays(shard, {"latent": entry.arrays["latent"]})["latent"]
        assert self._clip_latents is not None
        return self._clip_latents.encode(self._shards[shard].sha256, number, lambda: self._files(shard, entry))[0]

    def _log_mel(self, shard: int, entry: Entry) -> np.ndarray:
        """[frames, window, mels] float16, computed from the sample's sound. Raises ValueError."""
        import soundfile

        if "flac" not in entry.files:
            raise ValueError("it has no flac, though its json says that its sound is usable")
        samples, _ = soundfile.read(io.BytesIO(self._bytes(shard, entry.files["flac"])), dtype="float32")
        return frame_windows(samples, entry.frames, entry.fps)

    def _files(self, shard: int, entry: Entry) -> dict[str, bytes]:
        names = [name for name in ("mp4", "guidance.json", "json") if name in entry.files]
        return {name: bytes(self._bytes(shard, entry.files[name])) for name in names}

    def _arrays(self, shard: int, wanted: dict[str, ArraySpan]) -> dict[str, np.ndarray]:
        """The arrays of these spans. Neighbouring arrays are read by one request."""
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
            data = self._bytes(shard, ByteSpan(start, last.start + last.size - start))
            for name in names:
                span = wanted[name]
                part = memoryview(data)[span.start - start : span.start - start + span.size]
                arrays[name] = np.frombuffer(part, span.dtype).reshape(span.shape)
        return arrays

    def _bytes(self, shard: int, span: ByteSpan) -> bytearray:
        """Raises ValueError when the shard ends before the span does."""
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
            raise ValueError("the shard is cut off within this sample")
        return data


def sound_features_of(address: str, cache: Storage | None) -> SoundFeatures:
    """The features of sound of a dataset's samples: those of the first sample with usable sound.

    Log-mel where no sample has usable sound. Where that first sample names speakers, the features of each speaker's own
    sound count.

    address: of the dataset manifest. cache: as for `read_index`.

    Raises LoaderError where samples with usable sound have neither features nor a flac to make log-mel of;
    ManifestError.
    """
    from tasks.networks.whisper import STATES_PER_S

    lacking = ""
    storage = shards_storage(address)
    for shard in shards_by_name(load(address)):
        try:
            entries = read_index(storage, shard, cache).entries
        except OSError as error:
            raise LoaderError(f"the shards cannot be read: {error}") from error
        for entry in entries:
            if entry.fault or not entry.audio_usable:
                continue
            states = entry.arrays.get("speaker_whisper" if entry.speakers else "whisper")
            if states is not None:
                return SoundFeatures("whisper", STATES_PER_S, states.shape[-1])
            if entry.arrays.keys() & {"log_mel", "speaker_log_mel"} or "flac" in entry.files:
                return LOG_MEL
            lacking = lacking or f"{entry.key} of {shard.name}"
    if lacking:
        raise LoaderError(
            f"{address}: no sample with usable sound, such as {lacking}, has log_mel.npy, whisper.npy, or a flac to "
            "make log_mel from; curate with the stage speech"
        )
    return LOG_MEL


def check_text(address: str, tiers: Sequence[str], settings: LatentsSettings) -> None:
    """Check that the dataset has the text that the settings embed, in the first shard that a training would read.

    Raises LoaderError where none of that shard's samples has the text, or an embedding that fits; ManifestError.
    """
    if settings.text != "guidance":
        return
    storage = shards_storage(address)
    shard = next((shard for shard in load(address).shards if shard.tier in tiers and shard.samples), None)
    if shard is None:
        return
    reader = SampleReader(storage, [shard], ClipLatents(settings, None))
    entries = [entry for entry in read_index(storage, shard, None).entries if not entry.fault]
    with suppress(ValueError):  # frames too small for these settings, which the loader reports
        if any("guidance.json" in entry.files or reader.in_shard(entry) for entry in entries):
            return
    if entries:
        raise LoaderError(
            f"{address}: the recipe's training.data.latents embed the guidance (text: guidance), but the samples of "
            f"{shard.name} have no guidance.json; curate with the stage guidance, or embed the caption (text: caption)"
        )


def _mask_by_latent(mask: np.ndarray) -> np.ndarray:
    """The union of the masks over the video frames that each latent frame covers.

    mask: [frames, speakers, height, width] bool. Returns: [speakers, latent frames, height, width] bool.
    """
    rest = mask[1:].reshape(-1, TEMPORAL_STRIDE, *mask.shape[1:]).any(axis=1)
    return np.concatenate((mask[:1], rest)).swapaxes(0, 1)


def _rows(array: ArraySpan, rows: slice) -> ArraySpan:
    """A part of the array along its first axis."""
    count, row_size = len(range(*rows.indices(array.shape[0]))), array.size // array.shape[0]
    return ArraySpan(array.start + rows.start * row_size, array.dtype, (count, *array.shape[1:]))
