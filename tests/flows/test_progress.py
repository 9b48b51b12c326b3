"""How the progress of long work is shown in a terminal and in a log file."""

import io
import re
import threading
import time

import pytest
from rich.console import Console

from flows.progress import StepProgress, shown_on


def test_fused_work_shows_a_bar_for_each_of_its_steps() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with shown_on(console):
        progress = StepProgress("measure", 3)
        progress(1, 3, 0, {"people": 1, "motion": 0})
        progress(3, 3, 1, {"people": 3, "motion": 1})
    assert isinstance(console.file, io.StringIO)
    last = [line.split() for line in console.file.getvalue().splitlines()[-4:]]
    text = "\n".join(" ".join(words) for words in last)
    for name, count in (("measure", "3/3"), ("people", "3/3"), ("motion", "1/1")):  # two clips did not reach motion
        assert any(name in line and count in line for line in text.splitlines()), text
    assert "1 error" in text


def lines_of(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_without_a_terminal_a_step_ends_with_one_plain_line() -> None:
    console = Console(file=io.StringIO(), width=60)
    with shown_on(console):
        for name in ("cut", "measure"):
            progress = StepProgress(name, 3)
            progress(1, 3, 0, {"people": 1, "motion": 0})
            progress(3, 3, 2, {"people": 3, "motion": 1})
    assert [line.split(":")[0] for line in lines_of(console)] == ["cut", "measure"]
    for line in lines_of(console):
        assert re.fullmatch(r"\w+: 3 of 3, 2 errors, [0-9.e+]+/s, took 0 s \(people 3, motion 1\)", line), line


class Broken(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_log_that_cannot_be_written_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.progress.LINE_EVERY_S", 0.1)
    with shown_on(Console(file=Broken(), width=60)):
        progress = StepProgress("cut", 3)
        time.sleep(0.3)
        assert "progress" in {thread.name for thread in threading.enumerate()}  # it has printed, and is still at work
        progress(3, 3, 0)


def test_a_step_that_was_given_up_is_not_shown_as_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.progress.LINE_EVERY_S", 0.2)
    console = Console(file=io.StringIO(), width=60)
    with shown_on(console):
        StepProgress("cut", 3)(1, 3, 0)  # a store did not answer
        StepProgress("cut", 2)(2, 2, 0)  # the second try
        time.sleep(0.5)
    printed = lines_of(console)
    assert printed[0].startswith("cut: 2 of 2") and set(printed[1:]) == {"at work after cut"}


def test_without_a_terminal_progress_is_never_silent_for_longer_than_its_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flows.progress.LINE_EVERY_S", 0.2)
    console = Console(file=io.StringIO(), width=60)
    with shown_on(console):
        time.sleep(0.5)  # as while a server starts
        started = len(lines_of(console))
        progress = StepProgress("train", 100, start=40)
        progress(60, 100, 0)
        time.sleep(0.7)
        printed = lines_of(console)[started:]
    assert started >= 1 and len(printed) >= 2
    pattern = r"train: 60 of 100, ([0-9.]+)/s, \d+ s left"
    found = [match for line in printed if (match := re.fullmatch(pattern, line))]
    assert found, printed
    # the rate does not count the 40 that were done before
    assert float(found[-1][1]) < 20 / 0.2
