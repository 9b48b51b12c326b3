"""Videos sampled during training, and how well their mouths follow the sound: the sync gain.

The loss does not measure lip sync. So the same clip is sampled three times: with its own sound, with silence, and with
its sound shifted by half the clip. A probe measures how well the mouth of each follows the clip's own sound. Only the
conditioning on sound can make the first better than the other two. That difference is the sync gain.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_manifests.dataset import load
from data_manifests.storage import Storage, answering
from tasks.media.clip import SAMPLE_RATE, Clip, ClipRecord
from tasks.networks.latent_geometry import SPATIAL_STRIDE, latent_frames
from tasks.networks.log_mel import frame_windows
from tasks.stages.latents.codec import CODECS
from tasks.weights.missing import MissingBackend
from training.data.clip_latents import ClipLatents
from training.data.loader import tiers_within
from training.data.sample_reader import LOG_MEL, Bucket, SampleReader, SoundFeatures, sound_features_of
from training.data.shard_index import Entry, read_index, shards_by_name, shards_storage
from training.generate.sampling import initial_noise, reference_latent, sample_clip, sigma_steps
from training.loop.parallel import WorkerGroup, autocast
from training.loop.rng import generator_for
from training.loop.tracking import Trackers
from training.models.active_mind.model import ActiveMind, Conditions

if TYPE_CHECKING:
    from training.loop.job import Job

# (frames [frames, height, width, 3] uint8, frames a second, samples at 16 kHz) -> how well the mouth follows the
# sound, more is better; None where it cannot be measured
SyncProbe = Callable[[np.ndarray, int, np.ndarray], float | None]

_log = logging.getLogger(__name__)

_STRIP_FRAMES = 8  # side by side in the image of a sample


class Subject(NamedTuple):
    """A clip of the dataset whose first frame, sound and text are the conditions of a sample."""

    key: str
    """Clip id."""
    latent: np.ndarray
    """[latent frames, channels, height, width]."""
    audio: np.ndarray
    """[frames, window, dim], features of the sound. With a mask: [speakers, frames, window, dim]."""
    text: np.ndarray
    """[tokens, dim]."""
    mask: np.ndarray | None
    """[speakers, latent frames, height, width] bool, where each speaker is. None where the clip names no speakers."""
    sound: np.ndarray
    """[samples] float32 at 16 kHz."""


class Previews:
    """Sample videos for the first clips with usable sound of a phase's tier."""

    def __init__(self, job: "Job") -> None:
        self._job, self._fps = job, job.recipe.data.fps
        self._codec = CODECS[job.recipe.data.latents.backend](job.recipe.data.latents.channels)
        self._sound_features = sound_features_of(job.manifest, Storage(f"{job.out}/cache"))
        self._subjects = list(_subjects(job, self._sound_features))
        self._hears = job.settings.hears
        self._sync_probe = job.probe if self._hears else None
        self._probes: dict[str, tuple[SyncProbe, float] | None] = {}

    def make(
        self, model: ActiveMind, step: int, folder: Path, group: WorkerGroup, trackers: Trackers | None
    ) -> dict[str, float]:
        """Sample every subject. Every worker calls it.

        The leading worker writes KEY.mp4 and KEY.png into `folder` and gives them to the trackers.

        Returns, on the leading worker, means over subjects of what the probe measures: sync/true, sync/muted and
        sync/shifted of the three samples, sync/data of the clips themselves, and sync_gain, which is sync/true minus
        the larger of sync/muted and sync/shifted. Empty where nothing could be measured.
        """
        audios: list[list[np.ndarray | None]] = []
        for subject in self._subjects:
            audios.append([subject.audio])
            if self._sync_probe is not None:
                audios[-1] += [self._silence(subject), np.roll(subject.audio, subject.audio.shape[-3] // 2, axis=-3)]
        if len({tuple(keys) for keys in group.gather([subject.key for subject in self._subjects])}) > 1:
            _log.warning(
                "no samples at step %d: not every worker could read the same clips; the next ones try again", step
            )
            self._subjects = list(_subjects(self._job, self._sound_features))
            return {}
        wanted = [(subject, audio) for subject, of in zip(self._subjects, audios, strict=True) for audio in of]
        sampled = iter(self._sample_all(model, wanted, group))
        if not group.is_leader:
            return {}
        measured: list[tuple[float, float, float, float]] = []
        for subject, of in zip(self._subjects, audios, strict=True):
            videos = [self._decoded(latent) for latent in islice(sampled, len(of))]
            folder.mkdir(parents=True, exist_ok=True)
            video, strip = folder / f"{subject.key}.mp4", folder / f"{subject.key}.png"
            write_video(video, videos[0], self._fps, subject.sound)
            write_strip(strip, videos[0])
            if trackers is not None:
                trackers.sample(step, subject.key, video, strip)
            probe_and_data = self._probe(subject)
            if probe_and_data is not None:
                probe, of_data = probe_and_data
                values = [probe(frames, self._fps, subject.sound) for frames in videos]
                if all(value is not None and math.isfinite(value) for value in values):
                    measured.append((*values, of_data))  # type: ignore[arg-type]
        if not measured:
            return {}
        true, muted, shifted, data = (float(value) for value in np.mean(measured, axis=0))
        return {
            "sync/data": data,
            "sync/true": true,
            "sync/muted": muted,
            "sync/shifted": shifted,
            "sync_gain": true - max(muted, shifted),
        }

    def _sample_all(
        self, model: ActiveMind, wanted: Sequence[tuple[Subject, np.ndarray | None]], group: WorkerGroup
    ) -> list[Tensor]:
        """The latents of each subject with each sound, as `_sample` gives them, on the leading worker.

        The workers share them out.
        """
        own: list[Tensor] = []
        for first in range(0, len(wanted), group.data_size):
            number = first + group.data_rank
            # FSDP's workers run the model together, so one that has nothing left to sample repeats the last
            latents = self._sample(model, *wanted[min(number, len(wanted) - 1)], group)
            if number < len(wanted):
                own.append(latents)
        parts = group.gather_on_leader(own)[:: group.sequence_parallel]
        if not parts:
            return []
        return [parts[number % len(parts)][number // len(parts)] for number in range(len(wanted))]

    def _probe(self, subject: Subject) -> tuple[SyncProbe, float] | None:
        """The probe of a subject, and its value for the clip itself. None where no probe can measure the clip.

        It is the job's probe, or `brightness_probe` where that cannot measure the clip, as with puppets. A subject
        keeps its probe, so that its curve shows one measure.
        """
        if self._sync_probe is None:
            return None
        if subject.key not in self._probes:
            frames = self._decoded(torch.from_numpy(np.array(subject.latent, np.float32)))
            of_data = (
                (probe, probe(frames, self._fps, subject.sound)) for probe in (self._sync_probe, brightness_probe)
            )
            self._probes[subject.key] = next(((probe, value) for probe, value in of_data if value is not None), None)
        return self._probes[subject.key]

    def _silence(self, subject: Subject) -> np.ndarray | None:
        """The sound features of silence. None for Whisper's states, because computing them takes Whisper's weights."""
        if self._sound_features != LOG_MEL:
            return None
        frames = subject.audio.shape[-3]
        windows = frame_windows(np.zeros(frames * SAMPLE_RATE // self._fps, np.float32), frames, self._fps)
        return np.broadcast_to(windows.astype(np.float32), subject.audio.shape)

    def _sample(self, model: ActiveMind, subject: Subject, audio: np.ndarray | None, group: WorkerGroup) -> Tensor:
        """A sample's latents [latent frames, channels, height, width] on the CPU. It begins with the subject's first
        frame.

        audio: features of the sound. None: the model's null embedding.
        """

        def batch_of_one(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.array(array))[None].to(group.device)

        latent = batch_of_one(subject.latent).transpose(1, 2).float()
        mask = None
        if subject.mask is not None:  # the reference behind the clip is the first frame, so it has that frame's mask
            mask = batch_of_one(np.concatenate((subject.mask, subject.mask[:, :1]), 1))
        conditions = Conditions(
            audio=batch_of_one(subject.audio if audio is None else audio).float() if self._hears else None,
            text=batch_of_one(subject.text).float(),
            text_mask=torch.ones(1, len(subject.text), dtype=torch.bool, device=group.device),
            drop_audio=torch.full((1,), audio is None, device=group.device),
            drop_text=torch.zeros(1, dtype=torch.bool, device=group.device),
            speaker_mask=mask,
        )
        recipe = self._job.recipe
        seed = generator_for(recipe.seed, "preview", subject.key).initial_seed()
        with autocast(recipe.run.bf16, group.device):
            sampled = sample_clip(
                model,
                conditions,
                initial_noise(tuple(latent.shape), seed, group.device),
                sigma_steps(recipe.run.sample_steps, recipe.timesteps.shift),
                first=latent[:, :, :1],
                reference=self._reference(subject)[None].to(group.device).float(),
                pseudo_last=recipe.run.pseudo_last,
            )
        return sampled[0].transpose(0, 1).cpu()

    def _reference(self, subject: Subject) -> Tensor:
        """The subject's first frame as a reference latent: [channels, height, width] on the CPU."""
        _, _, height, width = subject.latent.shape
        first = next(iter(self._codec.decode([subject.latent[0]], height * SPATIAL_STRIDE, width * SPATIAL_STRIDE)))
        return reference_latent(self._codec, first)

    def _decoded(self, latents: Tensor) -> np.ndarray:
        """[frames, height, width, 3] uint8."""
        _, _, height, width = latents.shape
        frames = self._codec.decode(
            (latent.numpy() for latent in latents), height * SPATIAL_STRIDE, width * SPATIAL_STRIDE
        )
        return np.stack(list(frames))


def _subjects(job: "Job", sound_features: SoundFeatures) -> Iterator[Subject]:
    """The first clips that can be subjects, as many as the recipe's training.run.samples.

    Samples that cannot be read are skipped. The loader counts and reports them. Raises what reading the manifest
    raises.
    """
    import io

    import soundfile

    data, address = job.recipe.data, job.manifest
    shards = shards_by_name(load(address), tiers_within(data.tiers, job.settings.tier))
    storage, cache = shards_storage(address), Storage(f"{job.out}/cache")
    reader = SampleReader(storage, shards, ClipLatents(data.latents, cache), sound_features)
    num_missing = job.recipe.run.samples
    for number, shard in enumerate(shards):
        for place, entry in enumerate(read_index(storage, shard, cache).entries):
            if not num_missing:
                return
            try:
                bucket = _bucket(reader, entry, data.frames, data.fps)
                if bucket is None:
                    continue
                arrays = reader.read(number, place, entry, bucket, 0)
                with answering(address), storage.fs.open(storage.path(shard.name), "rb") as file:
                    file.seek(entry.files["flac"].start)
                    sound, _ = soundfile.read(io.BytesIO(file.read(entry.files["flac"].size)), dtype="float32")
            except Exception:  # noqa: S112 - a damaged sample may make its reader raise anything
                continue
            if arrays.audio is not None:
                sound = sound[: round(data.frames * SAMPLE_RATE / data.fps)]
                text = arrays.text[: data.latents.max_tokens]
                yield Subject(entry.key, arrays.latent, arrays.audio, text, arrays.speaker_mask, sound)
                num_missing -= 1


def _bucket(reader: SampleReader, entry: Entry, frames: int, fps: int) -> Bucket | None:
    """The bucket of a clip's first `frames` frames. None for a clip that cannot be a subject."""
    if entry.fault or not entry.audio_usable or entry.fps != fps or "flac" not in entry.files:
        return None
    (whole, channels, height, width), text_dim = reader.shape(entry)
    if whole < latent_frames(frames):
        return None
    return reader.bucket((latent_frames(frames), channels, height, width), text_dim, entry)


def write_video(path: Path, frames: np.ndarray, fps: int, sound: np.ndarray) -> None:
    """An MP4 (H.264, AAC) of frames [frames, height, width, 3] uint8 and samples [samples] float32 at 16 kHz."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        video_stream: Any = container.add_stream("libx264", rate=fps, options={"crf": "16"})
        video_stream.height, video_stream.width = frames.shape[1:3]
        video_stream.pix_fmt = "yuv420p"
        audio_stream: Any = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for frame in frames:
            container.mux(video_stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video_stream.encode(None))
        samples = av.AudioFrame.from_ndarray(sound[None].astype(np.float32), format="fltp", layout="mono")
        samples.sample_rate, samples.pts, samples.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
        container.mux(audio_stream.encode(samples))
        container.mux(audio_stream.encode(None))


def write_strip(path: Path, frames: np.ndarray) -> None:
    """A PNG of up to 8 frames, evenly spread over the video, side by side."""
    from PIL import Image

    shown = frames[np.linspace(0, len(frames) - 1, min(_STRIP_FRAMES, len(frames))).round().astype(int)]
    Image.fromarray(np.concatenate(list(shown), axis=1)).save(path)


def lip_probe(frames: np.ndarray, fps: int, sound: np.ndarray) -> float | None:
    """The first canonical correlation of the lips' movement and the sound at no offset, 0 to 1. A SyncProbe.

    It is the measure of tasks.stages.sync.lip_audio_correlation. None where there is no face, nothing moves, or
    MediaPipe is not installed.
    """
    import tempfile

    from tasks.stages.identity.stage import Identity, IdentitySettings
    from tasks.stages.sync.lip_audio_correlation import lip_curves, match, sound_curves

    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        path = Path(folder) / "sample.mp4"
        write_video(path, frames, fps, sound)
        count, height, width = frames.shape[:3]
        record = ClipRecord(
            clip_id="sample", source_id="sample", start_s=0, end_s=count / fps, fps=fps, frames=count, width=width,
            height=height, video="", audio="", metadata={},
        )  # fmt: skip
        try:
            lips = Identity(IdentitySettings()).measure(Clip(record, path, None)).arrays["lips"]
        except MissingBackend:
            return None
    best = match(lip_curves(lips, fps), sound_curves(sound), max_offset_s=2 / fps)
    return best.correlation if best else None


def brightness_probe(frames: np.ndarray, fps: int, sound: np.ndarray) -> float | None:
    """The largest correlation of brightness and loudness among 8 x 8 parts of the frame, 0 to 1. A SyncProbe.

    It serves videos without a face. Some part of a frame correlates with any sound by chance. The samples with silence
    and with shifted sound show how much. None where nothing changes.
    """
    import cv2

    count = min(len(frames), len(sound) * fps // SAMPLE_RATE)
    if count < 2:
        return None
    edges = np.arange(count + 1) * SAMPLE_RATE // fps
    power = np.add.reduceat(np.square(sound[: edges[-1]], dtype=np.float64), edges[:-1]) / np.diff(edges)
    loudness = np.log(power + 1e-6)  # -60 dB
    parts = np.stack([cv2.resize(frame, (8, 8), interpolation=cv2.INTER_AREA) for frame in frames[:count]])
    brightness = parts.mean(axis=3, dtype=np.float64).reshape(count, -1)
    loudness, brightness = loudness - loudness.mean(), brightness - brightness.mean(axis=0)
    deviation = np.sqrt(np.square(brightness).mean(axis=0))
    changing = deviation > 0.5  # grey levels
    if not changing.any() or loudness.std() == 0:
        return None
    products = (brightness[:, changing] * loudness[:, None]).mean(axis=0)
    return float(np.abs(products / (deviation[changing] * loudness.std())).max())
