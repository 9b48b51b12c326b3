"""What is heard in a clip: how much of it is speech, how loud it is, and its spectrogram aligned to the frames."""

import importlib.metadata
import importlib.util
import json
import math
import sys
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol

import numpy as np
from pydantic import Field, field_validator

from tasks import weights
from tasks.clip import SAMPLE_RATE, Clip
from tasks.log_mel import frame_windows, windows
from tasks.stage import Measurement, MissingBackend, Stage, StageSettings, known_backend

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_MODEL = "data/silero_vad_16k_sequence.onnx"
_INSTALL = (
    "install it with `pip install --no-deps silero-vad==6.2.3 onnxruntime` (`make setup` does); no other backend "
    "serves here"
)

_SILENCE = 1e-12  # mean square, -120 dBFS

_WINDOW = 512  # samples, 32 ms, of one probability
_CONTEXT = 64  # samples of the window before that the network sees too
_START, _STOP = 0.5, 0.35  # probabilities at which speech begins and ends
_MIN_SPEECH = SAMPLE_RATE // 4  # samples
_MIN_SILENCE = SAMPLE_RATE // 10
_PAD = 3 * SAMPLE_RATE // 100  # added to each end of a span


class SpeechSettings(StageSettings):
    """backend: "log_mel", the spectrogram of Whisper's front end; "whisper", the states of its encoder.

    layers: which states of the encoder: "last", "mean" or a layer's number (tasks.networks.whisper.states).
    """

    backend: str = "log_mel"
    layers: Literal["last", "mean"] | Annotated[int, Field(ge=0, le=100)] = "last"

    @field_validator("backend")
    @classmethod
    def _known(cls, backend: str) -> str:
        return known_backend(backend, BACKENDS)


class Front(Protocol):
    """A backend: features of the sound, by frame. No clip changes what the next one gets."""

    array: ClassVar[str]  # the array's name

    def __init__(self, settings: SpeechSettings) -> None: ...

    @staticmethod
    def version() -> str:
        """Library and weights, as far as they can change a number."""

    @staticmethod
    def check(settings: SpeechSettings) -> None:
        """Raises tasks.stage.MissingBackend when the backend cannot run."""

    def __call__(self, samples: np.ndarray, frames: int, fps: int) -> np.ndarray:
        """[frames, window, dim] float16 of [samples] float32 at 16 kHz."""


class LogMel:
    """The log-mel spectrogram that Whisper's encoder takes (tasks.log_mel)."""

    array: ClassVar[str] = "log_mel"

    def __init__(self, settings: SpeechSettings) -> None:
        pass

    @staticmethod
    def version() -> str:
        return ""

    @staticmethod
    def check(settings: SpeechSettings) -> None:
        """Nothing but NumPy."""

    def __call__(self, samples: np.ndarray, frames: int, fps: int) -> np.ndarray:
        return frame_windows(samples, frames, fps)


class Whisper:
    """States of Whisper's encoder (tasks.networks.whisper): two a frame at 25 frames a second, three at 24."""

    array: ClassVar[str] = "whisper"
    networks: ClassVar[tuple[str, ...]] = ("whisper",)

    def __init__(self, settings: SpeechSettings) -> None:
        from tasks.networks import whisper

        self._layers, self._encoder = settings.layers, whisper.load()

    @staticmethod
    def version() -> str:
        torch, transformers = (importlib.metadata.version(name) for name in ("torch", "transformers"))
        return f"whisper {weights.digest('whisper')}, torch {torch}, transformers {transformers}"

    @staticmethod
    def check(settings: SpeechSettings) -> None:
        weights.check("whisper")
        most = json.loads((weights.find("whisper") / "config.json").read_text())["encoder_layers"]
        if isinstance(settings.layers, int) and settings.layers > most:
            raise MissingBackend(f"speech.layers is {settings.layers}, and the Whisper encoder there has {most} layers")

    def __call__(self, samples: np.ndarray, frames: int, fps: int) -> np.ndarray:
        from tasks.networks.whisper import STATES_PER_S, states

        found = states(self._encoder, samples, self._layers)
        return windows(found, frames, fps, STATES_PER_S).astype(np.float16)


BACKENDS: dict[str, type[Front]] = {"log_mel": LogMel, "whisper": Whisper}


