"""The guidance document: what breaks the schema is refused with the key at fault."""

import json
from typing import Any

import pytest

from tasks.stages.guidance.backends import fill_templates
from tasks.stages.guidance.schema import GuidanceError, read_guidance, write_guidance
from tasks.stages.guidance.signals import SegmentSignals, Signals


def changed(**parts: Any) -> bytes:
    """A valid document with some values replaced; keys are joined by two underscores."""
    guidance = json.loads(write_guidance(fill_templates(Signals(640, 360, (SegmentSignals(0.0, 8.0),)))))
    for path, value in parts.items():
        *parents, last = path.split("__")
        target = guidance
        for key in parents:
            target = target[key]
        target[last] = value
    return json.dumps(guidance).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"I am sorry, I cannot", r"^it: document: Invalid JSON: "),
        (b"[]", r"^it: document: "),
        (b"\xff\xfe", r"^it: document: Invalid JSON: "),
        (b" " * 2_000_000, r"^it: 2,000,000 bytes, 1,000,000 are allowed"),
        (changed(note="hello"), r"^it: note: Extra inputs"),
        (changed(phrases__audio=["one"]), r"^it: phrases\.audio: .*at least 3"),
        (changed(phrases__audio=["a voice", "b", "c"]), r"^it: phrases\.audio\.0: .*'a'.*no articles"),
        (changed(phrases__audio=["is it?", "b", "c"]), r"^it: phrases\.audio\.0: .*is a question"),
        (changed(phrases__image=["w " * 30, "x " * 30, "y " * 30]), r"^it: phrases: 10\d words, 80 are allowed"),
        (changed(analysis__type="rap"), r"^it: analysis\.type: "),
        (changed(analysis__emotion="two\nlines"), r"^it: analysis\.emotion: has line breaks"),
        (changed(schedule=[]), r"^it: document: schedule: its shots are not at the times"),
        (changed(sources__audio=["intuition"]), r"^it: sources\.audio\.0: "),
        (
            changed(analysis__segments=[{"start_s": 1, "end_s": 8, "content": "x"}]),
            r"^it: analysis: segments: the first does not start at 0 s",
        ),
        (
            changed(analysis__segments=[{"start_s": 0, "end_s": float("nan"), "content": "x"}]),
            r"^it: ",
        ),
    ],
)
def test_a_document_that_breaks_the_schema_is_refused_with_the_key(data: bytes, message: str) -> None:
    with pytest.raises(GuidanceError, match=message):
        read_guidance(data, "it")
