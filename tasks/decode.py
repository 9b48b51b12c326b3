"""Video files read frame by frame, with every fault in them said and none papered over.

The source clock: seconds since the container's start time, the same zero for picture and sound, which is what a
player shows. Nothing here seeks: a frame's place is known by its own time stamp, never by counting.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.media import Gaps, MediaError, audio_stream, open_media, packets, start_of, video_stream
from tasks.upright import Picture, turn_of

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

_MISSING_S = 1.0  # headers round
_MANY = 10_000
_PROBE_PACKETS = 1000  # how far to look for a first good frame


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a file says of itself, and its first frames show.

    duration_s: seconds, as the header has it; 0 when it has none. start_s: the container's start time, zero of the
    source clock, in the file's own time. width, height: pixels on display, upright and square. fps: average. rotation:
    degrees counterclockwise from stored to upright, 0, 90, 180 or 270. interlaced: whether the first frames are.
    video_start_s, audio_start_s: first time stamps, on the source clock. Without sound audio_codec is "" and the
    numbers beside it are 0.
    """

    container: str
    duration_s: float
    start_s: float
    video_codec: str
    pix_fmt: str
    width: int
    height: int
    fps: float
    rotation: int
    interlaced: bool
    video_start_s: float
    audio_codec: str
    audio_rate: int
    audio_channels: int
    audio_start_s: float
    video_streams: int
    audio_streams: int

    @property
    def has_audio(self) -> bool:
        return bool(self.audio_codec)


class Bad(NamedTuple):
    """A frame that is in the file and cannot be decoded, or cannot be trusted: start and end on the source clock."""

    time_s: float
    end_s: float


class Missing(NamedTuple):
    """The end of a truncated file: what its header promises and nobody can read."""

    time_s: float
    end_s: float


def probe(path: Path) -> Probe:
    """Read the header and decode the first frame. Raises MediaError with the reason, FileNotFoundError."""
    with open_media(path) as container:
        stream = video_stream(container)
        audio = audio_stream(container, stream)
        start_s = start_of(container)
        frame, interlaced = _first_frame(container, stream, start_s)
        sar = float(stream.codec_context.sample_aspect_ratio or stream.sample_aspect_ratio or 1) or 1.0
        rotation = turn_of(frame).degrees
        width, height = max(1, round(frame.width * sar)), frame.height
        if rotation in (90, 270):
            width, height = height, width
        rate = stream.average_rate or stream.guessed_rate
        return Probe(
            container=container.format.name,
            duration_s=max((container.duration or 0) / 1_000_000, 0.0),
            start_s=start_s,
            video_codec=stream.codec_context.codec.canonical_name,
            pix_fmt=frame.format.name,
            width=width,
            height=height,
            fps=float(rate or 0),
            rotation=rotation,
            interlaced=interlaced,
            video_start_s=_stream_start(stream, start_s),
            audio_codec=audio.codec_context.codec.canonical_name if audio else "",
            audio_rate=audio.codec_context.sample_rate if audio else 0,
            audio_channels=audio.codec_context.channels if audio else 0,
            audio_start_s=_stream_start(audio, start_s) if audio else 0.0,
            video_streams=len(container.streams.video),
            audio_streams=len(container.streams.audio),
        )


def _stream_start(stream: Any, start_s: float) -> float:
    if stream.start_time is None:
        return 0.0
    return round(float(stream.start_time * stream.time_base) - start_s, 6)


def _first_frame(container: "InputContainer", stream: Any, start_s: float) -> tuple["av.VideoFrame", bool]:
    first, interlaced, seen = None, 0, 0
    decoder = VideoDecoder(stream, start_s)
    for count, packet in enumerate(packets(container, stream)):
        for event in decoder.feed(packet):
            if isinstance(event, Picture):
                first = first or event.frame
                interlaced += event.frame.interlaced_frame
                seen += 1
        if seen >= 4 or count >= _PROBE_PACKETS:
            break
    else:
        for event in decoder.finish():
            if isinstance(event, Picture):
                first = first or event.frame
                interlaced += event.frame.interlaced_frame
                seen += 1
    if first is None:
        raise MediaError("no frame of its video can be decoded")
    return first, 2 * interlaced > seen


_ONE_FRAME_A_PACKET = ("h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video")


