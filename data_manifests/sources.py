"""Source manifests: which footage goes in. CSV, JSONL, Parquet or a folder, at any fsspec address, read as a stream."""

import contextlib
import csv
import difflib
import io
import json
import os
import posixpath
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec

from data_manifests.seen import FirstSeen

# fmt: off
MEDIA_EXTENSIONS = frozenset({
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts",
    ".vob", ".webm", ".wmv",
})
# fmt: on
# What a manifest that came from elsewhere may name, besides places of its own kind: never this machine's files, and
# none of fsspec's protocols that lead to another one.
REMOTE_PROTOCOLS = frozenset(
    {"abfs", "abfss", "az", "ftp", "gcs", "gs", "hdfs", "hf", "http", "https", "oci", "s3", "s3a", "sftp"}
)
MAX_LINE = 1 << 20  # bytes in a line of text; a cell of CSV may have 131,072 characters, the csv module's own bound

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_SURROGATE = re.compile("[\ud800-\udfff]")


class ManifestError(ValueError):
    """A manifest that cannot be read at all; the message names it and says what to do."""


@dataclass(frozen=True)
class SourceRow:
    """One source.

    uri: an absolute path or a full address. metadata: the row's other fields, as text.
    where: "manifest:line"; for Parquet "manifest:row N"; for a folder the folder itself.
    """

    uri: str
    metadata: dict[str, str]
    where: str


@dataclass(frozen=True)
class BadRow:
    """A row that is left out, and why. duplicate: its uri stands in the manifest before; that first row counts."""

    where: str
    reason: str
    duplicate: bool = False


# A row as its format gives it: where it stands, and its fields, or the reason why it has none.
_Raw = tuple[str, Mapping[str, Any] | str]
_Rows = Generator[_Raw, None, None]


def read_sources(address: str) -> Iterator[SourceRow | BadRow]:
    """Read a manifest, or list the media files of a folder, in order; one row is in memory at a time.

    address: a path or any fsspec address, ending in .csv, .jsonl (.ndjson) or .parquet, or a folder.

    Raises, when the first row is asked for: ManifestError when there is nothing to read at `address`, when its kind is
    not known or when it has no `uri` column. Errors of the connection on the way come through as they are.
    """
    place = _Place.of(address)
    with FirstSeen() as seen, contextlib.closing(place.rows()) as rows:
        for where, fields in rows:
            row = fields if isinstance(fields, str) else _source(place, where, fields)
            if isinstance(row, str):
                yield BadRow(where, row)
            elif (first := seen.before(row.uri, where)) is not None:
                yield BadRow(where, f"the same uri as {first}; left out: {_short(row.uri)}", True)
            else:
                yield row


def path_of(address: str) -> str:
    """Where a manifest or a folder stands: the path within its file system, as the uris of a folder's files begin.

    Raises ManifestError when there is nothing to read at `address`.
    """
    return _Place.of(address).path


def _source(place: "_Place", where: str, fields: Mapping[str, Any]) -> SourceRow | str:
    """The row's source, or what is wrong with the row."""
    if "uri" not in fields:
        return f"no field `uri`; {_instead(list(fields))}"
    uri = fields["uri"]
    if uri is None or uri == "":
        return "no uri: the field is empty"
    try:
        uri = uri.decode("utf-8") if isinstance(uri, bytes) else uri
        if not isinstance(uri, str) or not uri.strip():
            return f"uri is not the name of a file: {_short(uri)}"
        metadata = {str(k): _text(v) for k, v in fields.items() if k != "uri" and v is not None}
        for text in (uri, *metadata, *metadata.values()):
            if _SURROGATE.search(text):
                return f"not UTF-8 text: {_short(text)}"
        return SourceRow(place.resolve(uri), metadata, where)
    except ValueError as error:
        return str(error)


