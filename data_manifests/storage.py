"""Files at any fsspec address. A write appears complete or not at all."""

import contextlib
import errno
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

_BESIDE = re.compile(r"\.[0-9a-f]{16}\.tmp")


class StoreError(OSError):
    """The run's storage cannot be read or written. The work done so far is kept, and a rerun goes on from it."""


@contextlib.contextmanager
def answering(address: str) -> Iterator[None]:
    """Turn any error inside the context into an OSError. Each library behind fsspec raises its own kinds of errors."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{address} does not answer: {error}") from error


@contextlib.contextmanager
def store_access(what: str) -> Iterator[None]:
    """Turn an OSError inside the context into a StoreError that says `what` could not be done."""
    try:
        yield
    except (StoreError, FileNotFoundError):
        raise  # a missing file concerns one unit of work, not the whole store
    except OSError as error:
        raise StoreError(error.errno, f"cannot {what}: {error}") from error


def describe(error: BaseException) -> str:
    """One line for a ledger row: the kind of error and its message, without the traceback."""
    message = " ".join(str(error).split())
    kind = type(error).__name__
    return (f"{kind}: {message}" if message else kind)[:500]


class Storage:
    """A folder at a local path or any fsspec address (`s3://bucket/prefix`), with files by relative name.

    Every write appears under its name complete or not at all. A local file is written under another name and then
    renamed; an upload to an object store is not visible before it ends.

    An instance pickles to its address, so that each worker process opens its own connections.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.fs, self.root = locate(address)
        self.is_local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.address,)

    def path(self, name: str) -> str:
        """The full path of `name` for `self.fs`. Raises ValueError when `name` would leave the folder."""
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise ValueError(f"{name!r} is not a name inside {self.address}")
        return f"{self.root}/{relative}"

    def exists(self, name: str) -> bool:
        with answering(self.address):
            return bool(self.fs.exists(self.path(name)))

    def size(self, name: str) -> int:
        """Bytes in `name`. Raises FileNotFoundError."""
        with answering(self.address):
            return int(self.fs.size(self.path(name)))

    def files(self, folder: str = "") -> list[str]:
        """Names of the files directly in `folder`, sorted. Empty when there is no such folder."""
        names = (name for name, kind in self._entries(folder) if kind == "file")
        return sorted(f"{folder}/{n}" if folder else n for n in names if not _BESIDE.fullmatch(n))

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders directly in `folder`, sorted, without `folder` before them."""
        return sorted(name for name, kind in self._entries(folder) if kind == "directory")

    def _entries(self, folder: str) -> list[tuple[str, str]]:
        path = self.path(folder) if folder else self.root
        with answering(self.address):
            self.fs.invalidate_cache(path)
            try:
                entries = self.fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return [(PurePosixPath(entry["name"]).name, entry["type"]) for entry in entries]

    def read_bytes(self, name: str) -> bytes:
        with answering(self.address):
            return bytes(self.fs.cat_file(self.path(name)))

    def write_bytes(self, name: str, data: bytes) -> None:
        self.write(name, lambda path: path.write_bytes(data))

    def write(self, name: str, produce: Callable[[Path], object]) -> None:
        """Call `produce` with a local path to write to, then make the result appear as `name`.

        When `produce` raises or the disk is full, nothing appears and nothing is left behind.
        """
        target = self.path(name)
        if self.is_local:
            folder = Path(target).parent
            folder.mkdir(parents=True, exist_ok=True)
            # a short name that `sweep` recognises; with the target's name in it, it could be too long
            beside = folder / f".{secrets.token_hex(8)}.tmp"
            try:
                produce(beside)
                beside.replace(target)
            finally:
                beside.unlink(missing_ok=True)
        else:
            with tempfile.TemporaryDirectory(prefix="understudy-") as folder_name:
                made = Path(folder_name) / "upload"
                produce(made)
                with answering(self.address):
                    self.fs.put_file(str(made), target)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A local path with the contents of `name`: the file itself, or a copy that exists inside the context."""
        source = self.path(name)
        if self.is_local:
            yield Path(source)
            return
        with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
            copy = Path(folder) / PurePosixPath(source).name
            with answering(self.address):
                self.fs.get_file(source, str(copy))
            yield copy

    def move(self, name: str, to: str) -> None:
        with answering(self.address):
            self.fs.mv(self.path(name), self.path(to))

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it. It need not exist."""
        path = self.path(name)
        with answering(self.address):
            self.fs.invalidate_cache(path)
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(path, recursive=True)

    def sweep(self, folders: Iterable[str]) -> None:
        """Remove the half-written files of a killed run, at the top and anywhere below `folders`.

        Only a run that has the storage to itself may call this.
        """
        if self.is_local:
            root = Path(self.root)
            for left in [*root.glob(".*.tmp"), *(p for folder in folders for p in (root / folder).rglob(".*.tmp"))]:
                if _BESIDE.fullmatch(left.name):
                    left.unlink(missing_ok=True)


def locate(uri: str) -> tuple[Any, str]:
    """The file system of a plain path or an fsspec address, and the path in it.

    In a plain path `::` and `~`, which have a meaning for fsspec, are ordinary characters.
    """
    if "://" not in uri:
        return fsspec.filesystem("file"), os.path.abspath(uri)  # noqa: PTH100
    fs, path = fsspec.core.url_to_fs(uri)
    return fs, str(path)


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local path with the bytes of `uri`, a plain path or any fsspec address. Only a remote file is copied."""
    fs, path = locate(uri)
    if "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        # some demuxers need the suffix; the rest of a remote name is not trusted
        copy = Path(folder) / f"source{PurePosixPath(path).suffix[:8]}"
        with answering(uri):
            fs.get_file(path, str(copy))
        yield copy
