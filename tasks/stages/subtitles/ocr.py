"""Finding and reading text in images: the backends' contract, RapidOCR and PaddleOCR. No other module imports these."""

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tasks.stages.backend import Backend, Resources
from tasks.weights import store as weights
from tasks.weights.missing import MissingBackend

_MODELS = ("models/PP-OCRv6_det_small.onnx", "models/PP-OCRv6_rec_small.onnx")
_INSTALL = (
    "install it with `pip install rapidocr==3.10.0 onnxruntime` (`make setup` does); subtitles has no other embedded "
    "backend"
)

_INSTALL_PADDLE = (
    "install it with `pip install 'understudy[ocr]'`; subtitles' backend `rapidocr` works without it, with smaller "
    "networks of the same kind"
)

_GRID = 32  # pixels; the detectors take images whose sides are multiples of it
_LONGEST = 2000  # pixels; RapidOCR scales larger images down by itself
_UNCLIP = 1.3  # keeps boxes tight: with the default settings they have twice the area of small print


class TextBox(NamedTuple):
    """An upright box around a line of text, in pixels of the image."""

    x0: float
    """Left edge."""
    y0: float
    """Upper edge."""
    x1: float
    """Right edge, just outside the text."""
    y1: float
    """Lower edge, just outside the text."""


class OcrBackend(Backend, ABC):
    """A backend of the stage: finds lines of text and reads them."""

    @abstractmethod
    def find(self, image: np.ndarray, short_side: int) -> list[TextBox]:
        """Find the lines of text in an image.

        image: [height, width, 3] uint8 RGB. short_side: pixels that its short side is scaled to for the search.

        Returns: boxes in pixels of `image`.
        """

    @abstractmethod
    def read(self, images: list[np.ndarray]) -> list[tuple[str, float]]:
        """Read images of one line of text each, [height, width, 3] uint8 RGB: the text, and its confidence, 0 to 1."""


class RapidOcr(OcrBackend):
    """PP-OCRv6 small, detector and recogniser, on ONNX Runtime. Both networks come with the package.

    The detector finds text of any script: lines of 2.5 % of the frame's height at a short side of 192 pixels. The
    recogniser reads Latin, Greek, Chinese and Japanese letters. In Cyrillic, Georgian and Arabic text it sees at most
    the gaps between words.
    """

    # measured: peak growth over one clip of 5 s (benchmarks/backends.py)
    resources: ClassVar[Resources] = Resources(memory_gb=0.2)

    def __init__(self) -> None:
        self.check(None)
        import cv2
        from rapidocr import RapidOCR

        cv2.setNumThreads(1)  # the workers run in parallel, so each uses one thread
        detector, recogniser = (str(path) for path in _model_paths())
        self._engine = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.max_side_len": _LONGEST,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                # With a path, RapidOCR downloads nothing.
                "Det.model_path": detector,
                "Rec.model_path": recogniser,
                # `find` has scaled the images already.
                "Det.limit_type": "min",
                "Det.limit_side_len": _GRID,
                "Det.use_dilation": False,
                "Det.unclip_ratio": _UNCLIP,
            }
        )

    @classmethod
    def version(cls) -> str:
        return f"rapidocr {_version('rapidocr')}, onnxruntime {_version('onnxruntime')}"

    @classmethod
    def check(cls, settings: Any) -> None:
        cls.version()
        missing = [str(path) for path in _model_paths() if not path.is_file()]
        if missing:
            raise MissingBackend(f"rapidocr lacks {', '.join(missing)}; {_INSTALL}")

    def find(self, image: np.ndarray, short_side: int) -> list[TextBox]:
        shrunk = _shrunk(image, short_side)
        return _boxes(self._run(shrunk, use_det=True, use_rec=False).boxes, shrunk, image)

    def read(self, images: list[np.ndarray]) -> list[tuple[str, float]]:
        # One by one, because in a batch the widest line decides how the others are padded.
        results = [self._run(image, use_det=False, use_rec=True) for image in images]
        return [(line.txts[0], float(line.scores[0])) if line.txts else ("", 0.0) for line in results]

    def _run(self, image: np.ndarray, **steps: bool) -> Any:
        return self._engine(_bgr(image), use_cls=False, **steps)


