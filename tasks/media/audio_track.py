"""Puts audio where its time stamps say: 16 kHz mono, exact to the sample, with silence where there is no audio."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.media.clip import SAMPLE_RATE

if TYPE_CHECKING:
    import av

_MARGIN_S = 0.1  # around a clip, for the resampling filter
_MAX_LATE_S = 10.0  # no muxer writes audio so long after the video of the same time
_JITTER_S = 0.010  # time stamps that deviate by less do not make a gap
_MIN_DRIFT = 2e-4  # relative difference of two clocks; a smaller one does not matter over a clip's length


@dataclass(frozen=True)
class _Chunk:
    """A decoded audio frame."""

    time_s: float
    rate: int
    format: str
    layout: str
    data: np.ndarray
    """As PyAV gives it: [channels, samples], or [1, samples * channels] for interleaved formats."""
    samples: int
    seen_s: float
    """The time of the video frame before it in the file."""
    heard_s: float
    """Where the audio before it in the file ends."""

    @property
    def end_s(self) -> float:
        return self.time_s + self.samples / self.rate

    @property
    def kind(self) -> tuple[int, str, str]:
        return self.rate, self.format, self.layout


class AudioTrack:
    """Decodes an audio stream in file order and keeps what lies in the wanted spans.

    A packet that cannot be decoded becomes silence, as in a player. The packets around it keep their places.
    """

    def __init__(self, stream: Any, start_s: float) -> None:
        """stream: the audio stream of an open container. start_s: zero of the source clock, in the file's time."""
        self._context = stream.codec_context
        self._context.thread_count = 1
        self._tick_s = float(stream.time_base)
        self._start_s = start_s
        self._chunks: list[_Chunk] = []
        self._time_s = float("-inf")  # the end of the last audio frame
        self._heard_s = float("-inf")  # the latest end of all audio frames; time stamps may jump back
        self.bytes = 0
        """Memory that the kept audio takes."""

    def feed(self, packet: Any, wanted: Iterable[tuple[float, float]], seen_s: float) -> None:
        """Decode one packet of the stream (None at the end).

        wanted: spans in seconds that `take` will be asked for. seen_s: the time of the video frame before the packet in
        the file.
        """
        import av

        try:
            frames = self._context.decode(packet)
        except (av.FFmpegError, ValueError):
            return
        for frame in frames:
            time_s = max(self._time_s, 0.0)
            if frame.pts is not None:
                time_s = frame.pts * self._tick_s - self._start_s
            end_s = time_s + frame.samples / frame.sample_rate
            if any(time_s < end + _MARGIN_S and end_s > start - _MARGIN_S for start, end in wanted):
                self._chunks.append(_chunk(frame, time_s, seen_s, self._heard_s))
                self.bytes += self._chunks[-1].data.nbytes
            self._time_s = end_s
            self._heard_s = max(self._heard_s, end_s)

    def covers(self, end_s: float, seen_s: float) -> bool:
        """Whether all that `take` needs for a clip that ends at `end_s` has been read.

        seen_s: the time of the last video frame read. Where it is far beyond `end_s`, the answer is yes: the audio ends
        before the video, and no more of it will come.
        """
        return self._heard_s >= end_s + _MARGIN_S or seen_s > end_s + _MAX_LATE_S

    def take(self, start_s: float, samples: int) -> np.ndarray:
        """The audio from `start_s` on: [samples] int16 at 16 kHz."""
        audio = np.zeros(samples, np.float32)
        end_s = start_s + samples / SAMPLE_RATE
        near = [c for c in self._chunks if c.time_s < end_s + _MARGIN_S and c.end_s > start_s - _MARGIN_S]
        # Chunks that were read after `covers` became true do not count. The result is then the same at any later time.
        near = [c for c in near if c.heard_s < end_s + _MARGIN_S and c.seen_s <= end_s + _MAX_LATE_S]
        for run in _runs(near):
            time_s, rate = _fit(run)
            resampled = _mono(run, rate)
            at = round((time_s - start_s) * SAMPLE_RATE)
            part = resampled[max(0, -at) : max(0, samples - at)]
            audio[max(0, at) : max(0, at) + len(part)] = part
        return np.clip(np.rint(audio * 32768), -32768, 32767).astype(np.int16)

    def forget(self, before_s: float) -> None:
        """Drop the audio that no clip starting at `before_s` or later needs."""
        self._chunks = [c for c in self._chunks if c.end_s > before_s - _MARGIN_S]
        self.bytes = sum(c.data.nbytes for c in self._chunks)


