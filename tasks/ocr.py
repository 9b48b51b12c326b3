"""Text in pictures, found and read: the protocol of a backend, RapidOCR and PaddleOCR; no other module imports them."""

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from tasks import weights
from tasks.stage import MissingBackend

_MODELS = ("models/PP-OCRv6_det_small.onnx", "models/PP-OCRv6_rec_small.onnx")
_INSTALL = (
    "install it with `pip install rapidocr==3.10.0 onnxruntime` (`make setup` does); no other backend serves here"
)

_INSTALL_PADDLE = (
    "install it with `pip install 'understudy[ocr]'`; subtitles' backend `rapidocr` serves without it, by smaller "
    "networks of the same kind"
)

_GRID = 32  # the detectors take sides that are multiples of it
_LONGEST = 2000  # pixels; RapidOCR scales what is larger
_UNCLIP = 1.3  # boxes as tight as they can be told: at the default settings, twice the area of small print


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
                "Det.use_dilation": False,
                "Det.unclip_ratio": _UNCLIP,
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
        shrunk = _shrunk(image, short_side)
        return _boxes(self._run(shrunk, use_det=True, use_rec=False).boxes, shrunk, image)

    def read(self, images: list[np.ndarray]) -> list[tuple[str, float]]:
        # one by one: in a batch, the widest line decides how the others are seen
        found = [self._run(image, use_det=False, use_rec=True) for image in images]
        return [(f.txts[0], float(f.scores[0])) if f.txts else ("", 0.0) for f in found]

    def _run(self, image: np.ndarray, **steps: bool) -> Any:
        return self._engine(_bgr(image), use_cls=False, **steps)


class PaddleOcr:
    """PaddleOCR's detector and recogniser, from local folders `det` and `rec`; any pair of PP-OCR that Paddle exported.

    Boxes are as wide around the letters as RapidOcr's, so that areas compare.
    """

    networks: ClassVar[tuple[str, ...]] = ("paddleocr",)

    def __init__(self) -> None:
        self.check()
        # read when it is imported: it asks four hosts for models unless it is told not to
        os.environ.setdefault("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")
        from paddleocr import TextDetection, TextRecognition

        detector, recogniser = _paddle_folders()
        # Folders, so that nothing is ever downloaded. The static engine alone: the other opens a pickle where it finds
        # one. Without oneDNN, by which Paddle 3.3 fails on PP-OCRv5. The workers are the parallelism.
        how = {"engine": "paddle_static", "cpu_threads": 1, "enable_mkldnn": False}
        self._detector = TextDetection(
            model_name=_paddle_name(detector),
            model_dir=str(detector),
            # pictures come at the size they are to be seen at
            limit_type="min",
            limit_side_len=_GRID,
            unclip_ratio=_UNCLIP,
            **how,
        )
        self._recogniser = TextRecognition(model_name=_paddle_name(recogniser), model_dir=str(recogniser), **how)

    @staticmethod
    def version() -> str:
        releases = [f"{package} {_version(package, _INSTALL_PADDLE)}" for package in ("paddleocr", "paddlex")]
        return f"paddleocr's networks {weights.digest('paddleocr')}, {', '.join(releases)}, paddle {_paddle_version()}"

    @staticmethod
    def check() -> None:
        _version("paddleocr", _INSTALL_PADDLE)
        _paddle_version()
        weights.check("paddleocr")
        for folder in _paddle_folders():
            _paddle_name(folder)

    def find(self, image: np.ndarray, short_side: int) -> list[Box]:
        shrunk = _shrunk(image, short_side)
        (found,) = self._detector.predict(_bgr(shrunk), batch_size=1)
        return _boxes(found["dt_polys"], shrunk, image)

    def read(self, images: list[np.ndarray]) -> list[tuple[str, float]]:
        # one by one: in a batch, the widest line decides how the others are seen
        found = [self._recogniser.predict(_bgr(image), batch_size=1)[0] for image in images]
        return [(str(line["rec_text"]), float(line["rec_score"])) for line in found]


def _shrunk(image: np.ndarray, short_side: int) -> np.ndarray:
    """A picture at the size at which text is looked for: sides on the detectors' grid."""
    import cv2

    height, width = image.shape[:2]
    scale = min(short_side / min(height, width), _LONGEST / max(height, width))
    size = [max(_GRID, round(side * scale / _GRID) * _GRID) for side in (width, height)]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _boxes(corners: Any, shrunk: np.ndarray, image: np.ndarray) -> list[Box]:
    """Upright boxes in a picture around lines that were found in it when shrunk.

    corners: [lines, 4, 2] x, y in pixels; None or empty for none.
    """
    if corners is None or not len(corners):
        return []
    # [lines, 4 corners, x and y]
    corners = np.asarray(corners, np.float64) * [image.shape[k] / shrunk.shape[k] for k in (1, 0)]
    return [Box(*map(float, (*c.min(axis=0), *c.max(axis=0)))) for c in corners]


def _bgr(image: np.ndarray) -> np.ndarray:
    """OpenCV's order of colours, which both engines take."""
    return np.ascontiguousarray(image[:, :, ::-1])


def _version(package: str, install: str = _INSTALL) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise MissingBackend(f"{package} is not installed in {sys.prefix}; {install}") from None


def _paddle_version() -> str:
    """Of Paddle itself, whose builds for GPUs are another package."""
    for package in ("paddlepaddle", "paddlepaddle-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    raise MissingBackend(f"paddlepaddle is not installed in {sys.prefix}; {_INSTALL_PADDLE}")


def _paddle_folders() -> tuple[Path, Path]:
    folder = weights.find("paddleocr")
    return folder / "det", folder / "rec"


def _paddle_name(folder: Path) -> str:
    """The name of the network in a folder, by which PaddleOCR knows what to do with it. Raises WrongWeights."""
    import yaml

    path = folder / "inference.yml"
    try:
        name = yaml.safe_load(path.read_text())["Global"]["model_name"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise weights.WrongWeights(f"{path} does not name its network (Global: model_name): {error!r}") from None
    if not str(name).endswith(f"_{folder.name}"):
        raise weights.WrongWeights(
            f"{path} is of {name}, and a network of PaddleOCR whose name ends in _{folder.name} "
            "was looked for; `understudy models pull paddleocr` gets the published ones"
        )
    return str(name)


def _model_paths() -> list[Path]:
    spec = importlib.util.find_spec("rapidocr")
    if spec is None or spec.origin is None:
        raise MissingBackend(f"rapidocr is listed in {sys.prefix} and cannot be found; {_INSTALL}")
    return [Path(spec.origin).parent / name for name in _MODELS]


BACKENDS: dict[str, type[Ocr]] = {"rapidocr": RapidOcr, "paddleocr": PaddleOcr}
