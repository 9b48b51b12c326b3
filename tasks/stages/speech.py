"""The stage `speech`: how much of a clip is speech, how loud it is, and features of the sound for each frame."""

import importlib.metadata
import json
import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from tasks.media.clip import Clip, Measurement
from tasks.networks.log_mel import frame_windows, windows
from tasks.stages import voice_activity
from tasks.stages.backend import Backend, Resources
from tasks.stages.base import Stage, StageSettings
from tasks.weights import store as weights
from tasks.weights.missing import MissingBackend

_SILENCE = 1e-12  # mean square, -120 dBFS


class SpeechBackend(Backend, ABC):
    """A backend of the stage: features of the sound for each frame."""

    array: ClassVar[str]
    """The name of the array that it makes."""

    @abstractmethod
    def __init__(self, settings: "SpeechSettings") -> None: ...

    @abstractmethod
    def __call__(self, samples: np.ndarray, frames: int, fps: int) -> np.ndarray:
        """Compute the features of a clip.

        samples: [samples] float32 at 16 kHz. frames: number of the clip's frames. fps: frames a second.

        Returns: [frames, window, dim] float16.
        """


class LogMel(SpeechBackend):
    """The log-mel spectrogram that Whisper's encoder takes (tasks.networks.log_mel)."""

    array: ClassVar[str] = "log_mel"
    # measured: peak growth over one clip of 5 s (benchmarks/backends.py)
    resources: ClassVar[Resources] = Resources(memory_gb=0.1)

    def __init__(self, settings: "SpeechSettings") -> None:
        pass

    def __call__(self, samples: np.ndarray, frames: int, fps: int) -> np.ndarray:
        return frame_windows(samples, frames, fps)


class WhisperStates(SpeechBackend):
    """States of Whisper's encoder (tasks.networks.whisper): two a frame at 25 frames a second, three at 24."""

    array: ClassVar[str] = "whisper"
    networks: ClassVar[tuple[str, ...]] = ("whisper",)
    resources: ClassVar[Resources] = Resources(gpu=0.25, memory_gb=3.6)
    """Memory by the size of its weights, not measured: 2.6 GB for the encoder in float32, in which it computes (41 % of
    the catalogue's 3.1 GB, which are in float16), and an allowance of 1 GB for libraries and activations."""

    def __init__(self, settings: "SpeechSettings") -> None:
        from tasks.networks import whisper

        self._layers, self._encoder = settings.layers, whisper.load()

    @classmethod
    def version(cls) -> str:
        torch, transformers = (importlib.metadata.version(name) for name in ("torch", "transformers"))
        return f"whisper {weights.digest('whisper')}, torch {torch}, transformers {transformers}"

    @classmethod
    def check(cls, settings: "SpeechSettings") -> None:
        super().check(settings)
        most = json.loads((weights.find("whisper") / "config.json").read_text())["encoder_layers"]
        if isinstance(settings.layers, int) and settings.layers > most:
            raise MissingBackend(
                f"speech.layers is {settings.layers}, but the Whisper encoder in the weights folder has {most} layers; "
                f"set it to {most} or less"
            )

    def __call__(self, samples: np.ndarray, frames: int, fps: int) -> np.ndarray:
        from tasks.networks.whisper import STATES_PER_S, states

        encoded = states(self._encoder, samples, self._layers)
        return windows(encoded, frames, fps, STATES_PER_S).astype(np.float16)


BACKENDS: dict[str, type[SpeechBackend]] = {"log_mel": LogMel, "whisper": WhisperStates}


class SpeechSettings(StageSettings):
    """Which features of the sound are computed."""

    choices: ClassVar = {"backend": BACKENDS}

    backend: str = "log_mel"
    """The features: "log_mel", the spectrogram of Whisper's front end; "whisper", the states of its encoder."""
    layers: Literal["last", "mean"] | Annotated[int, Field(ge=0, le=100)] = "last"
    """Which states of the encoder: "last", "mean" or a layer's number (tasks.networks.whisper.states). For the backend
    `whisper`."""


class Speech(Stage[SpeechSettings]):
    """Speech, loudness and features of a clip's sound.

    Columns, all None for a clip without sound:
        fraction: share of the time with speech by Silero VAD, 0 to 1. Silero VAD ends each utterance 0.1 s late.
        loudness_db: root mean square of the sound in dBFS; 0 is a square wave of full scale. Digital silence has -120,
            the lowest value.
    Arrays, none for a clip without sound; the one of the backend:
        log_mel: [frames, window, 80] float16, see tasks.networks.log_mel.frame_windows.
        whisper: [frames, window, dim] float16, see tasks.networks.whisper.states and tasks.networks.log_mel.windows.
    """

    name: ClassVar[str] = "speech"
    version: ClassVar[int] = 1
    backends: ClassVar = {"backend": BACKENDS}
    columns: ClassVar[dict[str, type]] = {"fraction": float, "loudness_db": float}

    def backend_version(self) -> str:
        # The fingerprints of this stage name the voice detector first; `library_version` would put it last.
        return ", ".join(filter(None, (voice_activity.version(), super().backend_version())))

    def check(self) -> None:
        voice_activity.check()
        super().check()

    @cached_property
    def _detector(self) -> voice_activity.VoiceDetector:
        return voice_activity.VoiceDetector()

    @cached_property
    def _backend(self) -> SpeechBackend:
        return BACKENDS[self.settings.backend](self.settings)

    def measure(self, clip: Clip) -> Measurement:
        samples = clip.samples()
        if samples is None or not len(samples):
            return Measurement({"fraction": None, "loudness_db": None})
        spoken = sum(end - start for start, end in self._detector.spans(samples))
        power = float(np.mean(np.square(samples, dtype=np.float64)))
        return Measurement(
            {"fraction": spoken / len(samples), "loudness_db": 10 * math.log10(max(power, _SILENCE))},
            {self._backend.array: self._backend(samples, clip.record.frames, clip.record.fps)},
        )
