"""The local folder in which a worker writes a phase's metrics and samples."""

import logging
import tempfile
import time
from pathlib import Path

from data_manifests.storage import Storage

_log = logging.getLogger(__name__)
_EVERY_S = 10.0  # between two copies of a file that grows


class OutputFolder:
    """A phase's output folder as a local path.

    For an output at another address, such as s3://, it is a temporary folder whose files are copied to that address. A
    store that does not answer gets the files with the next copy, so that no training ends because of its metrics.

    address: of the phase's output folder. resumed: names of files that a resumed phase goes on writing. They are copied
    into the temporary folder first, because else new files would overwrite them.

    Raises OSError when they cannot be read.
    """

    def __init__(self, address: str, resumed: tuple[str, ...] = ()) -> None:
        self._storage = Storage(address)
        self._copied: dict[str, tuple[int, int]] = {}  # size and modification time of each file when it was copied
        self._tried_at = -_EVERY_S
        if self._storage.is_local:
            self.path = Path(self._storage.root)
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="understudy-")
        self.path = Path(self._temporary.name)
        for name in set(resumed) & set(self._storage.files()):
            (self.path / name).write_bytes(self._storage.read_bytes(name))

    def copy(self) -> None:
        """Copy all new and changed files to the address. A store that does not answer is only a warning."""
        if not self._storage.is_local:
            self._copy([path.relative_to(self.path).as_posix() for path in sorted(self.path.rglob("*"))])

    def copy_now_and_then(self, name: str) -> None:
        """Copy one file, at most every 10 seconds."""
        if not self._storage.is_local and time.monotonic() >= self._tried_at + _EVERY_S:
            self._copy([name])

    def _copy(self, names: list[str]) -> None:
        try:
            for name in names:
                path = self.path / name
                status = path.stat()
                version = (status.st_size, status.st_mtime_ns)
                if path.is_file() and self._copied.get(name) != version:
                    self._storage.write_bytes(name, path.read_bytes())
                    self._copied[name] = version
        except OSError as error:
            _log.warning("%s: the newest metrics and samples cannot be copied there: %s", self._storage.address, error)
        self._tried_at = time.monotonic()

    def close(self) -> None:
        """Remove the temporary folder."""
        if not self._storage.is_local:
            self._temporary.cleanup()