class PaddleOcr(OcrBackend):
    """PaddleOCR's detector and recogniser from the local folders `det` and `rec`: any PP-OCR pair that Paddle exported.

    Boxes leave as much room around the letters as RapidOcr's, so that their areas can be compared.
    """

    networks: ClassVar[tuple[str, ...]] = ("paddleocr",)
    resources: ClassVar[Resources] = Resources(memory_gb=1.2)
    """Memory by the size of its weights, not measured: the catalogue's 0.17 GB in float32, in which it computes, and an
    allowance of 1 GB for libraries and activations."""

    def __init__(self) -> None:
        self.check(None)
        # PaddleOCR reads this when it is imported. Without it, it asks four hosts for models.
        os.environ.setdefault("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")
        from paddleocr import TextDetection, TextRecognition

        detector, recogniser = _paddle_folders()
        # With folders, PaddleOCR downloads nothing. The other engine opens a pickle where it finds one. With oneDNN,
        # Paddle 3.3 fails on PP-OCRv5. The workers run in parallel, so each uses one thread.
        options = {"engine": "paddle_static", "cpu_threads": 1, "enable_mkldnn": False}
        self._detector = TextDetection(
            model_name=_paddle_name(detector),
            model_dir=str(detector),
            # `find` has scaled the images already.
            limit_type="min",
            limit_side_len=_GRID,
            unclip_ratio=_UNCLIP,
            **options,
        )
        self._recogniser = TextRecognition(model_name=_paddle_name(recogniser), model_dir=str(recogniser), **options)

    @classmethod
    def version(cls) -> str:
        releases = [f"{package} {_version(package, _INSTALL_PADDLE)}" for package in ("paddleocr", "paddlex")]
        return f"paddleocr's networks {weights.digest('paddleocr')}, {', '.join(releases)}, paddle {_paddle_version()}"

    @classmethod
    def check(cls, settings: Any) -> None:
        _version("paddleocr", _INSTALL_PADDLE)
        _paddle_version()
        super().check(settings)
        for folder in _paddle_folders():
            _paddle_name(folder)

    def find(self, image: np.ndarray, short_side: int) -> list[TextBox]:
        shrunk = _shrunk(image, short_side)
        (result,) = self._detector.predict(_bgr(shrunk), batch_size=1)
        return _boxes(result["dt_polys"], shrunk, image)

    def read(self, images: list[np.ndarray]) -> list[tuple[str, float]]:
        # One by one, because in a batch the widest line decides how the others are padded.
        results = [self._recogniser.predict(_bgr(image), batch_size=1)[0] for image in images]
        return [(str(line["rec_text"]), float(line["rec_score"])) for line in results]


def _shrunk(image: np.ndarray, short_side: int) -> np.ndarray:
    """Scale an image to the size at which text is searched, with sides that are multiples of `_GRID`."""
    import cv2

    height, width = image.shape[:2]
    scale = min(short_side / min(height, width), _LONGEST / max(height, width))
    size = [max(_GRID, round(side * scale / _GRID) * _GRID) for side in (width, height)]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _boxes(corners: Any, shrunk: np.ndarray, image: np.ndarray) -> list[TextBox]:
    """Upright boxes in `image` around lines that were found in the image `shrunk`.

    corners: [lines, 4, 2] x, y in pixels of `shrunk`; None or empty without lines.
    """
    if corners is None or not len(corners):
        return []
    # [lines, 4, 2] in pixels of `image`
    corners = np.asarray(corners, np.float64) * [image.shape[k] / shrunk.shape[k] for k in (1, 0)]
    return [TextBox(*map(float, (*c.min(axis=0), *c.max(axis=0)))) for c in corners]


def _bgr(image: np.ndarray) -> np.ndarray:
    """Convert RGB to OpenCV's order of colours, which both libraries take."""
    return np.ascontiguousarray(image[:, :, ::-1])


def _version(package: str, install: str = _INSTALL) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise MissingBackend(f"{package} is not installed in {sys.prefix}; {install}") from None


def _paddle_version() -> str:
    """The release of Paddle itself. Its build for GPUs is another package."""
    for package in ("paddlepaddle", "paddlepaddle-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    raise MissingBackend(f"paddlepaddle is not installed in {sys.prefix}; {_INSTALL_PADDLE}")


def _paddle_folders() -> tuple[Path, Path]:
    folder = weights.find("paddleocr")
    return folder / "det", folder / "rec"


def _paddle_name(folder: Path) -> str:
    """The name of the network in a folder, which PaddleOCR needs to know. Raises WrongWeights."""
    import yaml

    path = folder / "inference.yml"
    try:
        name = yaml.safe_load(path.read_text())["Global"]["model_name"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise weights.WrongWeights(f"{path} does not name its network (Global: model_name): {error!r}") from None
    if not str(name).endswith(f"_{folder.name}"):
        raise weights.WrongWeights(
            f"{path} names the network {name}, but this folder has to hold a network of PaddleOCR whose name ends in "
            f"_{folder.name}; `understudy weights pull paddleocr` gets the published ones"
        )
    return str(name)


def _model_paths() -> list[Path]:
    spec = importlib.util.find_spec("rapidocr")
    if spec is None or spec.origin is None:
        raise MissingBackend(f"rapidocr is listed in {sys.prefix}, but the package cannot be found; {_INSTALL}")
    return [Path(spec.origin).parent / name for name in _MODELS]


BACKENDS: dict[str, type[OcrBackend]] = {"rapidocr": RapidOcr, "paddleocr": PaddleOcr}
