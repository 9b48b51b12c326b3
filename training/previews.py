"""Videos sampled in the course of a training, and whether their mouths follow the sound: sync gain.

Loss says nothing of lip sync. So the same clip is sampled with its own sound, with silence and with its sound shifted
by half its length; what the mouth follows the true sound more in the first than in the other two is the sound's doing.
"""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_manifests.dataset import load
from data_manifests.storage import Storage, answering
from tasks.clip import SAMPLE_RATE, Clip, ClipRecord
from tasks.latent_codec import CODECS, STRIDE_S, STRIDE_T, latent_frames
from tasks.log_mel import frame_windows
from tasks.stage import MissingBackend
from training.clip_latents import ClipLatents
from training.draws import generator
from training.loader import tiers_within
from training.models.active_mind import ActiveMind, Conditions
from training.parallel import Team
from training.sample_reader import LOG_MEL, Bucket, SampleReader, Sound, sound_of
from training.sampling import first_noise, sample_clip, sigma_steps
from training.shard_index import Entry, read_index
from training.tracking import Trackers

if TYPE_CHECKING:
    from training.job import Job

# (frames [frames, height, width, 3] uint8, frames a second, samples at 16 kHz) -> how well the mouth follows the
# sound, more is better; None where there is nothing to be told
Probe = Callable[[np.ndarray, int, np.ndarray], float | None]

_STRIP = 8  # frames side by side in a picture of a sample


class Subject(NamedTuple):
    """A clip of the dataset whose first frame, sound and text a sample is made from.

    latent: [latent frames, channels, height, width]. audio: [frames, window, dim], or [speakers, frames, window, dim]
    with a mask [speakers, latent frames, height, width]. text: [tokens, dim]. sound: [samples] float32 at 16 kHz.
    """

    key: str
    latent: np.ndarray
    audio: np.ndarray
    text: np.ndarray
    mask: np.ndarray | None
    sound: np.ndarray


