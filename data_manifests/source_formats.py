"""The formats of source manifests: reads the rows of a CSV, JSON lines or Parquet file.

A reader yields, for each row, the row's place in the file and its fields. For a row that cannot be read, the reason
stands in place of the fields.
"""

import csv
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

MAX_LINE = 1 << 20  # bytes of a line of text; a CSV cell may have 131,072 characters, the csv module's own limit

Fields = Mapping[str, Any] | str
"""A row's fields by name, or the reason why they cannot be read."""
RowReader = Callable[[BinaryIO], Iterator[tuple[str, Fields]]]
"""Reads an open file; yields each row's place in the file ("12" for line 12, "row 12") and its fields."""


class FormatError(ValueError):
    """A file that cannot be read at all."""


def nearest_to_uri(names: Sequence[str]) -> str:
    """The end of a message that there is no `uri` among `names`. It offers the nearest match, or all names."""
    near = difflib.get_close_matches("uri", [n.lower() for n in names], n=1, cutoff=0.6)
    if near:
        return f"did you mean {next(n for n in names if n.lower() == near[0])!r}?"
    return f"found: {', '.join(map(shortened, names[:20])) or 'nothing'}"


def shortened(value: object) -> str:
    """The repr of a value, cut to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


class _LineError(ValueError):
    """A line that cannot be used."""


class _Lines:
    """Lines of UTF-8 text with their endings, of bounded length. Lines can be put back, to be read again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._again: list[tuple[int, str]] = []  # lines that were put back, the next one last
        self._num_read = 0
        self.number = 0
        """Number of the last line, from 1."""
        self.taken: list[tuple[int, str]] = []
        """The lines with their numbers that have been read since the caller last emptied this list."""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self._again:
            self.number, line = self._again.pop()
        else:
            raw = self._file.readline(MAX_LINE)
            if not raw:
                raise StopIteration
            self._num_read += 1
            self.number = self._num_read
            if self.number == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise FormatError("is UTF-16 text; save it as UTF-8")
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if len(raw) == MAX_LINE and not raw.endswith(b"\n"):
                while raw and not raw.endswith(b"\n"):
                    raw = self._file.readline(MAX_LINE)
                raise _LineError(f"line {self.number} is longer than {MAX_LINE:,} bytes")
            # bytes that are not UTF-8 become surrogates, so that the row is refused and not the manifest
            line = raw.decode("utf-8", "surrogateescape")
        self.taken.append((self.number, line))
        return line

    def put_back(self, lines: list[tuple[int, str]]) -> None:
        self._again.extend(reversed(lines))


def csv_rows(file: BinaryIO) -> Iterator[tuple[str, Fields]]:
    """Read CSV with a header. Raises FormatError when the header has no `uri` column."""
    lines = _Lines(file)
    header = _csv_header(lines)
    for number, cells in _csv_cells(lines):
        if isinstance(cells, str):
            yield str(number), cells
        elif len(cells) != len(header):
            yield str(number), f"{len(cells)} cells, where the header has {len(header)}"
        else:
            yield str(number), {h: c for h, c in zip(header, cells, strict=True) if h}


def _csv_header(lines: _Lines) -> list[str]:
    _, header = next(_csv_cells(lines), (0, "it is empty"))
    if isinstance(header, str):
        raise FormatError(f"no header with a `uri` column: {header}")
    if "uri" not in header:
        hint = nearest_to_uri(header)
        if len(header) == 1 and re.search("[;\t]", header[0]):
            hint = "cells are separated by commas"
        raise FormatError(f"no column `uri` in its header; {hint}")
    twice = sorted({h for h in header if h and header.count(h) > 1})
    if twice:
        raise FormatError(f"the header has {twice[0]!r} twice")
    return header


def _csv_cells(lines: _Lines) -> Iterator[tuple[int, list[str] | str]]:
    """The number of each row's first line, and its cells or the reason why it has none. Empty lines are skipped."""
    reader = csv.reader(lines, strict=True)
    while True:
        lines.taken.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (_LineError, csv.Error) as error:
            # A quote that is not closed swallows the lines after it. They are put back and read again, one by one.
            first = lines.taken[0][0] if lines.taken else lines.number
            lines.put_back(lines.taken[1:])
            reader = csv.reader(lines, strict=True)
            yield first, f"not CSV: {error}"
        else:
            if cells:
                yield lines.taken[0][0], cells


def jsonl_rows(file: BinaryIO) -> Iterator[tuple[str, Fields]]:
    """Read JSON lines. Empty lines are skipped."""
    lines = _Lines(file)
    while True:
        lines.taken.clear()
        fields: Fields
        try:
            line = next(lines)
            if not line.strip():
                continue
            parsed = json.loads(line)
            fields = parsed if isinstance(parsed, dict) else f"not a JSON object: {shortened(parsed)}"
        except StopIteration:
            return
        except _LineError as error:
            fields = str(error)
        except (ValueError, RecursionError) as error:
            fields = f"not JSON: {error}"
        yield str(lines.number), fields


def parquet_rows(file: BinaryIO) -> Iterator[tuple[str, Fields]]:
    """Read a Parquet file. Raises FormatError when it is none, or has no `uri` column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"is not a Parquet file that can be read: {error}") from error
    columns = table.schema_arrow.names
    if "uri" not in columns:
        raise FormatError(f"no column `uri`; {nearest_to_uri(columns)}")
    row = 0
    for group in range(table.num_row_groups):
        end = row + table.metadata.row_group(group).num_rows
        try:
            for batch in table.iter_batches(batch_size=1024, row_groups=[group], use_threads=False):
                for fields in _batch_rows(batch):
                    row += 1
                    yield f"row {row}", fields
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the connection or the disk failed, not the data
            yield f"row {row + 1}", f"rows {row + 1} to {end} cannot be read: {error}"
        row = end


def _batch_rows(batch: Any) -> Iterator[Fields]:
    try:
        yield from batch.to_pylist()
        return
    # some cell has no value in Python: text that is not UTF-8, or a date outside the calendar
    except (ValueError, OverflowError):
        pass
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:
            yield f"cannot be read: {error}"


READERS: dict[str, RowReader] = {
    ".csv": csv_rows,
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".parquet": parquet_rows,
}
"""The reader of each format, by the file's extension."""
