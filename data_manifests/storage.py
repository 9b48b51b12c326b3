"""Files at any fsspec address, written whole or not at all."""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec


class Storage:
    """A folder at a local path or any fsspec address (`s3://bucket/prefix`), holding files by relative name.

    Every write appears under its name complete or not at all: locally by writing beside the place and renaming,
    on an object store because an upload is not visible before it ends.

    Instances pickle to their address, so that worker processes open their own connections.
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
        return bool(self.fs.exists(self.path(name)))

    def size(self, name: str) -> int:
        """Bytes in `name`. Raises FileNotFoundError."""
        return int(self.fs.size(self.path(name)))

    def list(self, folder: str = "") -> list[str]:
        """Names of the files directly in `folder`, sorted; empty when there is no such folder."""
        path = self.path(folder) if folder else self.root
        self.fs.invalidate_cache(path)
        try:
            entries = self.fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (PurePosixPath(e["name"]).name for e in entries if e["type"] == "file")
        return sorted(f"{folder}/{n}" if folder else n for n in names if not n.endswith(".tmp"))

    def read_bytes(self, name: str) -> bytes:
        return bytes(self.fs.cat_file(self.path(name)))

    def write_bytes(self, name: str, data: bytes) -> None:
        self.write(name, lambda path: path.write_bytes(data))

    def write(self, name: str, produce: Callable[[Path], object]) -> None:
        """Call `produce` with a local path to write to, then let the result appear as `name`.

        When `produce` raises, or the disk is full, nothing appears and nothing is left behind.
        """
        target = self.path(name)
        if self.is_local:
            folder = Path(target).parent
            folder.mkdir(parents=True, exist_ok=True)
            # a suffix of its own, so that a name of the longest allowed length still fits and a sweep finds it
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
                self.fs.put_file(str(made), target)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A local path with the contents of `name`: the file itself, or a copy that lasts as long as the context."""
        source = self.path(name)
        if self.is_local:
            yield Path(source)
            return
        with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
            copy = Path(folder) / PurePosixPath(source).name
            self.fs.get_file(source, str(copy))
            yield copy

    def sweep(self) -> None:
        """Remove what a killed run left half-written. Only for a run that has the folder to itself."""
        if self.is_local:
            for left in Path(self.root).rglob(".*.tmp"):
                left.unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        """Room left on a local disk; None for an object store."""
        if not self.is_local:
            return None
        Path(self.root).mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.root).free


def locate(uri: str) -> tuple[Any, str]:
    """The file system of a plain path or a fsspec address, and the path there. A plain path is one whatever it holds:
    `::` and `~`, which fsspec gives a meaning, are letters of a file's name like others."""
    if "://" not in uri:
        return fsspec.filesystem("file"), os.path.abspath(uri)  # noqa: PTH100
    fs, path = fsspec.core.url_to_fs(uri)
    return fs, str(path)


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local path with the bytes of `uri` (a plain path or any fsspec address), copied only when it is remote."""
    fs, path = locate(uri)
    if "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        # the suffix helps demuxers that go by it; the rest of a remote name is not trusted
        copy = Path(folder) / f"source{PurePosixPath(path).suffix[:8]}"
        fs.get_file(path, str(copy))
        yield copy
