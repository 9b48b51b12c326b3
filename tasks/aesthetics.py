"""How good a clip looks: image quality and aesthetics, 1 (bad) to 5 (excellent), and what they are made of.

The papers use Q-Align, a language model of 7 billion parameters (active-mind, appendix B, without a number; for Q-Align
"no published cut was found: give it as a percentile", thresholds.md). The embedded backend is made of classical
measures and knows faults, not beauty: its two scores order clips by how spoilt they are, and compare with those of
nothing else.
"""

from functools import cached_property
from importlib.metadata import version
from typing import ClassVar, Protocol

import numpy as np
from pydantic import Field, field_validator

from tasks import picture, remote_code, weights
from tasks.clip import Clip
from tasks.stage import Measurement, Stage, StageSettings, Unmeasurable, known_backend

_LINES = 480  # of the short side at which sharpness is measured: that of the training clips
_MAX_ASPECT = 8  # as in tasks.motion

# What each measure is worth: 0 at the first number and beyond, 1 at the second and beyond, straight between. The
# second numbers are those that footage of talking people reaches without complaint.
_WORTH = {
    # edges of 1 pixel's width (sigma) at 480 lines are good; at 4 pixels nothing is left of a face
    "sharpness": (0.05, 0.6),
    # standard deviations of 8-bit values; a camera in daylight stays below 1, a film at night goes up to 5
    "noise": (10.0, 1.0),
    # clean pictures have 0.02 to 0.1; JPEG of quality 15 0.15 to 0.3, MPEG without a deblocking filter up to 0.45
    "blockiness": (0.3, 0.1),
    # 8-bit luma. Too dark is a picture without light parts, not one with dark ones: studios may be black
    "highlights": (30.0, 90.0),
    "shadows": (220.0, 130.0),
    "clipped": (0.5, 0.1),
    "contrast": (0.05, 0.25),
}
_COLOURFUL = (0.0, 40.0)  # between Hasler and Suesstrunk's "moderately" and "averagely" colourful
_RICH = (0.2, 0.6)  # contrast


class AestheticsSettings(StageSettings):
    """backend: "classical", or "qalign".

    max_samples: key frames looked at in a clip, spread evenly over it; there is one a second.
    remote_code: the hash of the code that comes with Q-Align's weights, which says that you trust it.
    """

    backend: str = "classical"
    max_samples: int = Field(default=3, ge=1, le=1000)
    remote_code: str = Field(default="", pattern="^([0-9a-f]{12})?$")

    @field_validator("backend")
    @classmethod
    def _known(cls, backend: str) -> str:
        return known_backend(backend, BACKENDS)


class Judge(Protocol):
    """An aesthetics backend. No clip changes what the next one gets."""

    def __init__(self, settings: AestheticsSettings) -> None: ...

    @staticmethod
    def version() -> str:
        """Library and weights, as far as they can change a number."""

    @staticmethod
    def check(settings: AestheticsSettings) -> None:
        """Raises tasks.stage.MissingBackend when the backend cannot run."""

    def __call__(self, images: list[np.ndarray]) -> dict[str, float | None]:
        """The stage's columns for a clip's samples, [height, width, 3] uint8 RGB each, one and more.

        A backend that has no number for a column leaves it out; `quality` and `aesthetic` it has.
        """


class Classical:
    """Sharpness, noise, blocks, light, contrast and colour (`tasks.picture`), medians over the samples.

    quality is 1 + 4 t, where t is the product of what each measure is worth (`_WORTH`): one fault that spoils a
    picture is not made up for by the absence of the others, two are worse than one, and a fault that grows never
    raises it.

    aesthetic is 1 + 4 sqrt(t) (0.5 + 0.25 colour + 0.25 contrast): half of it for a picture without faults, the rest
    for colour and contrast, in which people agree most.
    """

    def __init__(self, settings: AestheticsSettings) -> None:
        import cv2

        # the workers are the parallelism
        cv2.setNumThreads(1)

    @staticmethod
    def version() -> str:
        import cv2

        return f"opencv {cv2.__version__}"

    @staticmethod
    def check(settings: AestheticsSettings) -> None:
        """OpenCV is always installed."""

    def __call__(self, images: list[np.ndarray]) -> dict[str, float | None]:
        frames = [_measured(image) for image in images]
        # a fade or a flash in one of them does not decide
        found = {name: float(np.median([frame[name] for frame in frames])) for name in frames[0]}
        faultless = float(np.prod([_worth(found[name], *bounds) for name, bounds in _WORTH.items()]))
        pleasing = 0.5 + 0.25 * _worth(found["colourfulness"], *_COLOURFUL) + 0.25 * _worth(found["contrast"], *_RICH)
        return {"quality": 1 + 4 * faultless, "aesthetic": 1 + 4 * faultless**0.5 * pleasing, **found}


