"""How body, face and hands are in each frame: physavatar's physical state tokens, 256 numbers for each (appendix B).

The paper takes them from the object level of X-Pose's decoder; the embedded backend puts key points into their layout.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
from pydantic import Field, field_validator, model_validator

from tasks import landmarks, weights
from tasks.clip import Clip
from tasks.keypoints import MEDIAPIPE_BODY, MEDIAPIPE_FACE, MEDIAPIPE_HAND, PARTS, SIZE, encode
from tasks.object_tokens import States, states
from tasks.stage import Measurement, Stage, StageSettings, Unmeasurable, known_backend

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
# The points of BlazePose that lie on a part, whose visibility stands for the part's own.
_ON_FACE, _ON_LEFT_HAND, _ON_RIGHT_HAND = tuple(range(11)), (15, 17, 19, 21), (16, 18, 20, 22)


_HANDS = ("left_hand", "right_hand")


class Found(NamedTuple):
    """What a backend found in a clip.

    tokens: [frames, 1024] float16, all 256 numbers of a part zero in frames where it is not seen. seen: [frames, 4]
    bool, in the order of tasks.keypoints.PARTS. hand_confidence: mean of the hands that are seen, 0 to 1, None when
    none is. boxes: [frames, 4, 4] float32, x0, y0, x1, y1 in fractions of the frame, NaN where not seen; None from a
    backend whose tokens are key points.
    """

    tokens: np.ndarray
    seen: np.ndarray
    hand_confidence: float | None
    boxes: np.ndarray | None = None


class Poses(Protocol):
    """A backend: the physical states of a clip's most prominent person."""

    def __init__(self, settings: "PoseSettings") -> None: ...

    @staticmethod
    def version() -> str:
        """Library and weights, as far as they can change a number."""

    @staticmethod
    def check() -> None:
        """Raises tasks.stage.MissingBackend when the backend cannot run."""

    def __call__(self, clip: Clip) -> Found:
        """Raises Unmeasurable for a clip without frames."""


class Landmarks:
    """MediaPipe's holistic networks: key points, in the layout of tasks.keypoints.encode.

    They follow the person from frame to frame, which is steadier than looking at each frame alone: the change of
    velocity of shoulders at rest is a third to a tenth, the delay less than a quarter of a frame. MediaPipe gives a
    confidence for points of the body only; those of face and hands get the mean confidence of the body's points on
    that part, and zero where they lie outside the frame.
    """

    def __init__(self, settings: "PoseSettings") -> None:
        del settings

    @staticmethod
    def version() -> str:
        return f"mediapipe {landmarks.version()}"

    @staticmethod
    def check() -> None:
        landmarks.check(*_MODELS)

    def __call__(self, clip: Clip) -> Found:
        solution = landmarks.solution("holistic")
        with landmarks.quiet():
            # a new one for each clip, because it remembers where the person was
            holistic = solution.Holistic(model_complexity=1, refine_face_landmarks=True)
            # the graph starts, with messages from threads of its own, before it answers for the first time
            holistic.process(np.zeros((64, 64, 3), np.uint8))
        frames = []
        try:
            for image in clip.frames():
                with landmarks.quiet():
                    found = holistic.process(image)
                frames.append(_key_points(found))
        finally:
            holistic.close()
        if not frames:
            raise Unmeasurable("the clip has no frame")
        points = {part: np.stack([frame[part] for frame in frames]) for part in PARTS}
        seen = np.stack([~np.isnan(points[part][:, 0, 0]) for part in PARTS], axis=1)
        hands = np.concatenate([points[hand][~np.isnan(points[hand][:, 0, 0]), :, 2] for hand in _HANDS])
        return Found(encode(points), seen, float(hands.mean()) if hands.size else None)


