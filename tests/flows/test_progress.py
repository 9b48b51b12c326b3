"""What is seen of long work in the terminal."""

import io

from rich.console import Console

from flows.progress import StepProgress, in_terminal


def test_work_that_goes_through_several_steps_shows_each_of_them() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with in_terminal(console):
        progress = StepProgress("measure", 3)
        progress(1, 3, 0, {"people": 1, "motion": 0})
        progress(3, 3, 1, {"people": 3, "motion": 1})
    assert isinstance(console.file, io.StringIO)
    last = [line.split() for line in console.file.getvalue().splitlines()[-4:]]
    text = "\n".join(" ".join(words) for words in last)
    for name, count in (("measure", "3/3"), ("people", "3/3"), ("motion", "1/1")):  # who did not come to it is no rest
        assert any(name in line and count in line for line in text.splitlines()), text
    assert "1 error" in text
