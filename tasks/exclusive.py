"""One run at a time in one folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from data_manifests.storage import Storage

# what a run makes in its output folder, besides single files at the top
OWN_FOLDERS = ("clips", "features", "ledger", "recipes", "shards")


class OutputError(RuntimeError):
    """The output folder cannot be had: another run is at work in it, or it cannot be written to."""


@contextlib.contextmanager
def exclusive(storage: Storage) -> Iterator[None]:
    """Hold a local folder for the length of the context, and clear what a killed run left half-written in it.

    The lock goes with the process, so a killed run never blocks the next. An object store knows no such lock: there
    the deployment's concurrency limit has to keep two runs apart.

    Raises OutputError.
    """
    if not storage.is_local:
        yield
        return
    from filelock import FileLock, Timeout

    root = Path(storage.root)
    lock = FileLock(root / ".lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(f"{storage.address}: another run is at work here; wait, or give another --out") from None
    except OSError as error:
        raise OutputError(f"{storage.address}: cannot be written to: {error}; give another --out") from None
    try:
        storage.sweep(OWN_FOLDERS)
        yield
    finally:
        lock.release()
