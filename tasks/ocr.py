"""Text in pictures, found and read: the protocol of a backend, and RapidOCR, which no other module imports."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from tasks.stage import MissingBackend

_MODELS = ("models/PP-OCRv6_det_small.onnx", "models/PP-OCRv6_rec_small.onnx")
_INSTALL = (
    "install it with `pip install rapidocr==3.10.0 onnxruntime` (`make setup` does); no other backend serves here"
)

_GRID = 32  # the detector takes sides that are multiples of it
_LONGEST = 2000  # pixels; RapidOCR scales what is larger


class Box(NamedTuple):
    """A line of text, upright, in pixels of the picture it was found in; x1 and y1 are just outside."""

    x0: float
    y0: float
    x1: float
    y1: float


class Ocr(Protocol):
    """An OCR backend. No picture changes what the next one gives."""

    @staticmethod
    def version() -> str:
        """Library and weights, as far as they can change a number."""

    @staticmethod
    def check() -> None:
        """Raises tasks.stage.MissingBackend when the backend cannot run."""

    def find(self, image: np.ndarray, short_side: int) -> list[Box]:
        """Lines of text in an image [height, width, 3] uint8 RGB, looked for at a short side of so many pixels."""

    def read(self, images: list[np.ndarray]) -> list[tuple[str, float]]:
        """The text of pictures of one line each, [height, width, 3] uint8 RGB, and how sure that is, 0 to 1."""


class RapidOcr:
    """PP-OCRv6 small, detector and recogniser, on ONNX Runtime; both come with the package.

    The detector finds text of any script, lines of 2.5 % of the frame's height at a short side of 192 pixels. The
    recogniser reads Latin, Greek, Chinese and Japanese letters; of Cyrillic, Georgian and Arabic it sees at most the
    gaps between words.
    """

    def __init__(self) -> None:
        self.check()
        import cv2
        from rapidocr import RapidOCR

        # the workers are the parallelism
        cv2.setNumThreads(1)
        detector, recogniser = (str(path) for path in _model_paths())
        self._engine = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.max_side_len": _LONGEST,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                # a path, so that nothing is ever downloaded
                "Det.model_path": detector,
                "Rec.model_path": recogniser,
                # pictures come at the size they are to be seen at
                "Det.limit_type": "min",
                "Det.limit_side_len": _GRID,
                # boxes as tight as they can be told: at the default settings, twice the area of small print
                "Det.use_dilation": False,
                "Det.unclip_ratio": 1.3,
            }
        )

    @staticmethod
    def version() -> str:
        return f"rapidocr {_version('rapidocr')}, onnxruntime {_version('onnxruntime')}"

    @staticmethod
    def check() -> None:
        RapidOcr.version()
        missing = [str(path) for path in _model_paths() if not path.is_file()]
        if missing:
            raise MissingBackend(f"rapidocr lacks {', '.join(missing)}; {_INSTALL}")

    def find(self, image: np.ndarray, short_side: int) -> list[Box]:
        import cv2

        height, width = image.shape[:2]
        scale = min(short_side / min(height, width), _LONGEST / max(height, width))
        size = [max(_GRID, round(side * scale / _GRID) * _GRID) for side in (width, height)]
        shrunk = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        corners = self._run(shrunk, use_det=True, use_rec=False).boxes
        if corners is None:
            return []
        # [lines, 4 corners, x and y]
        corners = np.asarray(corners, np.float64) * (width / size[0], height / size[1])
        return [Box(*map(float, (*c.min(axis=0), *c.max(axis=0)))) for c in corners]

    def read(self, images: list[np.ndarray]) -> list[tuple[str, float]]:
        # one by one: in a batch, the widest line decides how the others are seen
        found = [self._run(image, use_det=False, use_rec=True) for image in images]
        return [(f.txts[0], float(f.scores[0])) if f.txts else ("", 0.0) for f in found]

    def _run(self, image: np.ndarray, **steps: bool) -> Any:
        # OpenCV's order of colours
        return self._engine(np.ascontiguousarray(image[:, :, ::-1]), use_cls=False, **steps)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise MissingBackend(f"{package} is not installed in {sys.prefix}; {_INSTALL}") from None


def _model_paths() -> list[Path]:
    spec = importlib.util.find_spec("rapidocr")
    if spec is None or spec.origin is None:
        raise MissingBackend(f"rapidocr is listed in {sys.prefix} and cannot be found; {_INSTALL}")
    return [Path(spec.origin).parent / name for name in _MODELS]


BACKENDS: dict[str, type[Ocr]] = {"rapidocr": RapidOcr}
