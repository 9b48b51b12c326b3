"""Where a worker makes what is looked at in the course of a training: curves, samples."""

import tempfile
import time
from pathlib import Path

from data_manifests.storage import Storage

_EVERY_S = 10.0


class Outputs:
    """A phase's folder as a local path. Where the folder is at another address, such as s3://, it is a folder that
    lasts as long as this, and whose files are copied to the address.

    address: of the phase's folder. known: names of files that are to be gone on with.
    """

    def __init__(self, address: str, known: tuple[str, ...] = ()) -> None:
        self._storage = Storage(address)
        self._copied: dict[str, tuple[int, int]] = {}  # files by name, as they were when they were copied
        self._at = 0.0
        if self._storage.is_local:
            self.path = Path(self._storage.root)
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="understudy-")
        self.path = Path(self._temporary.name)
        for name in set(known) & set(self._storage.files()):
            (self.path / name).write_bytes(self._storage.read_bytes(name))

    def copy(self, now: bool = True) -> None:
        """Let the address have what is new here; when not `now`, only if it had nothing for some seconds. Raises
        OSError."""
        if self._storage.is_local or not (now or time.monotonic() >= self._at + _EVERY_S):
            return
        for path in sorted(self.path.rglob("*")):
            name, status = path.relative_to(self.path).as_posix(), path.stat()
            state = (status.st_size, status.st_mtime_ns)
            if path.is_file() and self._copied.get(name) != state:
                self._storage.write_bytes(name, path.read_bytes())
                self._copied[name] = state
        self._at = time.monotonic()

    def close(self) -> None:
        """Remove what is here for the time being."""
        if not self._storage.is_local:
            self._temporary.cleanup()
