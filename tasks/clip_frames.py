"""A clip's frames for the stages: decoded, as far as memory allows once for all who look, and turned into RGB."""

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.decode import read_video
from tasks.media import MediaError, open_media, video_stream
from tasks.upright import Picture

if TYPE_CHECKING:
    import av


class Decoded:
    """A clip's frames as they come out of the decoder, 1.5 bytes a pixel, kept for the next who asks.

    keep_bytes: memory for them; a clip that takes more is decoded each time. read: how many frames have gone through a
    decoder.
    """

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        self._path, self._keep_bytes = path, keep_bytes
        self._all: list[av.VideoFrame] = []  # complete or empty
        self._keys: list[av.VideoFrame] = []  # the same
        self.read = 0

    def frames(self) -> Iterator["av.VideoFrame"]:
        """All frames in order, none of them to be changed. Raises MediaError when one cannot be decoded."""
        if self._all:
            yield from self._all
        else:
            self._all = yield from self._passed_on(self._decode())

    def keyframes(self) -> Iterator["av.VideoFrame"]:
        """Only the key frames, one a second; likewise."""
        if self._all or self._keys:
            yield from self._keys or [frame for frame in self._all if frame.key_frame]
        else:
            self._keys = yield from self._passed_on(self._decode_keys())

    def _passed_on(self, frames: Iterable["av.VideoFrame"]) -> Generator["av.VideoFrame", None, list["av.VideoFrame"]]:
        """Pass frames on one by one. Returns: all of them at the end; none where they take too much memory."""
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
            if not isinstance(event, Picture):
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


def images(
    frames: Iterable["av.VideoFrame"],
    fps: int,
    rate: float | None = None,
    size: tuple[int, int] | None = None,
    rough: bool = False,
) -> Iterator[np.ndarray]:
    """Turn a clip's frames into RGB.

    fps: the clip's frames a second. rate: frames a second to take, each the one on display in the middle of its turn;
    all when None. size: (width, height) to scale to. rough: see tasks.clip.Clip.frames.

    Yields: [height, width, 3] uint8 RGB.
    """
    to_rgb = ToRgb(size, rough)
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


class ToRgb:
    def __init__(self, size: tuple[int, int] | None, rough: bool = False) -> None:
        from av.video.reformatter import Interpolation, VideoReformatter

        self._size = size
        self._scaler = VideoReformatter() if rough else None
        self._to_rgb = VideoReformatter()
        self._exact = int(Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT)
        # without ACCURATE_RND, swscale takes pixel by pixel what has its size already: integer arithmetic, the same on
        # every x86-64 since SSSE3, a fifth of the work
        self._how = int(Interpolation.AREA | Interpolation.BITEXACT) if rough else self._exact

    def __call__(self, frame: "av.VideoFrame") -> np.ndarray:
        width, height = self._size or (frame.width, frame.height)
        if self._scaler is not None and (width, height) != (frame.width, frame.height):
            # in the clip's own planes, half as large as RGB
            frame = self._scaler.reformat(frame, width, height, interpolation=self._exact, threads=1)
        return self._to_rgb.reformat(frame, width, height, "rgb24", interpolation=self._how, threads=1).to_ndarray()
