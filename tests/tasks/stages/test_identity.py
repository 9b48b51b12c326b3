"""Identity: faces are counted, followed and told apart. The main face's columns fit frames made with known values."""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from data_manifests.strict import RecipeError, validate
from tasks.media.clip import Clip, ClipRecord, Measurement
from tasks.stages.identity.backends import BACKENDS, IdentityBackend
from tasks.stages.identity.face_tracks import overlap
from tasks.stages.identity.stage import Identity, IdentitySettings
from tasks.stages.mediapipe import Face
from tasks.synthetic import portrait

pytest.importorskip("mediapipe")

FPS, WIDTH, HEIGHT = 25, 480, 320
PEOPLE = {"somebody": 0, "another": 1}
ClipWith = Callable[[Iterable[np.ndarray]], Clip]


@pytest.fixture(scope="module")
def stage() -> Identity:
    return Identity(IdentitySettings())


@pytest.fixture
def clip_with(tmp_path: Path) -> ClipWith:
    """Writes frames, each [height, width, 3] uint8 RGB, as a clip."""

    def write(frames: Iterable[np.ndarray]) -> Clip:
        frames = list(frames)
        height, width = frames[0].shape[:2]
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"crf": "14", "preset": "ultrafast", "g": "25"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
        return Clip(ClipRecord("c", "s", 0.0, len(frames) / FPS, FPS, len(frames), width, height, "", ""), path, None)

    return write


@functools.cache
def head(level: int = 0, who: str = "somebody") -> np.ndarray:
    """The photograph's head, [256, 256, 3] uint8 RGB. `another` is broader, darker and of another colour."""
    import cv2

    picture = portrait.figure(False)[0][level][:256, 95:351]
    if who == "somebody":
        return picture
    broad = cv2.resize(picture[:, 40:216], (256, 256), interpolation=cv2.INTER_CUBIC)
    return (255 * (broad[..., [0, 2, 1]] / 255.0) ** (1.6, 1.2, 1.4)).astype(np.uint8)


