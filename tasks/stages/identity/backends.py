"""The backends of the stage `identity`: finding faces, and describing them so that one person's faces are alike.

The face mesh is MediaPipe's with every backend (tasks.stages.identity.face_mesh).
"""

from abc import ABC, abstractmethod
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np

from tasks.stages import mediapipe
from tasks.stages.backend import Backend, Resources
from tasks.stages.identity.face_descriptor import SIDE, description, unit
from tasks.stages.identity.face_mesh import FIVE, aligned
from tasks.weights import store as weights


class IdentityBackend(Backend, ABC):
    """A backend of the stage: finds faces and describes them."""

    @abstractmethod
    def __init__(self, min_confidence: float) -> None:
        """min_confidence: of a face to be found, 0 to 1."""

    @abstractmethod
    def faces(self, image: np.ndarray) -> list[mediapipe.Face]:
        """Find the faces in an image, [height, width, 3] uint8 RGB, largest first."""

    @abstractmethod
    def description(self, image: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Describe a face by a unit vector [size]. Vectors of one person's faces have a high cosine.

        image: [height, width, 3] uint8 RGB. points: the face's mesh, [478, 3].
        """


class MediaPipeFaces(IdentityBackend):
    """MediaPipe's full-range detector, and oriented gradients and colours (tasks.stages.identity.face_descriptor)."""

    # measured: peak growth over one clip of 5 s (benchmarks/backends.py)
    resources: ClassVar[Resources] = Resources(memory_gb=0.3)

    def __init__(self, min_confidence: float) -> None:
        self._landmarks = mediapipe.Landmarks(min_confidence)

    @classmethod
    def version(cls) -> str:
        import cv2

        return f"opencv {cv2.__version__}"

    @classmethod
    def check(cls, settings: Any) -> None:
        mediapipe.check()

    def faces(self, image: np.ndarray) -> list[mediapipe.Face]:
        return self._landmarks.faces(image)

    def description(self, image: np.ndarray, points: np.ndarray) -> np.ndarray:
        return description(aligned(image, points, SIDE))


class InsightFaces(IdentityBackend):
    """A pack of InsightFace (tasks.networks.insightface): SCRFD, and ArcFace on the mesh's eyes, nose and mouth.

    Two images of one person usually have a cosine of 0.4 or more, images of two people 0.2 or less.
    """

    networks: ClassVar[tuple[str, ...]] = ("insightface",)
    defaults: ClassVar = {"same_person": 0.4}
    resources: ClassVar[Resources] = Resources(memory_gb=1.4)
    """Memory by the size of its weights, not measured: the catalogue's 0.33 GB in float32, in which it computes, and an
    allowance of 1 GB for libraries, activations and MediaPipe's mesh."""

    def __init__(self, min_confidence: float) -> None:
        from tasks.networks import insightface

        self._min_confidence = min_confidence
        self._detector, self._recogniser = insightface.load()

    @classmethod
    def version(cls) -> str:
        import cv2

        libraries = f"onnxruntime {version('onnxruntime')}, opencv {cv2.__version__}, scipy {version('scipy')}"
        return f"insightface {weights.digest('insightface')}, {libraries}"

    @classmethod
    def check(cls, settings: Any) -> None:
        from tasks.networks import insightface

        super().check(settings)
        insightface.load()

    def faces(self, image: np.ndarray) -> list[mediapipe.Face]:
        height, width = image.shape[:2]
        boxes = self._detector(image, self._min_confidence).boxes / (width, height, width, height, 1)
        # SCRFD's boxes begin at the hairline, about a fifth of their height above the brows.
        faces = [
            mediapipe.Face(x0, y0 + 0.2 * (y1 - y0), x1 - x0, 0.8 * (y1 - y0), score)
            for x0, y0, x1, y1, score in boxes.tolist()
        ]
        return sorted(faces, key=lambda face: -face.width * face.height)

    def description(self, image: np.ndarray, points: np.ndarray) -> np.ndarray:
        from tasks.networks import face_align

        height, width = image.shape[:2]
        five = points[list(FIVE), :2] * (width, height)
        return unit(self._recogniser(face_align.cut_aligned(image, five)[None])[0])


BACKENDS: dict[str, type[IdentityBackend]] = {"mediapipe": MediaPipeFaces, "insightface": InsightFaces}
