"""Opens media files, as local files and nothing else. A file that cannot be read is refused with the reason."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from av.container import InputContainer

# Containers that footage comes in. Others are refused: some of FFmpeg's demuxers follow addresses found in the file
# (playlists), or take any text for an image.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,flv,asf,ogg,mxf,gxf,rm,dv,nut,ivf,obu,"
    "gif,apng,wav,mp3,aac,flac,ac3,eac3,aiff,caf,amr,w64"
)
_MAX_FRAME_S = 0.4  # no camera takes so long from one frame to the next


class MediaError(ValueError):
    """A file that cannot be used as footage, for the reason given."""


def open_media(path: Path) -> "InputContainer":
    """Open a local file for reading. Nothing in the file can make FFmpeg open another file or address.

    Raises MediaError, FileNotFoundError.
    """
    import av

    size = path.stat().st_size
    if size == 0:
        raise MediaError("empty file (0 bytes)")
    try:
        return av.open(
            # FFmpeg could take the beginning of a relative path for a protocol
            str(path.absolute()),
            metadata_errors="ignore",
            container_options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"},
        )
    except (av.FFmpegError, ValueError, UnicodeError) as error:
        raise MediaError(_why_unreadable(path, size, error)) from None


def _why_unreadable(path: Path, size: int, error: Exception) -> str:
    with path.open("rb") as file:
        head = file.read(12)
        if head[4:8] in (b"ftyp", b"mdat", b"moov", b"wide", b"free") and not _has_moov(file, size):
            return "no index (moov atom): the file is truncated, or its recording was never finished"
    if head[:4] in (b"\x1aE\xdf\xa3", b"RIFF") or head[4:8] == b"ftyp":
        return f"damaged media file: {getattr(error, 'strerror', None) or error}"
    return "not a media file of a known kind"


def _has_moov(file: Any, size: int) -> bool:
    """Whether an MP4 file of `size` bytes has a complete `moov` atom, its index."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        header = file.read(16)
        (length,), kind = struct.unpack(">I", header[:4]), header[4:8]
        if kind == b"moov":
            return at + length <= size
        if length == 1 and len(header) == 16:
            (length,) = struct.unpack(">Q", header[8:])
        if length < 8:
            return False
        at += length
    return False


def start_time_s(container: "InputContainer") -> float:
    """The container's start time, in seconds of the file's own time. This is zero on the source clock."""
    return (container.start_time or 0) / 1_000_000


def video_stream(container: "InputContainer") -> Any:
    """The video stream that a player would show. Cover art does not count.

    Raises MediaError when there is no such stream, or no decoder for it.
    """
    import av

    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        what = "audio only" if container.streams.audio else "and no audio stream"
        raise MediaError(f"no video stream ({what})")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise MediaError("no decoder for its video codec")
    return stream


def audio_stream(container: "InputContainer", video: Any) -> Any | None:
    """The audio stream that a player would play with the stream `video`. None when none can be decoded."""
    stream: Any = container.streams.best("audio", related=video)
    if stream is None or stream.codec_context is None or not stream.codec_context.sample_rate:
        return None
    return stream


def packets(container: "InputContainer", *streams: Any) -> Iterator[Any]:
    """The packets of these streams in file order. They end where the file can be read no further."""
    import av

    try:
        for packet in container.demux(streams):
            if packet.size:  # FFmpeg's empty packets at the end only ask for a flush
                yield packet
    except (av.FFmpegError, OSError):
        return  # the rest of the file shows as a span without frames


class GapDetector:
    """Notices where a demuxer has skipped damage silently: the video stops for a while, and so does the audio.

    Where the audio goes on, the video stands still on purpose, as in screen recordings. MP4 is not watched: its index
    says how long each frame is shown.
    """

    def __init__(self, container: "InputContainer", video: Any) -> None:
        audio = audio_stream(container, video)
        self._watches = not container.format.name.startswith("mov")
        self._video, self._audio = video.index, audio.index if audio is not None else -1
        self._ends_s: dict[int, float] = {}  # by stream: where its packets end so far
        self._silence = (0.0, 0.0)  # the last gap in the audio

    def before(self, packet: Any) -> bool:
        """Whether frames are missing before this packet. The caller must ask for every packet, in file order."""
        stamp, index = packet.dts if packet.dts is not None else packet.pts, packet.stream_index
        if not self._watches or stamp is None or index not in (self._video, self._audio):
            return False
        start_s = float(stamp * packet.time_base)
        last_s = self._ends_s.get(index, start_s)
        self._ends_s[index] = max(last_s, start_s + float((packet.duration or 0) * packet.time_base))
        if start_s - last_s < _MAX_FRAME_S:
            return False
        if index == self._audio:
            self._silence = (last_s, start_s)
            return False
        heard_s = self._ends_s.get(self._audio, last_s)
        silent_s = max(0.0, min(start_s, self._silence[1]) - max(last_s, self._silence[0]))
        silent_s += max(0.0, start_s - max(heard_s, last_s))
        return silent_s > (start_s - last_s) / 2
