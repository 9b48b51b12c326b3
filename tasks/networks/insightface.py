"""InsightFace's published packs of ONNX networks, run on ONNX Runtime.

SCRFD (Guo et al., ICLR 2022) detects faces with five landmarks. ArcFace (Deng et al., CVPR 2019) embeds aligned faces.
Preprocessing and decoding are re-implementations of the insightface library's (deepinsight/insightface). A pack's other
networks (age and gender, dense landmarks) are left out.

The weights folder has the library's layout: models/buffalo_l/det_10g.onnx and w600k_r50.onnx, or models/antelopev2/
scrfd_10g_bnkps.onnx and glintr100.onnx. Images here are RGB; the library's are BGR.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tasks.weights import store as weights

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_STRIDES, _ANCHORS = (8, 16, 32), 2  # pixels a cell of each level; anchors a cell
_MIN_SCORE, _MAX_IOU = 0.5, 0.4  # the library's, of detections that are kept
_BATCH = 16  # faces at a time


class Detections(NamedTuple):
    """The faces in one image, highest score first."""

    boxes: np.ndarray
    """[faces, 5] float32: x0, y0, x1, y1 in the image's pixels, and the score, 0 to 1."""
    points: np.ndarray
    """[faces, 5, 2] landmarks, x and y in pixels, in the order of tasks.networks.face_align.TEMPLATE."""


def letterboxed(image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, float]:
    """The detector's input: the image, scaled to fit, in the upper left corner of a black one.

    image: [height, width, 3] uint8 RGB. size: (width, height) of the input.

    Returns: [1, 3, height, width] float32, and the scale from the image to the input.
    """
    import cv2

    height, width = image.shape[:2]
    if height / width > size[1] / size[0]:
        scaled = (int(size[1] * width / height), size[1])
    else:
        scaled = (size[0], int(size[0] * height / width))
    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    canvas[: scaled[1], : scaled[0]] = cv2.resize(image, scaled)
    blob = (canvas.astype(np.float32) - 127.5) / 128
    return np.ascontiguousarray(blob.transpose(2, 0, 1)[None]), scaled[1] / height


def decoded(outputs: list[np.ndarray], size: tuple[int, int], scale: float, least: float = _MIN_SCORE) -> Detections:
    """Decode the detector's nine outputs, with non-maximum suppression.

    outputs: the scores of each of the three levels, [cells * 2, 1]; then the distances from the cells to the box's
        sides, [cells * 2, 4]; then the offsets to the five landmarks, [cells * 2, 10]. Distances are in strides.
    size: (width, height) of the input.
    scale: from the image to the input.
    least: the lowest score of a face, 0 to 1.
    """
    scores, boxes, points = [], [], []
    for level, stride in enumerate(_STRIDES):
        rows, columns = size[1] // stride, size[0] // stride
        y, x = np.mgrid[:rows, :columns]
        centres = np.repeat(np.stack([x, y], -1).reshape(-1, 2), _ANCHORS, axis=0).astype(np.float32) * stride
        score, sides, offsets = (outputs[level + kind * len(_STRIDES)].reshape(len(centres), -1) for kind in range(3))
        is_face = score[:, 0] >= least
        centre = centres[is_face]
        scores.append(score[is_face, 0])
        boxes.append(np.hstack([centre - sides[is_face, :2] * stride, centre + sides[is_face, 2:] * stride]) / scale)
        points.append((centre[:, None] + offsets[is_face].reshape(-1, 5, 2) * stride) / scale)
    order = np.concatenate(scores).argsort()[::-1]
    found = np.hstack([np.concatenate(boxes), np.concatenate(scores)[:, None]])[order].astype(np.float32)
    kept = _suppressed(found)
    return Detections(found[kept], np.concatenate(points)[order][kept])


def _suppressed(found: np.ndarray) -> list[int]:
    """Non-maximum suppression: the rows to keep of [faces, 5], highest score first. Sides count one pixel more than
    their difference, as in the library."""
    x0, y0, x1, y1 = found[:, :4].T
    areas = (x1 - x0 + 1) * (y1 - y0 + 1)
    left, kept = np.arange(len(found)), []
    while len(left):
        best, rest = left[0], left[1:]
        kept.append(int(best))
        width = np.maximum(0, np.minimum(x1[best], x1[rest]) - np.maximum(x0[best], x0[rest]) + 1)
        height = np.maximum(0, np.minimum(y1[best], y1[rest]) - np.maximum(y0[best], y0[rest]) + 1)
        common = width * height
        left = rest[common / (areas[best] + areas[rest] - common) <= _MAX_IOU]
    return kept


class Scrfd:
    """The face detector of a pack. Its input is 640x640 where the graph leaves the size open."""

    def __init__(self, path: Path) -> None:
        self._session = _session(path, outputs=3 * len(_STRIDES))
        shape = self._session.get_inputs()[0].shape
        self._size = (int(shape[3]), int(shape[2])) if all(isinstance(side, int) for side in shape[2:]) else (640, 640)

    def __call__(self, image: np.ndarray, least: float = _MIN_SCORE) -> Detections:
        """image: [height, width, 3] uint8 RGB. least: the lowest score of a face, 0 to 1."""
        blob, scale = letterboxed(image, self._size)
        return decoded(_run(self._session, blob), self._size, scale, least)


class ArcFace:
    """The face recogniser of a pack. Embeddings of one person's faces have a high cosine similarity."""

    def __init__(self, path: Path) -> None:
        self._session = _session(path, outputs=1)

    def __call__(self, faces: np.ndarray) -> np.ndarray:
        """faces: [faces, 112, 112, 3] uint8 RGB, aligned by tasks.networks.face_align.

        Returns: [faces, 512] float32, not normalised.
        """
        found = [_run(self._session, blob(faces[at : at + _BATCH]))[0] for at in range(0, len(faces), _BATCH)]
        return np.concatenate(found)


def blob(faces: np.ndarray) -> np.ndarray:
    """ArcFace's input. [faces, 112, 112, 3] uint8 RGB to [faces, 3, 112, 112] float32, -1 to 1."""
    return np.ascontiguousarray(((faces.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2))


def load() -> tuple[Scrfd, ArcFace]:
    """The detector and the recogniser of the pack in the weights folder. Raises MissingBackend, WrongWeights."""
    detector, recogniser = weights.files("insightface")
    return Scrfd(detector), ArcFace(recogniser)


def _run(session: "InferenceSession", blob: np.ndarray) -> list[Any]:
    return session.run(None, {session.get_inputs()[0].name: blob})


def _session(path: Path, outputs: int) -> "InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # workers run in parallel instead
    options.log_severity_level = 3  # errors alone
    # TF32 on a GPU would round to a mantissa of ten bits
    exact = {"CUDAExecutionProvider": {"use_tf32": "0"}, "CPUExecutionProvider": {}}
    have = onnxruntime.get_available_providers()
    try:
        session = onnxruntime.InferenceSession(path, options, [(name, exact[name]) for name in exact if name in have])
    except Exception as error:  # onnxruntime's errors have no common class
        raise weights.WrongWeights(f"{path} cannot be read as ONNX: {str(error).splitlines()[0]}") from None
    found = len(session.get_outputs())
    if found != outputs:
        raise weights.WrongWeights(
            f"{path} has {found} outputs and this network has {outputs}: it is another network's file"
        )
    return session
