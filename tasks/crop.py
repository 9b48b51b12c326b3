"""The part of the picture that training sees, and sound put where the lips are.

physavatar, appendix A: "single-person, upper-body shots that focus on the most informative regions", 512x512 at 25
frames a second. active-mind keeps the whole picture at 480p. Published practice shifts sound that is late or early by a
constant until the offset is zero (LatentSync's preprocessing, thresholds.md).
"""

import io
import math
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from tasks.clip import SAMPLE_RATE, Clip
from tasks.crop_path import calm_path
from tasks.stage import Measurement, Stage, StageSettings, Unmeasurable, Value

if TYPE_CHECKING:
    import av

_FACE_AT = (0.5, 0.36)  # of the window's width and height, where the middle of the face is best
_MARGIN = 0.25  # face heights around the face that the window never cuts
_STEADY = 5  # frames of the running median that a single wrong box does not get through

_LOBES = 3  # of the Lanczos filter


class CropSettings(StageSettings):
    """What is cut out, how it is written, and whether the sound is moved.

    backend: "upper_body", a square window that follows the face; "whole", the picture as it is.
    size: pixels, width and height of the square that is written.
    closest, widest: bounds of the window's side in face heights (brow to chin). Between them it is as near to `size`
        pixels of the clip as can be, so that no more than needed is enlarged. A face of 1 / 5.26 of the height, 0.19,
        is where "upper body" ends (tasks.people).
    free: how far the face may stray from its place before the window follows, in window widths.
    qp, preset: of the encoder, as for clips.
    sound: "as_is", or "shift": by the offset that the stage sync found, if it may be trusted.
    min_confidence: sync's confidence from which its offset is trusted; each backend of sync has a scale of its own, so
        that there is no default.
    min_shift_s, max_shift_s: bounds of the offsets that are put right; smaller ones are within sync's own error of a
        frame, larger ones are more likely not this picture's sound at all.
    """

    backend: Literal["upper_body", "whole"] = "upper_body"
    size: int = Field(default=512, ge=64, le=2048, multiple_of=2)
    closest: float = Field(default=4.0, ge=2.0, le=20.0)
    widest: float = Field(default=5.25, ge=2.0, le=20.0)
    free: float = Field(default=0.08, ge=0.0, le=0.3)
    qp: int = Field(default=20, ge=1, le=51)
    preset: Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"] = (
        "ultrafast"
    )
    sound: Literal["as_is", "shift"] = "as_is"
    min_confidence: float | None = None
    min_shift_s: float = Field(default=0.04, ge=0.0, le=10.0)
    max_shift_s: float = Field(default=1.0, gt=0.0, le=10.0)

    @model_validator(mode="after")
    def _fits(self) -> "CropSettings":
        for low, high in (("closest", "widest"), ("min_shift_s", "max_shift_s")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low):g} is above {high} {getattr(self, high):g}")
        if self.sound == "shift" and self.min_confidence is None:
            raise ValueError("sound: shift needs min_confidence, sync's confidence from which its offset is trusted")
        return self