def _impossible(context: Any) -> bytes:
    """Bytes that no good packet of this codec holds; b"" when none are known.

    Half-fetched files are zeros inside, which an arithmetic decoder may take without complaint. The escape bytes of
    H.264 and HEVC (ITU-T H.264, 7.4.1) leave no place for four zeros in a length-prefixed packet. VP9 and AV1 forbid
    no number of zeros, but have not been seen to need a disk sector of them; VP8 has, for a picture at rest.
    """
    if context.name in ("h264", "hevc") and context.extradata and context.extradata[0] == 1:
        return bytes(4)
    return bytes(512) if context.name in ("vp9", "libdav1d", "av1") else b""


class VideoDecoder:
    """Turns a stream's packets into pictures in display order, and says which frames are bad.

    A packet that fails, or a frame that the decoder flags, spoils everything up to the next key frame: later frames
    are predicted from it. Those frames come out as Bad, not as the decoder's guesses (err_detect=explode).
    One decoding thread: the workers are the parallelism, and results do not depend on their number.
    """

    def __init__(self, stream: Any, start_s: float) -> None:
        self._context = stream.codec_context
        self._context.thread_count = 1
        self._context.options = {"err_detect": "explode"}
        self._time_base = stream.time_base
        self._tick_s = float(stream.time_base)
        self._never = _impossible(self._context)
        # each packet of these is one frame, unless fields come in packets of their own
        self._counts = self._context.name in _ONE_FRAME_A_PACKET and self._context.field_order in (0, 1)
        self._due: set[int] = set()  # time stamps that went in and have not come out
        self._start_s = start_s
        rate = stream.average_rate or stream.guessed_rate
        self._step_s = float(1 / rate) if rate else 0.04
        self._durations: dict[int, float] = {}
        self._waiting = False  # for a key frame, after a fault
        self._resumed_at = float("-inf")  # frames shown before this key frame lean on what is lost
        self._held: list[Picture | Bad] = []  # since the fault, until order is known again
        self._last_s = float("-inf")
        self._fed_to_s = 0.0

    def feed(self, packet: Any) -> Iterator[Picture | Bad]:
        """Decode one packet of the stream."""
        import av

        if self._waiting:
            if not packet.is_keyframe or packet.is_corrupt:
                self._hold_bad(packet)
                return
            self._waiting = False
            self._resumed_at = self._time(packet)
        elif packet.pts is not None and self._time(packet) < self._resumed_at:
            self._hold_bad(packet)  # not to the decoder, which would fail on it and lose the whole group
            return
        length_s = packet.duration * self._tick_s if packet.duration else self._step_s
        self._fed_to_s = max(self._fed_to_s, self._time(packet) + length_s)
        if packet.pts is not None and packet.duration:
            self._durations[packet.pts] = packet.duration * self._tick_s
        if self._counts and packet.pts is not None and not packet.is_discard:
            self._due.add(packet.pts)
        try:
            if packet.is_corrupt or (self._never and self._never in bytes(packet)):
                raise av.InvalidDataError(0, "damaged in the container")
            frames = self._context.decode(packet)
        except (av.FFmpegError, ValueError):
            self._due.discard(packet.pts)
            self._fault()
            self._hold_bad(packet)
            return
        yield from self._pictures(frames)

    def lose(self, packet: Any) -> None:
        """Say that packets are missing between those fed and this one, which comes next."""
        end_s = self._time(packet)
        self._fault()
        count = min(max(1, round((end_s - self._fed_to_s) / self._step_s)), _MANY)
        step_s = (end_s - self._fed_to_s) / count
        for number in range(count):
            time_s = self._fed_to_s + number * step_s
            self._held.append(Bad(round(time_s, 6), round(time_s + step_s, 6)))

    def finish(self) -> Iterator[Picture | Bad]:
        """The frames that the decoder still holds."""
        if not self._waiting:
            yield from self._pictures(self._drain())
        self._hold_due()
        yield from self._release()

    def _drain(self) -> list["av.VideoFrame"]:
        import av

        try:
            frames = self._context.decode(None)
        except (av.FFmpegError, ValueError):
            return []
        for frame in frames:
            frame.time_base = self._time_base
        return frames

    def _fault(self, spoilt_from: float = float("inf")) -> None:
        """Keep the good frames that the decoder still holds, and start afresh at the next key frame."""
        frames = self._drain()
        self._context.flush_buffers()
        for frame in frames:
            self._due.discard(frame.pts)
            time_s = self._time(frame)
            end_s = round(time_s + self._duration(frame), 6)
            spoilt = frame.is_corrupt or time_s < self._resumed_at or time_s > spoilt_from
            self._held.append(Bad(time_s, end_s) if spoilt else Picture(time_s, end_s, frame))
        self._hold_due()
        self._waiting = True

    def _hold_due(self) -> None:
        """What went in and will not come out any more is bad."""
        for stamp in sorted(self._due):
            time_s = round(stamp * self._tick_s - self._start_s, 6)
            self._held.append(Bad(time_s, round(time_s + self._durations.pop(stamp, self._step_s), 6)))
        self._due.clear()

    def _hold_bad(self, packet: Any) -> None:
        if packet.is_discard:
            return
        time_s = self._time(packet)
        length = packet.duration * self._tick_s if packet.duration else self._step_s
        self._held.append(Bad(time_s, round(time_s + length, 6)))

    def _pictures(self, frames: list["av.VideoFrame"]) -> Iterator[Picture | Bad]:
        for frame in frames:
            self._due.discard(frame.pts)
            time_s = self._time(frame)
            end_s = round(time_s + self._duration(frame), 6)
            lost_s = self._swallowed(frame)
            if frame.is_corrupt or time_s < self._resumed_at or lost_s is not None:
                self._held.append(Bad(time_s, end_s))
                if not self._waiting and time_s >= self._resumed_at:
                    self._fault(time_s)
                continue
            if self._waiting:  # frames that came out together with one that is spoilt
                self._held.append(Bad(time_s, end_s))
                continue
            if self._held:
                yield from self._release()
            yield from self._in_order(Picture(time_s, end_s, frame))

    def _swallowed(self, frame: "av.VideoFrame") -> float | None:
        """The time of a frame that should have come before this one and did not; later ones may lean on it."""
        if frame.pts is None or not self._due or self._last_s == float("-inf"):
            self._due = {stamp for stamp in self._due if frame.pts is None or stamp > frame.pts}
            return None
        first = min(self._due)
        return None if first > frame.pts else round(first * self._tick_s - self._start_s, 6)

    def _release(self) -> Iterator[Picture | Bad]:
        # a picture that a fault has taken back is still among the drained ones: bad wins
        bad = {event.time_s: event for event in self._held if isinstance(event, Bad)}
        good = [event for event in self._held if event.time_s not in bad]
        self._held = []
        for event in sorted([*bad.values(), *good], key=lambda e: e.time_s):
            yield from self._in_order(event)

    def _in_order(self, event: Picture | Bad) -> Iterator[Picture | Bad]:
        if isinstance(event, Bad):
            yield event
        elif event.time_s > self._last_s:
            self._last_s = event.time_s
            yield event
        elif event.time_s < self._last_s:  # the clock runs backwards: no telling what belongs where
            yield Bad(self._last_s, self._last_s)

    def _time(self, timed: Any) -> float:
        stamp = timed.pts if timed.pts is not None else timed.dts
        if stamp is None:
            return max(self._last_s, 0.0) + self._step_s
        return round(stamp * self._tick_s - self._start_s, 6)

    def _duration(self, frame: "av.VideoFrame") -> float:
        known = self._durations.pop(frame.pts, 0.0) if frame.pts is not None else 0.0
        if frame.duration:
            known = frame.duration * self._tick_s
        return known or self._step_s


