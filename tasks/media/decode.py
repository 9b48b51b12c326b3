"""Reads video files frame by frame. Every fault is reported, and no frame is made up for a lost one.

The source clock counts seconds from the container's start time. Zero is the same for video and audio, and is where a
player starts. Nothing here seeks: a frame's place is given by its own time stamp, never by counting.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.media.container import (
    GapDetector,
    MediaError,
    audio_stream,
    open_media,
    packets,
    start_time_s,
    video_stream,
)
from tasks.media.upright import DecodedFrame, rotation_of

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

_MIN_MISSING_S = 1.0  # a header rounds its duration; a file that ends this much earlier is truncated
_MAX_LOST_FRAMES = 10_000  # in one gap
_PROBE_FRAMES = 4  # that decide whether a source is interlaced
_PROBE_PACKETS = 1000  # how far to look for these frames


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a file's header says, and what its first frames show."""

    container: str
    """FFmpeg's name of the format."""
    duration_s: float
    """Seconds, from the header; 0 when the header has no duration."""
    start_s: float
    """The container's start time in the file's own time: zero on the source clock."""
    video_codec: str
    pix_fmt: str
    """FFmpeg's name of the pixel format of the stored frames."""
    width: int
    """Width on display, upright and with square pixels."""
    height: int
    """Height on display, upright and with square pixels."""
    fps: float
    """Average frames a second; 0 when it is not known."""
    rotation: int
    """Degrees counterclockwise from stored to upright: 0, 90, 180 or 270."""
    interlaced: bool
    """Whether most of the first frames are."""
    video_start_s: float
    """First time stamp of the video, on the source clock."""
    audio_codec: str
    """Empty without audio; the numbers beside it are then 0."""
    audio_rate: int
    """Sample rate, Hz."""
    audio_channels: int
    audio_start_s: float
    """First time stamp of the audio, on the source clock."""
    video_streams: int
    """Number of video streams, cover art included."""
    audio_streams: int
    """Number of audio streams."""

    @property
    def has_audio(self) -> bool:
        return bool(self.audio_codec)


class BadFrame(NamedTuple):
    """A frame of the file that cannot be decoded, or whose content cannot be trusted. On the source clock."""

    time_s: float
    end_s: float


class MissingEnd(NamedTuple):
    """The part of a truncated file that its header promises and that is not there. On the source clock."""

    time_s: float
    end_s: float


class AudioPacket(NamedTuple):
    """A packet of audio, in its place between the frames."""

    packet: Any


def probe(path: Path) -> Probe:
    """Read the header and decode the first frames. Raises MediaError with the reason, FileNotFoundError."""
    with open_media(path) as container:
        stream = video_stream(container)
        audio = audio_stream(container, stream)
        start_s = start_time_s(container)
        frame, interlaced = _first_frame(container, stream, start_s)
        sar = float(stream.codec_context.sample_aspect_ratio or stream.sample_aspect_ratio or 1) or 1.0
        rotation = rotation_of(frame).degrees
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
    """The first good frame, and whether most of the first good frames are interlaced."""
    first = _first_pictures(container, stream, start_s)
    if not first:
        raise MediaError("no frame of its video can be decoded")
    num_interlaced = sum(bool(picture.frame.interlaced_frame) for picture in first)
    return first[0].frame, 2 * num_interlaced > len(first)


def _first_pictures(container: "InputContainer", stream: Any, start_s: float) -> list[DecodedFrame]:
    decoder = VideoDecoder(stream, start_s)
    first: list[DecodedFrame] = []
    for count, packet in enumerate(packets(container, stream)):
        first += [event for event in decoder.feed(packet) if isinstance(event, DecodedFrame)]
        if len(first) >= _PROBE_FRAMES or count >= _PROBE_PACKETS:
            return first
    return first + [event for event in decoder.finish() if isinstance(event, DecodedFrame)]


_ONE_FRAME_A_PACKET = ("h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video")


def _impossible(context: Any) -> bytes:
    """Bytes that no good packet of this codec holds; b"" when none are known.

    A file that was downloaded in part has zeros inside, which an arithmetic decoder may accept without an error. The
    escape bytes of H.264 and HEVC (ITU-T H.264, 7.4.1) rule out four zeros in a length-prefixed packet. VP9 and AV1
    forbid no number of zeros, but have not been seen to need a disk sector of them. VP8 has, for a still image.
    """
    if context.name in ("h264", "hevc") and context.extradata and context.extradata[0] == 1:
        return bytes(4)
    return bytes(512) if context.name in ("vp9", "libdav1d", "av1") else b""


