"""Progress of a long step: bars in a terminal, plain lines in a log file, an artifact in the Prefect UI."""

import contextlib
import contextvars
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)

LINE_EVERY_S = 30.0  # the longest silence where there is no terminal
_ARTIFACT_EVERY_S = 10.0  # a server takes some twenty requests a second from all its runs together


class Display(Protocol):
    """Where the steps of a command are shown."""

    console: Console

    def begin(self, name: str, total: int | None, start: int) -> int:
        """Show that a step begins. total: its units, None where they are not known yet. start: units that were done
        before. Returns the step's number, which `update` takes."""

    def update(self, step: int, done: int, total: int, errors: int, by_step: Mapping[str, int]) -> None:
        """Show how far a step has come. by_step: units of each of the steps that are fused in it."""


_display: contextvars.ContextVar["Display | None"] = contextvars.ContextVar("display", default=None)


@contextlib.contextmanager
def shown_on(console: Console) -> Iterator[None]:
    """Show the steps that run inside the context: as bars on a terminal, as plain lines elsewhere."""
    with _Bars(console) if console.is_terminal else _Lines(console) as display:
        token = _display.set(display)
        try:
            yield
        finally:
            _display.reset(token)


def say(line: str) -> None:
    """Print a line above the bars, or between the lines of progress."""
    if (display := _display.get()) is not None:
        display.console.print(line, markup=False, highlight=False, soft_wrap=True)


class StepProgress:
    """The progress of one piece of work. Call it with the units done, all units, and the errors so far.

    by_step: of fused work, how many units each of its steps has done. In a terminal each has a bar of its own.
    """

    def __init__(self, name: str, total: int | None = None, start: int = 0) -> None:
        """start: units that were done before, such as training steps up to a checkpoint. The rate leaves them out."""
        self._name = name
        self._display = _display.get()
        self._step = self._display.begin(name, total, start) if self._display else 0
        self._artifact: Any = None
        self._shown_at = time.monotonic()

    def __call__(self, done: int, total: int, errors: int, by_step: Mapping[str, int] = MappingProxyType({})) -> None:
        if self._display is not None:
            self._display.update(self._step, done, total, errors, by_step)
        ended = done == total
        if not _in_flow_run() or (self._artifact is None and ended):
            return  # there is no UI, or the work is over before it could be shown there
        if ended or time.monotonic() - self._shown_at >= _ARTIFACT_EVERY_S:
            self._shown_at = time.monotonic()
            try:
                counts = [f"{done} of {total}", _errors(errors), *(f"{step} {n}" for step, n in by_step.items())]
                self._show_in_ui(100.0 * done / max(total, 1), f"{self._name}: {', '.join(filter(None, counts))}")
            except Exception as error:  # work of hours does not end because a server was away for a moment
                log.warning("progress is not shown in the UI: %s", error)

    def _show_in_ui(self, percent: float, description: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        if self._artifact is None:
            self._artifact = create_progress_artifact(
                progress=percent, key=f"progress-{self._name.replace('_', '-')}", description=description
            )
        else:
            update_progress_artifact(artifact_id=self._artifact, progress=percent, description=description)


class _Bars:
    """A bar a step."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._parts: dict[tuple[int, str], TaskID] = {}

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, name: str, total: int | None, start: int) -> int:
        return int(self._progress.add_task(name, total=total, completed=start, note=""))

    def update(self, step: int, done: int, total: int, errors: int, by_step: Mapping[str, int]) -> None:
        self._progress.update(TaskID(step), completed=done, total=total, note=_errors(errors))
        for name, count in by_step.items():
            if not count:
                continue
            if (step, name) not in self._parts:
                self._parts[step, name] = self._progress.add_task(f"  {name}", total=total, note="")
            self._progress.update(self._parts[step, name], completed=count, total=count if done == total else total)


class _Lines:
    """One line when a step ends, and one at least every LINE_EVERY_S, also while nothing is done."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._steps: list[_StepLine] = []
        self._printed_at = time.monotonic()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)

    def __enter__(self) -> "_Lines":
        self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._ticker.join()

    def begin(self, name: str, total: int | None, start: int) -> int:
        with self._lock:
            self._steps.append(_StepLine(name, total, start))
            return len(self._steps) - 1

    def update(self, step: int, done: int, total: int, errors: int, by_step: Mapping[str, int]) -> None:
        with self._lock:
            line = self._steps[step]
            line.done, line.total, line.errors, line.by_step = done, total, errors, dict(by_step)
            if done == total and not line.ended:
                line.ended = True
                self._print(line.text())

    def _tick(self) -> None:
        while not self._ended.wait(min(1.0, LINE_EVERY_S / 10)):
            with self._lock:
                if time.monotonic() - self._printed_at >= LINE_EVERY_S:
                    last = self._steps[-1] if self._steps else None
                    if last is not None and not last.ended:
                        self._print(last.text())
                    else:
                        self._print(f"at work after {last.name if last else 'the start'}")

    def _print(self, text: str) -> None:
        self._printed_at = time.monotonic()
        # Not by the console's own print, which ends the process when the reader of a pipe has gone.
        with contextlib.suppress(OSError, ValueError):
            self.console.file.write(text + "\n")
            self.console.file.flush()


class _StepLine:
    """What a line says of a step."""

    def __init__(self, name: str, total: int | None, start: int) -> None:
        self.name, self.total, self.done, self._start = name, total, start, start
        self.errors, self.by_step, self.ended = 0, dict[str, int](), False
        self._began = time.monotonic()

    def text(self) -> str:
        """Such as "measure: 12 of 21, 1 error, 0.4/s, 23 s left (people 12, motion 10)"."""
        seconds = time.monotonic() - self._began
        made = self.done - self._start
        rate = made / seconds if seconds > 0 else 0.0
        parts = [f"{self.done} of {'?' if self.total is None else self.total}", _errors(self.errors)]
        if made:
            parts.append(f"{rate:.3g}/s")
        if self.ended:
            parts.append(f"took {_duration(seconds)}")
        elif made and self.total is not None:
            parts.append(f"{_duration((self.total - self.done) / rate)} left")
        counts = ", ".join(f"{name} {count}" for name, count in self.by_step.items() if count)
        return f"{self.name}: {', '.join(filter(None, parts))}" + (f" ({counts})" if counts else "")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _in_flow_run() -> bool:
    if "prefect.context" not in sys.modules:
        return False  # and not worth the two seconds that its import takes
    from prefect.context import FlowRunContext

    return FlowRunContext.get() is not None


def _errors(count: int) -> str:
    return f"{count} error{'s' if count > 1 else ''}" if count else ""
