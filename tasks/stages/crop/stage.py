"""The part of the picture that training sees, and sound shifted to be in sync with the lips.

physavatar, appendix A: "single-person, upper-body shots that focus on the most informative regions", 512x512 at 25
frames a second. active-mind keeps the whole picture at 480p. Published practice shifts sound that is late or early by a
constant until the offset is zero (LatentSync's preprocessing, docs/thresholds.md).
"""

import io
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from tasks.media.clip import SAMPLE_RATE, Clip, Measurement, Unmeasurable, Value
from tasks.media.encode import X264Preset
from tasks.stages.base import Stage, StageSettings
from tasks.stages.crop.resample import write_windows
from tasks.stages.crop.windows import BACKENDS, CropBackend


class CropSettings(StageSettings):
    """What is cut out, how it is written, and whether the sound is shifted."""

    choices: ClassVar = {"backend": BACKENDS}

    backend: str = "upper_body"
    """What is cut out: "upper_body", a square window that follows the face; "whole", the whole picture as it is."""
    size: int = Field(default=512, ge=64, le=2048, multiple_of=2)
    """Pixels: width and height of the square that is written."""
    closest: float = Field(default=4.0, ge=2.0, le=20.0)
    """The smallest side of the window, in face heights (brow to chin). Between `closest` and `widest` the side is as
    near to `size` pixels of the clip as it can be, so that nothing is enlarged more than needed."""
    widest: float = Field(default=5.25, ge=2.0, le=20.0)
    """The largest side of the window, in face heights. "Upper body" ends at a face of 1 / 5.26 of the height, 0.19
    (tasks.stages.people.stage)."""
    free: float = Field(default=0.08, ge=0.0, le=0.3)
    """Window widths by which the face may leave its place before the window follows."""
    qp: int = Field(default=20, ge=1, le=51)
    """The encoder's quantizer, as for clips."""
    preset: X264Preset = "ultrafast"
    """The encoder's preset, as for clips."""
    sound: Literal["as_is", "shift"] = "as_is"
    """What happens to the sound: "as_is", nothing; "shift", it is moved by the offset that the stage sync found, if the
    confidence is high enough."""
    min_confidence: float | None = None
    """Sync's confidence from which its offset is trusted. Each backend of sync has a scale of its own, so there is no
    default."""
    min_shift_s: float = Field(default=0.04, ge=0.0, le=10.0)
    """Seconds: smaller offsets are not corrected, because they are within sync's own error of a frame."""
    max_shift_s: float = Field(default=1.0, gt=0.0, le=10.0)
    """Seconds: larger offsets are not corrected, because the sound is more likely not of this picture at all."""

    @model_validator(mode="after")
    def _check_bounds(self) -> "CropSettings":
        for low, high in (("closest", "widest"), ("min_shift_s", "max_shift_s")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low):g} is above {high} {getattr(self, high):g}")
        if self.sound == "shift" and self.min_confidence is None:
            raise ValueError("sound: shift needs min_confidence, the confidence from which sync's offset is trusted")
        return self


