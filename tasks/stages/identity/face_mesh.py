"""MediaPipe's face mesh for one face in one image, and what its points tell: box, lips, pose, aligned face.

MediaPipe's own solution follows faces by itself, and its detector finds near faces only. Here the network alone is run,
on a region that the caller gives. So a face of any size can be followed, and no state is kept between images.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from tasks.stages import mediapipe
from tasks.stages.mediapipe import Face

MODEL = "modules/face_landmark/face_landmark_with_attention.tflite"
POINTS = 478

_GRAPH = """
input_stream: "image"
input_stream: "region"
output_stream: "points"
node {
  calculator: "ConstantSidePacketCalculator"
  output_side_packet: "PACKET:attention"
  options { [mediapipe.ConstantSidePacketCalculatorOptions.ext] { packet { bool_value: true } } }
}
node {
  calculator: "FaceLandmarkCpu"
  input_stream: "IMAGE:image"
  input_stream: "ROI:region"
  input_side_packet: "WITH_ATTENTION:attention"
  output_stream: "LANDMARKS:points"
}
"""
_ROOM = 1.5  # the region's side in heights of the mesh or of the detector's box, as in MediaPipe's own graph

# Indices of points. "Right" is the person's right, which is on the left of the image.
_RIGHT_EYE, _LEFT_EYE = 33, 263  # outer corners
_FOREHEAD, _CHIN, _BELOW_NOSE = 10, 152, 2
_BROWS = (70, 63, 105, 66, 107, 336, 296, 334, 293, 300)
_RIGHT_EDGE, _LEFT_EDGE = (127, 234, 93), (356, 454, 323)
_INNER_LIPS = ((82, 13, 312), (87, 14, 317))  # upper and lower points, in pairs above each other
_OUTER_LIPS = ((37, 0, 267), (84, 17, 314))
_CORNERS = (61, 291)
FIVE = (468, 473, 1, 61, 291)  # the pupils, the tip of the nose, the mouth's corners, each pair left to right
# The outer and inner corners of the eyes, the bridge and the base of the nose, and the corners of the mouth.
_ANCHORS = (33, 133, 362, 263, 168, 2, 61, 291)
# Where the anchors are in an aligned face, in fractions of its side.
_ALIGNED = (
    *((0.23, 0.36), (0.41, 0.37), (0.59, 0.37), (0.77, 0.36)),
    *((0.5, 0.36), (0.5, 0.62), (0.37, 0.78), (0.63, 0.78)),
)


class Region(NamedTuple):
    """A square around a face."""

    x: float
    """Its middle, in fractions of the frame's width."""
    y: float
    """Its middle, in fractions of the frame's height."""
    side: float
    """Pixels."""
    turn: float
    """Radians."""


class FaceMesh:
    """The face mesh network with attention for lips and eyes (Grishchenko et al., Attention Mesh, 2020).

    No state is kept from one image to the next. Raises MissingBackend.
    """

    def __init__(self) -> None:
        mediapipe.check(MODEL)
        solution = mediapipe.solution("face_mesh")
        from google.protobuf import (  # type: ignore[import-untyped]
            message_factory,
            symbol_database,
            text_format,
        )

        def message(name: str) -> type[Any]:
            return message_factory.GetMessageClass(symbol_database.Default().pool.FindMessageTypeByName(name))

        self._rect = message("mediapipe.NormalizedRect")
        config = text_format.Parse(_GRAPH, message("mediapipe.CalculatorGraphConfig")())
        with mediapipe.quiet():
            self._graph = solution.SolutionBase(graph_config=config, outputs=["points"])
            # The graph writes messages, from threads of its own, until it has answered once.
            self(np.zeros((64, 64, 3), np.uint8), Region(0.5, 0.5, 32, 0.0))

    def __call__(self, image: np.ndarray, region: Region) -> np.ndarray | None:
        """Fit the mesh to the face in a region of an image [height, width, 3] uint8 RGB.

        Returns: [478, 3] float32: x, y in fractions of the frame's width and height, and the depth in fractions of the
        width, smaller when nearer. None if the region has no face.
        """
        height, width = image.shape[:2]
        # Only the part that holds the region, however turned, is copied into the graph.
        x, y, reach = region.x * width, region.y * height, 0.75 * region.side + 2
        left, top = (max(0, math.floor(at - reach)) for at in (x, y))
        part = image[top : max(top, math.ceil(y + reach)), left : max(left, math.ceil(x + reach))]
        high, wide = part.shape[:2]
        if not high or not wide:
            return None
        rect = self._rect(
            x_center=(x - left) / wide,
            y_center=(y - top) / high,
            width=region.side / wide,
            height=region.side / high,
            rotation=region.turn,
        )
        with mediapipe.quiet():
            landmarks = self._graph.process({"image": np.ascontiguousarray(part), "region": rect}).points
        if landmarks is None:
            return None
        scale, shift = (wide / width, high / height, wide / width), (left / width, top / height, 0)
        return np.asarray(_xyz(landmarks.SerializeToString()) * np.array(scale) + shift, np.float32)

    def close(self) -> None:
        self._graph.close()


