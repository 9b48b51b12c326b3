"""Voice activity by Silero VAD: where in a sound there is speech."""

import importlib.metadata
import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.media.clip import SAMPLE_RATE
from tasks.weights.missing import MissingBackend

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_INSTALL = (
    "install it with `pip install --no-deps silero-vad==6.2.3 onnxruntime` (`make setup` does); no other voice "
    "detector can take its place"
)
_MODEL = "data/silero_vad_16k_sequence.onnx"
_WINDOW = 512  # samples of one probability, 32 ms
_CONTEXT = 64  # samples before a window that the network takes too
_BLOCK = 512  # windows computed at a time
_START, _STOP = 0.5, 0.35  # probabilities at which speech begins and ends
_MIN_SPEECH = SAMPLE_RATE // 4  # samples
_MIN_SILENCE = SAMPLE_RATE // 10  # samples
_PAD = 3 * SAMPLE_RATE // 100  # samples added to each end of a span


class VoiceDetector:
    """Silero VAD from the package's model file. The package itself is not imported, because that imports torch."""

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
        blocks = [np.zeros(0, np.float32)]
        for first in range(0, count, _BLOCK):
            block = np.ascontiguousarray(windows[first : first + _BLOCK])
            values, state, cell = self._session.run(
                ["speech_probs", "hn", "cn"], {"input": block, "h": state, "c": cell}
            )
            blocks.append(values.reshape(-1))
        return np.concatenate(blocks)

    def spans(self, samples: np.ndarray) -> list[tuple[int, int]]:
        """The spans of speech in [samples] float32 at 16 kHz: (first sample, end sample), in order, without overlap."""
        return speech_spans(self.probabilities(samples), len(samples))


def speech_spans(probabilities: np.ndarray, length: int) -> list[tuple[int, int]]:
    """Silero's rule for spans of speech, with its default numbers (`get_speech_timestamps`).

    Speech begins at a probability of 0.5 and ends where it stays below 0.35 for 100 ms. Spans of 250 ms or less are
    dropped. The others are widened by 30 ms at each end, or to the middle of a shorter pause.

    probabilities: [windows] of 512 samples. length: samples. Returns: (first sample, end sample) of each span.
    """
    spans: list[tuple[int, int]] = []
    start, quiet = -1, 0  # `quiet`: first sample of the pause that may end the span, 0 outside a pause
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
    # Spans may be widened by all of the silence before the first and after the last, and by half of each pause between.
    room = [spans[0][0], *((b - a) // 2 for (_, a), (b, _) in pairwise(spans)), length - spans[-1][1]] if spans else []
    return [
        (start - min(_PAD, before), end + min(_PAD, after))
        for (start, end), (before, after) in zip(spans, pairwise(room), strict=True)
    ]


def version() -> str:
    """The installed releases of Silero VAD and of ONNX Runtime, which runs it. Raises MissingBackend."""
    return f"silero-vad {_version('silero-vad')}, onnxruntime {_version('onnxruntime')}"


def check() -> None:
    """Check that the detector can run. Raises MissingBackend."""
    version()
    model_path()


def model_path() -> Path:
    """The detector's model in the installed silero-vad package. Raises MissingBackend."""
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