class VideoDecoder:
    """Decodes a stream's packets to frames in display order, and reports which frames are bad.

    A packet that fails, or a frame that the decoder flags, spoils everything up to the next key frame, since later
    frames are predicted from it. These frames come out as BadFrame, not as the decoder's guesses (err_detect=explode).

    There is one decoding thread. The worker processes are the parallelism, and results do not depend on their number.
    """

    def __init__(self, stream: Any, start_s: float) -> None:
        """start_s: zero of the source clock, in the file's time."""
        self._context = stream.codec_context
        self._context.thread_count = 1
        self._context.options = {"err_detect": "explode"}
        self._time_base = stream.time_base
        self._tick_s = float(stream.time_base)
        self._impossible = _impossible(self._context)
        # whether each packet gives one frame; not when the two fields of a frame come in packets of their own
        self._frame_a_packet = self._context.name in _ONE_FRAME_A_PACKET and self._context.field_order in (0, 1)
        self._due: set[int] = set()  # time stamps that went in and have not come out
        self._start_s = start_s
        rate = stream.average_rate or stream.guessed_rate
        self._step_s = float(1 / rate) if rate else 0.04
        self._durations: dict[int, float] = {}  # seconds, by time stamp
        self._waiting = False  # for a key frame, after a fault
        self._resumed_at = float("-inf")  # frames shown before this key frame are predicted from lost ones
        self._held: list[DecodedFrame | BadFrame] = []  # since the fault, until their order is known
        self._last_s = float("-inf")  # the time of the last good frame that came out
        self._fed_to_s = 0.0  # where the packets end so far

    def feed(self, packet: Any) -> Iterator[DecodedFrame | BadFrame]:
        """Decode one packet of the stream."""
        import av

        if self._waiting:
            if not packet.is_keyframe or packet.is_corrupt:
                self._hold_bad(packet)
                return
            self._waiting = False
            self._resumed_at = self._time(packet)
        elif packet.pts is not None and self._time(packet) < self._resumed_at:
            # the decoder would fail on it, and the whole group of frames would be lost
            self._hold_bad(packet)
            return
        length_s = packet.duration * self._tick_s if packet.duration else self._step_s
        self._fed_to_s = max(self._fed_to_s, self._time(packet) + length_s)
        if packet.pts is not None and packet.duration:
            self._durations[packet.pts] = packet.duration * self._tick_s
        if self._frame_a_packet and packet.pts is not None and not packet.is_discard:
            self._due.add(packet.pts)
        try:
            if packet.is_corrupt or (self._impossible and self._impossible in bytes(packet)):
                raise av.InvalidDataError(0, "damaged in the container")
            frames = self._context.decode(packet)
        except (av.FFmpegError, ValueError):
            self._due.discard(packet.pts)
            self._fault()
            self._hold_bad(packet)
            return
        yield from self._checked(frames)

    def gap_before(self, packet: Any) -> None:
        """Count the frames between the packets fed so far and this one, which is fed next, as bad."""
        end_s = self._time(packet)
        self._fault()
        count = min(max(1, round((end_s - self._fed_to_s) / self._step_s)), _MAX_LOST_FRAMES)
        step_s = (end_s - self._fed_to_s) / count
        for number in range(count):
            time_s = self._fed_to_s + number * step_s
            self._held.append(BadFrame(round(time_s, 6), round(time_s + step_s, 6)))

    def finish(self) -> Iterator[DecodedFrame | BadFrame]:
        """The frames that the decoder still holds at the end of the stream."""
        if not self._waiting:
            yield from self._checked(self._drain())
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
        """Keep the good frames that the decoder still holds, and start afresh at the next key frame.

        spoilt_from: frames later than this time are bad.
        """
        frames = self._drain()
        self._context.flush_buffers()
        for frame in frames:
            self._due.discard(frame.pts)
            time_s = self._time(frame)
            end_s = round(time_s + self._duration(frame), 6)
            spoilt = frame.is_corrupt or time_s < self._resumed_at or time_s > spoilt_from
            self._held.append(BadFrame(time_s, end_s) if spoilt else DecodedFrame(time_s, end_s, frame))
        self._hold_due()
        self._waiting = True

    def _hold_due(self) -> None:
        """Count every time stamp that went in and will not come out any more as a bad frame."""
        for stamp in sorted(self._due):
            time_s = round(stamp * self._tick_s - self._start_s, 6)
            self._held.append(BadFrame(time_s, round(time_s + self._durations.pop(stamp, self._step_s), 6)))
        self._due.clear()

    def _hold_bad(self, packet: Any) -> None:
        if packet.is_discard:
            return
        time_s = self._time(packet)
        length = packet.duration * self._tick_s if packet.duration else self._step_s
        self._held.append(BadFrame(time_s, round(time_s + length, 6)))

    def _checked(self, frames: list["av.VideoFrame"]) -> Iterator[DecodedFrame | BadFrame]:
        """Tell the good ones of decoded frames from the bad ones."""
        for frame in frames:
            self._due.discard(frame.pts)
            time_s = self._time(frame)
            end_s = round(time_s + self._duration(frame), 6)
            swallowed = self._frame_is_missing_before(frame)
            if frame.is_corrupt or time_s < self._resumed_at or swallowed:
                self._held.append(BadFrame(time_s, end_s))
                if not self._waiting and time_s >= self._resumed_at:
                    self._fault(time_s)
                continue
            if self._waiting:  # decoded in one call with a frame that is spoilt
                self._held.append(BadFrame(time_s, end_s))
                continue
            if self._held:
                yield from self._release()
            yield from self._in_order(DecodedFrame(time_s, end_s, frame))

    def _frame_is_missing_before(self, frame: "av.VideoFrame") -> bool:
        """Whether an earlier frame went in and did not come out. Later frames may be predicted from it."""
        if frame.pts is None or not self._due or self._last_s == float("-inf"):
            self._due = {stamp for stamp in self._due if frame.pts is None or stamp > frame.pts}
            return False
        return min(self._due) <= frame.pts

    def _release(self) -> Iterator[DecodedFrame | BadFrame]:
        # A frame may be held as good, drained before the fault, and as bad. Then it is bad.
        bad = {event.time_s: event for event in self._held if isinstance(event, BadFrame)}
        good = [event for event in self._held if event.time_s not in bad]
        self._held = []
        for event in sorted([*bad.values(), *good], key=lambda e: e.time_s):
            yield from self._in_order(event)

    def _in_order(self, event: DecodedFrame | BadFrame) -> Iterator[DecodedFrame | BadFrame]:
        if isinstance(event, BadFrame):
            yield event
        elif event.time_s > self._last_s:
            self._last_s = event.time_s
            yield event
        elif event.time_s < self._last_s:  # the clock runs backwards, so the frame's place is not known
            yield BadFrame(self._last_s, self._last_s)

    def _time(self, timed: Any) -> float:
        """The time of a packet or frame, in seconds on the source clock."""
        stamp = timed.pts if timed.pts is not None else timed.dts
        if stamp is None:
            return max(self._last_s, 0.0) + self._step_s
        return round(stamp * self._tick_s - self._start_s, 6)

    def _duration(self, frame: "av.VideoFrame") -> float:
        known = self._durations.pop(frame.pts, 0.0) if frame.pts is not None else 0.0
        if frame.duration:
            known = frame.duration * self._tick_s
        return known or self._step_s


