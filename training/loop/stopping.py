"""How a training is asked to stop, in this process or on Ray.

A process hears SIGTERM and SIGINT in its main thread alone. On Ray the training loop runs in another thread of another
process. So the process that started the training passes its signals on through a file in the phase's folder, which all
workers share.
"""

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any, TypeVar

from data_manifests.storage import Storage

_STOP_FILE = "stop"
LOOK_EVERY_S = 5.0  # a step may take milliseconds, and a store takes money for each request

ResultT = TypeVar("ResultT")


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or SIGINT sets. A second SIGINT raises KeyboardInterrupt.

    In a thread other than the main one, which hears no signals, the event is never set.
    """
    stop_requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop_requested
        return

    def request_stop(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop_requested.is_set():
            raise KeyboardInterrupt
        stop_requested.set()

    before = {number: signal.signal(number, request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop_requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopFile:
    """The file by which the process that started a training on Ray asks its workers to stop."""

    def __init__(self, phase_folder: str) -> None:
        self._folder = Storage(phase_folder)
        self._look_at = 0.0

    def write(self) -> None:
        self._folder.write_bytes(_STOP_FILE, b"")

    def remove(self) -> None:
        self._folder.remove(_STOP_FILE)

    def is_there(self) -> bool:
        """Whether the file is there. It looks every few seconds only. A store that does not answer is asked again."""
        if time.monotonic() < self._look_at:
            return False
        self._look_at = time.monotonic() + LOOK_EVERY_S
        with contextlib.suppress(OSError):
            return self._folder.exists(_STOP_FILE)
        return False


def passing_stops_on(run: Callable[[], ResultT], stop_file: StopFile) -> ResultT:
    """Call `run`, which trains on Ray, in a thread. SIGTERM or SIGINT to this process makes the workers stop after
    their step, and `run` returns what they have come to.

    Outside of the main thread, which alone hears signals, `run` is simply called.
    """
    if threading.current_thread() is not threading.main_thread():
        return run()
    result: Future[ResultT] = Future()
    try:
        with stop_signals() as stop_requested:
            threading.Thread(target=functools.partial(_run_into, result, run), name="ray-train", daemon=True).start()
            asked = False
            while not wait([result], timeout=0.2).done:
                if stop_requested.is_set() and not asked:
                    with contextlib.suppress(OSError):  # a store that does not answer is asked again
                        stop_file.write()
                        asked = True
        return result.result()
    finally:
        with contextlib.suppress(OSError):  # the next run removes it
            stop_file.remove()


def _run_into(result: "Future[Any]", run: Callable[[], Any]) -> None:
    try:
        result.set_result(run())
    except BaseException as error:
        result.set_exception(error)
