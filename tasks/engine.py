"""The inline engine: map a job over units in worker processes of this machine.

A unit that raises, hangs or kills its worker costs that unit alone. At most twice as many units as workers are under
way, so memory does not grow with their number.
"""

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

Unit = TypeVar("Unit")
Result = TypeVar("Result")

TOO_LONG = "took longer than its time limit"  # the error of a unit that was ended by its own alarm

# The disk or the store is at fault, not the unit: going on would only mark every further unit as broken.
_MACHINE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class StoreError(OSError):
    """The run's storage cannot be read or written; nothing of what was done is lost, and a rerun goes on from it."""


@dataclass(frozen=True)
class Outcome(Generic[Unit, Result]):
    """What came of one unit: a result, or the reason why there is none."""

    unit: Unit
    result: Result | None
    error: str = ""


@contextlib.contextmanager
def store_access(what: str) -> Iterator[None]:
    """Turn an OSError inside the context into a StoreError that says `what` could not be done."""
    try:
        yield
    except (StoreError, FileNotFoundError):
        raise  # one file that is not there is its unit's trouble, not the store's
    except OSError as error:
        raise StoreError(error.errno, f"cannot {what}: {error}") from error


class Engine:
    """Worker processes, started on first use and shared by all stages of a run."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or usable_cores()
        self._pool: Any = None
        self._scratch = ""

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:
            if kind is None:
                self._pool.close()
            else:
                self._pool.stop()
            self._pool.join()
            self._pool = None
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _started(self) -> Any:
        if self._pool is None:
            from pebble import ProcessPool

            self._scratch = _scratch()
            self._pool = ProcessPool(
                max_workers=self.workers,
                # fork would copy the threads' locks of Prefect and of the numeric libraries in whatever state they are
                context=multiprocessing.get_context("spawn"),
                initializer=_prepare_worker,
                initargs=(os.getpid(), self._scratch),
            )
        return self._pool

    def map(
        self, job: Callable[[Unit], Result], units: Iterable[Unit], time_limit_s: float
    ) -> Iterator[Outcome[Unit, Result]]:
        """Apply `job`, which must pickle, to each unit; outcomes come as they are ready, in no fixed order.

        Raises StoreError when the storage or the machine fails rather than a unit.
        """
        pool = self._started()
        under_way: dict[Any, Unit] = {}
        remaining = iter(units)
        try:
            while True:
                while len(under_way) < 2 * self.workers:
                    try:
                        unit = next(remaining)
                    except StopIteration:
                        break
                    under_way[pool.schedule(job, args=[unit], timeout=time_limit_s)] = unit
                if not under_way:
                    return
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    yield _outcome(future, under_way.pop(future), time_limit_s)
        finally:
            for future in under_way:
                future.cancel()


def usable_cores() -> int:
    """Cores that this process may use, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _outcome(future: Any, unit: Unit, time_limit_s: float) -> Outcome[Unit, Any]:
    from pebble import ProcessExpired

    try:
        return Outcome(unit, future.result())
    except TimeoutError:
        return Outcome(unit, None, f"took longer than {time_limit_s:g} s")
    except ProcessExpired as error:
        if error.exitcode == -signal.SIGALRM:
            return Outcome(unit, None, TOO_LONG)
        return Outcome(unit, None, f"its worker process died (exit code {error.exitcode})")
    except CancelledError:
        return Outcome(unit, None, "cancelled")
    except Exception as error:
        return Outcome(unit, None, unit_error(error))


def unit_error(error: Exception) -> str:
    """Why a unit could not be done, in one line. Raises StoreError when the storage or the machine is at fault."""
    if isinstance(error, StoreError):
        raise error
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS:
        raise StoreError(error.errno, str(error)) from error
    return describe(error)


def describe(error: BaseException) -> str:
    """One line for a ledger row: the kind of error and its message, without the traceback."""
    message = " ".join(str(error).split())
    kind = type(error).__name__
    return (f"{kind}: {message}" if message else kind)[:500]


def _scratch() -> str:
    """A folder for the temporary files of one run's workers, which outlive a worker that is killed; those of runs that
    were killed themselves are removed."""
    import psutil

    for left in Path(tempfile.gettempdir()).glob("understudy-run-*-*"):
        owner = left.name.split("-")[2]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"understudy-run-{os.getpid()}-")


def _prepare_worker(parent: int, scratch: str) -> None:
    """One thread a worker, since the workers are the parallelism; and an end when the run that started it is killed."""
    tempfile.tempdir = scratch
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    import cv2

    cv2.setNumThreads(1)
    # an interrupt from the terminal is the parent's to handle: it stops the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # how a job ends that has set itself an alarm
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
