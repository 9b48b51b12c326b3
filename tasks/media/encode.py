"""Writes a clip's video file: H.264 in MP4, readable by any player, with the same bytes each time."""

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import av

X264Preset = Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]
"""x264's presets, from the fastest to the one with the smallest files at the same quality."""

# code points of ITU-T H.273
_UNSPECIFIED = 2  # in all of its tables
_BT709, _SMPTE170M = 1, 6
_LIMITED = 1


class ClipEncoder:
    """Writes frames at a constant rate: yuv420p in limited range, a key frame each second and nowhere else.

    There are no B-frames. Time stamps therefore start at zero without an edit list, which not every reader honours.
    """

    def __init__(
        self, path: Path, fps: int, size: tuple[int, int], qp: int, preset: X264Preset, source_height: int
    ) -> None:
        """size: (width, height) in pixels. qp: x264's constant quantiser. source_height: lines of the source, by which
        a player would guess the colour matrix of an untagged source."""
        import av

        self._container = av.open(
            str(path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}
        )
        options = {
            "preset": preset,
            # Not a rate factor: with this preset it would take a third more time for the same size and distortion,
            # all of it to look ahead at how hard each frame is to encode.
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
        """Number of frames encoded so far."""

    def add(self, frame: "av.VideoFrame") -> None:
        """Encode the next frame. The same frame object may be added again."""
        if self.frames == 0:
            self._tag_colours(frame)
        frame.pts, frame.time_base = self.frames, self._time_base
        frame.pict_type = 0  # x264 chooses the frame types, whatever they were in the source
        self._container.mux(self._stream.encode(frame))
        self.frames += 1

    def _tag_colours(self, frame: "av.VideoFrame") -> None:
        """Write the colour matrix into the file: the source's own, or else the one that players guess by its height.

        Without the tag a player would guess by the clip's height, which is smaller than the source's.
        """
        guess = _BT709 if self._source_height >= 720 else _SMPTE170M
        context = self._stream.codec_context
        context.color_range = _LIMITED
        context.colorspace = guess if frame.colorspace == _UNSPECIFIED else frame.colorspace
        context.color_primaries = frame.color_primaries
        context.color_trc = frame.color_trc

    def close(self) -> None:
        """Encode what is buffered and finish the file."""
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abandon(self) -> None:
        """Close a file that will not be finished."""
        self._container.close()
