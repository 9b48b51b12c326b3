"""Progress of a long step, in the terminal and in the Prefect UI."""

import contextlib
import contextvars
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

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

_ARTIFACT_EVERY_S = 10.0  # a server takes some twenty requests a second from all its runs together

_terminal: contextvars.ContextVar["Progress | None"] = contextvars.ContextVar("terminal", default=None)


@contextlib.contextmanager
def in_terminal(console: Console) -> Iterator[None]:
    """Show the steps that run inside the context as bars on `console`."""
    bars = Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
    token = _terminal.set(bars)
    try:
        with bars:
            yield
    finally:
        _terminal.reset(token)


def say(line: str) -> None:
    """A line above the bars; where there is no terminal, nobody to say it to."""
    if (bars := _terminal.get()) is not None:
        bars.console.print(line, markup=False, highlight=False, soft_wrap=True)


class StepProgress:
    """The progress of one piece of work: call it with the units done, the units in all and the errors so far.

    by_step: where it goes through several steps, how many units each of them has done. Each has a bar of its own in the
    terminal, below the first, and its number in the UI.
    """

    def __init__(self, name: str, total: int | None = None) -> None:
        self._name = name
        self._bars = _terminal.get()
        self._bar = self._bars.add_task(name, total=total, note="") if self._bars else None
        self._bar_of: dict[str, TaskID] = {}
        self._artifact: Any = None
        self._shown_at = time.monotonic()

    def __call__(self, done: int, total: int, errors: int, by_step: Mapping[str, int] = MappingProxyType({})) -> None:
        ended = done == total
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, completed=done, total=total, note=_errors(errors))
            for step, count in by_step.items():
                if not count:
                    continue
                if step not in self._bar_of:
                    self._bar_of[step] = self._bars.add_task(f"  {step}", total=total, note="")
                self._bars.update(self._bar_of[step], completed=count, total=count if ended else total)
        if not _in_flow_run() or (self._artifact is None and ended):
            return  # nowhere to look, or over before anybody could have looked
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


def _in_flow_run() -> bool:
    if "prefect.context" not in sys.modules:
        return False  # and not worth the two seconds that its import takes
    from prefect.context import FlowRunContext

    return FlowRunContext.get() is not None


def _errors(count: int) -> str:
    return f"{count} error{'s' if count > 1 else ''}" if count else ""
