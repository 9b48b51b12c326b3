"""How much moves in a clip, and what: the camera, or what stands before it.

Optical flow is measured at one rate and one size whatever the clip's own, and told in short sides of the frame per
second, so that numbers compare across clips: 1 short side per second is 480 / 24 = 20 pixels a frame at 480p and 24
frames a second. Goku's bounds for RAFT at 480p, 0.3 to 20 pixels a frame (thresholds.md, second hand), are then 0.015
to 1.0.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import count, pairwise
from typing import ClassVar

import numpy as np
from pydantic import Field, field_validator

from tasks.clip import Clip
from tasks.flow import BACKENDS, Flow
from tasks.stage import Measurement, Stage, StageSettings, Unmeasurable, known_backend

_MAX_ASPECT = 8  # at a fixed short side, a picture's cost grows with its aspect ratio
_GRID = 8  # pixels between the points at which the flow is read
_INLIER = 0.5  # pixels that a point may be off the camera's movement, or a twentieth of the median movement


class MotionSettings(StageSettings):
    """How the flow is measured, and what counts as static and as chaotic.

    rate_hz: frames a second to look at (all, in a clip that has fewer). short_side: pixels to scale the frame's short
    side to. static_speed: short sides per second that the fastest hundredth of a static picture does not reach.
    chaotic_speed: mean speed, short sides per second, above which motion is chaotic (1.0 is Goku's upper bound).
    chaotic_jolt: change of the camera's velocity from one pair of frames to the next, short sides per second, above
    which it is shaken; pans, however fast, keep their velocity.

    Measured with DIS, and to be measured anew with RAFT: pictures that stand still, compressed again, stay below 0.005
    and seven real talkers above it; the camera's velocity changes by 0.27 at most in real talk, by 0.07 in a pan, by 2
    (median) in a violent shake.
    """

    backend: str = "dis"
    rate_hz: float = Field(default=12.0, gt=0.0, le=60.0)
    short_side: int = Field(default=180, ge=64, le=1080)
    static_speed: float = Field(default=0.005, ge=0.0)
    chaotic_speed: float = Field(default=1.0, ge=0.0)
    chaotic_jolt: float = Field(default=0.5, ge=0.0)

    @field_validator("backend")
    @classmethod
    def _known(cls, backend: str) -> str:
        return known_backend(backend, BACKENDS)


class Motion(Stage[MotionSettings]):
    """Speeds, and the shares of a clip that stand still or are chaotic.

    Columns; speeds in short sides per second, means over the frame and over the pairs of frames:
        speed: of the flow.
        camera_speed: of the camera's movement, the shift, turn and zoom that most of the picture follows.
        subject_speed: of what remains of the flow without the camera's movement.
        static_fraction: share of the pairs in which nothing moves, 0 to 1: the 99th percentile of the speed is below
            `static_speed`, so that a small figure talking in a still picture is not static.
        chaotic_fraction: share of the pairs in which the picture rushes or is shaken, 0 to 1: mean speed above
            `chaotic_speed`, or a change of the camera's velocity above `chaotic_jolt`.
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

    def backend_version(self) -> str:
        return BACKENDS[self.settings.backend].version()

    def check(self) -> None:
        BACKENDS[self.settings.backend].check()

    @cached_property
    def _flow(self) -> Flow:
        return BACKENDS[self.settings.backend]()

    def measure(self, clip: Clip) -> Measurement:
        settings, fps = self.settings, clip.record.fps
        rate = settings.rate_hz if settings.rate_hz < fps else None
        width, height = clip.record.width, clip.record.height
        if max(width, height) > _MAX_ASPECT * min(width, height):
            raise Unmeasurable(f"a picture of {width}x{height} is too narrow to measure motion in")
        scale = settings.short_side / min(width, height)
        size = (round(width * scale / 2) * 2, round(height * scale / 2) * 2)
        # the frame on display in the middle of its turn, as tasks.clip_frames.images takes it
        indices = (int((number + 0.5) * fps / rate) if rate else number for number in count())
        steps: list[_Step] = []
        for flow, (before, index) in zip(self._flow.flows(clip.frames(rate, size)), pairwise(indices), strict=False):
            # a clip's rate need not be a multiple of ours, so the time between two frames varies
            per_second = fps / (index - before) / settings.short_side
            steps.append(_step(flow, per_second, steps[-1] if steps else None))
        if not steps:
            raise Unmeasurable("fewer than two frames: there is no motion to measure")
        # A key frame of a compressed still picture looks a little different from what came before it: one pair that
        # stands out from both its neighbours is not motion.
        fast = np.pad([s.fast_speed for s in steps], 1, mode="edge")
        static = np.median(np.lib.stride_tricks.sliding_window_view(fast, 3), axis=1) < settings.static_speed
        chaotic = [s.speed > settings.chaotic_speed or s.jolt > settings.chaotic_jolt for s in steps]
        return Measurement(
            {
                "speed": float(np.mean([s.speed for s in steps])),
                "camera_speed": float(np.mean([s.camera_speed for s in steps])),
                "subject_speed": float(np.mean([s.subject_speed for s in steps])),
                "static_fraction": float(np.mean(static)),
                "chaotic_fraction": float(np.mean(chaotic)),
            }
        )


@dataclass(frozen=True)
class _Step:
    """Motion from one frame to the next, in short sides per second.

    fast_speed: 99th percentile of the speed. camera: [points, 2], velocity that the camera's movement gives each point.
    jolt: mean change of that velocity since the step before.
    """

    speed: float
    fast_speed: float
    camera_speed: float
    subject_speed: float
    camera: np.ndarray
    jolt: float


def _step(flow: np.ndarray, per_second: float, before: _Step | None) -> _Step:
    """Tell speeds from a flow [height, width, 2] in pixels; `per_second` turns pixels into short sides per second."""
    height, width = flow.shape[:2]
    y, x = (axis.ravel() for axis in np.mgrid[_GRID // 2 : height : _GRID, _GRID // 2 : width : _GRID])
    points = np.stack([x, y], axis=1).astype(np.float32)
    moved = flow[y, x]
    camera = camera_flow(points, moved)
    # what the camera's movement has carried out of the picture was not seen to move
    there = points + camera
    inside = ((there >= 0) & (there < (width, height))).all(axis=1)
    rest = (moved - camera)[inside]
    speeds = np.hypot(moved[:, 0], moved[:, 1]) * per_second
    velocity = camera * per_second
    return _Step(
        speed=float(speeds.mean()),
        fast_speed=float(np.percentile(speeds, 99)),
        camera_speed=_mean_length(velocity),
        subject_speed=_mean_length(rest * per_second),
        camera=velocity,
        jolt=_mean_length(velocity - before.camera) if before else 0.0,
    )


def camera_flow(points: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """The part of a flow that the camera's shift, turn and zoom explain: a similarity that most points agree on.

    points, moved: [points, 2] float32, where and how far, in pixels. Returns: [points, 2]; zero when no two agree.
    """
    import cv2

    tolerance = max(_INLIER, 0.05 * float(np.median(np.hypot(moved[:, 0], moved[:, 1]))))
    # OpenCV seeds its draws afresh in each call, so the same flow gives the same camera
    matrix, _ = cv2.estimateAffinePartial2D(
        points, points + moved, method=cv2.RANSAC, ransacReprojThreshold=tolerance, maxIters=500
    )
    if matrix is None or not math.isfinite(float(matrix.sum())):
        return np.zeros_like(points)
    # written out, because a matrix product's last digits depend on the number of threads
    x, y = points[:, 0], points[:, 1]
    return np.stack([row[0] * x + row[1] * y + row[2] for row in matrix], axis=1) - points


def _mean_length(vectors: np.ndarray) -> float:
    return float(np.hypot(vectors[:, 0], vectors[:, 1]).mean()) if len(vectors) else 0.0
