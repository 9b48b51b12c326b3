"""Motion: speeds that can be compared across clips, camera and subject apart, static and chaotic clips."""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_manifests.strict import RecipeError, validate
from tasks.media.clip import Clip, ClipRecord, Unmeasurable
from tasks.stages.motion import optical_flow
from tasks.stages.motion.stage import Motion, MotionSettings, camera_flow

ClipOf = Callable[..., Clip]
ClipWith = Callable[..., Clip]


def measured(clip: Clip, **settings: Any) -> dict[str, float]:
    columns = Motion(MotionSettings(**settings)).measure(clip).columns
    assert set(columns) == set(Motion.columns)
    assert all(type(value) is float for value in columns.values())
    return columns  # type: ignore[return-value]


@pytest.fixture
def clip_with(tmp_path: Any) -> ClipWith:
    """Writes frames, each [height, width, 3] uint8 RGB, as a clip."""

    def write(frames: list[np.ndarray], fps: int = 25) -> Clip:
        path = tmp_path / f"{len(frames)}-{fps}.mp4"
        height, width = frames[0].shape[:2]
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": "12", "g": str(fps)})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        record = ClipRecord("c", "s", 0.0, len(frames) / fps, fps, len(frames), width, height, "", "")
        return Clip(record, path, None)

    return write


