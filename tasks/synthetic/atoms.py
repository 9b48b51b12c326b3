"""Changes to the boxes ("atoms") of a written MP4 file that FFmpeg's muxer does not offer."""

import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path


def _boxes(data: bytes | bytearray, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """Yield the boxes in a range of bytes: (type, start of the contents, end of the contents)."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        header = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, start + 8)
            header = 16
        yield kind.decode("latin-1"), start + header, start + size
        start += size


def _inside(data: bytes | bytearray, span: tuple[int, int], *path: str) -> tuple[int, int]:
    """The range of the contents of the first box at a path of box types, searched in a range."""
    for name in path:
        span = next((a, b) for kind, a, b in _boxes(data, *span) if kind == name)
    return span


def hide_start(path: Path, handler: str, seconds: Fraction) -> None:
    """Change a track's edit list so that its first `seconds` are in the file but not played.

    handler: the kind of track, "vide" (video) or "soun" (sound).
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
        at = elst + 8 + 12 * (edits - 1)  # the last edit; an empty edit may come before it
        length, media_time = struct.unpack_from(">Ii", data, at)
        assert media_time >= 0, "the last edit of a track shows its media"
        struct.pack_into(
            ">Ii", data, at, length - round(seconds * movie_scale), media_time + round(seconds * media_scale)
        )
    path.write_bytes(data)
