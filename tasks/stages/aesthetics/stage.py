"""How good a clip looks: image quality and aesthetics, 1 (bad) to 5 (excellent), and the measures behind them.

The papers use Q-Align, a language model of 7 billion parameters (active-mind, appendix B, without a number). For
Q-Align "no published cut was found: give it as a percentile" (docs/thresholds.md). The embedded backend computes
classical measures, which see faults but not beauty. Its two scores order clips by their faults and cannot be compared
with other scores.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from importlib.metadata import version
from typing import ClassVar

import numpy as np
from pydantic import Field

from tasks.media.clip import Clip, Measurement, Unmeasurable
from tasks.stages.aesthetics import measures
from tasks.stages.backend import Backend, Resources
from tasks.stages.base import MAX_ASPECT, Stage, StageSettings
from tasks.weights import remote_code
from tasks.weights import store as weights

_LINES = 480  # of the short side at which sharpness is measured, as the training clips have

# What each measure is worth: 0 at the first number and beyond, 1 at the second and beyond, linear between them. The
# second numbers are those that footage of talking people reaches without complaint.
_WORTH = {
    # An edge of 1 pixel's width (sigma) at 480 lines is good. At 4 pixels nothing is left of a face.
    "sharpness": (0.05, 0.6),
    # Standard deviations of 8-bit values. A camera in daylight stays below 1, a film at night goes up to 5.
    "noise": (10.0, 1.0),
    # Clean images have 0.02 to 0.1, JPEG of quality 15 0.15 to 0.3, MPEG without a deblocking filter up to 0.45.
    "blockiness": (0.3, 0.1),
    # 8-bit luma. A frame is too dark if it has no light parts. Dark parts are no fault: studios may be black.
    "highlights": (30.0, 90.0),
    "shadows": (220.0, 130.0),
    "clipped": (0.5, 0.1),
    "contrast": (0.05, 0.25),
}
_COLOURFUL = (0.0, 40.0)  # between Hasler and Suesstrunk's "moderately" and "averagely" colourful
_RICH = (0.2, 0.6)  # contrast


class AestheticsBackend(Backend, ABC):
    """A backend of the stage: scores and measures of a clip's sampled frames."""

    @abstractmethod
    def __init__(self, settings: "AestheticsSettings") -> None: ...

    @abstractmethod
    def __call__(self, images: list[np.ndarray]) -> dict[str, float | None]:
        """Compute the stage's columns for a clip.

        images: one or more sampled frames, [height, width, 3] uint8 RGB each.

        Returns: `quality` and `aesthetic`, and further columns by name. Columns that are left out have no value.
        """


class Classical(AestheticsBackend):
    """Sharpness, noise, blocks, light, contrast and colour (tasks.stages.aesthetics.measures), medians over the frames.

    quality is 1 + 4 t, where t is the product of what each measure is worth (`_WORTH`). So a fault is not made up for
    by the absence of others, two faults are worse than one, and a fault that grows never raises the score.

    aesthetic is 1 + 4 sqrt(t) (0.5 + 0.25 colour + 0.25 contrast). A clip without faults gets half of the scale. The
    rest is for colour and contrast, on which people agree most.
    """

    # measured: peak growth over one clip of 5 s (benchmarks/backends.py)
    resources: ClassVar[Resources] = Resources(memory_gb=0.1)

    def __init__(self, settings: "AestheticsSettings") -> None:
        import cv2

        cv2.setNumThreads(1)  # the workers run in parallel, so each uses one thread

    @classmethod
    def version(cls) -> str:
        import cv2

        return f"opencv {cv2.__version__}"

    def __call__(self, images: list[np.ndarray]) -> dict[str, float | None]:
        frames = [_measure(image) for image in images]
        # The median, so that a fade or a flash in one frame does not decide.
        medians = {name: float(np.median([frame[name] for frame in frames])) for name in frames[0]}
        faultless = float(np.prod([_worth(medians[name], *bounds) for name, bounds in _WORTH.items()]))
        colour, contrast = _worth(medians["colourfulness"], *_COLOURFUL), _worth(medians["contrast"], *_RICH)
        pleasing = 0.5 + 0.25 * colour + 0.25 * contrast
        return {"quality": 1 + 4 * faultless, "aesthetic": 1 + 4 * faultless**0.5 * pleasing, **medians}


def _measure(image: np.ndarray) -> dict[str, float]:
    import cv2

    height, width = image.shape[:2]
    scale = _LINES / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    grey = measures.luma(image)
    if scale < 1:
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    noise = measures.noise(grey)
    at_size = cv2.resize(grey, size, interpolation=cv2.INTER_CUBIC) if scale > 1 else grey
    return {
        # Scaling up makes noise coarser and leaves it as strong.
        "sharpness": measures.sharpness(at_size, noise * max(1.0, scale)),
        "noise": noise,
        "blockiness": measures.blockiness(measures.luma(image)),
        **measures.light(image)._asdict(),
    }


