"""People: people are found where the footage shows them and nowhere else, with the framing of the truth."""

import functools
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_manifests.strict import RecipeError, validate
from tasks.media.clip import Clip
from tasks.stages.mediapipe import Face
from tasks.stages.people.stage import FRAMINGS, People, PeopleSettings, frame_framing
from tasks.weights.missing import MissingBackend

pytest.importorskip("mediapipe")

ClipOf = Callable[..., Clip]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def people() -> People:
    return People(PeopleSettings())


@pytest.fixture(scope="module")
def columns_of(people: People, clip_of: ClipOf) -> Callable[[str], dict[str, Any]]:
    return functools.cache(lambda name: people.measure(clip_of(name)).columns)


ColumnsOf = Callable[[str], dict[str, Any]]
FROM_NEAR_TO_FAR = ["talk_office.mp4", "talk_medium.mp4", "talk_full.mp4", "talk_long.mp4"]


@pytest.mark.parametrize("name", FROM_NEAR_TO_FAR)
def test_a_person_is_found_and_framed_as_the_truth_says(name: str, columns_of: ColumnsOf, world: Any) -> None:
    found = columns_of(name)
    assert set(found) == set(People.columns)
    # In the long shot, the face is 20 pixels high in a frame of 480.
    least = 0.75 if found["framing"] == "long" else 1.0
    assert found["person_share"] >= found["face_share"] >= least
    assert found["framing"] == world.truth(name).framing
    assert found["framing_source"] == "landmarks"
    assert found["scene"] == ""
    assert found["caption_person"] is None
    assert found["persons"] is found["single_share"] is None  # MediaPipe does not count people


def test_faces_are_smaller_in_wider_framings(columns_of: ColumnsOf) -> None:
    heights = [columns_of(name)["face_height"] for name in FROM_NEAR_TO_FAR]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] < 0.4
    assert heights[-1] > 0.02


@pytest.mark.parametrize("name", ["nobody.mp4", "pan.mp4"])
def test_no_person_is_found_in_footage_without_people(name: str, columns_of: ColumnsOf) -> None:
    found = columns_of(name)
    assert found["person_share"] <= 0.3
    assert found["face_share"] == 0.0
    assert found["face_height"] is None


def test_a_framing_named_in_the_caption_decides(people: People, clip_of: ClipOf) -> None:
    said = people.measure(clip_of("talk_office.mp4", caption="Full-body shot of a woman in an office.")).columns
    assert (said["framing"], said["framing_source"], said["scene"]) == ("full", "caption", "indoor")
    assert said["caption_person"] is True
    unsaid = people.measure(clip_of("talk_office.mp4", caption="Trees in the wind, outdoors.")).columns
    assert (unsaid["framing"], unsaid["framing_source"], unsaid["scene"]) == ("upper body", "landmarks", "outdoor")
    assert unsaid["caption_person"] is False


def test_earlier_clips_do_not_change_a_measurement(people: People, clip_of: ClipOf, columns_of: ColumnsOf) -> None:
    first = columns_of("talk_medium.mp4")
    columns_of("nobody.mp4")
    assert people.measure(clip_of("talk_medium.mp4")).columns == first
    assert People(PeopleSettings()).measure(clip_of("talk_medium.mp4")).columns == first


def body(nose_y: float, hips: tuple[float, float], ankles: tuple[float, float]) -> np.ndarray:
    """Landmarks with a nose, and hips and ankles at (y, visibility)."""
    points = np.tile(np.array([0.5, 0.5, 1.0], np.float32), (33, 1))
    points[0, 1] = nose_y
    points[[23, 24], 1:] = hips
    points[[27, 28], 1:] = ankles
    return points


def face(height: float) -> Face:
    return Face(0.4, 0.1, height / 2, height, 0.9)


@pytest.mark.parametrize(
    ("faces", "landmarks", "framing"),
    [
        ([], None, ""),
        ([face(0.5)], None, "upper body"),
        ([face(0.15), face(0.02)], None, "medium"),
        ([face(0.08)], None, "full"),
        ([face(0.03)], None, "long"),
        ([face(0.3)], body(0.3, (1.3, 0.0), (2.2, 0.0)), "upper body"),
        ([face(0.3)], body(0.3, (0.97, 0.1), (1.8, 0.0)), "upper body"),  # hips behind a desk
        ([face(0.17)], body(0.2, (0.9, 0.9), (1.5, 0.0)), "medium"),
        ([], body(0.1, (0.5, 1.0), (0.95, 0.9)), "full"),
        ([face(0.04)], body(0.4, (0.55, 1.0), (0.7, 0.9)), "long"),
    ],
)
def test_framing_goes_by_the_lowest_joint_in_the_frame(
    faces: list[Face], landmarks: np.ndarray | None, framing: str
) -> None:
    assert frame_framing(faces, landmarks) == framing
    assert framing in ("", *FRAMINGS)


def test_a_missing_mediapipe_is_an_error_before_work_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(MissingBackend, match=r"mediapipe is not installed in .*pip install --no-deps mediapipe"):
        People(PeopleSettings()).check()


def test_an_unknown_backend_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"here: backend: .*'yol'.* did you mean 'yolo'"):
        validate(PeopleSettings, {"backend": "yol"}, "here")


def test_mediapipe_writes_nothing_to_the_terminal() -> None:
    code = (
        "import numpy, skimage.data; from tasks.stages.mediapipe import Landmarks; l = Landmarks(0.5);"
        "image = skimage.data.astronaut(); assert l.faces(image) and l.body(image) is not None;"
        "l.faces(numpy.zeros_like(image))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