class Previews:
    """Samples of the first clips of a phase's tier that have usable sound."""

    def __init__(self, job: "Job") -> None:
        self._job, self._fps = job, job.recipe.data.fps
        self._codec = CODECS[job.recipe.data.latents.backend](job.recipe.data.latents.channels)
        self._sound = sound_of(job.manifest, Storage(f"{job.out}/cache"))
        self._subjects = list(_subjects(job, self._sound))
        self._probes: dict[str, tuple[Probe, float] | None] = {}

    def make(
        self, model: ActiveMind, step: int, folder: Path, team: Team, trackers: Trackers | None
    ) -> dict[str, float]:
        """Sample every subject, on every worker; the first one writes KEY.mp4 and KEY.png into `folder`, shows them and
        gives the means of the probe: sync/true, sync/muted, sync/shifted, sync_gain, which is true less the larger of
        the others, and sync/data, what the probe says of the clips themselves."""
        found: list[tuple[float, float, float, float]] = []
        for subject in self._subjects:
            sounds: list[np.ndarray | None] = [subject.audio]
            if self._job.probe is not None:
                shift = subject.audio.shape[-3] // 2
                sounds += [self._silence(subject), np.roll(subject.audio, shift, axis=-3)]
            latents = [self._sample(model, subject, sound, team) for sound in sounds]
            if not team.leads:
                continue
            videos = [self._decoded(latent) for latent in latents]
            folder.mkdir(parents=True, exist_ok=True)
            video, strip = folder / f"{subject.key}.mp4", folder / f"{subject.key}.png"
            write_video(video, videos[0], self._fps, subject.sound)
            write_strip(strip, videos[0])
            if trackers is not None:
                trackers.sample(step, subject.key, video, strip)
            chosen = self._probe(subject)
            if chosen is not None:
                probe, of_data = chosen
                probed = [probe(frames, self._fps, subject.sound) for frames in videos]
                if all(value is not None and math.isfinite(value) for value in probed):
                    found.append((*probed, of_data))  # type: ignore[arg-type]
        if not found:
            return {}
        true, muted, shifted, data = (float(value) for value in np.mean(found, axis=0))
        return {
            "sync/data": data,
            "sync/true": true,
            "sync/muted": muted,
            "sync/shifted": shifted,
            "sync_gain": true - max(muted, shifted),
        }

    def _probe(self, subject: Subject) -> tuple[Probe, float] | None:
        """The job's probe, or the one for any picture where the job's can tell nothing of the clip itself, as of
        puppets; and what it says of the clip. One for a subject all along, so that its curve is of one measure."""
        if self._job.probe is None:
            return None
        if subject.key not in self._probes:
            frames = self._decoded(torch.from_numpy(np.array(subject.latent, np.float32)))
            told = ((probe, probe(frames, self._fps, subject.sound)) for probe in (self._job.probe, picture_probe))
            self._probes[subject.key] = next(((probe, value) for probe, value in told if value is not None), None)
        return self._probes[subject.key]

    def _silence(self, subject: Subject) -> np.ndarray | None:
        """What the sound's windows are where nothing is heard; None where that takes Whisper's weights to know."""
        if self._sound != LOG_MEL:
            return None
        frames = subject.audio.shape[-3]
        windows = frame_windows(np.zeros(frames * SAMPLE_RATE // self._fps, np.float32), frames, self._fps)
        return np.broadcast_to(windows.astype(np.float32), subject.audio.shape)

    def _sample(self, model: ActiveMind, subject: Subject, sound: np.ndarray | None, team: Team) -> Tensor:
        """[latent frames, channels, height, width] on the CPU, begun from the subject's first frame. sound: the model's
        own stand-in for one that is dropped, where None."""

        def one(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.array(array))[None].to(team.device)

        latent = one(subject.latent).transpose(1, 2).float()
        conditions = Conditions(
            audio=one(subject.audio if sound is None else sound).float(),
            text=one(subject.text).float(),
            text_mask=torch.ones(1, len(subject.text), dtype=torch.bool, device=team.device),
            drop_audio=torch.full((1,), sound is None, device=team.device),
            drop_text=torch.zeros(1, dtype=torch.bool, device=team.device),
            # the reference, behind the clip, is its first frame
            speaker_mask=None if subject.mask is None else one(np.concatenate((subject.mask, subject.mask[:, :1]), 1)),
        )
        recipe = self._job.recipe
        seed = generator(recipe.seed, "preview", subject.key).initial_seed()
        sampled = sample_clip(
            model,
            conditions,
            first_noise(tuple(latent.shape), seed, team.device),
            sigma_steps(recipe.run.sample_steps, recipe.timesteps.shift),
            first=latent[:, :, :1],
            reference=one(self._reference(subject)).float(),
            pseudo_last=recipe.run.pseudo_last,
        )
        return sampled[0].transpose(0, 1).cpu()

    def _reference(self, subject: Subject) -> np.ndarray:
        """The first frame as a latent that covers four frames like it: [channels, height, width]."""
        _, _, height, width = subject.latent.shape
        first = next(iter(self._codec.decode([subject.latent[0]], height * STRIDE_S, width * STRIDE_S)))
        return list(self._codec.encode([first] * (STRIDE_T + 1)))[1].latent

    def _decoded(self, latents: Tensor) -> np.ndarray:
        _, _, height, width = latents.shape
        frames = self._codec.decode((latent.numpy() for latent in latents), height * STRIDE_S, width * STRIDE_S)
        return np.stack(list(frames))


def _subjects(job: "Job", sound_kind: Sound) -> Iterator[Subject]:
    """Raises what reading the manifest raises. Samples that cannot be read are passed by: the loader counts them."""
    import io

    import soundfile

    data, address = job.recipe.data, job.manifest
    tiers = tiers_within(data.tiers, job.settings.tier)
    shards = sorted((s for s in load(address).shards if s.tier in tiers), key=lambda shard: shard.name)
    storage = Storage(address.rpartition("/")[0] or ("/" if address.startswith("/") else "."))
    cache = Storage(f"{job.out}/cache")
    reader = SampleReader(storage, shards, ClipLatents(data.latents, cache), sound_kind)
    left = job.recipe.run.samples
    for number, shard in enumerate(shards):
        for place, entry in enumerate(read_index(storage, shard, cache).entries):
            if not left:
                return
            try:
                bucket = _bucket(reader, entry, data.frames, data.fps)
                if bucket is None:
                    continue
                arrays = reader.read(number, place, entry, bucket, 0)
                with answering(address), storage.fs.open(storage.path(shard.name), "rb") as file:
                    file.seek(entry.files["flac"].start)
                    sound, _ = soundfile.read(io.BytesIO(file.read(entry.files["flac"].size)), dtype="float32")
            except Exception:  # noqa: S112 - whatever a broken sample makes its reader raise
                continue
            if arrays.audio is not None:
                heard = sound[: round(data.frames * SAMPLE_RATE / data.fps)]
                text = arrays.text[: data.latents.max_tokens]
                yield Subject(entry.key, arrays.latent, arrays.audio, text, arrays.speaker_mask, heard)
                left -= 1


def _bucket(reader: SampleReader, entry: Entry, frames: int, fps: int) -> Bucket | None:
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
        picture: Any = container.add_stream("libx264", rate=fps, options={"crf": "16"})
        picture.height, picture.width = frames.shape[1:3]
        picture.pix_fmt = "yuv420p"
        heard: Any = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for frame in frames:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(picture.encode(None))
        samples = av.AudioFrame.from_ndarray(sound[None].astype(np.float32), format="fltp", layout="mono")
        samples.sample_rate, samples.pts, samples.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
        container.mux(heard.encode(samples))
        container.mux(heard.encode(None))


def write_strip(path: Path, frames: np.ndarray) -> None:
    """A PNG of some frames, evenly spread, side by side."""
    from PIL import Image

    shown = frames[np.linspace(0, len(frames) - 1, min(_STRIP, len(frames))).round().astype(int)]
    Image.fromarray(np.concatenate(list(shown), axis=1)).save(path)


def lip_probe(frames: np.ndarray, fps: int, sound: np.ndarray) -> float | None:
    """How much of the lips' movement is in the sound at no offset, 0 to 1: the first canonical correlation of
    tasks.lip_sync; None where there is no face, nothing moves, or no MediaPipe is here to see it. A Probe."""
    import tempfile

    from tasks.identity import Identity, IdentitySettings
    from tasks.lip_sync import lip_curves, match, sound_curves

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
    found = match(lip_curves(lips, fps), sound_curves(sound), max_offset_s=2 / fps)
    return found.correlation if found else None


def picture_probe(frames: np.ndarray, fps: int, sound: np.ndarray) -> float | None:
    """How much the brightness of some part of the picture goes with the loudness, 0 to 1: the largest correlation among
    8 x 8 parts; None where nothing changes. A Probe for what has no face. Some part goes with any sound by chance: how
    much of it is chance, muted and shifted sound tell."""
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