def _worth(value: float, nothing: float, full: float) -> float:
    """0 where `value` is `nothing` or beyond, 1 where it is `full` or beyond, linear between them."""
    return min(1.0, max(0.0, (value - nothing) / (full - nothing)))


class QAlignAesthetics(AestheticsBackend):
    """Q-Align (tasks.networks.qalign).

    quality and aesthetic are the medians of the frames' own scores. video_quality is the score of the frames as one
    video, which has one frame a second if `max_samples` takes all key frames.
    """

    networks: ClassVar[tuple[str, ...]] = ("qalign",)
    resources: ClassVar[Resources] = Resources(gpu=1.0, memory_gb=17.4)
    """Memory by the size of its weights, not measured: the catalogue's 16.4 GB in float16, in which it computes on a
    GPU, and an allowance of 1 GB for libraries and activations."""

    def __init__(self, settings: "AestheticsSettings") -> None:
        from tasks.networks.qalign import load

        self._model = load(settings.remote_code)

    @classmethod
    def version(cls) -> str:
        from tasks.networks.qalign import precision

        code, kind = remote_code.digest("qalign"), str(precision()).removeprefix("torch.")
        libraries = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "pillow"))
        return f"qalign {weights.digest('qalign')} in {kind}, code {code}, {libraries}"

    @classmethod
    def check(cls, settings: "AestheticsSettings") -> None:
        super().check(settings)
        remote_code.check("qalign", "aesthetics.remote_code", settings.remote_code)

    def __call__(self, images: list[np.ndarray]) -> dict[str, float | None]:
        return {
            "quality": float(np.median(self._model.images(images, "quality"))),
            "aesthetic": float(np.median(self._model.images(images, "aesthetics"))),
            "video_quality": self._model.video(images, "quality"),
        }


BACKENDS: dict[str, type[AestheticsBackend]] = {"classical": Classical, "qalign": QAlignAesthetics}


class AestheticsSettings(StageSettings):
    """What scores a clip, and how many of its frames."""

    choices: ClassVar = {"backend": BACKENDS}

    backend: str = "classical"
    """What computes the scores: "classical", measures of faults; "qalign", a language model."""
    max_samples: int = Field(default=3, ge=1, le=1000)
    """The most key frames that are scored in a clip, spread evenly over it. A clip has one key frame a second."""
    remote_code: str = Field(default="", pattern="^([0-9a-f]{12})?$")
    """The hash of the code that comes with Q-Align's weights. Setting it says that you trust this code. For the backend
    `qalign`."""


class Aesthetics(Stage[AestheticsSettings]):
    """Scores of a clip's picture.

    Columns, medians over the sampled key frames; those after `video_quality` are from `classical` only:
        quality: technical quality, 1 to 5.
        aesthetic: aesthetics, 1 to 5.
        video_quality: quality of the sampled frames as one video, 1 to 5; from `qalign` only.
        sharpness: of the sharper parts, at 480 lines, 0 to 1 (steps).
        noise: standard deviation, 8-bit levels.
        blockiness: share of the visible steps that lie on a codec's grid, 0 to 1.
        brightness, shadows, highlights: mean, 10th and 90th percentile of luma, 0 to 255.
        contrast: span of luma, 0 to 1.
        clipped: share of the frame at the upper end of luma, 0 to 1.
        colourfulness: Hasler and Suesstrunk's M3, 0 (grey) to 109 (extreme) and more.
    """

    name: ClassVar[str] = "aesthetics"
    version: ClassVar[int] = 2
    backends: ClassVar = {"backend": BACKENDS}
    columns: ClassVar[dict[str, type]] = {
        "quality": float,
        "aesthetic": float,
        "video_quality": float,
        "sharpness": float,
        "noise": float,
        "blockiness": float,
        "brightness": float,
        "shadows": float,
        "highlights": float,
        "contrast": float,
        "clipped": float,
        "colourfulness": float,
    }

    @cached_property
    def _backend(self) -> AestheticsBackend:
        return BACKENDS[self.settings.backend](self.settings)

    def measure(self, clip: Clip) -> Measurement:
        width, height = clip.record.width, clip.record.height
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise Unmeasurable(f"a frame of {width}x{height} is too narrow to score")
        images = [image for _, image in clip.keyframes()]
        if not images:
            raise Unmeasurable("the clip has no key frame")
        chosen = np.linspace(0, len(images) - 1, min(len(images), self.settings.max_samples))
        scores = self._backend([images[round(k)] for k in chosen])
        return Measurement({name: scores.get(name) for name in self.columns})
