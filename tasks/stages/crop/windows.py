"""The backends of the stage `crop`: which part of each frame is kept."""

import math
from abc import ABC, abstractmethod
from importlib.metadata import version
from typing import ClassVar

import numpy as np

from tasks.media.clip import ClipRecord
from tasks.stages.backend import Backend, Resources
from tasks.stages.crop.path import calm_path

_FACE_AT = (0.5, 0.36)  # of the window's width and height: the best place for the middle of the face
_MARGIN = 0.25  # face heights around the face that the window never cuts
_STEADY = 5  # frames of the running median that removes single wrong boxes


class CropBackend(Backend, ABC):
    """A backend of the stage: the window in each frame."""

    cuts: ClassVar[bool]
    """Whether the windows are cut out and written as a new video."""

    def __init__(self, size: int, closest: float, widest: float, free: float) -> None:
        """The stage's settings of these names."""
        self.size, self.closest, self.widest, self.free = size, closest, widest, free

    @classmethod
    def version(cls) -> str:
        import cv2

        return f"pyav {version('av')}, opencv {cv2.__version__}, scipy {version('scipy')}"

    @abstractmethod
    def windows(self, record: ClipRecord, faces: np.ndarray) -> np.ndarray | None:
        """Choose the window in each frame of a clip.

        faces: [frames, 4] float32, boxes in pixels, NaN in frames without a face.

        Returns: [frames, 4] float32, x0, y0, x1, y1 in pixels; None if there is no face to follow.
        """


class UpperBody(CropBackend):
    """A square window that follows the face."""

    cuts: ClassVar[bool] = True
    # measured: peak growth over one clip of 5 s (benchmarks/backends.py)
    resources: ClassVar[Resources] = Resources(memory_gb=0.1)

    def windows(self, record: ClipRecord, faces: np.ndarray) -> np.ndarray | None:
        seen = ~np.isnan(faces).any(axis=1)
        if not seen.any():
            return None
        frame = (record.width, record.height)
        side = window_side(faces[seen], self.size, self.closest, self.widest, frame)
        return follow_face(faces, side, self.free, frame, record.fps)


class Whole(CropBackend):
    """The whole frame."""

    cuts: ClassVar[bool] = False
    resources: ClassVar[Resources] = Resources(memory_gb=0.1)

    def windows(self, record: ClipRecord, faces: np.ndarray) -> np.ndarray | None:
        return np.tile(np.array([0, 0, record.width, record.height], np.float32), (record.frames, 1))


BACKENDS: dict[str, type[CropBackend]] = {"upper_body": UpperBody, "whole": Whole}


def window_side(faces: np.ndarray, size: int, closest: float, widest: float, frame: tuple[int, int]) -> int:
    """Choose the side of the window: an even number of pixels.

    faces: [frames, 4] boxes in pixels, none missing. size, closest, widest: see CropSettings. frame: its width and
        height in pixels.
    """
    width, height = faces[:, 2] - faces[:, 0], faces[:, 3] - faces[:, 1]
    usual = float(np.median(height))
    side = min(max(closest * usual, size), widest * usual)
    # Large enough for the face in frames where it is nearer to the camera than usual.
    side = max(side, float(max(width.max(), height.max())) + 2 * _MARGIN * usual)
    return min(2 * math.ceil(side / 2), *(length // 2 * 2 for length in frame))


def follow_face(faces: np.ndarray, side: int, free: float, frame: tuple[int, int], fps: float) -> np.ndarray:
    """Choose the place of the window in each frame.

    faces: [frames, 4] boxes in pixels, NaN in frames without the face. There it is taken to move evenly from where it
        was last found to where it is found next.
    side: of the window, pixels. free: see CropSettings. frame: its width and height in pixels. fps: frames a second.

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
            # A window that stands still is put on whole pixels of all planes, which need no resampling.
            corner = np.full(len(corner), 2 * np.round(np.median(corner) / 2))
        corners.append(np.clip(corner, 0, room))
    x, y = corners
    return np.stack([x, y, x + side, y + side], axis=1).astype(np.float32)
