"""InsightFace's packs of ONNX networks, run straight on ONNX Runtime: SCRFD finds faces, ArcFace tells them apart.

The weights folder is laid out as the insightface library has it: models/buffalo_l/det_10g.onnx and w600k_r50.onnx, or
antelopev2's scrfd_10g_bnkps.onnx and glintr100.onnx. Pictures here are RGB; the library's are BGR.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tasks import weights

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_STRIDES, _ANCHORS = (8, 16, 32), 2
_LEAST_SCORE, _OVERLAP = 0.5, 0.4
_BATCH = 16  # faces at a time


class Detections(NamedTuple):
    """boxes: [faces, 5], x0, y0, x1, y1 in the picture's pixels and the score, best first. points: [faces, 5, 2], in
    the order of tasks.networks.face_align.TEMPLATE."""

    boxes: np.ndarray
    points: np.ndarray


def letterboxed(image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, float]:
    """A picture scaled into the upper left corner of the detector's.

    image: [height, width, 3] uint8 RGB. size: (width, height). Returns: [1, 3, height, width] float32, and the scale.
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


def decoded(outputs: list[np.ndarray], size: tuple[int, int], scale: float, least: float = _LEAST_SCORE) -> Detections:
    """What the detector's nine outputs say, overlaps taken out.

    outputs: for each stride the scores, then for each the distances from the cells to the box's sides, then those to
    the five points, [cells * 2, 1], [cells * 2, 4] and [cells * 2, 10], in strides. size: (width, height) of the input.
    scale: of the input against the picture. least: score.
    """
    scores, boxes, points = [], [], []
    for level, stride in enumerate(_STRIDES):
        rows, columns = size[1] // stride, size[0] // stride
        y, x = np.mgrid[:rows, :columns]
        centres = np.repeat(np.stack([x, y], -1).reshape(-1, 2), _ANCHORS, axis=0).astype(np.float32) * stride
        score, sides, steps = (outputs[level + kind * len(_STRIDES)].reshape(len(centres), -1) for kind in range(3))
        sure = score[:, 0] >= least
        at = centres[sure]
        scores.append(score[sure, 0])
        boxes.append(np.hstack([at - sides[sure, :2] * stride, at + sides[sure, 2:] * stride]) / scale)
        points.append((at[:, None] + steps[sure].reshape(-1, 5, 2) * stride) / scale)
    order = np.concatenate(scores).argsort()[::-1]
    found = np.hstack([np.concatenate(boxes), np.concatenate(scores)[:, None]])[order].astype(np.float32)
    kept = _apart(found)
    return Detections(found[kept], np.concatenate(points)[order][kept])


def _apart(found: np.ndarray) -> list[int]:
    """Those of [faces, 5], best first, that do not overlap a better one; sides count a pixel more, as the library's."""
    x0, y0, x1, y1 = found[:, :4].T
    areas = (x1 - x0 + 1) * (y1 - y0 + 1)
    left, kept = np.arange(len(found)), []
    while len(left):
        best, rest = left[0], left[1:]
        kept.append(int(best))
        width = np.maximum(0, np.minimum(x1[best], x1[rest]) - np.maximum(x0[best], x0[rest]) + 1)
        height = np.maximum(0, np.minimum(y1[best], y1[rest]) - np.maximum(y0[best], y0[rest]) + 1)
        common = width * height
        left = rest[common / (areas[best] + areas[rest] - common) <= _OVERLAP]
    return kept


class Scrfd:
    """The detector of a pack, at 640x640 where its graph leaves the size open."""

    def __init__(self, path: Path) -> None:
        self._session = _session(path, outputs=3 * len(_STRIDES))
        shape = self._session.get_inputs()[0].shape
        self._size = (int(shape[3]), int(shape[2])) if all(isinstance(side, int) for side in shape[2:]) else (640, 640)

    def __call__(self, image: np.ndarray, least: float = _LEAST_SCORE) -> Detections:
        """image: [height, width, 3] uint8 RGB. least: score of a face, 0 to 1."""
        blob, scale = letterboxed(image, self._size)
        return decoded(_run(self._session, blob), self._size, scale, least)


class ArcFace:
    """The recogniser of a pack: faces of one person have a high cosine."""

    def __init__(self, path: Path) -> None:
        self._session = _session(path, outputs=1)

    def __call__(self, faces: np.ndarray) -> np.ndarray:
        """faces: [faces, 112, 112, 3] uint8 RGB, cut by tasks.networks.face_align. Returns: [faces, 512] float32, not
        normalised."""
        found = [_run(self._session, blob(faces[at : at + _BATCH]))[0] for at in range(0, len(faces), _BATCH)]
        return np.concatenate(found)


def blob(faces: np.ndarray) -> np.ndarray:
    """ArcFace's input: [faces, 112, 112, 3] uint8 RGB to [faces, 3, 112, 112] float32, -1 to 1."""
    return np.ascontiguousarray(((faces.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2))


def load() -> tuple[Scrfd, ArcFace]:
    """Detector and recogniser of the pack that is there. Raises MissingBackend, WrongWeights."""
    detector, recogniser = weights.files("insightface")
    return Scrfd(detector), ArcFace(recogniser)


def _run(session: "InferenceSession", blob: np.ndarray) -> list[Any]:
    return session.run(None, {session.get_inputs()[0].name: blob})


def _session(path: Path, outputs: int) -> "InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # the workers are the parallelism
    options.log_severity_level = 3
    # on a GPU it rounds to ten bits unless told not to
    exact = {"CUDAExecutionProvider": {"use_tf32": "0"}, "CPUExecutionProvider": {}}
    have = onnxruntime.get_available_providers()
    try:
        session = onnxruntime.InferenceSession(path, options, [(name, exact[name]) for name in exact if name in have])
    except Exception as error:  # onnxruntime's errors have no common class
        raise weights.WrongWeights(f"{path} cannot be read as ONNX: {str(error).splitlines()[0]}") from None
    found = len(session.get_outputs())
    if found != outputs:
        raise weights.WrongWeights(f"{path} has {found} outputs, and {outputs} were looked for: it is another network")
    return session