class Crop(Stage[CropSettings]):
    """The cut-out picture, and the shifted sound.

    The window has one size for the whole clip and moves as little as it can while the face, with a quarter of its
    height around it, stays inside; where the frame ends, the window does too.

    Columns:
        width, height: pixels of the picture that is left; None, like all but `reason`, without a face to follow.
        scale: pixels of the clip for one of that picture; below 1 the picture is enlarged.
        face_inside: share of the frames with a face in which its box lies inside the window, 0 to 1; a face that the
            camera cuts does not. None without a face.
        face_height: median height of the face, brow to chin, as a fraction of that picture's; None likewise.
        window_speed: the window's greatest speed, window widths per second.
        sound_shift_s: seconds added to the sound's times, below zero when sound that was late now comes earlier; 0
            when it stays as it is, None without sound.
        offset_s: what remains of the offset that sync found, seconds; None where it found none, or was not asked.
        reason: "no face" when there is none to follow, "" otherwise.
    Arrays:
        crop_box: [frames, 4] float32, x0, y0, x1, y1 of the window in pixels of the clip.
    Files:
        mp4: the picture, at the clip's rate; none when the whole picture stays.
        flac: the sound, as long as the clip's; none when it is not shifted.
    """

    name: ClassVar[str] = "crop"
    version: ClassVar[int] = 1
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

    def backend_version(self) -> str:
        import cv2

        return f"pyav {version('av')}, opencv {cv2.__version__}, scipy {version('scipy')}"

    @classmethod
    def needed(cls, settings: CropSettings) -> tuple[str, ...]:
        return (*cls.needs, "sync") if settings.sound == "shift" else cls.needs

    def measure(self, clip: Clip) -> Measurement:
        record, settings = clip.record, self.settings
        faces = clip.found["identity"].arrays["face_box"] * np.array([record.width, record.height] * 2, np.float32)
        seen = ~np.isnan(faces).any(axis=1)
        files: dict[str, bytes] = {}
        if settings.backend == "whole":
            windows = np.tile(np.array([0, 0, record.width, record.height], np.float32), (record.frames, 1))
            width, height = record.width, record.height
        elif not seen.any():
            return Measurement({**dict.fromkeys(self.columns), "reason": "no face"})
        else:
            side = window_side(faces[seen], settings, (record.width, record.height))
            windows = follow(faces, side, settings.free, (record.width, record.height), record.fps)
            width = height = settings.size
            files["mp4"] = _written(clip, windows, settings)
        shift_s, sound = _sound(clip, settings)
        if sound is not None:
            files["flac"] = sound
        reaches = np.concatenate([windows[:, :2] - faces[:, :2], faces[:, 2:] - windows[:, 2:]], axis=1)
        inside = reaches.max(axis=1) <= 0
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