def _xyz(message: bytes) -> np.ndarray:
    """Read [478, 3] float32 from a NormalizedLandmarkList in protobuf's format.

    Reading the 478 points as Python objects takes 30 times as long.
    """
    # A point has a head of two bytes, then x, y and z: for each a byte that names the field, and a float32.
    points = np.frombuffer(message, np.uint8).reshape(POINTS, 17)
    assert (points[:, (2, 7, 12)] == (0x0D, 0x15, 0x1D)).all()
    return np.concatenate([points[:, at : at + 4].copy().view("<f4") for at in (3, 8, 13)], axis=1)


def region_of_face(face: Face, size: tuple[int, int]) -> Region:
    """The region for the mesh of a face that the detector found. size: width and height of the frame."""
    width, height = size
    side = _ROOM * max(face.width * width, face.height * height)
    return Region(face.x + face.width / 2, face.y + face.height / 2, side, 0.0)


def region_of_points(points: np.ndarray, size: tuple[int, int]) -> Region:
    """The region for a face in the next frame, from its mesh in this one.

    points: [478, 3]. size: width and height of the frame.
    """
    at = points[:, :2].astype(np.float64) * size
    low, high = at.min(axis=0), at.max(axis=0)
    x, y = (low + high) / 2 / size
    across = at[_LEFT_EYE] - at[_RIGHT_EYE]
    return Region(float(x), float(y), _ROOM * float((high - low).max()), float(np.arctan2(across[1], across[0])))


def box_of(points: np.ndarray) -> np.ndarray:
    """The box of a mesh: [4] float32, x0, y0, x1, y1 in fractions of the frame, brows to chin and side to side."""
    x, y = points[:, 0], points[:, 1]
    edges = [*_RIGHT_EDGE, *_LEFT_EDGE]
    return np.array([x[edges].min(), y[list(_BROWS)].min(), x[edges].max(), y[_CHIN]], np.float32)


def lips_of(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """How far the lips are open. The face's size does not count, nor its pose if the mesh's depth is right.

    points: [478, 3]. size: width and height of the frame.

    Returns: [4] float32: opening between the inner edges of the lips, width of the mouth, distance of the outer edges,
    distance of nose and chin. The unit is the distance between the outer corners of the eyes.
    """
    at = _in_pixels(points, size)

    def distance(one: tuple[int, ...], other: tuple[int, ...]) -> float:
        return float(np.linalg.norm(at[list(one)] - at[list(other)], axis=1).mean())

    eyes = distance((_RIGHT_EYE,), (_LEFT_EYE,))
    lengths = (
        distance(*_INNER_LIPS),
        distance(_CORNERS[:1], _CORNERS[1:]),
        distance(*_OUTER_LIPS),
        distance((_BELOW_NOSE,), (_CHIN,)),
    )
    return np.array(lengths, np.float32) / np.float32(max(eyes, 1e-6))


def pose_of(points: np.ndarray, size: tuple[int, int]) -> tuple[float, float, float]:
    """Yaw, pitch and roll of a mesh in degrees, zero for an upright face that looks into the camera.

    Yaw is positive for a face that turns to the image's right, pitch for one that looks down, roll for one that leans
    to the image's right.

    points: [478, 3]. size: width and height of the frame.
    """
    at = _in_pixels(points, size)
    across, down = at[_LEFT_EYE] - at[_RIGHT_EYE], at[_CHIN] - at[_FOREHEAD]
    yaw, pitch = np.arctan2(across[2], across[0]), np.arctan2(down[2], down[1])
    return tuple(float(np.degrees(a)) for a in (yaw, pitch, np.arctan2(across[1], across[0])))  # type: ignore[return-value]


def aligned(image: np.ndarray, points: np.ndarray, side: int) -> np.ndarray:
    """Turn, move and scale a face so that eyes, nose and mouth are at the same places in all aligned faces.

    image: [height, width, 3] uint8 RGB. points: [478, 3], the face's mesh. side: pixels.

    Returns: [side, side, 3] uint8 RGB.
    """
    import cv2

    height, width = image.shape[:2]
    source = points[list(_ANCHORS), :2].astype(np.float64) * (width, height)
    goal = side * np.array(_ALIGNED)
    # The similarity that fits best, with turn and scale as one complex number.
    here, there = (at - at.mean(axis=0) for at in (source, goal))
    z, w = here[:, 0] + 1j * here[:, 1], there[:, 0] + 1j * there[:, 1]
    turn = (z.conj() * w).sum() / max(float((np.abs(z) ** 2).sum()), 1e-9)
    (x, y), (to_x, to_y) = source.mean(axis=0), goal.mean(axis=0)
    matrix = np.array(
        [
            [turn.real, -turn.imag, to_x - turn.real * x + turn.imag * y],
            [turn.imag, turn.real, to_y - turn.imag * x - turn.real * y],
        ]
    )
    return cv2.warpAffine(image, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _in_pixels(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    width, height = size
    return points.astype(np.float64) * (width, height, width)
