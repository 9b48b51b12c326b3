"""Do the lips move with the sound, and how late is it.

active-mind (audio-visual synchronization) and physavatar (appendix A) ask SyncNet (Chung and Zisserman, Out of time,
2016); the embedded backend asks how the lips of the face mesh go with the sound's energy and needs no weights. What
the numbers of the two mean is alike, their scales are not (thresholds.md gives SyncNet's).
"""

from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
from pydantic import Field, field_validator

from tasks.clip import SAMPLE_RATE, Clip
from tasks.lip_sync import Match, lip_curves, match, sound_curves
from tasks.speech import Speech, SpeechSettings
from tasks.stage import Measurement, Stage, StageSettings, known_backend

if TYPE_CHECKING:
    from tasks.speech import VoiceDetector

_MIN_FACE_S, _MIN_SPEECH_S = 2.0, 1.0


class Synchrony(Protocol):
    """A backend: how a clip's main face and its sound fit."""

    @staticmethod
    def version() -> str:
        """Library and weights, as far as they can change a number."""

    @staticmethod
    def check() -> None:
        """Raises tasks.stage.MissingBackend when the backend cannot run."""

    def __call__(self, clip: Clip, samples: np.ndarray, max_offset_s: float) -> Match | None:
        """The best fit of the face that identity found and `samples`, [samples] float32 at 16 kHz; None when nothing
        moves, on one side or the other."""


class Lips:
    """Lips of the face mesh against energy in five bands, by canonical correlation (tasks.lip_sync)."""

    @staticmethod
    def version() -> str:
        return f"scipy {version('scipy')}"

    @staticmethod
    def check() -> None:
        """Nothing but libraries that are always installed."""

    def __call__(self, clip: Clip, samples: np.ndarray, max_offset_s: float) -> Match | None:
        lips = clip.found["identity"].arrays["lips"]
        return match(lip_curves(lips, clip.record.fps), sound_curves(samples), max_offset_s)


BACKENDS: dict[str, type[Synchrony]] = {"lips": Lips}


class SyncSettings(StageSettings):
    """How far to look, and what is natural.

    max_offset_s: seconds, the largest offset that can be found, either way.
    natural_s: the offset that is measured where sound and picture are together, taken off every offset. A syllable is
        loudest while the mouth still opens: in seven real talkers the sound fits best 0.05 s (median; -0.09 to 0.11)
        before the lips. Where the mouth opens exactly with the loudness it is 0. The default is within a frame of both.
    min_s: seconds of a clip below which nothing is said.
    """

    backend: str = "lips"
    max_offset_s: float = Field(default=1.5, ge=0.2, le=5.0)
    natural_s: float = Field(default=-0.03, ge=-0.5, le=0.5)
    min_s: float = Field(default=3.0, ge=2.0, le=60.0)

    @field_validator("backend")
    @classmethod
    def _known(cls, backend: str) -> str:
        return known_backend(backend, BACKENDS)


class Sync(Stage[SyncSettings]):
    """Offset between sound and lips of the main face, and how sure it is.

    Columns, None but for `reason` where there is one:
        offset_s: seconds by which the sound is later than the lips, below zero when it is earlier; to a fraction of a
            frame, the natural offset taken off. Without meaning where the confidence is low; None when nothing moves.
        confidence: by how many standard deviations of all other lags the best one stands out; 0 when nothing moves.
            Chance gives 2 to 3.6 (nine of ten, 5.6 the highest, of 42 pairs of one's lips and another's speech), real
            talkers of 5 s 3.7 to 5.5 (and one in seven 3.1, at a wrong offset), one of 15 s 9.7; more with length.
        distance: 1 - the first canonical correlation of lips and sound at the best lag, 0 to 1.
        reason: why nothing can be told: "too short", "no sound", "no face" (seen for less than 2 s), "no speech" (less
            than 1 s of it, by Silero VAD), or "".
    """

    name: ClassVar[str] = "sync"
    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, type]] = {"offset_s": float, "confidence": float, "distance": float, "reason": str}
    needs: ClassVar[tuple[str, ...]] = ("identity",)

    def backend_version(self) -> str:
        own = BACKENDS[self.settings.backend].version()
        return f"{own}, {Speech(SpeechSettings()).backend_version()}"

    def check(self) -> None:
        Speech(SpeechSettings()).check()
        BACKENDS[self.settings.backend].check()

    @cached_property
    def _backend(self) -> Synchrony:
        return BACKENDS[self.settings.backend]()

    @cached_property
    def _voice(self) -> "VoiceDetector":
        from tasks.speech import VoiceDetector

        return VoiceDetector()

    def measure(self, clip: Clip) -> Measurement:
        samples = clip.samples()
        reason = self._why_not(clip, samples)
        if reason or samples is None:
            return Measurement({**dict.fromkeys(self.columns), "reason": reason})
        found = self._backend(clip, samples, self.settings.max_offset_s)
        return Measurement(
            {
                "offset_s": found.offset_s - self.settings.natural_s if found else None,
                "confidence": found.confidence if found else 0.0,
                "distance": 1 - found.correlation if found else 1.0,
                "reason": "",
            }
        )

    def _why_not(self, clip: Clip, samples: np.ndarray | None) -> str:
        if clip.record.duration_s < self.settings.min_s:
            return "too short"
        if samples is None or not samples.any():
            return "no sound"
        seen = ~np.isnan(clip.found["identity"].arrays["face_box"]).any(axis=1)
        if seen.sum() < _MIN_FACE_S * clip.record.fps:
            return "no face"
        spoken = sum(end - start for start, end in self._voice.spans(samples))
        return "no speech" if spoken < _MIN_SPEECH_S * SAMPLE_RATE else ""
