"""Sources made known: each file probed, and named by its content."""

import errno
import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from data_manifests.storage import answering, local_copy, locate
from tasks.decode import Probe, probe
from tasks.media import MediaError

_OF_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}


@dataclass(frozen=True, kw_only=True)
class SourceInfo(Probe):
    """One file of footage: where it lies, what it is called by, what it is.

    source_id: first 16 hex digits of the sha256 of its bytes, so that the same content at two addresses is one source.
    signature: tells cheaply whether the file at `uri` is still the same (see `signature`).
    """

    VERSION: ClassVar[int] = 1

    uri: str
    source_id: str
    sha256: str
    size_bytes: int
    signature: str


# of the ledger's table of sources
COLUMNS: dict[str, type] = {f.name: f.type for f in fields(SourceInfo) if isinstance(f.type, type)}

# what the file systems of fsspec call a file's content tag, or else its time of change
_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated", "created")


def of_the_file(error: OSError) -> bool:
    """Whether one file is at fault, where any other OSError is its store's or the machine's."""
    return error.errno in _OF_THE_FILE or isinstance(error, FileNotFoundError | PermissionError)


def signature(uri: str) -> str:
    """Size and content tag (or time of change) of a file, without reading it; "" when it is not to be had.

    Raises OSError when the storage cannot be asked.
    """
    try:
        fs, path = locate(uri)
        with answering(uri):
            fs.invalidate_cache(path)
            info = fs.info(path)
    except (ValueError, ImportError):
        return ""  # an address that leads nowhere; reading it will say why
    except OSError as error:
        if of_the_file(error):
            return ""
        raise
    tag = next((str(info[key]) for key in _TAGS if info.get(key)), "")
    return f"{info.get('size') or 0}-{tag.strip(chr(34))}"


def ingest(uri: str) -> SourceInfo:
    """Hash and probe one file, copied once when it is remote.

    Raises tasks.media.MediaError with the reason when it cannot be used, OSError when the storage fails.
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