def window_side(faces: np.ndarray, settings: CropSettings, frame: tuple[int, int]) -> int:
    """Side of the window in pixels, even. faces: [frames, 4] boxes in pixels, none missing. frame: width and height."""
    width, height = faces[:, 2] - faces[:, 0], faces[:, 3] - faces[:, 1]
    usual = float(np.median(height))
    side = min(max(settings.closest * usual, settings.size), settings.widest * usual)
    # who comes nearer to the camera than usual is not cut either
    side = max(side, float(max(width.max(), height.max())) + 2 * _MARGIN * usual)
    return min(2 * math.ceil(side / 2), *(length // 2 * 2 for length in frame))


def follow(faces: np.ndarray, side: int, free: float, frame: tuple[int, int], fps: float) -> np.ndarray:
    """Where the window is in each frame.

    faces: [frames, 4] boxes in pixels, NaN where no face is seen (there it is taken to move evenly from where it was
    last seen to where it is seen next). side: of the window, pixels. free: see CropSettings. frame: width and height.

    Returns: [frames, 4] float32, x0, y0, x1, y1 in pixels, inside the frame.
    """
    from scipy.ndimage import median_filter

    every = np.arange(len(faces))
    seen = ~np.isnan(faces).any(axis=1)
    whole = np.stack([np.interp(every, every[seen], faces[seen, edge]) for edge in range(4)], axis=1)
    whole = median_filter(whole, size=(_STEADY, 1), mode="nearest")
    margin = _MARGIN * float(np.median(whole[:, 3] - whole[:, 1]))
    corners = []
    for axis in range(2):
        first, last, room = whole[:, axis], whole[:, axis + 2], frame[axis] - side
        low, high, wanted = (
            np.clip(at, 0, room) / side
            for at in (last + margin - side, first - margin, (first + last) / 2 - _FACE_AT[axis] * side)
        )
        corner = calm_path(wanted, np.minimum(low, high), high, free, fps) * side
        if np.ptp(corner) < 1:
            # a window that stands still stands on whole pixels of all planes, which need no resampling
            corner = np.full(len(corner), 2 * np.round(np.median(corner) / 2))
        corners.append(np.clip(corner, 0, room))
    x, y = corners
    return np.stack([x, y, x + side, y + side], axis=1).astype(np.float32)


def _written(clip: Clip, windows: np.ndarray, settings: CropSettings) -> bytes:
    """The windows' pictures as one MP4."""
    import cv2

    from tasks.encode import ClipEncoder

    cv2.setNumThreads(1)  # the workers are the parallelism
    record, size = clip.record, settings.size
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        path = Path(folder) / "crop.mp4"
        encoder = ClipEncoder(path, record.fps, (size, size), settings.qp, settings.preset, record.height)
        try:
            for frame in clip.pictures():
                if encoder.frames == len(windows):
                    raise Unmeasurable(f"the picture has more than the {len(windows)} frames that it should have")
                encoder.add(_cut(frame, windows[encoder.frames], size))
            if encoder.frames != len(windows):
                raise Unmeasurable(f"the picture has {encoder.frames} frames and should have {len(windows)}")
        except BaseException:
            encoder.abandon()
            raise
        encoder.close()
        return path.read_bytes()


def _cut(frame: "av.VideoFrame", window: np.ndarray, size: int) -> "av.VideoFrame":
    """A window of a yuv420p frame scaled to a square of `size`, without a detour over RGB."""
    import cv2
    from av import VideoFrame

    rows = frame.to_ndarray()
    planes = (rows[: frame.height], *rows[frame.height :].reshape(2, frame.height // 2, frame.width // 2))
    cut: list[np.ndarray] = []
    for plane, per_pixel in zip(planes, (1, 2, 2), strict=True):
        x, y, end_x, _ = (float(edge) / per_pixel for edge in window)
        part = _part(plane, x, y, round(end_x - x))
        goal = size // per_pixel
        how = cv2.INTER_AREA if len(part) > goal else cv2.INTER_CUBIC
        cut.append(cv2.resize(part, (goal, goal), interpolation=how).reshape(-1, size))
    square = VideoFrame.from_ndarray(np.concatenate(cut).astype(np.uint8, copy=False), format="yuv420p")
    square.colorspace, square.color_range = frame.colorspace, frame.color_range
    square.color_primaries, square.color_trc = frame.color_primaries, frame.color_trc
    return square


def _part(plane: np.ndarray, x: float, y: float, side: int) -> np.ndarray:
    """The square of a plane whose corner is at x, y, between pixels too: else a slow window would tremble."""
    import cv2

    if x.is_integer() and y.is_integer():
        return plane[int(y) : int(y) + side, int(x) : int(x) + side]
    left, top = math.floor(x), math.floor(y)
    x0, y0 = max(0, left - _LOBES), max(0, top - _LOBES)
    around = plane[y0 : top + side + _LOBES, x0 : left + side + _LOBES]
    # every pixel is moved by the same part of a pixel, so that moving is a convolution
    across, down = (_between(at - math.floor(at)) for at in (x, y))
    anchor = (_LOBES - 1, _LOBES - 1)
    moved = cv2.sepFilter2D(around, -1, across, down, anchor=anchor, borderType=cv2.BORDER_REPLICATE)
    return moved[top - y0 : top - y0 + side, left - x0 : left - x0 + side]


def _between(fraction: float) -> np.ndarray:
    """Lanczos' weights, [2 lobes] float32, of the pixels around a place `fraction` of a pixel after one of them."""
    distance = np.arange(1 - _LOBES, _LOBES + 1) - fraction
    weights = np.sinc(distance) * np.sinc(distance / _LOBES)
    return (weights / weights.sum()).astype(np.float32)


def _sound(clip: Clip, settings: CropSettings) -> tuple[float | None, bytes | None]:
    """Seconds added to the sound's times, and the shifted sound as FLAC, None when it stays where it is."""
    import soundfile

    if clip.audio_path is None:
        return None, None
    if settings.sound == "as_is" or settings.min_confidence is None:
        return 0.0, None
    if "sync" not in clip.found:
        raise Unmeasurable("`sound: shift` needs the stage sync before crop, which measures by how much")
    sync = clip.found["sync"].columns
    offset_s, confidence = sync["offset_s"], sync["confidence"]
    if not isinstance(offset_s, float) or not isinstance(confidence, float):
        return 0.0, None
    if confidence < settings.min_confidence or not settings.min_shift_s <= abs(offset_s) <= settings.max_shift_s:
        return 0.0, None
    by = -round(offset_s * SAMPLE_RATE)
    # whole numbers, so that not a bit of a sample changes
    samples, _ = soundfile.read(clip.audio_path, dtype="int16")
    buffer = io.BytesIO()
    soundfile.write(buffer, shifted(samples, by), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return by / SAMPLE_RATE, buffer.getvalue()


def shifted(samples: np.ndarray, by: int) -> np.ndarray:
    """[samples] moved to `by` samples later, as long as before, with silence where nothing is known."""
    moved = np.zeros_like(samples)
    by = min(max(by, -len(samples)), len(samples))
    if by >= 0:
        moved[by:] = samples[: len(samples) - by]
    else:
        moved[:by] = samples[-by:]
    return moved
