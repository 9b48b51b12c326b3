"""What is heard in a clip: how much of it is speech, how loud it is, and its spectrogram aligned to the frames."""

import importlib.metadata
import importlib.util
import math
import sys
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from tasks.clip import SAMPLE_RATE, Clip
from tasks.log_mel import frame_windows
from tasks.stage import Measurement, MissingBackend, Stage, StageSettings

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
    """backend: "log_mel", the spectrogram of Whisper's front end."""

    backend: Literal["log_mel"] = "log_mel"


class Speech(Stage[SpeechSettings]):
    """Speech, loudness and the spectrogram of a clip's sound.

    Columns, all None for a clip without sound:
        fraction: share of the time with speech by Silero VAD, 0 to 1. It lets go of each utterance 0.1 s late.
        loudness_db: root mean square of the sound in dBFS (0 is a square wave of full scale), no lower than -120, which
            is what digital silence gets.
    Arrays, none for a clip without sound:
        log_mel: [frames, window, 80] float16, see tasks.log_mel.frame_windows.
    """

    name: ClassVar[str] = "speech"
    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, type]] = {"fraction": float, "loudness_db": float}

    def backend_version(self) -> str:
        return f"silero-vad {_version('silero-vad')}, onnxruntime {_version('onnxruntime')}"

    def check(self) -> None:
        self.backend_version()
        model_path()

    @cached_property
    def _detector(self) -> "VoiceDetector":
        return VoiceDetector()

    def measure(self, clip: Clip) -> Measurement:
        samples = clip.samples()
        if samples is None or not len(samples):
            return Measurement({"fraction": None, "loudness_db": None})
        spoken = sum(end - start for start, end in self._detector.spans(samples))
        power = float(np.mean(np.square(samples, dtype=np.float64)))
        return Measurement(
            {"fraction": spoken / len(samples), "loudness_db": 10 * math.log10(max(power, _SILENCE))},
            {"log_mel": frame_windows(samples, clip.record.frames, clip.record.fps)},
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
