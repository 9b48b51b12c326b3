"""Faces and body landmarks by MediaPipe, and the one door to it: no other module imports it.

MediaPipe 0.10.21 is the last release with its models inside the wheel. It is installed apart from the rest, because it
declares older libraries than those it works with.
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

from tasks.stage import MissingBackend

_MODELS = (
    "modules/face_detection/face_detection_full_range_sparse.tflite",
    "modules/pose_detection/pose_detection.tflite",
    "modules/pose_landmark/pose_landmark_full.tflite",
)
_INSTALL = (
    "install it with `pip install --no-deps mediapipe==0.10.21` (`make setup` does); no other backend serves here"
)

_TILE = 0.6
# In tiles of scenes without anybody, scores reached 0.69; those of real faces began at 0.70.
_TILE_CONFIDENCE = 0.7


class Face(NamedTuple):
    """A detected face, brow to chin, in fractions of the frame's width and height; it may reach beyond the frame."""

    x: float
    y: float
    width: float
    height: float
    score: float


def version() -> str:
    """The installed release of MediaPipe. Raises MissingBackend."""
    try:
        return importlib.metadata.version("mediapipe")
    except importlib.metadata.PackageNotFoundError:
        raise MissingBackend(f"mediapipe is not installed in {sys.prefix}; {_INSTALL}") from None


def check(*models: str) -> None:
    """See, without the second that its import takes, that MediaPipe is here, and its files of models.

    models: paths inside the package, such as "modules/face_landmark/face_landmark.tflite"; those of this module's
        `Landmarks` when none are given. Raises MissingBackend.
    """
    release = version()
    spec = importlib.util.find_spec("mediapipe")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise MissingBackend(f"mediapipe {release} is listed in {sys.prefix} and cannot be found; {_INSTALL}")
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
    """Face detector and body landmarks for single images; no image changes what the next one gives.

    min_confidence: of a face in the whole frame, and of a body, 0 to 1.
    """

    def __init__(self, min_confidence: float) -> None:
        check()
        face_detection, pose = solution("face_detection"), solution("pose")
        with quiet():
            # the full range model: it finds faces from a tenth of the frame's height to all of it
            self._detector = face_detection.FaceDetection(model_selection=1, min_detection_confidence=min_confidence)
            self._pose = pose.Pose(static_image_mode=True, model_complexity=1, min_detection_confidence=min_confidence)
            # the graphs start, with warnings from threads of their own, before they answer for the first time
            blank = np.zeros((64, 64, 3), np.uint8)
            self.faces(blank)
            self.body(blank)

    def faces(self, image: np.ndarray) -> list[Face]:
        """Faces in an image [height, width, 3] uint8 RGB, largest first.

        The network sees the whole frame in 192 x 192 pixels. Where that shows it no face, it looks again at square
        tiles of 0.6 of the frame's height, for faces down to 0.035 of it; there it has to be surer.
        """
        height, width = image.shape[:2]
        found = self._detect(image)
        if not found:
            side = round(_TILE * height)
            for y in _offsets(height, side):
                for x in _offsets(width, side):
                    tile = np.ascontiguousarray(image[y : y + side, x : x + side])
                    high, wide = tile.shape[0] / height, tile.shape[1] / width
                    found += [
                        Face(x / width + f.x * wide, y / height + f.y * high, f.width * wide, f.height * high, f.score)
                        for f in self._detect(tile)
                        if f.score >= _TILE_CONFIDENCE
                    ]
        return sorted(found, key=lambda f: (-f.height, f.x, f.y))

    def _detect(self, image: np.ndarray) -> list[Face]:
        with quiet():
            detections = self._detector.process(image).detections or []
        boxes = [(d.location_data.relative_bounding_box, float(d.score[0])) for d in detections]
        return [Face(box.xmin, box.ymin, box.width, box.height, score) for box, score in boxes]

    def body(self, image: np.ndarray) -> np.ndarray | None:
        """Landmarks of the most prominent person in an image [height, width, 3] uint8 RGB, None when nobody is found.

        Returns: [33, 3] float32: x, y as fractions of width and height (beyond 0..1 where a part is outside the
        frame), and visibility 0..1; in the order of MediaPipe's PoseLandmark (BlazePose, Bazarevsky et al. 2020).
        """
        with quiet():
            found = self._pose.process(image).pose_landmarks
        if found is None:
            return None
        return np.array([(p.x, p.y, p.visibility) for p in found.landmark], np.float32)


def _offsets(length: int, side: int) -> list[int]:
    """Where tiles of `side` pixels begin that cover `length`, neighbours sharing at least a third."""
    count = 1 + math.ceil(max(0, length - side) / (side * 2 / 3))
    return [round(at) for at in np.linspace(0, max(0, length - side), count)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep off the terminal what native code writes to the error stream; MediaPipe 0.10.21 has no setting for it."""
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