def texture(height: int, width: int) -> np.ndarray:
    import cv2

    noise = np.random.default_rng(0).uniform(0, 255, (height // 8, width // 8, 3)).astype(np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def span_share(spans: tuple[tuple[float, float], ...], duration_s: float) -> float:
    return sum(end - start for start, end in spans) / duration_s


def test_a_frozen_picture_is_static(clip_of: ClipOf, world: Any) -> None:
    truth = world.truth("frozen.mp4")
    found = measured(clip_of("frozen.mp4", fps=24))
    assert found["static_fraction"] == pytest.approx(span_share(truth.frozen_s, truth.duration_s), abs=0.1)


@pytest.mark.parametrize("name", ["talk_office.mp4", "talk_medium.mp4", "talk_full.mp4"])
def test_a_talking_person_is_neither_static_nor_chaotic(name: str, clip_of: ClipOf) -> None:
    found = measured(clip_of(name))
    assert found["static_fraction"] < 0.1
    assert found["chaotic_fraction"] == 0.0


def test_shake_is_chaotic(clip_of: ClipOf, world: Any) -> None:
    truth = world.truth("shake.mp4")
    found = measured(clip_of("shake.mp4"))
    assert found["chaotic_fraction"] == pytest.approx(span_share(truth.shake_s, truth.duration_s), abs=0.1)
    assert found["camera_speed"] > 5 * found["subject_speed"]


@pytest.mark.parametrize(("name", "widths_per_s"), [("pan.mp4", 0.15), ("pan_no_cut.mp4", 0.12)])
def test_a_pan_counts_as_camera_movement_and_is_not_chaotic(name: str, widths_per_s: float, clip_of: ClipOf) -> None:
    clip = clip_of(name)
    found = measured(clip)
    speed = widths_per_s * clip.record.width / clip.record.height
    assert found["camera_speed"] == pytest.approx(speed, rel=0.05)
    assert found["speed"] == pytest.approx(speed, rel=0.05)
    assert found["subject_speed"] < 0.1 * speed
    assert found["chaotic_fraction"] == found["static_fraction"] == 0.0


@pytest.mark.parametrize(("fps", "short_side"), [(24, 480), (10, 240)])
def test_speed_does_not_depend_on_the_clips_rate_and_size(fps: int, short_side: int, clip_of: ClipOf) -> None:
    reference = measured(clip_of("pan.mp4"))
    found = measured(clip_of("pan.mp4", fps=fps, short_side=short_side))
    assert found["speed"] == pytest.approx(reference["speed"], rel=0.03)
    assert found["camera_speed"] == pytest.approx(reference["camera_speed"], rel=0.03)
    assert found["static_fraction"] == found["chaotic_fraction"] == 0.0


def test_movement_before_a_fixed_camera_counts_as_the_subjects(clip_with: ClipWith) -> None:
    background, subject = texture(180, 320), texture(180, 320)[:, ::-1][60:140, :80]
    frames = []
    for k in range(50):
        frame = background.copy()
        # The subject moves to and fro by a quarter of the short side, once a second.
        x = 120 + round(45 * np.sin(2 * np.pi * k / 25))
        frame[60:140, x : x + 80] = subject
        frames.append(frame)
    found = measured(clip_with(frames))
    assert found["camera_speed"] < 0.1 * found["subject_speed"]
    assert found["static_fraction"] == found["chaotic_fraction"] == 0.0


def test_earlier_clips_do_not_change_a_measurement(clip_of: ClipOf) -> None:
    shake, other = clip_of("shake.mp4"), clip_of("frozen.mp4", fps=24)
    motion = Motion(MotionSettings())
    first = motion.measure(shake)
    motion.measure(other)
    assert motion.measure(shake) == first


def test_a_clip_of_one_frame_cannot_be_measured(clip_with: ClipWith) -> None:
    with pytest.raises(Unmeasurable, match="fewer than two frames"):
        measured(clip_with([texture(64, 64)]))


def test_a_very_narrow_frame_cannot_be_measured(clip_with: ClipWith) -> None:
    with pytest.raises(Unmeasurable, match="512x32 is too narrow"):
        measured(clip_with([texture(32, 512)] * 5))


def test_an_unknown_backend_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"here: backend: unknown backend 'dsi'; did you mean 'dis'\?"):
        validate(MotionSettings, {"backend": "dsi"}, "here")


def test_a_new_backend_takes_one_class(clip_with: ClipWith, monkeypatch: pytest.MonkeyPatch) -> None:
    class Drift(optical_flow.FlowBackend):
        """Finds a flow of three pixels to the right in all frames."""

        @classmethod
        def version(cls) -> str:
            return "drift 1"

        def flows(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
            for first, _ in pairwise(frames):
                yield np.broadcast_to(np.float32([3, 0]), (*first.shape[:2], 2))

    monkeypatch.setitem(optical_flow.BACKENDS, "drift", Drift)
    stage = Motion(MotionSettings(backend="drift"))
    stage.check()
    assert stage.backend_version() == "drift 1"
    # The clip has 10 frames a second, fewer than the 12 of the settings, so all are compared: 3 of 180 pixels each.
    found = stage.measure(clip_with([texture(64, 96)] * 5, fps=10)).columns
    assert found["speed"] == pytest.approx(3 / 180 * 10)
    assert found["camera_speed"] == pytest.approx(3 / 180 * 10)
    assert found["subject_speed"] == pytest.approx(0.0, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    shift=st.tuples(st.floats(-40, 40), st.floats(-40, 40)),
    turn=st.floats(-0.1, 0.1),
    zoom=st.floats(0.9, 1.1),
    subject=st.integers(0, 40),
    seed=st.integers(0, 1000),
)
def test_the_camera_is_found_behind_a_subject_of_two_fifths(
    shift: tuple[float, float], turn: float, zoom: float, subject: int, seed: int
) -> None:
    y, x = np.mgrid[4:180:8, 4:320:8]
    points = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32)
    rotation = zoom * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    truth = (points - (160, 90)) @ rotation.T + (160, 90) + shift - points
    moved = truth.astype(np.float32)
    # The subject's points move in all directions.
    of_subject = points[:, 0] < 320 * subject / 100
    moved[of_subject] += np.random.default_rng(seed).uniform(-30, 30, (int(of_subject.sum()), 2)).astype(np.float32)
    assert np.abs(camera_flow(points, moved) - truth).max() < 0.5
