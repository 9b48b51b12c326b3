"""Sound put where its time stamps say: 16 kHz mono, to the sample, with silence where there is none."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.clip import SAMPLE_RATE

if TYPE_CHECKING:
    import av

_MARGIN_S = 0.1  # around a clip, for the resampling filter
_LATE_S = 10.0  # no muxer lets sound come so long after its picture
_JITTER_S = 0.010  # time stamps that stray less belong to sound without a gap
_STEADY = 2e-4  # difference of two clocks that does not matter over a clip's length


@dataclass(frozen=True)
class _Chunk:
    time_s: float
    rate: int
    format: str
    layout: str
    data: np.ndarray  # as PyAV gives it: [channels, samples], or [1, samples * channels] where they are interleaved
    samples: int
    seen_s: float  # the time of the picture before it in the file
    heard_s: float  # how far the sound before it in the file goes

    @property
    def end_s(self) -> float:
        return self.time_s + self.samples / self.rate

    @property
    def kind(self) -> tuple[int, str, str]:
        return self.rate, self.format, self.layout


class SoundTrack:
    """Decodes a sound stream in file order and keeps what lies in the wanted spans.

    A packet that cannot be decoded is silence, as in a player: its neighbours keep their places.
    """

    def __init__(self, stream: Any, start_s: float) -> None:
        """stream: of an open container. start_s: zero of the source clock, in the file's time."""
        self._context = stream.codec_context
        self._context.thread_count = 1
        self._tick_s = float(stream.time_base)
        self._start_s = start_s
        self._chunks: list[_Chunk] = []
        self._time_s = float("-inf")  # the end of the last frame
        self._heard_s = float("-inf")  # how far the sound has been read: time stamps may jump back
        self.bytes = 0  # of memory

    def feed(self, packet: Any, wanted: Iterable[tuple[float, float]], seen_s: float) -> None:
        """Decode one packet of the stream (None at the end).

        wanted: spans in seconds that `take` will be asked for. seen_s: the time of the picture before it in the file.
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
        """Whether all that `take` needs of a clip ending then has been read, with the pictures up to `seen_s`.

        Sound that ends before the picture would never come: nobody is to wait for it.
        """
        return self._heard_s >= end_s + _MARGIN_S or seen_s > end_s + _LATE_S

    def take(self, start_s: float, samples: int) -> np.ndarray:
        """The sound from `start_s` on: [samples] int16 at 16 kHz."""
        sound = np.zeros(samples, np.float32)
        end_s = start_s + samples / SAMPLE_RATE
        near = [c for c in self._chunks if c.time_s < end_s + _MARGIN_S and c.end_s > start_s - _MARGIN_S]
        # the same whenever it is asked for: what came after `covers` was true has no part in it
        near = [c for c in near if c.heard_s < end_s + _MARGIN_S and c.seen_s <= end_s + _LATE_S]
        for run in _runs(near):
            time_s, rate = _fit(run)
            resampled = _mono(run, rate)
            at = round((time_s - start_s) * SAMPLE_RATE)
            part = resampled[max(0, -at) : max(0, samples - at)]
            sound[max(0, at) : max(0, at) + len(part)] = part
        return np.clip(np.rint(sound * 32768), -32768, 32767).astype(np.int16)

    def forget(self, before_s: float) -> None:
        """Drop what only clips that start earlier would need."""
        self._chunks = [c for c in self._chunks if c.end_s > before_s - _MARGIN_S]
        self.bytes = sum(c.data.nbytes for c in self._chunks)


def _runs(chunks: list[_Chunk]) -> list[list[_Chunk]]:
    """Chunks that follow on one another without a gap, an overlap or a change of rate."""
    runs: list[list[_Chunk]] = []
    strays: list[float] = []  # of each chunk's time stamp from where the samples before it end
    length = 0
    for chunk in chunks:
        stray = chunk.time_s - runs[-1][0].time_s - length / chunk.rate if runs else 0.0
        if not runs or chunk.kind != runs[-1][0].kind or abs(stray - np.mean(strays[-32:])) > _JITTER_S:
            runs.append([])
            strays, length, stray = [], 0, 0.0
        runs[-1].append(chunk)
        strays.append(stray)
        length += chunk.samples
    return runs


def _fit(run: list[_Chunk]) -> tuple[float, int]:
    """The start in seconds and the true rate in Hz of a run: what its time stamps say together, jitter set aside."""
    rate = run[0].rate
    counted = np.cumsum([0, *(chunk.samples for chunk in run[:-1])]) / rate
    strays = np.array([chunk.time_s for chunk in run]) - counted
    slope = 0.0
    if len(run) >= 20 and counted[-1] > 2:
        slope = float(np.polyfit(counted, strays, 1)[0])
    if abs(slope) < _STEADY:
        return float(np.median(strays)), rate
    return float(np.median(strays - slope * counted)), round(rate / (1 + slope))


def _chunk(frame: "av.AudioFrame", time_s: float, seen_s: float, heard_s: float) -> _Chunk:
    data: Any = frame.to_ndarray()
    kind, layout = frame.format.name, frame.layout.name
    if len(frame.layout.channels) > 1 and "channels" in layout:
        # channels that nobody gave a place, which FFmpeg will not mix
        if not frame.format.is_planar:
            data = data.reshape(-1, len(frame.layout.channels)).T
        middle, scale = (128, 128) if data.dtype.kind == "u" else (0, 1)
        if data.dtype.kind == "i":
            scale = -int(np.iinfo(data.dtype).min)
        data = ((data.mean(axis=0, keepdims=True) - middle) / scale).astype(np.float32)
        kind, layout = "fltp", "mono"
    return _Chunk(time_s, frame.sample_rate, kind, layout, data, frame.samples, seen_s, heard_s)


def _mono(run: list[_Chunk], rate: int) -> np.ndarray:
    """A run whose true rate is `rate` Hz, mixed by FFmpeg's matrices: [samples] float32 at 16 kHz from its start on."""
    import av

    data = np.concatenate([chunk.data for chunk in run], axis=1)
    frame = av.AudioFrame.from_ndarray(data, format=run[0].format, layout=run[0].layout)
    frame.sample_rate = rate
    # weights that add up to one: left to itself FFmpeg lets a float mix of full channels overshoot
    resampler = av.AudioResampler("fltp", "mono", SAMPLE_RATE, options={"rematrix_maxval": "1.0"})
    parts = [part for given in (frame, None) for part in resampler.resample(given) if part is not None]
    return np.concatenate([part.to_ndarray()[0] for part in parts]) if parts else np.zeros(0, np.float32)