def _text(value: Any) -> str:
    """A field as text: itself, bytes as UTF-8, a date as ISO 8601, everything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):  # how some writers store text in Parquet
        return value.decode("utf-8")
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _instead(names: Sequence[str]) -> str:
    """What there is where `uri` is not: the nearest match, or everything."""
    near = difflib.get_close_matches("uri", [n.lower() for n in names], n=1, cutoff=0.6)
    if near:
        return f"did you mean {next(n for n in names if n.lower() == near[0])!r}?"
    return f"found: {', '.join(map(_short, names[:20])) or 'nothing'}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


@dataclass(frozen=True)
class _Place:
    """Where a manifest stands, and so what its names may mean. `protocol` is "" for this machine's own files."""

    address: str
    protocol: str
    path: str
    is_folder: bool
    fs: Any

    @classmethod
    def of(cls, address: str) -> "_Place":
        scheme = _SCHEME.match(address)
        if scheme and "::" in address:
            raise ManifestError(
                f"{address}: chained file systems are not read; give the address of the manifest itself"
            )
        try:
            fs, path = fsspec.core.url_to_fs(address) if scheme else (fsspec.filesystem("file"), address)
            is_local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
            if is_local:
                path = os.path.abspath(Path(path).expanduser())  # noqa: PTH100
            fs.invalidate_cache()
            is_there, is_folder = fs.exists(path), fs.isdir(path)
        # file systems of every kind stand behind fsspec, and each fails in exceptions of its own
        except Exception as error:
            raise ManifestError(f"{address}: cannot be opened: {error}") from error
        if not is_there:
            raise ManifestError(f"{address}: there is no such file or folder")
        return cls(address, scheme[1].lower() if scheme and not is_local else "", path, is_folder, fs)

    def rows(self) -> _Rows:
        if self.is_folder:
            return _folder(self)
        name = self.path.partition("?")[0] if self.protocol in ("http", "https") else self.path
        extension = PurePosixPath(name).suffix.lower()
        reader = _READERS.get(extension)
        if reader is None:
            hint = "; this is footage itself: give its folder" if extension in MEDIA_EXTENSIONS else ""
            kind = f"an extension {extension!r} is not known" if extension else "there is no extension to go by"
            raise ManifestError(f"{self.address}: {kind}{hint}; known: {', '.join(sorted(_READERS))}, or a folder")
        return reader(self)

    def open(self) -> BinaryIO:
        try:
            # fsspec's own files read lines slowly and without a bound
            file = open(self.path, "rb") if not self.protocol else io.BufferedReader(self.fs.open(self.path), MAX_LINE)  # noqa: PTH123, SIM115
        except Exception as error:  # as above
            raise ManifestError(f"{self.address}: cannot be opened: {error}") from error
        return file

    def resolve(self, uri: str) -> str:
        """What `uri` means in a manifest that stands here. Raises ValueError when it must not be followed."""
        if "\0" in uri:
            raise ValueError(f"uri has a NUL character: {_short(uri)}")
        scheme = _SCHEME.match(uri)
        if not self.protocol:
            return uri if scheme else os.path.normpath(PurePosixPath(self.path).parent / uri)
        if "::" in uri:
            raise ValueError(f"a remote manifest may not chain file systems: {_short(uri)}")
        if scheme:
            protocol = scheme[1].lower()
            if protocol != self.protocol and protocol not in REMOTE_PROTOCOLS:
                raise ValueError(f"a remote manifest may not name {protocol}:// places: {_short(uri)}")
            return uri
        if uri.startswith("/"):
            raise ValueError(f"a remote manifest may not name local paths: {_short(uri)}")
        head, _, rest = self.address.rpartition("://")
        base = rest.partition("?")[0] if self.protocol in ("http", "https") else rest
        # the first part is a bucket or a host, which a relative name cannot leave
        host, _, path = base.partition("/")
        joined = posixpath.normpath(posixpath.join(posixpath.dirname(path), uri))
        if joined == "." or joined.split("/")[0] == "..":
            raise ValueError(f"uri leads out of {head}://{host}: {_short(uri)}")
        return f"{head}://{host}/{joined}"


# ---- a folder ----


def _folder(place: _Place) -> _Rows:
    """Its media files, folder by folder in sorted order; hidden files and links to folders are passed by."""
    unread: list[OSError] = []
    if not place.protocol:
        walk: Iterable[tuple[str, list[str], list[str]]] = os.walk(place.path, onerror=unread.append)
    else:
        walk = place.fs.walk(place.path, on_error="raise")
    prefix = f"{place.address.partition('://')[0]}://" if place.protocol else ""
    for folder, folders, names in walk:
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and PurePosixPath(name).suffix.lower() in MEDIA_EXTENSIONS:
                full = posixpath.join(folder, name)
                yield place.address, {"uri": full if full.startswith(prefix) else prefix + full}
    for error in unread:
        yield place.address, f"a folder that cannot be read: {error}"


# ---- text ----


class _LineError(ValueError):
    """A line that cannot be used."""