class Crop(Stage[CropSettings]):
    """The cut-out picture, and the shifted sound.

    The window has one size for the whole clip. It moves as little as it can while the face, with a quarter of its
    height around it, stays inside. It never leaves the frame.

    Columns. All but `reason` are None without a face to follow.
        width, height: pixels of the new picture.
        scale: pixels of the clip for one pixel of the new picture. Below 1 the picture is enlarged.
        face_inside: share of the frames with a face in which its box lies inside the window, 0 to 1. A face that the
            edge of the frame cuts does not. None without a face.
        face_height: median height of the face, brow to chin, as a fraction of the new picture's height. None without a
            face.
        window_speed: the window's greatest speed, window widths per second.
        sound_shift_s: seconds added to the sound's times, negative where late sound is moved to earlier. 0 if it stays
            as it is, None without sound.
        offset_s: seconds that remain of the offset that sync found. None if sync found none, or did not run.
        reason: "no face" if there is none to follow, "" otherwise.
    Arrays:
        crop_box: [frames, 4] float32, x0, y0, x1, y1 of the window in pixels of the clip.
    Files:
        mp4: the new picture, at the clip's rate; none if the whole picture stays.
        flac: the sound, as long as the clip's; none if it is not shifted.
    """

    name: ClassVar[str] = "crop"
    version: ClassVar[int] = 1
    backends: ClassVar = {"backend": BACKENDS}
    columns: ClassVar[dict[str, type]] = {
        "width": int,
        "height": int,
        "scale": float,
        "face_inside": float,
        "face_height": float,
        "window_speed": float,
        "sound_shift_s": float,
        "offset_s": float,
        "reason": str,
    }
    needs: ClassVar[tuple[str, ...]] = ("identity",)
    uses: ClassVar[tuple[str, ...]] = ("sync",)
    remakes_clip: ClassVar[bool] = True

    @classmethod
    def needed(cls, settings: CropSettings) -> tuple[str, ...]:
        return (*cls.needs, "sync") if settings.sound == "shift" else cls.needs

    @cached_property
    def _backend(self) -> CropBackend:
        settings = self.settings
        return BACKENDS[settings.backend](settings.size, settings.closest, settings.widest, settings.free)

    def measure(self, clip: Clip) -> Measurement:
        record, settings = clip.record, self.settings
        faces = clip.found["identity"].arrays["face_box"] * np.array([record.width, record.height] * 2, np.float32)
        seen = ~np.isnan(faces).any(axis=1)
        files: dict[str, bytes] = {}
        windows = self._backend.windows(record, faces)
        if windows is None:
            return Measurement({**dict.fromkeys(self.columns), "reason": "no face"})
        width, height = record.width, record.height
        if self._backend.cuts:
            width = height = settings.size
            files["mp4"] = write_windows(clip, windows, settings.size, settings.qp, settings.preset)
        shift_s, sound = _shifted_sound(clip, settings)
        if sound is not None:
            files["flac"] = sound
        # How far the face reaches beyond each edge of the window, in pixels: [frames, 4].
        beyond = np.concatenate([windows[:, :2] - faces[:, :2], faces[:, 2:] - windows[:, 2:]], axis=1)
        inside = beyond.max(axis=1) <= 0
        side_px = float(windows[0, 3] - windows[0, 1])
        steps = np.hypot(*np.diff(windows[:, :2].astype(np.float64), axis=0).T)
        offset_s = clip.found["sync"].columns["offset_s"] if "sync" in clip.found else None
        assert offset_s is None or isinstance(offset_s, float)
        columns: dict[str, Value] = {
            "width": width,
            "height": height,
            "scale": side_px / height,
            "face_inside": float(inside[seen].mean()) if seen.any() else None,
            "face_height": float(np.median(faces[seen, 3] - faces[seen, 1])) / side_px if seen.any() else None,
            "window_speed": float(steps.max(initial=0.0)) * record.fps / side_px,
            "sound_shift_s": shift_s,
            "offset_s": None if offset_s is None else offset_s + (shift_s or 0.0),
            "reason": "",
        }
        return Measurement(columns, {"crop_box": windows}, files)


def _shifted_sound(clip: Clip, settings: CropSettings) -> tuple[float | None, bytes | None]:
    """The seconds added to the sound's times, None without sound; and the shifted sound as FLAC, None if it stays."""
    import soundfile

    if clip.audio_path is None:
        return None, None
    if settings.sound == "as_is" or settings.min_confidence is None:
        return 0.0, None
    if "sync" not in clip.found:
        raise Unmeasurable("`sound: shift` needs the stage sync before crop, which measures the offset")
    sync = clip.found["sync"].columns
    offset_s, confidence = sync["offset_s"], sync["confidence"]
    if not isinstance(offset_s, float) or not isinstance(confidence, float):
        return 0.0, None
    if confidence < settings.min_confidence or not settings.min_shift_s <= abs(offset_s) <= settings.max_shift_s:
        return 0.0, None
    by = -round(offset_s * SAMPLE_RATE)
    # Read as integers, so that no sample's value changes.
    samples, _ = soundfile.read(clip.audio_path, dtype="int16")
    buffer = io.BytesIO()
    soundfile.write(buffer, shift_sound(samples, by), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return by / SAMPLE_RATE, buffer.getvalue()


def shift_sound(samples: np.ndarray, by: int) -> np.ndarray:
    """Move a sound, [samples], to `by` samples later, or earlier if `by` is negative.

    The length stays. The part for which there is no sound is silent.
    """
    moved = np.zeros_like(samples)
    by = min(max(by, -len(samples)), len(samples))
    if by >= 0:
        moved[by:] = samples[: len(samples) - by]
    else:
        moved[:by] = samples[-by:]
    return moved
