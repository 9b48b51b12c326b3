"""Brings frames upright: progressive, of one size with square pixels, 8-bit limited-range YUV 4:2:0."""

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import av


class DecodedFrame(NamedTuple):
    """A decoded frame as it is stored, not upright yet, with its time on display."""

    time_s: float
    """When it appears, in seconds on the source clock."""
    end_s: float
    """When its display ends, in seconds on the source clock."""
    frame: "av.VideoFrame"


class Rotation(NamedTuple):
    """How a stored frame is brought upright."""

    degrees: int
    """Degrees counterclockwise from stored to upright, as `Probe.rotation`."""
    filters: tuple[str, ...]
    """The FFmpeg filters that do it."""


def rotation_of(frame: "av.VideoFrame") -> Rotation:
    """Read a frame's display matrix: one of the eight rotations and mirrorings, the nearest one for other matrices."""
    from av.sidedata.sidedata import SideDataContainer, Type

    # Not `frame.side_data`: the frame and that object keep each other alive until Python's garbage collector runs, and
    # what triggers it is the number of objects, not their megabytes.
    side: Any = SideDataContainer(frame).get(Type.DISPLAYMATRIX)  # type: ignore[call-arg]
    if side is None:
        return Rotation(0, ())
    a, b, _, c, d = struct.unpack("=5i", bytes(side)[:20])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        filters = (("hflip",) if a < 0 else ()) + (("vflip",) if d < 0 else ())
        return Rotation(180 if len(filters) == 2 else 0, filters)
    ways = {(True, False): "clock", (False, True): "cclock", (True, True): "cclock_flip", (False, False): "clock_flip"}
    name = ways[(b > 0, c > 0)]
    return Rotation(270 if name.startswith("clock") else 90, (f"transpose={name}",))


class FrameConverter:
    """Converts stored frames to progressive, upright frames of one size with square pixels.

    The result is 8-bit limited-range YUV 4:2:0. Colours keep their matrix. A converted frame says which one it is.
    """

    def __init__(self, size: tuple[int, int], interlaced: bool) -> None:
        """size: (width, height) of the upright result, pixels. interlaced: whether the source is."""
        from av.video.reformatter import Interpolation, VideoReformatter

        self.size = size
        # bit-exact: the same pixels whatever vector instructions the machine has
        self._interpolation = int(Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT)
        self._deinterlacer = Deinterlacer() if interlaced else None
        self._scaler = VideoReformatter()
        self._graph: tuple[tuple[str, ...], Any] = ((), None)

    def progressive(self, picture: DecodedFrame) -> Iterator[DecodedFrame]:
        """Deinterlace the next frame. The output of an interlaced source comes one frame late."""
        if self._deinterlacer is None:
            yield picture
        else:
            yield from self._deinterlacer.push(picture)

    def flush(self) -> Iterator[DecodedFrame]:
        """The frames that `progressive` still holds. Call it at the end and before a hole in the source."""
        if self._deinterlacer is not None:
            yield from self._deinterlacer.flush()

    def __call__(self, frame: "av.VideoFrame") -> "av.VideoFrame":
        """Scale a progressive frame and bring it upright."""
        from av.video.reformatter import ColorRange, Colorspace

        rotation = rotation_of(frame)
        width, height = self.size if rotation.degrees in (0, 180) else self.size[::-1]
        is_rgb = frame.format.is_rgb
        upright = self._scaler.reformat(
            frame,
            width,
            height,
            "yuv420p",
            interpolation=self._interpolation,
            dst_colorspace=Colorspace.ITU709 if is_rgb else None,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        if rotation.filters:
            if self._graph[0] != rotation.filters:
                self._graph = (rotation.filters, _graph(upright, *rotation.filters))
            self._graph[1].push(upright)
            upright = self._graph[1].pull()
        return upright


class Deinterlacer:
    """FFmpeg's bwdif. It gives one frame for each input frame, at the time of the input's first field.

    Frames that are not marked as interlaced pass through unchanged.
    """

    def __init__(self) -> None:
        self._graph: Any = None
        self._waiting: list[DecodedFrame] = []

    def push(self, picture: DecodedFrame) -> Iterator[DecodedFrame]:
        """Deinterlace the next frame; yields the frames that are ready."""
        if self._graph is None:
            self._graph = _graph(picture.frame, "bwdif=mode=send_frame:deint=interlaced")
        self._waiting.append(picture)
        self._graph.push(picture.frame)
        yield from self._pull()

    def flush(self) -> Iterator[DecodedFrame]:
        """The frames that the filter still holds. The next frame starts a new filter."""
        if self._graph is not None:
            self._graph.push(None)
            yield from self._pull()
            self._graph = None
            self._waiting = []

    def _pull(self) -> Iterator[DecodedFrame]:
        import av

        while True:
            try:
                frame = self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            yield self._waiting.pop(0)._replace(frame=frame)


def _graph(frame: "av.VideoFrame", *filters: str) -> Any:
    """An FFmpeg filter graph for frames like `frame`."""
    from av.filter import Graph

    graph = Graph()
    graph.threads = 1
    nodes = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)]
    for text in filters:
        name, _, arguments = text.partition("=")
        nodes.append(graph.add(name, arguments or None))
    nodes.append(graph.add("buffersink"))
    graph.link_nodes(*nodes).configure()
    return graph