class Speech(Stage[SpeechSettings]):
    """Speech, loudness and features of a clip's sound.

    Columns, all None for a clip without sound:
        fraction: share of the time with speech by Silero VAD, 0 to 1. It lets go of each utterance 0.1 s late.
        loudness_db: root mean square of the sound in dBFS (0 is a square wave of full scale), no lower than -120, which
            is what digital silence gets.
    Arrays, none for a clip without sound; that of the backend:
        log_mel: [frames, window, 80] float16, see tasks.log_mel.frame_windows.
        whisper: [frames, window, dim] float16, see tasks.networks.whisper.states and tasks.log_mel.windows.
    """

    name: ClassVar[str] = "speech"
    version: ClassVar[int] = 1
    backends: ClassVar = {"backend": BACKENDS}
    columns: ClassVar[dict[str, type]] = {"fraction": float, "loudness_db": float}

    def backend_version(self) -> str:
        detector = f"silero-vad {_version('silero-vad')}, onnxruntime {_version('onnxruntime')}"
        return ", ".join(filter(None, (detector, BACKENDS[self.settings.backend].version())))

    def check(self) -> None:
        self.backend_version()
        model_path()
        BACKENDS[self.settings.backend].check(self.settings)

    @cached_property
    def _detector(self) -> "VoiceDetector":
        return VoiceDetector()

    @cached_property
    def _front(self) -> Front:
        return BACKENDS[self.settings.backend](self.settings)

    def measure(self, clip: Clip) -> Measurement:
        samples = clip.samples()
        if samples is None or not len(samples):
            return Measurement({"fraction": None, "loudness_db": None})
        spoken = sum(end - start for start, end in self._detector.spans(samples))
        power = float(np.mean(np.square(samples, dtype=np.float64)))
        return Measurement(
            {"fraction": spoken / len(samples), "loudness_db": 10 * math.log10(max(power, _SILENCE))},
            {self._front.array: self._front(samples, clip.record.frames, clip.record.fps)},
        )


class VoiceDetector:
    """Silero VAD from the package's own file, run without importing the package, whose import brings in torch."""

    def __init__(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session: InferenceSession = onnxruntime.InferenceSession(
            str(model_path()), options, providers=["CPUExecutionProvider"]
        )

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        """The probability of speech in each window of 512 samples (32 ms), the last one padded with zeros.

        samples: [samples] float32 in -1..1 at 16 kHz. Returns: [windows] float32.
        """
        count = -(-len(samples) // _WINDOW)
        padded = np.zeros(_CONTEXT + count * _WINDOW, np.float32)
        padded[_CONTEXT : _CONTEXT + len(samples)] = samples
        windows = np.lib.stride_tricks.sliding_window_view(padded, _CONTEXT + _WINDOW)[::_WINDOW]
        state = cell = np.zeros((1, 1, 128), np.float32)
        found = [np.zeros(0, np.float32)]
        for at in range(0, count, 512):
            block = np.ascontiguousarray(windows[at : at + 512])
            values, state, cell = self._session.run(
                ["speech_probs", "hn", "cn"], {"input": block, "h": state, "c": cell}
            )
            found.append(values.reshape(-1))
        return np.concatenate(found)

    def spans(self, samples: np.ndarray) -> list[tuple[int, int]]:
        """Where there is speech: (first sample, end sample), in order and apart."""
        return speech_spans(self.probabilities(samples), len(samples))


def speech_spans(probabilities: np.ndarray, length: int) -> list[tuple[int, int]]:
    """Silero's rule for spans of speech, with its default numbers (`get_speech_timestamps`).

    Speech begins at a probability of 0.5 and ends where it stays below 0.35 for 100 ms; spans of 250 ms or less are
    dropped, the others widened by 30 ms at each end, or to the middle of a shorter pause.

    probabilities: [windows] of 512 samples. length: samples. Returns: (first sample, end sample) of each span.
    """
    spans: list[tuple[int, int]] = []
    start, quiet = -1, 0  # `quiet`: where the pause that may end the span began, 0 outside one
    for number, probability in enumerate(probabilities):
        at = number * _WINDOW
        if probability >= _START:
            quiet = 0
            start = at if start < 0 else start
        elif start >= 0 and probability < _STOP:
            quiet = quiet or at
            if at - quiet >= _MIN_SILENCE:
                spans.append((start, quiet))
                start, quiet = -1, 0
    if start >= 0:
        spans.append((start, length))
    spans = [(start, end) for start, end in spans if end - start > _MIN_SPEECH]
    # half of each pause between spans, and all of what lies before the first and after the last, may be widened into
    room = [spans[0][0], *((b - a) // 2 for (_, a), (b, _) in pairwise(spans)), length - spans[-1][1]] if spans else []
    return [
        (start - min(_PAD, before), end + min(_PAD, after))
        for (start, end), (before, after) in zip(spans, pairwise(room), strict=True)
    ]


def model_path() -> Path:
    """The voice detector's model in the installed silero-vad package. Raises MissingBackend."""
    spec = importlib.util.find_spec("silero_vad")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise MissingBackend(f"silero-vad is not installed in {sys.prefix}; {_INSTALL}")
    path = Path(folders[0]) / _MODEL
    if not path.is_file():
        raise MissingBackend(f"silero-vad in {folders[0]} lacks {_MODEL}; {_INSTALL}")
    return path


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise MissingBackend(f"{package} is not installed in {sys.prefix}; {_INSTALL}") from None
