"""Writing a window of each frame of a clip as a square MP4."""

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.media.clip import Clip, Unmeasurable
from tasks.media.encode import ClipEncoder, X264Preset

if TYPE_CHECKING:
    import av

_LOBES = 3  # of the Lanczos filter


def write_windows(clip: Clip, windows: np.ndarray, size: int, qp: int, preset: X264Preset) -> bytes:
    """Write the windows of a clip's frames as one MP4 at the clip's rate.

    windows: [frames, 4] x0, y0, x1, y1 in pixels. size: width and height to write, pixels. qp, preset: of x264.

    Raises Unmeasurable if the clip has another number of frames.
    """
    import cv2

    cv2.setNumThreads(1)  # the workers run in parallel, so each uses one thread
    record = clip.record
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        path = Path(folder) / "crop.mp4"
        encoder = ClipEncoder(path, record.fps, (size, size), qp, preset, record.height)
        try:
            for frame in clip.decoded_frames():
                if encoder.frames == len(windows):
                    raise Unmeasurable(f"the video has more than the {len(windows)} frames that it should have")
                encoder.add(_cut(frame, windows[encoder.frames], size))
            if encoder.frames != len(windows):
                raise Unmeasurable(f"the video has {encoder.frames} frames and should have {len(windows)}")
        except BaseException:
            encoder.abandon()
            raise
        encoder.close()
        return path.read_bytes()


def _cut(frame: "av.VideoFrame", window: np.ndarray, size: int) -> "av.VideoFrame":
    """Scale a window of a yuv420p frame to a square of `size`, without a conversion to RGB."""
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
    """Cut a square out of a plane. Its corner x, y may lie between pixels, or a slow window would jitter."""
    import cv2

    if x.is_integer() and y.is_integer():
        return plane[int(y) : int(y) + side, int(x) : int(x) + side]
    left, top = math.floor(x), math.floor(y)
    x0, y0 = max(0, left - _LOBES), max(0, top - _LOBES)
    around = plane[y0 : top + side + _LOBES, x0 : left + side + _LOBES]
    # All pixels are shifted by the same fraction of a pixel, so the shift is a convolution.
    across, down = (_lanczos_weights(at - math.floor(at)) for at in (x, y))
    anchor = (_LOBES - 1, _LOBES - 1)
    shifted = cv2.sepFilter2D(around, -1, across, down, anchor=anchor, borderType=cv2.BORDER_REPLICATE)
    return shifted[top - y0 : top - y0 + side, left - x0 : left - x0 + side]


def _lanczos_weights(fraction: float) -> np.ndarray:
    """Weights of the pixels around a place that lies `fraction` of a pixel after one of them: [2 lobes] float32."""
    distance = np.arange(1 - _LOBES, _LOBES + 1) - fraction
    weights = np.sinc(distance) * np.sinc(distance / _LOBES)
    return (weights / weights.sum()).astype(np.float32)
