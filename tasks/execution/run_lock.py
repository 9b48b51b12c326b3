"""The lock on an output folder: one run at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from data_manifests.storage import Storage

OWN_FOLDERS = ("clips", "features", "ledger", "recipes", "shards")
"""The folders that a curation makes in its output folder."""


class OutputError(RuntimeError):
    """The output folder cannot be used: another run is at work in it, or it cannot be written to."""


@contextlib.contextmanager
def exclusive(storage: Storage) -> Iterator[None]:
    """Lock a local output folder while the context lasts, and remove half-written files that a killed run left in it.

    The operating system releases the lock when the process ends, so a killed run never blocks the next one. An object
    store has no such lock. There, the deployment's concurrency limit must keep two runs apart.

    Raises OutputError when another run holds the folder, or it cannot be written to.
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
        raise OutputError(
            f"{storage.address}: another run is at work here; wait until it ends, or give another --out"
        ) from None
    except OSError as error:
        raise OutputError(f"{storage.address}: cannot be written to: {error}; give another --out") from None
    try:
        storage.sweep(OWN_FOLDERS)
        yield
    finally:
        lock.release()
