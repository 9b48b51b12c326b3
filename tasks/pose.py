"""Where body, face and hands are in each frame: key points in the layout of physavatar's physical state tokens."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from tasks import landmarks
from tasks.clip import Clip
from tasks.keypoints import MEDIAPIPE_BODY, MEDIAPIPE_FACE, MEDIAPIPE_HAND, PARTS, encode
from tasks.stage import Measurement, Stage, StageSettings, Unmeasurable

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


class PoseSettings(StageSettings):
    """backend: "landmarks", MediaPipe's holistic networks."""

    backend: Literal["landmarks"] = "landmarks"


class Pose(Stage[PoseSettings]):
    """Key points of the most prominent person, in every frame.

    The networks follow the person from frame to frame, which is steadier than looking at each frame alone: the change
    of velocity of shoulders at rest is a third to a tenth, the delay less than a quarter of a frame.

    Columns:
        body_share, face_share, left_hand_share, right_hand_share: share of the frames in which the part is seen, 0 to
            1. Left and right are the person's.
        hand_confidence: mean confidence of the points of the hands that are seen, 0 to 1; None when none is.
    Arrays:
        pose: [frames, 1024] float16, see tasks.keypoints.encode. MediaPipe gives a confidence for points of the body
            only; those of face and hands get the mean confidence of the body's points on that part, and zero where
            they lie outside the frame.
    """

    name: ClassVar[str] = "pose"
    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, type]] = {
        "body_share": float,
        "face_share": float,
        "left_hand_share": float,
        "right_hand_share": float,
        "hand_confidence": float,
    }

    def backend_version(self) -> str:
        return f"mediapipe {landmarks.version()}"

    def check(self) -> None:
        landmarks.check(*_MODELS)

    def measure(self, clip: Clip) -> Measurement:
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
        seen = {part: ~np.isnan(values[:, 0, 0]) for part, values in points.items()}
        hands = [points[part][seen[part], :, 2] for part in ("left_hand", "right_hand")]
        confidences = np.concatenate(hands)
        return Measurement(
            {
                **{f"{part}_share": float(where.mean()) for part, where in seen.items()},
                "hand_confidence": float(confidences.mean()) if confidences.size else None,
            },
            {"pose": encode(points)},
        )


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