def _runs(chunks: list[_Chunk]) -> list[list[_Chunk]]:
    """Group chunks that follow one another without a gap, an overlap or a change of format."""
    runs: list[list[_Chunk]] = []
    deviations: list[float] = []  # by how much each chunk's time stamp deviates from the count of samples before it
    length = 0
    for chunk in chunks:
        deviation = chunk.time_s - runs[-1][0].time_s - length / chunk.rate if runs else 0.0
        if not runs or chunk.kind != runs[-1][0].kind or abs(deviation - np.mean(deviations[-32:])) > _JITTER_S:
            runs.append([])
            deviations, length, deviation = [], 0, 0.0
        runs[-1].append(chunk)
        deviations.append(deviation)
        length += chunk.samples
    return runs


def _fit(run: list[_Chunk]) -> tuple[float, int]:
    """Fit a run's start in seconds and its true sample rate in Hz to all of its time stamps. Jitter averages out."""
    rate = run[0].rate
    counted = np.cumsum([0, *(chunk.samples for chunk in run[:-1])]) / rate
    deviations = np.array([chunk.time_s for chunk in run]) - counted
    slope = 0.0
    if len(run) >= 20 and counted[-1] > 2:
        slope = float(np.polyfit(counted, deviations, 1)[0])
    if abs(slope) < _MIN_DRIFT:
        return float(np.median(deviations)), rate
    return float(np.median(deviations - slope * counted)), round(rate / (1 + slope))


def _chunk(frame: "av.AudioFrame", time_s: float, seen_s: float, heard_s: float) -> _Chunk:
    data: Any = frame.to_ndarray()
    kind, layout = frame.format.name, frame.layout.name
    if len(frame.layout.channels) > 1 and "channels" in layout:
        # FFmpeg does not mix channels without speaker positions, so they are averaged here
        if not frame.format.is_planar:
            data = data.reshape(-1, len(frame.layout.channels)).T
        middle, scale = (128, 128) if data.dtype.kind == "u" else (0, 1)
        if data.dtype.kind == "i":
            scale = -int(np.iinfo(data.dtype).min)
        data = ((data.mean(axis=0, keepdims=True) - middle) / scale).astype(np.float32)
        kind, layout = "fltp", "mono"
    return _Chunk(time_s, frame.sample_rate, kind, layout, data, frame.samples, seen_s, heard_s)


def _mono(run: list[_Chunk], rate: int) -> np.ndarray:
    """Mix a run to mono by FFmpeg's matrices and resample it from `rate` Hz, its true sample rate.

    Returns [samples] float32 at 16 kHz, from the run's start on.
    """
    import av

    data = np.concatenate([chunk.data for chunk in run], axis=1)
    frame = av.AudioFrame.from_ndarray(data, format=run[0].format, layout=run[0].layout)
    frame.sample_rate = rate
    # FFmpeg's default weights would let a float mix of loud channels exceed 1; with this option they add up to one
    resampler = av.AudioResampler("fltp", "mono", SAMPLE_RATE, options={"rematrix_maxval": "1.0"})
    parts = [part for given in (frame, None) for part in resampler.resample(given) if part is not None]
    return np.concatenate([part.to_ndarray()[0] for part in parts]) if parts else np.zeros(0, np.float32)
