"""A clip's picture as a file: H.264 in MP4, readable by anything, the same bytes each time."""

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import av

_UNSPECIFIED = 2  # in all of ITU-T H.273's tables
_BT709, _SMPTE170M = 1, 6
_LIMITED = 1


class ClipEncoder:
    """Writes frames at a constant rate: yuv420p in limited range, a key frame each second and nowhere else.

    No B-frames, so that time stamps start at zero without an edit list, which not every reader honours.
    """

    def __init__(self, path: Path, fps: int, size: tuple[int, int], qp: int, preset: str, source_height: int) -> None:
        import av

        self._container = av.open(
            str(path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}
        )
        options = {
            "preset": preset,
            # Not a rate factor: beside this preset it would take a third more time for the same size and distortion,
            # all of it to see in advance how hard each frame is.
            "qp": str(qp),
            "a53cc": "0",
            "x264-params": f"threads=1:keyint={fps}:min-keyint={fps}:scenecut=0:bframes=0:open-gop=0",
        }
        self._stream = self._container.add_stream("libx264", rate=fps, options=options)
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, fps)
        self._stream.codec_context.thread_count = 1
        self._stream.codec_context.flags |= av.codec.context.Flags.bitexact | av.codec.context.Flags.closed_gop
        self._time_base = Fraction(1, fps)
        self._source_height = source_height
        self.frames = 0

    def add(self, frame: "av.VideoFrame") -> None:
        """Encode the next frame; the same one may come again."""
        if self.frames == 0:
            self._tag_colours(frame)
        frame.pts, frame.time_base = self.frames, self._time_base
        frame.pict_type = 0  # the decoder's choice of frame types is not ours
        self._container.mux(self._stream.encode(frame))
        self.frames += 1

    def _tag_colours(self, frame: "av.VideoFrame") -> None:
        """Say which matrix the colours have: the source's, or else what players guess by its height.

        Said, because they would guess another for a smaller picture.
        """
        guess = _BT709 if self._source_height >= 720 else _SMPTE170M
        context = self._stream.codec_context
        context.color_range = _LIMITED
        context.colorspace = guess if frame.colorspace == _UNSPECIFIED else frame.colorspace
        context.color_primaries = frame.color_primaries
        context.color_trc = frame.color_trc

    def close(self) -> None:
        """Finish the file."""
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abandon(self) -> None:
        """Let go of a file that will not be finished."""
        self._container.close()