def read_video(path: Path) -> Iterator[DecodedFrame | BadFrame | MissingEnd]:
    """Decode a file's video once, in display order. Raises MediaError when the file cannot be opened."""
    with open_media(path) as container:
        for event in read_container(container):
            assert not isinstance(event, AudioPacket)
            yield event


def read_container(
    container: "InputContainer", audio: Any = None
) -> Iterator[DecodedFrame | BadFrame | MissingEnd | AudioPacket]:
    """Decode an open file's video once, in display order.

    audio: an audio stream of the file, whose packets come out undecoded between the frames; none when None.
    """
    stream = video_stream(container)
    start_s = start_time_s(container)
    decoder = VideoDecoder(stream, start_s)
    gaps = GapDetector(container, stream)
    ticks_s = [float(s.time_base or 0) for s in container.streams]
    ends_s = 0.0
    for packet in packets(container, *container.streams):
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None:
            ends_s = max(ends_s, (stamp + (packet.duration or 0)) * ticks_s[packet.stream_index] - start_s)
        if gaps.before(packet):
            decoder.gap_before(packet)
        if packet.stream_index == stream.index:
            yield from decoder.feed(packet)
        elif audio is not None and packet.stream_index == audio.index:
            yield AudioPacket(packet)
    yield from decoder.finish()
    declared_s = (container.duration or 0) / 1_000_000
    if container.format.name.startswith("matroska"):
        declared_s -= start_s  # Matroska counts its duration from zero, not from the first frame
    # the duration is exact only in formats with an index; in others FFmpeg guesses it
    if container.format.name.startswith(("mov", "matroska")) and declared_s - ends_s > _MIN_MISSING_S:
        yield MissingEnd(round(ends_s, 6), round(declared_s, 6))
