"""How much moves in a clip, and whether it is the camera or the subject.

Optical flow is measured at one frame rate and one size, whatever the clip's own. Speeds are in short sides of the frame
per second, so they can be compared across clips: 1 short side per second is 480 / 24 = 20 pixels a frame at 480p and 24
frames a second. Goku's bounds for RAFT at 480p, 0.3 to 20 pixels a frame (docs/thresholds.md, second hand), are 0.015
to 1.0 short sides per second.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import count, pairwise
from typing import ClassVar

import numpy as np
from pydantic import Field

from tasks.media.clip import Clip, Measurement, Unmeasurable
from tasks.stages.base import MAX_ASPECT, Stage, StageSettings
from tasks.stages.motion.optical_flow import BACKENDS, FlowBackend

_GRID = 8  # pixels between the points at which the flow is read
_INLIER = 0.5  # pixels by which a point may be off the camera's movement, or a twentieth of the median movement


class MotionSettings(StageSettings):
    """How the flow is measured, and what counts as static and as chaotic.

    The thresholds were measured with DIS and have to be measured anew for RAFT. Still frames that were compressed again
    stay below 0.005, seven real talkers above it. The camera's velocity changes by 0.27 at most in real talk, by 0.07
    in a pan, by 2 (median) in a violent shake.
    """

    choices: ClassVar = {"backend": BACKENDS}

    backend: str = "dis"
    """The optical flow: "dis", OpenCV's DIS; "raft", a network."""
    rate_hz: float = Field(default=12.0, gt=0.0, le=60.0)
    """Frames a second that are compared. In a clip with fewer, all frames are."""
    short_side: int = Field(default=180, ge=64, le=1080)
    """Pixels that the frame's short side is scaled to."""
    static_speed: float = Field(default=0.005, ge=0.0)
    """Short sides per second. A pair of frames is static if the 99th percentile of its speed is below this."""
    chaotic_speed: float = Field(default=1.0, ge=0.0)
    """Short sides per second. A pair of frames with a higher mean speed is chaotic. 1.0 is Goku's upper bound."""
    chaotic_jolt: float = Field(default=0.5, ge=0.0)
    """Short sides per second by which the camera's velocity changes from one pair of frames to the next. Above it, the
    camera is shaken and the pair is chaotic. A pan keeps its velocity, however fast it is."""


class Motion(Stage[MotionSettings]):
    """Speeds, and the shares of a clip that are static or chaotic.

    Columns. Speeds are in short sides per second, means over the frame and over the pairs of frames.
        speed: of the flow.
        camera_speed: of the camera's movement: the shift, turn and zoom that most of the frame follows.
        subject_speed: of the flow less the camera's movement.
        static_fraction: share of the pairs in which nothing moves, 0 to 1: the 99th percentile of the speed is below
            `static_speed`. By this percentile, a small figure that talks in a still frame is not static.
        chaotic_fraction: share of the pairs with a mean speed above `chaotic_speed`, or with a change of the camera's
            velocity above `chaotic_jolt`, 0 to 1.
    """

    name: ClassVar[str] = "motion"
    version: ClassVar[int] = 1
    backends: ClassVar = {"backend": BACKENDS}
    columns: ClassVar[dict[str, type]] = {
        "speed": float,
        "camera_speed": float,
        "subject_speed": float,
        "static_fraction": float,
        "chaotic_fraction": float,
    }

    @cached_property
    def _backend(self) -> FlowBackend:
        return BACKENDS[self.settings.backend]()

    def measure(self, clip: Clip) -> Measurement:
        settings, fps = self.settings, clip.record.fps
        rate = settings.rate_hz if settings.rate_hz < fps else None
        width, height = clip.record.width, clip.record.height
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise Unmeasurable(f"a frame of {width}x{height} is too narrow to measure motion in it")
        scale = settings.short_side / min(width, height)
        size = (round(width * scale / 2) * 2, round(height * scale / 2) * 2)
        # The index of each frame, as tasks.media.frames.rgb_frames chooses it: the frame that is shown in the middle of
        # its interval.
        indices = (int((number + 0.5) * fps / rate) if rate else number for number in count())
        pairs: list[_FramePair] = []
        flows = self._backend.flows(clip.frames(rate, size))
        for flow, (before, index) in zip(flows, pairwise(indices), strict=False):
            # The clip's rate need not be a multiple of `rate`, so the time between two frames varies.
            per_second = fps / (index - before) / settings.short_side
            pairs.append(_frame_pair(flow, per_second, pairs[-1] if pairs else None))
        if not pairs:
            raise Unmeasurable("the clip has fewer than two frames, so there is no motion to measure")
        # In a compressed still video, a key frame differs a little from the frame before it. The median over three
        # pairs keeps one such pair from counting as motion.
        fast = np.pad([pair.fast_speed for pair in pairs], 1, mode="edge")
        static = np.median(np.lib.stride_tricks.sliding_window_view(fast, 3), axis=1) < settings.static_speed
        chaotic = [pair.speed > settings.chaotic_speed or pair.jolt > settings.chaotic_jolt for pair in pairs]
        return Measurement(
            {
                "speed": float(np.mean([pair.speed for pair in pairs])),
                "camera_speed": float(np.mean([pair.camera_speed for pair in pairs])),
                "subject_speed": float(np.mean([pair.subject_speed for pair in pairs])),
                "static_fraction": float(np.mean(static)),
                "chaotic_fraction": float(np.mean(chaotic)),
            }
        )


