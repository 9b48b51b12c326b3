"""Each stage reports its own kind of fault and no other, on a part of the footage that `make bench` measures."""

from typing import Any

import pytest

from benchmarks.confusion import has_fault, measure_all, pointed_at, scores
from tasks.synthetic import Truth

NAMES = [
    "clean_a.mp4",
    "subtitles_b.mp4",
    "watermark_a.mp4",
    "blur_a.mp4",
    "second_face_a.mp4",
    "nobody_a.mp4",
    "static_a.mp4",
    "shake_a.mp4",
    "early_0.4_b.mp4",
    "other_speech_a.mp4",
    "silence_a.mp4",
    "copy_coded_a.mp4",
]


@pytest.fixture(scope="module")
def found(world: Any) -> tuple[list[Truth], dict[str, list[bool]]]:
    truths, rows = measure_all(world.folder, NAMES, workers=2)
    return truths, pointed_at(truths, rows)


@pytest.mark.slow
def test_each_stage_reports_its_own_fault_and_no_other(found: tuple[list[Truth], dict[str, list[bool]]]) -> None:
    truths, points = found
    assert {name: score.mistakes for name, score in scores(truths, points).items() if score.mistakes} == {}


@pytest.mark.slow
def test_each_detector_has_clips_with_its_fault_and_clips_without(
    found: tuple[list[Truth], dict[str, list[bool]]],
) -> None:
    truths, points = found
    for name in points:
        assert {True, False} <= {has_fault(name, truth) for truth in truths}, name


def test_precision_and_recall_are_computed_as_defined() -> None:
    truths = [Truth(f"{k}", people=1, like="0" if k in (1, 2, 3) else "") for k in range(6)]
    (score,) = scores(truths, {"copy": [False, True, True, False, True, False]}).values()
    assert (score.precision, score.recall, score.others) == (2 / 3, 2 / 3, 1 / 3)
    assert score.mistakes == ("3", "4")
