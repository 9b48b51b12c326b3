"""Frames brought upright: progressive, of one size with square pixels, 8-bit limited-range YUV 4:2:0."""

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import av


class Picture(NamedTuple):
    """A decoded frame as stored (not upright yet), and the time it appears at, seconds on the source clock."""

    time_s: float
    end_s: float
    frame: "av.VideoFrame"


class Turn(NamedTuple):
    """How a stored frame is brought upright: degrees counterclockwise as `Probe.rotation`, and FFmpeg filters."""

    degrees: int
    filters: tuple[str, ...]


def turn_of(frame: "av.VideoFrame") -> Turn:
    """Read the frame's display matrix: one of the eight turns and mirrorings, the nearest for any other."""
    from av.sidedata.sidedata import SideDataContainer, Type

    # not `frame.side_data`: the frame keeps that, and that the frame, until Python's collector looks for them, which
    # counts objects and not megabytes
    side: Any = SideDataContainer(frame).get(Type.DISPLAYMATRIX)  # type: ignore[call-arg]
    if side is None:
        return Turn(0, ())
    a, b, _, c, d = struct.unpack("=5i", bytes(side)[:20])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        filters = (("hflip",) if a < 0 else ()) + (("vflip",) if d < 0 else ())
        return Turn(180 if len(filters) == 2 else 0, filters)
    way = {(True, False): "clock", (False, True): "cclock", (True, True): "cclock_flip", (False, False): "clock_flip"}
    name = way[(b > 0, c > 0)]
    return Turn(270 if name.startswith("clock") else 90, (f"transpose={name}",))


class Upright:
    """Makes stored frames progressive, of one size with square pixels, and upright; limited-range YUV 4:2:0, 8 bit.

    size: (width, height) of the upright result. Colours keep their matrix; frames say which (see `matrix_of`).
    """

    def __init__(self, size: tuple[int, int], interlaced: bool) -> None:
        from av.video.reformatter import Interpolation, VideoReformatter

        self.size = size
        # bit-exact: the same pixels whatever vector unit the machine has
        self._how = int(Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT)
        self._deinterlacer = Deinterlacer() if interlaced else None
        self._scaler = VideoReformatter()
        self._graph: tuple[tuple[str, ...], Any] = ((), None)

    def progressive(self, picture: Picture) -> Iterator[Picture]:
        """Pictures without combing; one comes late by a frame where fields are woven apart."""
        if self._deinterlacer is None:
            yield picture
        else:
            yield from self._deinterlacer.push(picture)

    def flush(self) -> Iterator[Picture]:
        """What `progressive` holds back; call at the end and before a hole."""
        if self._deinterlacer is not None:
            yield from self._deinterlacer.flush()

    def __call__(self, frame: "av.VideoFrame") -> "av.VideoFrame":
        from av.video.reformatter import ColorRange, Colorspace

        turn = turn_of(frame)
        width, height = self.size if turn.degrees in (0, 180) else self.size[::-1]
        is_rgb = frame.format.is_rgb
        upright = self._scaler.reformat(
            frame,
            width,
            height,
            "yuv420p",
            interpolation=self._how,
            dst_colorspace=Colorspace.ITU709 if is_rgb else None,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        if turn.filters:
            if self._graph[0] != turn.filters:
                self._graph = (turn.filters, _graph(upright, *turn.filters))
            self._graph[1].push(upright)
            upright = self._graph[1].pull()
        return upright


class Deinterlacer:
    """FFmpeg's bwdif, one frame out for each in, at its first field's time; frames not marked interlaced pass."""

    def __init__(self) -> None:
        self._graph: Any = None
        self._waiting: list[Picture] = []

    def push(self, picture: Picture) -> Iterator[Picture]:
        if self._graph is None:
            self._graph = _graph(picture.frame, "bwdif=mode=send_frame:deint=interlaced")
        self._waiting.append(picture)
        self._graph.push(picture.frame)
        yield from self._pull()

    def flush(self) -> Iterator[Picture]:
        if self._graph is not None:
            self._graph.push(None)
            yield from self._pull()
            self._graph = None
            self._waiting = []

    def _pull(self) -> Iterator[Picture]:
        import av

        while True:
            try:
                frame = self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            yield self._waiting.pop(0)._replace(frame=frame)


def _graph(frame: "av.VideoFrame", *filters: str) -> Any:
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