@dataclass(frozen=True)
class _FramePair:
    """Motion from one frame to the next, in short sides per second."""

    speed: float
    """Mean speed of the flow."""
    fast_speed: float
    """99th percentile of the speed."""
    camera_speed: float
    """Mean speed of the camera's movement."""
    subject_speed: float
    """Mean speed of the flow less the camera's movement."""
    camera: np.ndarray
    """[points, 2]: the velocity that the camera's movement gives each point."""
    jolt: float
    """Mean change of `camera` since the pair of frames before."""


def _frame_pair(flow: np.ndarray, per_second: float, before: _FramePair | None) -> _FramePair:
    """Compute speeds from a flow.

    flow: [height, width, 2] in pixels. per_second: turns pixels into short sides per second. before: the pair before.
    """
    height, width = flow.shape[:2]
    y, x = (axis.ravel() for axis in np.mgrid[_GRID // 2 : height : _GRID, _GRID // 2 : width : _GRID])
    points = np.stack([x, y], axis=1).astype(np.float32)
    moved = flow[y, x]
    camera = camera_flow(points, moved)
    # Points that the camera's movement carries out of the frame have no measured flow of their own.
    target = points + camera
    inside = ((target >= 0) & (target < (width, height))).all(axis=1)
    rest = (moved - camera)[inside]
    speeds = np.hypot(moved[:, 0], moved[:, 1]) * per_second
    velocity = camera * per_second
    return _FramePair(
        speed=float(speeds.mean()),
        fast_speed=float(np.percentile(speeds, 99)),
        camera_speed=_mean_length(velocity),
        subject_speed=_mean_length(rest * per_second),
        camera=velocity,
        jolt=_mean_length(velocity - before.camera) if before else 0.0,
    )


def camera_flow(points: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """The part of a flow that is explained by the camera's shift, turn and zoom: a similarity that most points follow.

    points: [points, 2] float32, their places in pixels. moved: [points, 2] float32, their flow in pixels.

    Returns: [points, 2], the camera's flow in pixels; zero where no two points agree.
    """
    import cv2

    tolerance = max(_INLIER, 0.05 * float(np.median(np.hypot(moved[:, 0], moved[:, 1]))))
    # OpenCV seeds RANSAC anew in each call, so the same flow gives the same result.
    matrix, _ = cv2.estimateAffinePartial2D(
        points, points + moved, method=cv2.RANSAC, ransacReprojThreshold=tolerance, maxIters=500
    )
    if matrix is None or not math.isfinite(float(matrix.sum())):
        return np.zeros_like(points)
    # Not a matrix product, because its last digits depend on the number of threads.
    x, y = points[:, 0], points[:, 1]
    return np.stack([row[0] * x + row[1] * y + row[2] for row in matrix], axis=1) - points


def _mean_length(vectors: np.ndarray) -> float:
    return float(np.hypot(vectors[:, 0], vectors[:, 1]).mean()) if len(vectors) else 0.0
