"""Where a worker makes what is looked at in the course of a training: curves, samples."""

import logging
import tempfile
import time
from pathlib import Path

from data_manifests.storage import Storage

_log = logging.getLogger(__name__)
_EVERY_S = 10.0


class Outputs:
    """A phase's folder as a local path. Where the folder is at another address, such as s3://, it is a folder that
    lasts as long as this, and whose files are copied to the address. A store that does not answer gets them the next
    time: no training ends for its curves.

    address: of the phase's folder. known: names of files that are to be gone on with; raises OSError where they cannot
    be read, since they would be lost under those that begin anew.
    """

    def __init__(self, address: str, known: tuple[str, ...] = ()) -> None:
        self._storage = Storage(address)
        self._copied: dict[str, tuple[int, int]] = {}  # files by name, as they were when they were copied
        self._tried_at = -_EVERY_S
        if self._storage.is_local:
            self.path = Path(self._storage.root)
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="understudy-")
        self.path = Path(self._temporary.name)
        for name in set(known) & set(self._storage.files()):
            (self.path / name).write_bytes(self._storage.read_bytes(name))

    def copy(self) -> None:
        """Let the address have all that is new here; a warning where it cannot be had."""
        if not self._storage.is_local:
            self._copy([path.relative_to(self.path).as_posix() for path in sorted(self.path.rglob("*"))])

    def copy_now_and_then(self, name: str) -> None:
        """`copy` for a file that others follow, unless that was tried some seconds ago."""
        if not self._storage.is_local and time.monotonic() >= self._tried_at + _EVERY_S:
            self._copy([name])

    def _copy(self, names: list[str]) -> None:
        try:
            for name in names:
                path = self.path / name
                status = path.stat()
                state = (status.st_size, status.st_mtime_ns)
                if path.is_file() and self._copied.get(name) != state:
                    self._storage.write_bytes(name, path.read_bytes())
                    self._copied[name] = state
        except OSError as error:
            _log.warning("%s has not got the newest curves and samples: %s", self._storage.address, error)
        self._tried_at = time.monotonic()

    def close(self) -> None:
        """Remove what is here for the time being."""
        if not self._storage.is_local:
            self._temporary.cleanup()
