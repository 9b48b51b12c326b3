"""Small changes to the boxes of an MP4 file that no writer offers."""

import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path


def _boxes(data: bytes | bytearray, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """The boxes in a range: (type, where its contents begin, where they end)."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        header = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, start + 8)
            header = 16
        yield kind.decode("latin-1"), start + header, start + size
        start += size


def _inside(data: bytes | bytearray, span: tuple[int, int], *path: str) -> tuple[int, int]:
    """The contents of the first box at a path below a range."""
    for name in path:
        span = next((a, b) for kind, a, b in _boxes(data, *span) if kind == name)
    return span


def hide_start(path: Path, handler: str, seconds: Fraction) -> None:
    """Let the edit list of a track begin its media so much later: what comes before is in the file, and not shown.

    handler: "vide" or "soun", the kind of track.
    """
    data = bytearray(path.read_bytes())
    moov = _inside(data, (0, len(data)), "moov")
    (movie_scale,) = struct.unpack_from(">I", data, _inside(data, moov, "mvhd")[0] + 12)
    for kind, *trak in _boxes(data, *moov):
        if kind != "trak":
            continue
        where = (trak[0], trak[1])
        hdlr, _ = _inside(data, where, "mdia", "hdlr")
        if data[hdlr + 8 : hdlr + 12].decode() != handler:
            continue
        (media_scale,) = struct.unpack_from(">I", data, _inside(data, where, "mdia", "mdhd")[0] + 12)
        elst, _ = _inside(data, where, "edts", "elst")
        (edits,) = struct.unpack_from(">I", data, elst + 4)
        at = elst + 8 + 12 * (edits - 1)  # the last one; an empty edit may come before it
        length, media_time = struct.unpack_from(">Ii", data, at)
        assert media_time >= 0, "the last edit of a track shows its media"
        struct.pack_into(
            ">Ii", data, at, length - round(seconds * movie_scale), media_time + round(seconds * media_scale)
        )
    path.write_bytes(data)
