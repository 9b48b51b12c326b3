"""Probes source files and names each one by its content."""

import errno
import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from data_manifests.storage import answering, local_copy, locate
from tasks.media.container import MediaError
from tasks.media.decode import Probe, probe

_OF_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}


@dataclass(frozen=True, kw_only=True)
class SourceInfo(Probe):
    """One file of footage: its address, its name by content, and what its probe says."""

    VERSION: ClassVar[int] = 1

    uri: str
    source_id: str
    """The first 16 hex digits of `sha256`. The same content at two addresses is one source."""
    sha256: str
    """Of the file's bytes, 64 hex digits."""
    size_bytes: int
    signature: str
    """Tells cheaply whether the file at `uri` is still the same (see the function `signature`)."""


# the columns of the ledger's table of sources
COLUMNS: dict[str, type] = {f.name: f.type for f in fields(SourceInfo) if isinstance(f.type, type)}

# the names that fsspec's file systems give to a file's content tag, or else to its time of change
_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated", "created")


def concerns_one_file(error: OSError) -> bool:
    """Whether an error concerns one file alone. Any other OSError concerns its whole store, or the machine."""
    return error.errno in _OF_THE_FILE or isinstance(error, FileNotFoundError | PermissionError)


def signature(uri: str) -> str:
    """A file's size and content tag (or time of change), found without reading the file; "" when there is no such file.

    Raises OSError when the storage does not answer.
    """
    try:
        fs, path = locate(uri)
        with answering(uri):
            fs.invalidate_cache(path)
            info = fs.info(path)
    except (ValueError, ImportError):
        return ""  # not a valid address; `ingest` will give the reason
    except OSError as error:
        if concerns_one_file(error):
            return ""
        raise
    tag = next((str(info[key]) for key in _TAGS if info.get(key)), "")
    return f"{info.get('size') or 0}-{tag.strip(chr(34))}"


def ingest(uri: str) -> SourceInfo:
    """Hash and probe one file. A remote file is copied once for both.

    Raises tasks.media.container.MediaError with the reason when the file cannot be used; OSError when the storage
    fails.
    """
    known_by = signature(uri)
    try:
        with local_copy(uri) as path:
            if path.is_dir():
                raise MediaError("a folder, not a file")
            if path.exists() and not path.is_file():
                raise MediaError("a device or a pipe, not a file")
            sha256 = _sha256(path)
            about = probe(path)
            return SourceInfo(
                uri=uri,
                source_id=sha256[:16],
                sha256=sha256,
                size_bytes=path.stat().st_size,
                signature=known_by,
                **{f.name: getattr(about, f.name) for f in fields(Probe)},
            )
    except FileNotFoundError:
        raise MediaError("no such file") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