class _Lines:
    """Lines of UTF-8 text with their endings, of bounded length; any can be put back to be read again."""

    def __init__(self, file: BinaryIO, address: str) -> None:
        self._file, self._address = file, address
        self._again: list[tuple[int, str]] = []
        self._read = 0
        self.number = 0  # of the line given last
        self.taken: list[tuple[int, str]] = []  # since the owner last emptied it

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self._again:
            self.number, line = self._again.pop()
        else:
            raw = self._file.readline(MAX_LINE)
            if not raw:
                raise StopIteration
            self._read += 1
            self.number = self._read
            if self.number == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise ManifestError(f"{self._address}: is UTF-16 text; save it as UTF-8")
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if len(raw) == MAX_LINE and not raw.endswith(b"\n"):
                while raw and not raw.endswith(b"\n"):
                    raw = self._file.readline(MAX_LINE)
                raise _LineError(f"line {self.number} is longer than {MAX_LINE:,} bytes")
            # what is no UTF-8 is kept as surrogates, for the row to be refused rather than the manifest
            line = raw.decode("utf-8", "surrogateescape")
        self.taken.append((self.number, line))
        return line

    def put_back(self, lines: list[tuple[int, str]]) -> None:
        self._again.extend(reversed(lines))


def _csv(place: _Place) -> _Rows:
    with place.open() as file:
        lines = _Lines(file, place.address)
        header = _csv_header(place, lines)
        for number, cells in _csv_rows(lines):
            where = f"{place.address}:{number}"
            if isinstance(cells, str):
                yield where, cells
            elif len(cells) != len(header):
                yield where, f"{len(cells)} cells, where the header has {len(header)}"
            else:
                yield where, {h: c for h, c in zip(header, cells, strict=True) if h}


def _csv_header(place: _Place, lines: _Lines) -> list[str]:
    _, header = next(_csv_rows(lines), (0, "it is empty"))
    if isinstance(header, str):
        raise ManifestError(f"{place.address}: no header with a `uri` column: {header}")
    if "uri" not in header:
        hint = _instead(header)
        if len(header) == 1 and re.search("[;\t]", header[0]):
            hint = "cells are separated by commas"
        raise ManifestError(f"{place.address}: no column `uri` in its header; {hint}")
    twice = sorted({h for h in header if h and header.count(h) > 1})
    if twice:
        raise ManifestError(f"{place.address}: the header has {twice[0]!r} twice")
    return header


def _csv_rows(lines: _Lines) -> Iterator[tuple[int, list[str] | str]]:
    """Rows with the number of their first line; empty lines are passed by."""
    reader = csv.reader(lines, strict=True)
    while True:
        lines.taken.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (_LineError, csv.Error) as error:
            # a quote that nobody closed takes the lines after it along: those are read again, each for itself
            first = lines.taken[0][0] if lines.taken else lines.number
            lines.put_back(lines.taken[1:])
            reader = csv.reader(lines, strict=True)
            yield first, f"not CSV: {error}"
        else:
            if cells:
                yield lines.taken[0][0], cells


def _jsonl(place: _Place) -> _Rows:
    with place.open() as file:
        lines = _Lines(file, place.address)
        while True:
            lines.taken.clear()
            content: Mapping[str, Any] | str
            try:
                line = next(lines)
                if not line.strip():
                    continue
                parsed = json.loads(line)
                content = parsed if isinstance(parsed, dict) else f"not a JSON object: {_short(parsed)}"
            except StopIteration:
                return
            except _LineError as error:
                content = str(error)
            except (ValueError, RecursionError) as error:
                content = f"not JSON: {error}"
            yield f"{place.address}:{lines.number}", content


# ---- Parquet ----


def _parquet(place: _Place) -> _Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with place.open() as file:
        try:
            table = pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise ManifestError(f"{place.address}: is not a Parquet file that can be read: {error}") from error
        columns = table.schema_arrow.names
        if "uri" not in columns:
            raise ManifestError(f"{place.address}: no column `uri`; {_instead(columns)}")
        row = 0
        for group in range(table.num_row_groups):
            end = row + table.metadata.row_group(group).num_rows
            try:
                for batch in table.iter_batches(batch_size=1024, row_groups=[group], use_threads=False):
                    for fields in _batch_rows(batch):
                        row += 1
                        yield f"{place.address}:row {row}", fields
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # of the connection or the disk, not of the data
                yield f"{place.address}:row {row + 1}", f"rows {row + 1} to {end} cannot be read: {error}"
            row = end


def _batch_rows(batch: Any) -> Iterator[Mapping[str, Any] | str]:
    try:
        yield from batch.to_pylist()
        return
    except (
        ValueError,
        OverflowError,
    ):  # some cell has no meaning in Python: text that is no UTF-8, a date beyond the calendar
        pass
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:
            yield f"cannot be read: {error}"


_READERS: dict[str, Callable[[_Place], _Rows]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
}
