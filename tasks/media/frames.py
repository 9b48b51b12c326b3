"""A clip's frames for the stages: decoded once and shared as far as memory allows, and converted to RGB."""

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.media.container import MediaError, open_media, video_stream
from tasks.media.decode import read_video
from tasks.media.upright import DecodedFrame

if TYPE_CHECKING:
    import av


class FrameCache:
    """A clip's frames as the decoder gives them, 1.5 bytes a pixel. They are kept in memory for the next reader."""

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        """keep_bytes: memory for the frames. A clip that takes more is decoded again for each reader."""
        self._path, self._keep_bytes = path, keep_bytes
        self._all: list[av.VideoFrame] = []  # either complete or empty
        self._keys: list[av.VideoFrame] = []  # either complete or empty
        self.read = 0
        """Number of frames that have been decoded so far."""

    def frames(self) -> Iterator["av.VideoFrame"]:
        """All frames in order. The caller must not change them. Raises MediaError when a frame cannot be decoded."""
        if self._all:
            yield from self._all
        else:
            self._all = yield from self._keeping(self._decode())

    def keyframes(self) -> Iterator["av.VideoFrame"]:
        """The key frames in order, one a second. The caller must not change them.

        Raises MediaError when a key frame cannot be decoded.
        """
        if self._all or self._keys:
            yield from self._keys or [frame for frame in self._all if frame.key_frame]
        else:
            self._keys = yield from self._keeping(self._decode_keys())

    def _keeping(self, frames: Iterable["av.VideoFrame"]) -> Generator["av.VideoFrame", None, list["av.VideoFrame"]]:
        """Yield the frames one by one. Returns all of them at the end, or none when they take too much memory."""
        kept: list[av.VideoFrame] = []
        taken = 0
        for frame in frames:
            self.read += 1
            taken += sum(plane.buffer_size for plane in frame.planes)
            if taken <= self._keep_bytes:
                kept.append(frame)
            else:
                kept.clear()
            yield frame
        return kept

    def _decode(self) -> Iterator["av.VideoFrame"]:
        for index, event in enumerate(read_video(self._path)):
            if not isinstance(event, DecodedFrame):
                raise MediaError(f"{self._path.name}: frame {index} of the clip cannot be decoded")
            yield event.frame

    def _decode_keys(self) -> Iterator["av.VideoFrame"]:
        import av

        with open_media(self._path) as container:
            stream = video_stream(container)
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"err_detect": "explode"}
            stream.codec_context.skip_frame = "NONKEY"
            try:
                yield from container.decode(stream)
            except av.FFmpegError as error:
                raise MediaError(f"{self._path.name}: a key frame cannot be decoded: {error}") from None


def rgb_frames(
    frames: Iterable["av.VideoFrame"],
    fps: int,
    rate: float | None = None,
    size: tuple[int, int] | None = None,
    rough: bool = False,
) -> Iterator[np.ndarray]:
    """Convert a clip's frames to RGB.

    fps: the clip's frames a second.
    rate: frames a second to take; all when None. Each interval of 1 / rate seconds gives the frame on display in its
        middle.
    size: (width, height) to scale to; the frames' own when None.
    rough: see tasks.media.clip.Clip.frames.

    Yields: [height, width, 3] uint8 RGB.
    """
    to_rgb = RgbConverter(size, rough)
    taken = 0
    for index, frame in enumerate(frames):
        if rate is None:
            yield to_rgb(frame)
            continue
        image = None
        while int((taken + 0.5) * fps / rate) == index:
            image = to_rgb(frame) if image is None else image
            yield image
            taken += 1


class RgbConverter:
    """Converts frames to [height, width, 3] uint8 RGB."""

    def __init__(self, size: tuple[int, int] | None, rough: bool = False) -> None:
        """size: (width, height) to scale to; each frame's own when None. rough: see tasks.media.clip.Clip.frames."""
        from av.video.reformatter import Interpolation, VideoReformatter

        self._size = size
        self._scaler = VideoReformatter() if rough else None
        self._to_rgb = VideoReformatter()
        self._exact = int(Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT)
        # Without ACCURATE_RND, swscale converts pixel by pixel where nothing is left to scale. It then uses integer
        # arithmetic: a fifth of the work, and the same result on every x86-64 since SSSE3.
        self._conversion = int(Interpolation.AREA | Interpolation.BITEXACT) if rough else self._exact

    def __call__(self, frame: "av.VideoFrame") -> np.ndarray:
        width, height = self._size or (frame.width, frame.height)
        if self._scaler is not None and (width, height) != (frame.width, frame.height):
            # scaled as YUV 4:2:0, which has half as many bytes as RGB
            frame = self._scaler.reformat(frame, width, height, interpolation=self._exact, threads=1)
        rgb = self._to_rgb.reformat(frame, width, height, "rgb24", interpolation=self._conversion, threads=1)
        return rgb.to_ndarray()
