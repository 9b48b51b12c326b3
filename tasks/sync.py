"""Do the lips move with the sound, and how late is it.

active-mind (audio-visual synchronization) and physavatar (appendix A) ask SyncNet (Chung and Zisserman, Out of time,
2016); the embedded backend asks how the lips of the face mesh go with the sound's energy and needs no weights. What
the numbers of the two mean is alike, their scales are not (thresholds.md gives SyncNet's).
"""

from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
from pydantic import Field, field_validator, model_validator

from tasks import weights
from tasks.clip import SAMPLE_RATE, Clip
from tasks.lip_sync import lip_curves, match, sound_curves
from tasks.speech import Speech, SpeechSettings
from tasks.stage import Measurement, Stage, StageSettings, known_backend, with_own_defaults

if TYPE_CHECKING:
    import torch

    from tasks.networks.face_crop import Track
    from tasks.networks.s3fd import S3FD
    from tasks.networks.syncnet import SyncNet
    from tasks.speech import VoiceDetector

_MIN_FACE_S, _MIN_SPEECH_S = 2.0, 1.0
# [own] of brows to chin, how far a detector's box reaches above the brows: the hairline, where the boxes that S3FD was
# trained on end, is half of it above them by the rule of facial thirds, and hair hangs over it
_FOREHEAD = 0.4


class Found(NamedTuple):
    """How sound and lips fit: the stage's columns, the natural offset not yet taken off."""

    offset_s: float | None
    confidence: float | None
    distance: float | None
    reason: str = ""


class Synchrony(Protocol):
    """A backend: how a clip's main face and its sound fit."""

    def __init__(self, settings: "SyncSettings") -> None:
        """Under the stage's settings."""

    @staticmethod
    def version() -> str:
        """Library and weights, as far as they can change a number."""

    @staticmethod
    def check() -> None:
        """Raises tasks.stage.MissingBackend when the backend cannot run."""

    def __call__(self, clip: Clip, samples: np.ndarray) -> Found:
        """The best fit of the main face and `samples`, [samples] float32 at 16 kHz."""


class Lips:
    """Lips of the face mesh against energy in five bands, by canonical correlation (tasks.lip_sync)."""

    def __init__(self, settings: "SyncSettings") -> None:
        self._max_offset_s = settings.max_offset_s

    @staticmethod
    def version() -> str:
        return f"scipy {version('scipy')}"

    @staticmethod
    def check() -> None:
        """Nothing but libraries that are always installed."""

    def __call__(self, clip: Clip, samples: np.ndarray) -> Found:
        lips = clip.found["identity"].arrays["lips"]
        found = match(lip_curves(lips, clip.record.fps), sound_curves(samples), self._max_offset_s)
        if found is None:
            return Found(None, 0.0, 1.0)
        return Found(found.offset_s, found.confidence, 1 - found.correlation)


class FaceSource(Protocol):
    """Where SyncNet takes the face from."""

    @staticmethod
    def version() -> str:
        """As of a backend."""

    @staticmethod
    def check() -> None:
        """Raises tasks.stage.MissingBackend when it cannot run."""

    def __call__(self, clip: Clip, min_track: int) -> "Track | None":
        """The main face in the clip's frames at 25 a second, boxes in pixels from forehead to chin; None when it is not
        found in more than `min_track` of them without a gap of more than a second."""


