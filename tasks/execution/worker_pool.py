"""Worker processes of this machine, and mapping a job over units in them.

A unit that raises, hangs or kills its worker costs that unit alone. At most twice as many units as workers are under
way, so memory does not grow with the number of units.
"""

import errno
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, wait
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Generic, TypeVar

from data_manifests.storage import StoreError, describe

Payload = TypeVar("Payload")
Result = TypeVar("Result")

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_PRELOADED = ["tasks.execution.preload"]

TOO_LONG = "took longer than its time limit"  # the error of a unit that its own alarm has ended

# With these the disk or the store is at fault, not the unit. Going on would only mark every further unit as broken.
_MACHINE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


@dataclass(frozen=True)
class JobResult(Generic[Result]):
    """What came of one unit: a result, or the reason why there is none."""

    key: str
    result: Result | None
    error: str = ""


class WorkerPool:
    """Worker processes, started on first use and shared by all steps of a run."""

    def __init__(self, workers: int | None = None) -> None:
        """workers: how many processes; one for each usable core when None."""
        self.workers = workers or usable_cores()
        self._pool: Any = None
        self._scratch = ""

    def __enter__(self) -> "WorkerPool":
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
                context=_context(),
                initializer=_prepare_worker,
                initargs=(self._scratch, dict(os.environ)),
            )
        return self._pool

    def map(
        self, job: Callable[[Payload], Result], units: Iterable[tuple[str, Payload]], time_limit_s: float
    ) -> Iterator[JobResult[Result]]:
        """Apply a job to each unit. Results come as they are ready, in no fixed order.

        job: must pickle. units: (key, payload); each result names the key of its unit. time_limit_s: seconds that a
        unit may take.

        Raises StoreError when the storage or the machine fails rather than a unit.
        """
        pool = self._started()
        under_way: dict[Any, str] = {}
        remaining = iter(units)
        try:
            while True:
                while len(under_way) < 2 * self.workers:
                    try:
                        key, payload = next(remaining)
                    except StopIteration:
                        break
                    under_way[pool.schedule(job, args=[payload], timeout=time_limit_s)] = key
                if not under_way:
                    return
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    yield _job_result(future, under_way.pop(future), time_limit_s)
        finally:
            for future in under_way:
                future.cancel()


def usable_cores() -> int:
    """Cores that this process may use. In a container these are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _job_result(future: Any, key: str, time_limit_s: float) -> JobResult[Any]:
    from pebble import ProcessExpired

    try:
        return JobResult(key, future.result())
    except TimeoutError:
        return JobResult(key, None, f"took longer than {time_limit_s:g} s")
    except ProcessExpired as error:
        if error.exitcode == -signal.SIGALRM:
            return JobResult(key, None, TOO_LONG)
        return JobResult(key, None, f"its worker process died (exit code {error.exitcode})")
    except CancelledError:
        return JobResult(key, None, "cancelled")
    except Exception as error:
        return JobResult(key, None, unit_error(error))


def unit_error(error: Exception) -> str:
    """Why a unit could not be done, in one line. Raises StoreError when the storage or the machine is at fault."""
    if isinstance(error, StoreError):
        raise error
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS:
        raise StoreError(error.errno, str(error)) from error
    return describe(error)


def _scratch() -> str:
    """A folder for the temporary files of this run's workers. It outlives a worker that is killed. The folders of runs
    that were killed themselves are removed."""
    import psutil

    for left in Path(tempfile.gettempdir()).glob("understudy-run-*-*"):
        owner = left.name.split("-")[2]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"understudy-run-{os.getpid()}-")


def _context() -> Any:
    """How workers are started: as copies of a process that has done nothing but import what each of them needs.

    A copy of this process would have the locks of Prefect's and the numeric libraries' threads in whatever state they
    are. To start from nothing takes a worker two seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    before = dict(os.environ)
    os.environ.update(_ONE_THREAD)  # the libraries look when they are imported
    try:
        forkserver.ensure_running()
    finally:
        for name in _ONE_THREAD:
            del os.environ[name]
        os.environ.update(before)
    return context


def _prepare_worker(scratch: str, environment: dict[str, str]) -> None:
    """Give a worker one thread, since the workers are the parallelism. Let it end when the run that started it ends."""
    os.environ.clear()
    os.environ.update(environment | _ONE_THREAD)  # the process that this one is a copy of may be older than the run's
    tempfile.tempdir = scratch
    import cv2

    cv2.setNumThreads(1)
    # the parent handles an interrupt from the terminal: it stops the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends a job that has set itself an alarm
    threading.Thread(target=_end_with_run, daemon=True).start()


def _end_with_run() -> None:
    run = multiprocessing.parent_process()
    if run is not None:
        run.join()
        os._exit(1)