def read_video(path: Path) -> Iterator[Picture | Bad | Missing]:
    """Decode a file's video once, in display order. Raises MediaError when the file cannot be opened."""
    with open_media(path) as container:
        for event in read(container):
            assert not isinstance(event, Sound)
            yield event


class Sound(NamedTuple):
    """A packet of sound, in its place among the pictures."""

    packet: Any


def read(container: "InputContainer", audio: Any = None) -> Iterator[Picture | Bad | Missing | Sound]:
    """Decode an open file's video once, in display order, and pass on the packets of its stream `audio`, if any."""
    stream = video_stream(container)
    start_s = start_of(container)
    decoder = VideoDecoder(stream, start_s)
    gaps = Gaps(container, stream)
    ticks_s = [float(s.time_base or 0) for s in container.streams]
    ends_s = 0.0
    for packet in packets(container, *container.streams):
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None:
            ends_s = max(ends_s, (stamp + (packet.duration or 0)) * ticks_s[packet.stream_index] - start_s)
        if gaps.before(packet):
            decoder.lose(packet)
        if packet.stream_index == stream.index:
            yield from decoder.feed(packet)
        elif audio is not None and packet.stream_index == audio.index:
            yield Sound(packet)
    yield from decoder.finish()
    declared_s = (container.duration or 0) / 1_000_000
    if container.format.name.startswith("matroska"):
        declared_s -= start_s  # counted from zero there, not from the first frame
    # only where the header is an index; elsewhere it is a guess
    if container.format.name.startswith(("mov", "matroska")) and declared_s - ends_s > _MISSING_S:
        yield Missing(round(ends_s, 6), round(declared_s, 6))