def _measured(image: np.ndarray) -> dict[str, float]:
    import cv2

    height, width = image.shape[:2]
    scale = _LINES / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    grey = picture.luma(image)
    if scale < 1:
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    noise = picture.noise(grey)
    at_size = cv2.resize(grey, size, interpolation=cv2.INTER_CUBIC) if scale > 1 else grey
    return {
        # scaled up, noise is as high and coarser
        "sharpness": picture.sharpness(at_size, noise * max(1.0, scale)),
        "noise": noise,
        "blockiness": picture.blockiness(picture.luma(image)),
        **picture.light(image)._asdict(),
    }


def _worth(value: float, nothing: float, full: float) -> float:
    return min(1.0, max(0.0, (value - nothing) / (full - nothing)))


class QAlignJudge:
    """Q-Align (tasks.networks.qalign): medians of the samples' own quality and aesthetics, and the quality of the film
    that they make, one a second when `max_samples` takes all."""

    networks: ClassVar[tuple[str, ...]] = ("qalign",)

    def __init__(self, settings: AestheticsSettings) -> None:
        from tasks.networks.qalign import load

        self._model = load(settings.remote_code)

    @staticmethod
    def version() -> str:
        from tasks.networks.qalign import precision

        code, kind = remote_code.digest("qalign"), str(precision()).removeprefix("torch.")
        libraries = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "pillow"))
        return f"qalign {weights.digest('qalign')} in {kind}, code {code}, {libraries}"

    @staticmethod
    def check(settings: AestheticsSettings) -> None:
        weights.check("qalign")
        remote_code.check("qalign", "aesthetics.remote_code", settings.remote_code)

    def __call__(self, images: list[np.ndarray]) -> dict[str, float | None]:
        return {
            "quality": float(np.median(self._model.images(images, "quality"))),
            "aesthetic": float(np.median(self._model.images(images, "aesthetics"))),
            "video_quality": self._model.video(images, "quality"),
        }


BACKENDS: dict[str, type[Judge]] = {"classical": Classical, "qalign": QAlignJudge}


class Aesthetics(Stage[AestheticsSettings]):
    """What a clip's picture is worth.

    Columns, medians over the samples:
        quality: technical quality, 1 to 5.
        aesthetic: 1 to 5.
        video_quality: of the samples taken as one film, 1 to 5; Q-Align's alone.
        sharpness: of the sharper parts, as seen at 480 lines, 0 to 1 (steps).
        noise: standard deviation, 8-bit levels.
        blockiness: share of the visible steps that are a codec's grid, 0 to 1.
        brightness, shadows, highlights: mean, 10th and 90th percentile of luma, 0 to 255.
        contrast: span of luma, 0 to 1.
        clipped: share of the picture at the upper end of luma, 0 to 1.
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

    def backend_version(self) -> str:
        return BACKENDS[self.settings.backend].version()

    def check(self) -> None:
        BACKENDS[self.settings.backend].check(self.settings)

    @cached_property
    def _judge(self) -> Judge:
        return BACKENDS[self.settings.backend](self.settings)

    def measure(self, clip: Clip) -> Measurement:
        width, height = clip.record.width, clip.record.height
        if max(width, height) > _MAX_ASPECT * min(width, height):
            raise Unmeasurable(f"a picture of {width}x{height} is too narrow to judge")
        images = [image for _, image in clip.keyframes()]
        if not images:
            raise Unmeasurable("the clip has no key frame")
        chosen = np.linspace(0, len(images) - 1, min(len(images), self.settings.max_samples))
        found = self._judge([images[round(k)] for k in chosen])
        return Measurement({name: found.get(name) for name in self.columns})
