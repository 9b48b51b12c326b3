"""physavatar's physical state tokens: 256 numbers for each of body, face and hands in each frame (appendix B).

The paper takes them from the object level of X-Pose's decoder. The embedded backend puts key points into their layout.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from tasks.media.clip import Clip, Measurement, Unmeasurable
from tasks.stages import mediapipe
from tasks.stages.backend import Backend, Resources
from tasks.stages.base import Stage, StageSettings
from tasks.stages.pose.keypoints import MEDIAPIPE_BODY, MEDIAPIPE_FACE, MEDIAPIPE_HAND, PARTS, SIZE, encode
from tasks.stages.pose.state_tokens import States, choose_states
from tasks.weights import store as weights

if TYPE_CHECKING:
    from tasks.networks.xpose import ObjectTokens

_MODELS = (
    "modules/holistic_landmark/holistic_landmark_cpu.binarypb",
    "modules/holistic_landmark/hand_recrop.tflite",
    "modules/pose_detection/pose_detection.tflite",
    "modules/pose_landmark/pose_landmark_full.tflite",
    "modules/face_detection/face_detection_short_range.tflite",
    "modules/face_landmark/face_landmark_with_attention.tflite",
    "modules/hand_landmark/hand_landmark_full.tflite",
)
# The points of BlazePose that lie on a part. Their mean visibility is the confidence of the part's points.
_ON_FACE, _ON_LEFT_HAND, _ON_RIGHT_HAND = tuple(range(11)), (15, 17, 19, 21), (16, 18, 20, 22)

_HANDS = ("left_hand", "right_hand")


class PoseStates(NamedTuple):
    """The physical states of one person in a clip, as a backend found them."""

    tokens: np.ndarray
    """[frames, 1024] float16. The 256 numbers of a part are zero in frames where it is not seen."""
    seen: np.ndarray
    """[frames, 4] bool, in the order of tasks.stages.pose.keypoints.PARTS."""
    hand_confidence: float | None
    """Mean confidence of the hands that are seen, 0 to 1; None where none is seen."""
    boxes: np.ndarray | None = None
    """[frames, 4, 4] float32, x0, y0, x1, y1 in fractions of the frame, NaN where a part is not seen. None from a
    backend whose tokens are key points."""


class PoseBackend(Backend, ABC):
    """A backend of the stage `pose`. It measures the most prominent person of a clip."""

    @abstractmethod
    def __init__(self, settings: "PoseSettings") -> None: ...

    @abstractmethod
    def __call__(self, clip: Clip) -> PoseStates:
        """The physical states in every frame. Raises Unmeasurable for a clip without frames."""


class HolisticPose(PoseBackend):
    """MediaPipe's holistic networks: key points, in the layout of tasks.stages.pose.keypoints.encode.

    They track the person from frame to frame, which is steadier than detection in each frame alone. The change of
    velocity of shoulders at rest is a third to a tenth of the latter's, and the delay is less than a quarter of a
    frame.

    MediaPipe gives a confidence for the body's points only. The points of face and hands get the mean confidence of the
    body's points on that part, and zero where they lie outside the frame.
    """

    resources: ClassVar[Resources] = Resources(memory_gb=0.4)

    def __init__(self, settings: "PoseSettings") -> None:
        del settings

    @classmethod
    def version(cls) -> str:
        return f"mediapipe {mediapipe.version()}"

    @classmethod
    def check(cls, settings: Any) -> None:
        mediapipe.check(*_MODELS)

    def __call__(self, clip: Clip) -> PoseStates:
        solution = mediapipe.solution("holistic")
        with mediapipe.quiet():
            # a new graph for each clip, because it remembers where the person was
            holistic = solution.Holistic(model_complexity=1, refine_face_landmarks=True)
            # the first call starts the graph, whose threads print messages
            holistic.process(np.zeros((64, 64, 3), np.uint8))
        frames = []
        try:
            for image in clip.frames():
                with mediapipe.quiet():
                    found = holistic.process(image)
                frames.append(_key_points(found))
        finally:
            holistic.close()
        if not frames:
            raise Unmeasurable("the clip has no frame")
        points = {part: np.stack([frame[part] for frame in frames]) for part in PARTS}
        seen = np.stack([~np.isnan(points[part][:, 0, 0]) for part in PARTS], axis=1)
        hands = np.concatenate([points[hand][~np.isnan(points[hand][:, 0, 0]), :, 2] for hand in _HANDS])
        return PoseStates(encode(points), seen, float(hands.mean()) if hands.size else None)


class XPoseTokens(PoseBackend):
    """X-Pose's object level (tasks.networks.xpose), on each frame alone.

    It gives a token of 256 numbers for each part (chosen by tasks.stages.pose.state_tokens). Tokens are the outputs of
    a layer norm, so none is all zero.
    """

    networks: ClassVar = ("xpose",)
    resources: ClassVar[Resources] = Resources(gpu=0.5, memory_gb=3.9, batch=4)
    """Memory by the size of its weights, not measured: the catalogue's 1.3 GB in float32, in which it computes, an
    allowance of 0.4 GB for each frame of a batch, and one of 1 GB for libraries. The batch is that of
    tasks.networks.xpose.BATCH, whose import would import torch."""

    def __init__(self, settings: "PoseSettings") -> None:
        self._settings = settings

    @classmethod
    def version(cls) -> str:
        return f"xpose {weights.digest('xpose')}, torch {version('torch')}"

    @cached_property
    def _network(self) -> "ObjectTokens":
        import torch

        from tasks.networks.device import device
        from tasks.networks.xpose import load

        if device().type == "cpu":
            torch.set_num_threads(1)  # workers run in parallel instead
        return load(device())

    def __call__(self, clip: Clip) -> PoseStates:
        from tasks.networks.xpose import BATCH, input_size

        size = input_size(clip.record.width, clip.record.height, self._settings.short_side)
        frames = [state for batch in _batches(clip.frames(size=size), BATCH) for state in self._states(batch)]
        if not frames:
            raise Unmeasurable("the clip has no frame")
        scores = np.stack([frame.scores for frame in frames])
        hands = scores[:, [list(PARTS).index(hand) for hand in _HANDS]]
        return PoseStates(
            tokens=np.stack([frame.tokens for frame in frames]).reshape(-1, SIZE).astype(np.float16),
            seen=~np.isnan(scores),
            hand_confidence=None if np.isnan(hands).all() else float(np.nanmean(hands)),
            boxes=np.stack([frame.boxes for frame in frames]),
        )

    def _states(self, images: np.ndarray) -> Iterator[States]:
        import torch

        found = self._network(torch.from_numpy(images))
        for tokens, logits, boxes in zip(*(values.numpy() for values in found), strict=True):
            yield choose_states(tokens, logits, boxes, self._settings.min_score)


BACKENDS: dict[str, type[PoseBackend]] = {"landmarks": HolisticPose, "xpose": XPoseTokens}


class PoseSettings(StageSettings):
    """Which backend measures, and the settings of the backend "xpose"."""

    choices: ClassVar = {"backend": BACKENDS}

    backend: str = "landmarks"
    """What is stored: "landmarks" for MediaPipe's key points, "xpose" for X-Pose's tokens."""
    short_side: int = Field(default=800, ge=128, le=1333)
    """Backend "xpose". Pixels that a frame's shorter side is scaled to; the longer side becomes at most 5/3 of it.
    X-Pose was trained and is published for 800. The cost grows with the square."""
    min_score: float = Field(default=0.1, ge=0.0, le=1.0)
    """Backend "xpose". The lowest score, 0 to 1, at which a part counts as seen. 0.1 is that of X-Pose's own
    demonstration."""

    @model_validator(mode="after")
    def _of_the_backend(self) -> "PoseSettings":
        misplaced = [
            name
            for name in ("short_side", "min_score")
            if getattr(self, name) != type(self).model_fields[name].default and self.backend != "xpose"
        ]
        if misplaced:
            raise ValueError(f"{' and '.join(misplaced)} can be set for backend 'xpose' only, not {self.backend!r}")
        return self


class Pose(Stage[PoseSettings]):
    """Physical states of the most prominent person, in every frame.

    Columns:
        body_share, face_share, left_hand_share, right_hand_share: share of the frames in which the part is seen, 0 to
            1. Left and right are the person's.
        hand_confidence: mean confidence of the hands that are seen, 0 to 1; None where none is seen. `landmarks` gives
            that of their points, `xpose` that of their boxes.
    Arrays:
        pose: [frames, 1024] float16, 256 numbers for each of body, face, left hand and right hand. All are zero where
            the part is not seen. `landmarks` stores key points (tasks.stages.pose.keypoints.encode), `xpose` X-Pose's
            tokens.
        pose_box: `xpose` only. [frames, 4, 4] float32, the parts' boxes: x0, y0, x1, y1 in fractions of the frame, NaN
            where the part is not seen.
    """

    name: ClassVar[str] = "pose"
    version: ClassVar[int] = 1
    backends: ClassVar = {"backend": BACKENDS}
    columns: ClassVar[dict[str, type]] = {
        "body_share": float,
        "face_share": float,
        "left_hand_share": float,
        "right_hand_share": float,
        "hand_confidence": float,
    }

    @cached_property
    def _backend(self) -> PoseBackend:
        return BACKENDS[self.settings.backend](self.settings)

    def measure(self, clip: Clip) -> Measurement:
        found = self._backend(clip)
        shares = {f"{part}_share": float(share) for part, share in zip(PARTS, found.seen.mean(axis=0), strict=True)}
        boxes = {} if found.boxes is None else {"pose_box": found.boxes}
        return Measurement({**shares, "hand_confidence": found.hand_confidence}, {"pose": found.tokens, **boxes})


def _batches(images: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Stack images to batches of up to `count`: [images, height, width, 3] each."""
    remaining = iter(images)
    while batch := list(islice(remaining, count)):
        yield np.stack(batch)


