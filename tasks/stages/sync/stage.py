"""Whether the lips move with the sound, and how late the sound is.

active-mind (audio-visual synchronization) and physavatar (appendix A) use SyncNet (Chung and Zisserman, Out of time,
2016). The embedded backend correlates the lips of the face mesh with the sound's energy and needs no weights. The
columns mean the same for both, but their scales differ (docs/thresholds.md has SyncNet's).
"""

from functools import cached_property
from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from tasks.media.clip import SAMPLE_RATE, Clip, Measurement
from tasks.stages import voice_activity
from tasks.stages.base import Stage, StageSettings
from tasks.stages.sync.backends import BACKENDS, FACES, MIN_FACE_S, SyncBackend

_MIN_SPEECH_S = 1.0


class SyncSettings(StageSettings):
    """How the offset is measured, and in which range."""

    choices: ClassVar = {"backend": BACKENDS, "faces": FACES}

    backend: str = "lips"
    """What compares lips and sound: "lips", canonical correlation; "syncnet", a network."""
    max_offset_s: float = Field(default=1.5, ge=0.2, le=5.0)
    """Seconds: the largest offset that can be found, either way. The default for `syncnet` is 0.6, which gives the 31
    offsets of published figures; the confidence is relative to their median."""
    natural_s: float = Field(default=-0.03, ge=-0.5, le=0.5)
    """Seconds: the offset that is measured where sound and picture are in sync. It is subtracted from every offset. A
    syllable is loudest while the mouth still opens: in seven real talkers the sound fits best 0.05 s before the lips
    (median; -0.09 to 0.11). Where the mouth opens exactly with the loudness it is 0. The default is within a frame of
    both. SyncNet has learnt when sound belongs to lips, so the default for `syncnet` is 0."""
    min_s: float = Field(default=3.0, ge=2.0, le=60.0)
    """Seconds: a shorter clip gets the reason "too short"."""
    faces: str = "identity"
    """Where `syncnet` takes the face from: "identity", the face that the stage identity follows; "s3fd", a detector as
    for published figures, which needs its weights and five times the time, and does without the stage identity."""

    @model_validator(mode="after")
    def _check_faces(self) -> "SyncSettings":
        if self.faces != "identity" and self.backend != "syncnet":
            raise ValueError(f"faces can be set for backend 'syncnet' only, not {self.backend!r}")
        return self


class Sync(Stage[SyncSettings]):
    """The offset between the sound and the lips of the main face, and its confidence.

    Columns. All but `reason` are None where there is a reason.
        offset_s: seconds by which the sound is later than the lips, negative if it is earlier, less `natural_s`. It is
            precise to a fraction of a frame, with `syncnet` to a frame of 1/25 s. It means nothing if the confidence is
            low. None if nothing moves.
        confidence:
            `lips`: by how many standard deviations of all other lags the best lag stands out; 0 if nothing moves.
                Chance gives 2 to 3.6 (nine of ten of 42 pairs of one person's lips and another's speech; 5.6 the
                highest). Real talkers of 5 s have 3.7 to 5.5 (and one in seven 3.1, at a wrong offset), one of 15 s
                9.7. It grows with length.
            `syncnet`: Sync-C, by how much the least mean distance is below the median over all offsets. Published
                filters ask for 3 (LatentSync), and for offsets of 6 frames at most.
        distance:
            `lips`: 1 less the first canonical correlation of lips and sound at the best lag, 0 to 1.
            `syncnet`: Sync-D, the least mean distance of the vectors, 0 and up; 5 to 9 where lips and sound fit.
        reason: why nothing can be measured, or "":
            "too short": shorter than `min_s`.
            "no sound".
            "no face": it shows for less than 2 s. `syncnet`: its longest track without a gap of more than a second is
                not longer than 2 s, or than twice `max_offset_s` and 0.2 s where that is more.
            "no speech": less than 1 s of it, by Silero VAD.
    """

    name: ClassVar[str] = "sync"
    version: ClassVar[int] = 1
    backends: ClassVar = {"backend": BACKENDS, "faces": FACES}
    columns: ClassVar[dict[str, type]] = {"offset_s": float, "confidence": float, "distance": float, "reason": str}
    needs: ClassVar[tuple[str, ...]] = ("identity",)

    @classmethod
    def needed(cls, settings: SyncSettings) -> tuple[str, ...]:
        return cls.needs if settings.faces == "identity" else ()

    def library_version(self) -> str:
        return voice_activity.version()

    def check(self) -> None:
        voice_activity.check()
        super().check()

    @cached_property
    def _backend(self) -> SyncBackend:
        return BACKENDS[self.settings.backend](self.settings.max_offset_s, FACES[self.settings.faces]())

    @cached_property
    def _detector(self) -> voice_activity.VoiceDetector:
        return voice_activity.VoiceDetector()

    def measure(self, clip: Clip) -> Measurement:
        samples = clip.samples()
        reason = self._reason(clip, samples)
        if reason or samples is None:
            return Measurement({**dict.fromkeys(self.columns), "reason": reason})
        fit = self._backend(clip, samples)
        offset_s = None if fit.offset_s is None else fit.offset_s - self.settings.natural_s
        return Measurement({**fit._asdict(), "offset_s": offset_s})

    def _reason(self, clip: Clip, samples: np.ndarray | None) -> str:
        """Why nothing can be measured in a clip; "" if it can."""
        if clip.record.duration_s < self.settings.min_s:
            return "too short"
        if samples is None or not samples.any():
            return "no sound"
        if self.settings.faces == "identity":
            seen = ~np.isnan(clip.found["identity"].arrays["face_box"]).any(axis=1)
            if seen.sum() < MIN_FACE_S * clip.record.fps:
                return "no face"
        spoken = sum(end - start for start, end in self._detector.spans(samples))
        return "no speech" if spoken < _MIN_SPEECH_S * SAMPLE_RATE else ""
