"""Faces and body landmarks by MediaPipe. No other module imports MediaPipe.

MediaPipe 0.10.21 is the last release that has its models in the wheel. It is installed apart from the other packages,
because it declares older libraries than those that it works with.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from tasks.weights.missing import MissingBackend

_MODELS = (
    "modules/face_detection/face_detection_full_range_sparse.tflite",
    "modules/pose_detection/pose_detection.tflite",
    "modules/pose_landmark/pose_landmark_full.tflite",
)
_INSTALL = (
    "install it with `pip install --no-deps mediapipe==0.10.21` (`make setup` does); no embedded backend works "
    "without it here"
)

_TILE = 0.6  # side of a tile, in heights of the frame
# In tiles of scenes without people, scores reached 0.69. Scores of real faces began at 0.70.
_TILE_CONFIDENCE = 0.7


class Face(NamedTuple):
    """A detected face, brow to chin, in fractions of the frame's width and height. It may reach beyond the frame."""

    x: float
    """Left edge."""
    y: float
    """Upper edge."""
    width: float
    height: float
    score: float
    """The detector's confidence, 0 to 1."""


def version() -> str:
    """The installed release of MediaPipe. Raises MissingBackend."""
    try:
        return importlib.metadata.version("mediapipe")
    except importlib.metadata.PackageNotFoundError:
        raise MissingBackend(f"mediapipe is not installed in {sys.prefix}; {_INSTALL}") from None


def check(*models: str) -> None:
    """Check that MediaPipe and its model files are installed. It does not import MediaPipe, which takes a second.

    models: paths inside the package, such as "modules/face_landmark/face_landmark.tflite". Without any, those that
        `Landmarks` needs.

    Raises MissingBackend.
    """
    release = version()
    spec = importlib.util.find_spec("mediapipe")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise MissingBackend(
            f"mediapipe {release} is listed in {sys.prefix}, but the package cannot be found; {_INSTALL}"
        )
    missing = [name for name in models or _MODELS if not (Path(folders[0]) / name).is_file()]
    if missing:
        raise MissingBackend(f"mediapipe {release} in {folders[0]} lacks {', '.join(missing)}; {_INSTALL}")
    if int(importlib.metadata.version("protobuf").split(".")[0]) >= 7:
        raise MissingBackend("mediapipe cannot run with protobuf 7 or newer; install protobuf==6.33.5")


def solution(name: str) -> ModuleType:
    """One of MediaPipe's solutions: face_detection, pose, face_mesh, hands, holistic. Raises MissingBackend."""
    try:
        with quiet():
            return importlib.import_module(f"mediapipe.python.solutions.{name}")
    except ImportError as error:
        raise MissingBackend(f"mediapipe {version()} cannot be imported: {error}; {_INSTALL}") from error


class Landmarks:
    """Face detector and body landmarks for single images. The result for an image does not depend on earlier ones."""

    def __init__(self, min_confidence: float) -> None:
        """min_confidence: of a face in the whole frame, and of a body, 0 to 1."""
        check()
        face_detection, pose = solution("face_detection"), solution("pose")
        with quiet():
            # The full-range model finds faces from a tenth of the frame's height to all of it.
            self._detector = face_detection.FaceDetection(model_selection=1, min_detection_confidence=min_confidence)
            self._pose = pose.Pose(static_image_mode=True, model_complexity=1, min_detection_confidence=min_confidence)
            # The graphs write warnings, from threads of their own, until they have answered once.
            blank = np.zeros((64, 64, 3), np.uint8)
            self.faces(blank)
            self.body(blank)

    def faces(self, image: np.ndarray) -> list[Face]:
        """Find the faces in an image [height, width, 3] uint8 RGB, largest first.

        The network scales the whole frame to 192 x 192 pixels. If it finds no face there, it is run on square tiles of
        0.6 of the frame's height, which show faces down to 0.035 of that height. A face in a tile needs a score of 0.7.
        """
        height, width = image.shape[:2]
        faces = self._detect(image)
        if not faces:
            side = round(_TILE * height)
            for y in _tile_offsets(height, side):
                for x in _tile_offsets(width, side):
                    tile = np.ascontiguousarray(image[y : y + side, x : x + side])
                    high, wide = tile.shape[0] / height, tile.shape[1] / width
                    faces += [
                        Face(x / width + f.x * wide, y / height + f.y * high, f.width * wide, f.height * high, f.score)
                        for f in self._detect(tile)
                        if f.score >= _TILE_CONFIDENCE
                    ]
        return sorted(faces, key=lambda f: (-f.height, f.x, f.y))

    def _detect(self, image: np.ndarray) -> list[Face]:
        with quiet():
            detections = self._detector.process(image).detections or []
        boxes = [(d.location_data.relative_bounding_box, float(d.score[0])) for d in detections]
        return [Face(box.xmin, box.ymin, box.width, box.height, score) for box, score in boxes]

    def body(self, image: np.ndarray) -> np.ndarray | None:
        """Find the landmarks of the most prominent person in an image [height, width, 3] uint8 RGB.

        Returns: [33, 3] float32: x, y as fractions of width and height (beyond 0..1 for a part outside the frame), and
        visibility 0..1, in the order of MediaPipe's PoseLandmark (BlazePose, Bazarevsky et al. 2020). None if no person
        is found.
        """
        with quiet():
            landmarks = self._pose.process(image).pose_landmarks
        if landmarks is None:
            return None
        return np.array([(p.x, p.y, p.visibility) for p in landmarks.landmark], np.float32)


def _tile_offsets(length: int, side: int) -> list[int]:
    """First pixels of tiles of `side` pixels that cover `length`. Neighbours share at least a third."""
    count = 1 + math.ceil(max(0, length - side) / (side * 2 / 3))
    return [round(at) for at in np.linspace(0, max(0, length - side), count)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard what native code writes to the error stream. MediaPipe 0.10.21 has no setting for it."""
    sys.stderr.flush()
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