def _key_points(found: Any) -> dict[str, np.ndarray]:
    """One frame's key points from the holistic graph's result: [points, 3] for each of PARTS, NaN where not seen."""
    body = _points(found.pose_landmarks, MEDIAPIPE_BODY)
    parts = {
        "body": body,
        "face": _points(found.face_landmarks, MEDIAPIPE_FACE),
        "left_hand": _points(found.left_hand_landmarks, MEDIAPIPE_HAND),
        "right_hand": _points(found.right_hand_landmarks, MEDIAPIPE_HAND),
    }
    for part, nearby in (("face", _ON_FACE), ("left_hand", _ON_LEFT_HAND), ("right_hand", _ON_RIGHT_HAND)):
        # the graph searches face and hands at the body's points, so where it has found them there is a body
        if not np.isnan(parts[part][0, 0]):
            parts[part][:, 2] = np.mean([found.pose_landmarks.landmark[k].visibility for k in nearby])
    for values in parts.values():
        inside = ((values[:, :2] >= 0) & (values[:, :2] <= 1)).all(axis=1)
        values[~inside & ~np.isnan(values[:, 2]), 2] = 0
    return parts


def _points(found: Any, order: Sequence[int]) -> np.ndarray:
    if found is None:
        return np.full((len(order), 3), np.nan, np.float32)
    return np.array([(p.x, p.y, p.visibility) for p in (found.landmark[k] for k in order)], np.float32)