def scene(*heads: tuple[float, float, np.ndarray], width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Heads before a grey wall, each with the x and y of its upper left corner in pixels."""
    import cv2

    picture = np.full((height, width, 3), (150, 156, 160), np.uint8)
    for x, y, shown in heads:
        shift = np.array([[1, 0, x], [0, 1, y]], np.float64)
        moved = cv2.warpAffine(shown, shift, (width, height), flags=cv2.INTER_CUBIC)
        cover = cv2.warpAffine(np.ones(shown.shape[:2], np.uint8), shift, (width, height)) > 0
        picture[cover] = moved[cover]
    return picture


def boxes_of(found: Measurement) -> np.ndarray:
    return found.arrays["face_box"]


def test_a_talking_person_is_one_speaker_with_a_face_in_every_frame(clip_of: Any, stage: Identity) -> None:
    clip = clip_of("talk_office.mp4")
    found = stage.measure(clip)
    assert set(found.columns) == set(Identity.columns)
    for name, kind in Identity.columns.items():
        assert type(found.columns[name]) is kind
    for name in ("face_box", "lips"):
        assert found.arrays[name].shape == (clip.record.frames, 4)
        assert found.arrays[name].dtype == np.float32
        assert np.isfinite(found.arrays[name]).all()
    columns: dict[str, Any] = found.columns
    assert columns["faces"] == columns["speakers"] == 1
    assert columns["single_share"] == columns["face_share"] == 1.0
    assert columns["face_px"] == pytest.approx(columns["face_height"] * clip.record.height)
    assert columns["stability"] > 0.95
    assert columns["stability_min"] > 0.9
    assert abs(columns["yaw"]) < 5
    assert columns["turn"] < 20


@pytest.mark.parametrize(("name", "highest"), [("talk_medium.mp4", 0.2), ("talk_full.mp4", 0.1)])
def test_small_faces_are_followed_too(name: str, highest: float, clip_of: Any, stage: Identity) -> None:
    columns: dict[str, Any] = stage.measure(clip_of(name)).columns
    assert columns["faces"] == columns["speakers"] == 1
    assert columns["face_share"] > 0.9
    assert 0.03 < columns["face_height"] < highest


def test_a_clip_without_people_has_no_face(clip_of: Any, stage: Identity) -> None:
    found = stage.measure(clip_of("nobody.mp4"))
    columns = dict(found.columns)
    assert [columns.pop(name) for name in ("faces", "speakers", "single_share", "face_share")] == [0, 0, 0.0, 0.0]
    assert set(columns.values()) == {None}
    assert np.isnan(boxes_of(found)).all()
    assert np.isnan(found.arrays["lips"]).all()


def test_the_box_moves_as_the_face_does(clip_with: ClipWith, stage: Identity) -> None:
    steps = np.array([(30 + 2.0 * k, 20 + 0.7 * k) for k in range(50)])
    found = stage.measure(clip_with(scene((x, y, head())) for x, y in steps))
    moved = (boxes_of(found) - boxes_of(found)[0]) * (WIDTH, HEIGHT, WIDTH, HEIGHT)
    # In pixels; the face is 90 pixels high.
    assert np.abs(moved - np.tile(steps - steps[0], 2)).max() < 3


def test_the_opening_of_the_lips_does_not_depend_on_the_faces_size(clip_with: ClipWith, stage: Identity) -> None:
    import cv2

    levels = [level for level in range(portrait.LEVELS) for _ in range(3)]
    near = stage.measure(clip_with(scene((100, 40, head(level))) for level in levels)).arrays["lips"]
    far = stage.measure(
        clip_with(
            scene((200, 80, cv2.resize(head(level), (160, 160), interpolation=cv2.INTER_AREA))) for level in levels
        )
    ).arrays["lips"]
    # From shut to wide open, the inner opening grows by a fifth of the eyes' distance, and the chin moves with it.
    inner = near[:, 0].reshape(-1, 3).mean(axis=1)
    assert (np.diff(inner[2:]) > 0).all()
    assert inner[-1] - inner[0] > 0.1
    assert np.corrcoef(near[:, 3], levels)[0, 1] > 0.9
    for feature in (0, 2, 3):
        assert np.corrcoef(near[:, feature], far[:, feature])[0, 1] > 0.95
        assert np.abs(near[:, feature] - far[:, feature]).max() < 0.08


@pytest.mark.parametrize("every", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_searching_fewer_frames_gives_the_same_curves(every: int, clip_with: ClipWith, stage: Identity) -> None:
    # The mouth opens and shuts twice in 1.6 s.
    levels = [round(4 - 4 * np.cos(2 * np.pi * k / 20)) for k in range(41)]
    here = [scene((60 + 2 * k, 40, head(level))) for k, level in enumerate(levels)]
    clip = clip_with([*here, *[scene()] * 24])
    whole, some = (
        Identity(IdentitySettings(every=e)).measure(clip).arrays if e > 1 else stage.measure(clip).arrays
        for e in (1, every)
    )
    for name in ("face_box", "lips"):
        assert np.isfinite(some[name][:39]).all()
        assert np.isnan(some[name][42:]).all()
        assert np.abs(some[name][:39] - whole[name][:39]).max() < 0.06
    assert np.corrcoef(whole["lips"][:39, 0], some["lips"][:39, 0])[0, 1] > 0.95


def test_roll_and_yaw_have_the_documented_signs(clip_with: ClipWith, stage: Identity) -> None:
    import cv2

    still = scene((112, 30, head()))
    turned = cv2.warpAffine(
        still,
        cv2.getRotationMatrix2D((WIDTH / 2, HEIGHT / 2), -20, 1.0),
        (WIDTH, HEIGHT),
        borderMode=cv2.BORDER_REFLECT,
    )
    upright, leaning, mirrored = (
        stage.measure(clip_with([picture] * 20)).columns for picture in (still, turned, still[:, ::-1])
    )
    # Negative angles turn clockwise in OpenCV, so the head leans to the frame's right.
    assert leaning["roll"] - upright["roll"] == pytest.approx(20, abs=2)  # type: ignore[operator]
    assert mirrored["yaw"] == pytest.approx(-upright["yaw"], abs=2)  # type: ignore[operator]


def test_a_blurred_face_is_less_sharp_and_a_dark_one_is_not(clip_with: ClipWith, stage: Identity) -> None:
    import cv2

    still = scene((112, 30, head()))

    def sharpness(picture: np.ndarray) -> float:
        return stage.measure(clip_with([picture] * 10)).columns["sharpness"]  # type: ignore[return-value]

    sharp, blurred, smooth = (
        sharpness(cv2.GaussianBlur(still, (0, 0), sigma) if sigma else still) for sigma in (0, 1.5, 4)
    )
    assert 1 > sharp > 1.5 * blurred > 2 * smooth > 0
    assert sharpness((still * 0.6).astype(np.uint8)) == pytest.approx(sharp, abs=0.1)


def test_a_second_face_for_a_third_of_the_time_is_counted(clip_with: ClipWith, stage: Identity) -> None:
    alone, both = scene((0, 40, head())), scene((0, 40, head()), (230, 60, head(0, "another")))
    columns: dict[str, Any] = stage.measure(clip_with([alone] * 50 + [both] * 50 + [alone] * 50)).columns
    assert columns["faces"] == columns["speakers"] == 2
    assert columns["single_share"] == pytest.approx(2 / 3, abs=0.06)
    assert columns["face_share"] == 1.0
    assert columns["stability_min"] > 0.9


def test_a_face_in_one_sampled_frame_does_not_count(clip_with: ClipWith, stage: Identity) -> None:
    alone, both = scene((0, 40, head())), scene((0, 40, head()), (230, 60, head(0, "another")))
    frames = [alone] * 60
    frames[24] = both  # one of the sampled frames
    columns = stage.measure(clip_with(frames)).columns
    assert columns["faces"] == columns["speakers"] == 1
    assert columns["single_share"] == 1.0


def test_another_person_in_the_same_place_counts_as_a_second_speaker(clip_with: ClipWith, stage: Identity) -> None:
    one, other = (scene((112, 30, head(0, who))) for who in PEOPLE)
    same: dict[str, Any] = stage.measure(clip_with([one] * 100)).columns
    swapped: dict[str, Any] = stage.measure(clip_with([one] * 50 + [other] * 50)).columns
    briefly: dict[str, Any] = stage.measure(clip_with([one] * 70 + [other] * 30)).columns
    assert same["speakers"] == 1
    assert same["stability_min"] > 0.95
    assert swapped["speakers"] == 2
    assert swapped["faces"] == 1
    assert max(swapped["stability_min"], briefly["stability_min"]) < 0.7


def test_a_person_who_leaves_and_comes_back_is_one_speaker(clip_with: ClipWith, stage: Identity) -> None:
    here, gone, there = scene((20, 40, head())), scene(), scene((190, 30, head()))
    found = stage.measure(clip_with([here] * 48 + [gone] * 24 + [there] * 48))
    assert found.columns["speakers"] == found.columns["faces"] == 1
    seen = ~np.isnan(boxes_of(found)[:, 0])
    assert seen[:48].all()
    assert not seen[48:72].any()
    assert seen[80:].all()
    assert boxes_of(found)[100, 0] > boxes_of(found)[0, 0] + 0.25
    assert found.columns["single_share"] == pytest.approx(0.8, abs=0.05)


def test_earlier_clips_do_not_change_a_measurement(clip_of: Any, clip_with: ClipWith, stage: Identity) -> None:
    clip = clip_with(scene((60 + 3 * k, 40, head(k % 9))) for k in range(30))
    first = Identity(IdentitySettings()).measure(clip)
    stage.measure(clip_of("nobody.mp4"))
    again = stage.measure(clip)
    assert again.columns == first.columns
    for name, values in first.arrays.items():
        assert again.arrays[name].tobytes() == values.tobytes()


def test_an_unknown_backend_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"here: backend: unknown backend 'mediapip'; did you mean 'mediapipe'\?"):
        validate(IdentitySettings, {"backend": "mediapip"}, "here")


def test_a_new_backend_takes_one_class(clip_with: ClipWith, monkeypatch: pytest.MonkeyPatch) -> None:
    class Left(IdentityBackend):
        """Finds one face at the left, and describes all faces alike."""

        def __init__(self, min_confidence: float) -> None:
            pass

        @classmethod
        def version(cls) -> str:
            return "left 1"

        def faces(self, image: np.ndarray) -> list[Face]:
            return [Face(0.12, 0.3, 0.25, 0.4, 1.0)]

        def description(self, image: np.ndarray, points: np.ndarray) -> np.ndarray:
            return np.array([1, 0], np.float32)

    monkeypatch.setitem(BACKENDS, "left", Left)
    stage = Identity(IdentitySettings(backend="left"))
    stage.check()
    assert "left 1" in stage.backend_version()
    one, other = (scene((0, 30, head(0, who)), (230, 30, head())) for who in PEOPLE)
    columns = stage.measure(clip_with([one] * 25 + [other] * 25)).columns
    assert columns["faces"] == columns["speakers"] == 1
    assert columns["stability_min"] == pytest.approx(1.0)


def test_overlap_is_intersection_over_union() -> None:
    box = np.array([0.0, 0.0, 2.0, 1.0])
    assert overlap(box, box) == 1.0
    assert overlap(box, box + np.array([1, 0, 1, 0])) == pytest.approx(1 / 3)
    assert overlap(box, box + 5) == overlap(box * 0, box) == 0.0
