"""Source manifests: which footage goes into a curation.

A manifest is a CSV, JSON lines or Parquet file, or a folder, at any fsspec address. It is read as a stream.
"""

import contextlib
import io
import json
import os
import posixpath
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec

from data_manifests.seen import FirstSeen
from data_manifests.source_formats import (
    MAX_LINE,
    READERS,
    Fields,
    FormatError,
    RowReader,
    nearest_to_uri,
    shortened,
)

# fmt: off
MEDIA_EXTENSIONS = frozenset({
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts",
    ".vob", ".webm", ".wmv",
})
# fmt: on
# The protocols that a remote manifest may name, besides its own. None of them leads to a file of this machine, and none
# of them chains to another protocol of fsspec.
REMOTE_PROTOCOLS = frozenset(
    {"abfs", "abfss", "az", "ftp", "gcs", "gs", "hdfs", "hf", "http", "https", "oci", "s3", "s3a", "sftp"}
)

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_SURROGATE = re.compile("[\ud800-\udfff]")


class ManifestError(ValueError):
    """A manifest that cannot be read at all. The message names it and says what to do."""


@dataclass(frozen=True)
class SourceRow:
    """One source."""

    uri: str
    """An absolute path or a full address."""
    metadata: dict[str, str]
    """The row's other fields, as text."""
    where: str
    """The row's place: "manifest:line", for Parquet "manifest:row N", for a folder the folder itself."""


@dataclass(frozen=True)
class BadRow:
    """A row that is left out."""

    where: str
    """The row's place, as for `SourceRow`."""
    reason: str
    duplicate: bool = False
    """Whether the row is left out because an earlier row has the same uri."""


# a row's place in the manifest, and its fields
_Rows = Generator[tuple[str, Fields], None, None]


def read_sources(address: str) -> Iterator[SourceRow | BadRow]:
    """Read a manifest, or list the media files of a folder, in order. One row is in memory at a time.

    address: a path or any fsspec address, ending in .csv, .jsonl (.ndjson) or .parquet, or a folder.

    Raises ManifestError, when the first row is asked for, if there is nothing to read at `address`, if its kind is not
    known or if it has no `uri` column. Errors of the connection while reading are passed on as they are.
    """
    place = _Place.of(address)
    with FirstSeen() as seen, contextlib.closing(place.rows()) as rows:
        for where, fields in rows:
            row = fields if isinstance(fields, str) else _source(place, where, fields)
            if isinstance(row, str):
                yield BadRow(where, row)
            elif (first := seen.before(row.uri, where)) is not None:
                yield BadRow(where, f"the same uri as {first}; left out: {shortened(row.uri)}", True)
            else:
                yield row


def path_of(address: str) -> str:
    """The path of a manifest or folder in its file system. The uris of a folder's files begin with it.

    Raises ManifestError when there is nothing to read at `address`.
    """
    return _Place.of(address).path


def _source(place: "_Place", where: str, fields: Mapping[str, Any]) -> SourceRow | str:
    """The row's source, or what is wrong with the row."""
    if "uri" not in fields:
        return f"no field `uri`; {nearest_to_uri(list(fields))}"
    uri = fields["uri"]
    if uri is None or uri == "":
        return "no uri: the field is empty"
    try:
        uri = uri.decode("utf-8") if isinstance(uri, bytes) else uri
        if not isinstance(uri, str) or not uri.strip():
            return f"uri is not the name of a file: {shortened(uri)}"
        metadata = {str(k): _text(v) for k, v in fields.items() if k != "uri" and v is not None}
        for text in (uri, *metadata, *metadata.values()):
            if _SURROGATE.search(text):
                return f"not UTF-8 text: {shortened(text)}"
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


@dataclass(frozen=True)
class _Place:
    """A manifest's address. It decides what the uris in the manifest mean and may name."""

    address: str
    protocol: str
    """In lower case, such as "s3"; "" for a file of this machine."""
    path: str
    """The path in `fs`."""
    is_folder: bool
    fs: Any

    @classmethod
    def of(cls, address: str) -> "_Place":
        scheme = _SCHEME.match(address)
        if scheme and "::" in address:
            raise ManifestError(
                f"{address}: chained file systems (`::`) are not read; give the address of the manifest itself"
            )
        try:
            fs, path = fsspec.core.url_to_fs(address) if scheme else (fsspec.filesystem("file"), address)
            is_local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
            if is_local:
                path = os.path.abspath(Path(path).expanduser())  # noqa: PTH100
            fs.invalidate_cache()
            is_there, is_folder = fs.exists(path), fs.isdir(path)
        # each file system behind fsspec raises its own kinds of errors
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
        reader = READERS.get(extension)
        if reader is None:
            hint = "; it is a media file: give its folder" if extension in MEDIA_EXTENSIONS else ""
            kind = f"the extension {extension!r} is not known" if extension else "there is no extension to go by"
            raise ManifestError(f"{self.address}: {kind}{hint}; known: {', '.join(sorted(READERS))}, or a folder")
        return self._file_rows(reader)

    def _file_rows(self, reader: RowReader) -> _Rows:
        with self.open() as file:
            try:
                for where, fields in reader(file):
                    yield f"{self.address}:{where}", fields
            except FormatError as error:
                raise ManifestError(f"{self.address}: {error}") from error

    def open(self) -> BinaryIO:
        try:
            # fsspec's own file objects read lines slowly, and lines of any length
            file = open(self.path, "rb") if not self.protocol else io.BufferedReader(self.fs.open(self.path), MAX_LINE)  # noqa: PTH123, SIM115
        except Exception as error:  # any kind, as in `of`
            raise ManifestError(f"{self.address}: cannot be opened: {error}") from error
        return file

    def resolve(self, uri: str) -> str:
        """The full path or address that `uri` means in this manifest. Raises ValueError when it must not be used."""
        if "\0" in uri:
            raise ValueError(f"uri has a NUL character: {shortened(uri)}")
        scheme = _SCHEME.match(uri)
        if not self.protocol:
            return uri if scheme else os.path.normpath(PurePosixPath(self.path).parent / uri)
        if "::" in uri:
            raise ValueError(f"a remote manifest may not chain file systems: {shortened(uri)}")
        if scheme:
            protocol = scheme[1].lower()
            if protocol != self.protocol and protocol not in REMOTE_PROTOCOLS:
                raise ValueError(f"a remote manifest may not name {protocol}:// places: {shortened(uri)}")
            return uri
        if uri.startswith("/"):
            raise ValueError(f"a remote manifest may not name local paths: {shortened(uri)}")
        head, _, rest = self.address.rpartition("://")
        base = rest.partition("?")[0] if self.protocol in ("http", "https") else rest
        # the first part is a bucket or a host; a relative name must not leave it
        host, _, path = base.partition("/")
        joined = posixpath.normpath(posixpath.join(posixpath.dirname(path), uri))
        if joined == "." or joined.split("/")[0] == "..":
            raise ValueError(f"uri leads out of {head}://{host}: {shortened(uri)}")
        return f"{head}://{host}/{joined}"


def _folder(place: _Place) -> _Rows:
    """A folder's media files, folder by folder in sorted order. Hidden files and links to folders are skipped."""
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
