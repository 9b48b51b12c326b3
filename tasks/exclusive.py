"""One run at a time in one folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from data_manifests.storage import Storage


class InUseError(RuntimeError):
    """Another run is at work in the same folder."""


@contextlib.contextmanager
def exclusive(storage: Storage) -> Iterator[None]:
    """Hold a local folder for the length of the context, and clear what a killed run left half-written in it.

    The lock goes with the process, so a killed run never blocks the next. An object store knows no such lock: there
    the deployment's concurrency limit has to keep two runs apart.

    Raises InUseError.
    """
    if not storage.is_local:
        yield
        return
    from filelock import FileLock, Timeout

    root = Path(storage.root)
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InUseError(f"{storage.address}: another run is writing here; wait for it or give another --out") from None
    try:
        storage.sweep()
        yield
    finally:
        lock.release()