class FollowedFace:
    """The main face that the stage identity has followed, its box raised to the forehead."""

    @staticmethod
    def version() -> str:
        return ""

    @staticmethod
    def check() -> None:
        """Nothing but what identity has found."""

    def __call__(self, clip: Clip, min_track: int) -> "Track | None":
        from tasks.networks.face_crop import followed
        from tasks.networks.syncnet import FPS

        record = clip.record
        boxes = clip.found["identity"].arrays["face_box"].astype(np.float64)
        boxes[:, 1] -= _FOREHEAD * (boxes[:, 3] - boxes[:, 1])
        shown = ((np.arange(-(-len(boxes) * FPS // record.fps) + 1) + 0.5) * record.fps / FPS).astype(int)
        return followed((boxes * ([record.width, record.height] * 2))[shown[shown < len(boxes)]], min_track)


class DetectedFace:
    """The largest of the faces that S3FD finds and SyncNet's own tracker follows, as for published figures."""

    networks: ClassVar = ("s3fd",)

    @staticmethod
    def version() -> str:
        return f"s3fd {weights.digest('s3fd')}"

    @staticmethod
    def check() -> None:
        weights.check("s3fd")

    @cached_property
    def _network(self) -> "S3FD":
        from tasks.networks import s3fd

        return s3fd.load(_device())

    def __call__(self, clip: Clip, min_track: int) -> "Track | None":
        from tasks.networks.face_crop import tracks
        from tasks.networks.lip_scores import search
        from tasks.networks.s3fd import faces
        from tasks.networks.syncnet import FPS

        found = list(search(lambda images: faces(self._network, images), clip.frames(rate=FPS)))
        # as in identity, the main face is that whose height, summed over the frames, is greatest
        return max(
            tracks(found, min_track, min_face=0.0),
            key=lambda track: float((track.boxes[:, 3] - track.boxes[:, 1]).sum()),
            default=None,
        )


FACES: dict[str, type[FaceSource]] = {"identity": FollowedFace, "s3fd": DetectedFace}


class SyncNetLips:
    """SyncNet's vectors of lips and of sound, over windows that have both (tasks.networks.syncnet.compare). Frames are
    taken 25 a second by their times, whatever the clip's rate; the sound stays as it is."""

    networks: ClassVar = ("syncnet",)

    def __init__(self, settings: "SyncSettings") -> None:
        self._max_offset_s = settings.max_offset_s
        self._face = FACES[settings.faces]()

    @staticmethod
    def version() -> str:
        import cv2

        libraries = f"torch {version('torch')}, scipy {version('scipy')}, opencv {cv2.__version__}"
        return f"syncnet {weights.digest('syncnet')}, {libraries}"

    @staticmethod
    def check() -> None:
        weights.check("syncnet")

    @cached_property
    def _network(self) -> "SyncNet":
        from tasks.networks import syncnet

        return syncnet.load(_device())

    def __call__(self, clip: Clip, samples: np.ndarray) -> Found:
        from tasks.networks.face_crop import crops
        from tasks.networks.lip_scores import sound_of
        from tasks.networks.syncnet import FPS, FRAMES, compare

        shift = round(self._max_offset_s * FPS)
        track = self._face(clip, max(round(_MIN_FACE_S * FPS), 2 * shift + FRAMES))
        if track is None:
            return Found(None, None, None, "no face")
        sound = sound_of(samples * 32768.0, track)  # on the scale of int16
        fit = compare(self._network, crops(clip.frames(rate=FPS), track), sound, shift)
        return Found(-fit.offset / FPS, fit.confidence, fit.distance)


def _device() -> "torch.device":
    import torch

    from tasks.networks.device import device

    if device().type == "cpu":
        torch.set_num_threads(1)  # the workers are the parallelism
    return device()


BACKENDS: dict[str, type[Synchrony]] = {"lips": Lips, "syncnet": SyncNetLips}
_OWN = {"syncnet": {"max_offset_s": 0.6, "natural_s": 0.0}}  # defaults, where a backend has others


class SyncSettings(StageSettings):
    """How far to look, and what is natural.

    max_offset_s: seconds, the largest offset that can be found, either way. For `syncnet` 0.6 is the default: the 31
        offsets of published figures, over whose median the confidence stands.
    natural_s: the offset that is measured where sound and picture are together, taken off every offset. A syllable is
        loudest while the mouth still opens: in seven real talkers the sound fits best 0.05 s (median; -0.09 to 0.11)
        before the lips. Where the mouth opens exactly with the loudness it is 0. The default is within a frame of both;
        for `syncnet`, which has learnt when sound goes with lips, it is 0.
    min_s: seconds of a clip below which nothing is said.
    faces: where `syncnet` takes the face from: "identity", that which this stage follows, or "s3fd", as for published
        figures, which needs its weights, five times the time and no identity.
    """

    backend: str = "lips"
    max_offset_s: float = Field(default=1.5, ge=0.2, le=5.0)
    natural_s: float = Field(default=-0.03, ge=-0.5, le=0.5)
    min_s: float = Field(default=3.0, ge=2.0, le=60.0)
    faces: str = "identity"

    @model_validator(mode="before")
    @classmethod
    def _as_the_backend_has_it(cls, given: Any) -> Any:
        return with_own_defaults(given, _OWN)

    @field_validator("backend")
    @classmethod
    def _known(cls, backend: str) -> str:
        return known_backend(backend, BACKENDS)

    @field_validator("faces")
    @classmethod
    def _known_faces(cls, faces: str) -> str:
        return known_backend(faces, FACES)

    @model_validator(mode="after")
    def _of_the_backend(self) -> "SyncSettings":
        if self.faces != "identity" and self.backend != "syncnet":
            raise ValueError(f"faces can be set for backend 'syncnet' only, not {self.backend!r}")
        return self


class Sync(Stage[SyncSettings]):
    """Offset between sound and lips of the main face, and how sure it is.

    Columns, None but for `reason` where there is one:
        offset_s: seconds by which the sound is later than the lips, below zero when it is earlier; to a fraction of a
            frame (`syncnet`: in whole frames of 1/25 s), the natural offset taken off. Without meaning where the
            confidence is low; None when nothing moves.
        confidence: `lips`: by how many standard deviations of all other lags the best one stands out; 0 when nothing
            moves. Chance gives 2 to 3.6 (nine of ten, 5.6 the highest, of 42 pairs of one's lips and another's speech),
            real talkers of 5 s 3.7 to 5.5 (and one in seven 3.1, at a wrong offset), one of 15 s 9.7; more with length.
            `syncnet`: Sync-C, by how much the least mean distance is below the median of all offsets'; published
            filters ask for 3 (LatentSync), and for offsets of 6 frames at most.
        distance: `lips`: 1 - the first canonical correlation of lips and sound at the best lag, 0 to 1. `syncnet`:
            Sync-D, the least mean distance of the vectors, 0 and up; 5 to 9 where lips and sound fit.
        reason: why nothing can be told: "too short", "no sound", "no face" (seen for less than 2 s; `syncnet`: without
            a gap of over a second in no more than 2 s, or twice `max_offset_s` and 0.2 s where that is more), "no
            speech" (less than 1 s of it, by Silero VAD), or "".
    """

    name: ClassVar[str] = "sync"
    version: ClassVar[int] = 1
    backends: ClassVar = {"backend": BACKENDS, "faces": FACES}
    columns: ClassVar[dict[str, type]] = {"offset_s": float, "confidence": float, "distance": float, "reason": str}
    needs: ClassVar[tuple[str, ...]] = ("identity",)

    @classmethod
    def needed(cls, settings: SyncSettings) -> tuple[str, ...]:
        return cls.needs if settings.faces == "identity" else ()

    def backend_version(self) -> str:
        own = (BACKENDS[self.settings.backend].version(), FACES[self.settings.faces].version())
        return ", ".join(filter(None, (*own, Speech(SpeechSettings()).backend_version())))

    def check(self) -> None:
        Speech(SpeechSettings()).check()
        BACKENDS[self.settings.backend].check()
        FACES[self.settings.faces].check()

    @cached_property
    def _backend(self) -> Synchrony:
        return BACKENDS[self.settings.backend](self.settings)

    @cached_property
    def _voice(self) -> "VoiceDetector":
        from tasks.speech import VoiceDetector

        return VoiceDetector()

    def measure(self, clip: Clip) -> Measurement:
        samples = clip.samples()
        reason = self._why_not(clip, samples)
        if reason or samples is None:
            return Measurement({**dict.fromkeys(self.columns), "reason": reason})
        found = self._backend(clip, samples)
        offset_s = None if found.offset_s is None else found.offset_s - self.settings.natural_s
        return Measurement({**found._asdict(), "offset_s": offset_s})

    def _why_not(self, clip: Clip, samples: np.ndarray | None) -> str:
        if clip.record.duration_s < self.settings.min_s:
            return "too short"
        if samples is None or not samples.any():
            return "no sound"
        if self.settings.faces == "identity":
            seen = ~np.isnan(clip.found["identity"].arrays["face_box"]).any(axis=1)
            if seen.sum() < _MIN_FACE_S * clip.record.fps:
                return "no face"
        spoken = sum(end - start for start, end in self._voice.spans(samples))
        return "no speech" if spoken < _MIN_SPEECH_S * SAMPLE_RATE else ""