class XPose:
    """X-Pose's object level (tasks.networks.xpose), each frame alone: a token of 256 numbers for each part, chosen as
    tasks.object_tokens says. Tokens come out of a layer norm, so that none is all zero."""

    networks: ClassVar = ("xpose",)

    def __init__(self, settings: "PoseSettings") -> None:
        self._settings = settings

    @staticmethod
    def version() -> str:
        return f"xpose {weights.digest('xpose')}, torch {version('torch')}"

    @staticmethod
    def check() -> None:
        weights.check("xpose")

    @cached_property
    def _network(self) -> "ObjectTokens":
        import torch

        from tasks.networks.device import device
        from tasks.networks.xpose import load

        if device().type == "cpu":
            torch.set_num_threads(1)  # the workers are the parallelism
        return load(device())

    def __call__(self, clip: Clip) -> Found:
        from tasks.networks.xpose import BATCH, input_size

        size = input_size(clip.record.width, clip.record.height, self._settings.short_side)
        frames = [state for batch in _batches(clip.frames(size=size), BATCH) for state in self._states(batch)]
        if not frames:
            raise Unmeasurable("the clip has no frame")
        scores = np.stack([frame.scores for frame in frames])
        hands = scores[:, [list(PARTS).index(hand) for hand in _HANDS]]
        return Found(
            tokens=np.stack([frame.tokens for frame in frames]).reshape(-1, SIZE).astype(np.float16),
            seen=~np.isnan(scores),
            hand_confidence=None if np.isnan(hands).all() else float(np.nanmean(hands)),
            boxes=np.stack([frame.boxes for frame in frames]),
        )

    def _states(self, images: np.ndarray) -> Iterator[States]:
        import torch

        found = self._network(torch.from_numpy(images))
        for tokens, logits, boxes in zip(*(values.numpy() for values in found), strict=True):
            yield states(tokens, logits, boxes, self._settings.min_score)


BACKENDS: dict[str, type[Poses]] = {"landmarks": Landmarks, "xpose": XPose}


class PoseSettings(StageSettings):
    """What is looked at, and what counts as seen; both for the backend `xpose` alone.

    short_side: pixels that the shorter side of a frame is scaled to, the longer one at most 5/3 of it. X-Pose was
        trained and is published for 800; the cost grows with the square.
    min_score: of the best query, 0 to 1, below which a part is not seen; 0.1 is that of X-Pose's own demonstration.
    """

    backend: str = "landmarks"
    short_side: int = Field(default=800, ge=128, le=1333)
    min_score: float = Field(default=0.1, ge=0.0, le=1.0)

    @field_validator("backend")
    @classmethod
    def _known(cls, backend: str) -> str:
        return known_backend(backend, BACKENDS)

    @model_validator(mode="after")
    def _of_the_backend(self) -> "PoseSettings":
        of_another = [
            name
            for name in ("short_side", "min_score")
            if getattr(self, name) != type(self).model_fields[name].default and self.backend != "xpose"
        ]
        if of_another:
            raise ValueError(f"{' and '.join(of_another)} can be set for backend 'xpose' only, not {self.backend!r}")
        return self


class Pose(Stage[PoseSettings]):
    """Physical states of the most prominent person, in every frame.

    Columns:
        body_share, face_share, left_hand_share, right_hand_share: share of the frames in which the part is seen, 0 to
            1. Left and right are the person's.
        hand_confidence: mean confidence of the hands that are seen, 0 to 1: of their points from `landmarks`, of their
            boxes from `xpose`; None when none is.
    Arrays:
        pose: [frames, 1024] float16, 256 numbers for each of body, face, left hand and right hand, all zero where the
            part is not seen. From `landmarks` see tasks.keypoints.encode, from `xpose` the tokens themselves.
        pose_box: from `xpose` only, [frames, 4, 4] float32, the parts' boxes: x0, y0, x1, y1 in fractions of the
            frame, NaN where the part is not seen.
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

    def backend_version(self) -> str:
        return BACKENDS[self.settings.backend].version()

    def check(self) -> None:
        BACKENDS[self.settings.backend].check()

    @cached_property
    def _backend(self) -> Poses:
        return BACKENDS[self.settings.backend](self.settings)

    def measure(self, clip: Clip) -> Measurement:
        found = self._backend(clip)
        shares = {f"{part}_share": float(share) for part, share in zip(PARTS, found.seen.mean(axis=0), strict=True)}
        boxes = {} if found.boxes is None else {"pose_box": found.boxes}
        return Measurement({**shares, "hand_confidence": found.hand_confidence}, {"pose": found.tokens, **boxes})


def _batches(images: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """[up to count, height, width, 3] of each so many images."""
    rest = iter(images)
    while batch := list(islice(rest, count)):
        yield np.stack(batch)


def _key_points(found: Any) -> dict[str, np.ndarray]:
    """One frame's key points, [points, 3] for each of PARTS, NaN where not seen, from what the holistic graph found."""
    body = _points(found.pose_landmarks, MEDIAPIPE_BODY)
    parts = {
        "body": body,
        "face": _points(found.face_landmarks, MEDIAPIPE_FACE),
        "left_hand": _points(found.left_hand_landmarks, MEDIAPIPE_HAND),
        "right_hand": _points(found.right_hand_landmarks, MEDIAPIPE_HAND),
    }
    for part, nearby in (("face", _ON_FACE), ("left_hand", _ON_LEFT_HAND), ("right_hand", _ON_RIGHT_HAND)):
        # face and hands are looked for where the body's points are, so there is a body
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
