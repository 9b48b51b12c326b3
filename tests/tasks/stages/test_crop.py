"""The crop: a steady window that never cuts the face, precise to a fraction of a pixel, and sound shifted exactly."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from data_manifests.strict import RecipeError, validate
from tasks.media.clip import SAMPLE_RATE, Clip, ClipRecord, Measurement, Unmeasurable
from tasks.media.decode import read_video
from tasks.media.encode import ClipEncoder
from tasks.media.upright import DecodedFrame
from tasks.stages.crop.stage import Crop, CropSettings, shift_sound
from tasks.stages.crop.windows import follow_face, window_side

FPS = 25
FRAME = (960, 540)
MakeClip = Callable[..., Clip]


def boxes_at(x: np.ndarray, y: np.ndarray, height: float = 0.2, frame: tuple[int, int] = FRAME) -> np.ndarray:
    """Face boxes [frames, 4] around centres, all in fractions of the frame. They are four fifths as wide as high."""
    half_h, half_w = height / 2, 0.4 * height * frame[1] / frame[0]
    return np.stack([x - half_w, y - half_h, x + half_w, y + half_h], axis=1).astype(np.float32)


def seconds(count: int) -> np.ndarray:
    return np.arange(count) / FPS


def in_pixels(boxes: np.ndarray, frame: tuple[int, int] = FRAME) -> np.ndarray:
    return boxes * np.array([*frame, *frame])


def cut_off(windows: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """How far each face reaches out of its window, in pixels: [frames]."""
    return np.maximum(windows[:, :2] - faces[:, :2], faces[:, 2:] - windows[:, 2:]).max(axis=1)


@pytest.fixture
def make_clip(tmp_path: Path) -> MakeClip:
    """Writes a clip of frames `at(frame, x, y)`, luma from 0 to 255, with given results of identity and sync."""

    def make(
        boxes: np.ndarray,
        at: Callable[..., np.ndarray] | None = None,
        frame: tuple[int, int] = FRAME,
        samples: np.ndarray | None = None,
        sync: dict[str, Any] | None = None,
    ) -> Clip:
        width, height = frame
        y, x = np.mgrid[0:height, 0:width] + 0.5
        encoder = ClipEncoder(tmp_path / "clip.mp4", FPS, frame, 4, "ultrafast", height)
        for number in range(len(boxes)):
            luma = at(number, x, y) if at else np.full((height, width), 90 + number % 2)
            planes = np.full((height * 3 // 2, width), 128, np.uint8)
            planes[:height] = np.round(luma)
            encoder.add(av.VideoFrame.from_ndarray(planes, format="yuv420p"))
        encoder.close()
        audio = None
        if samples is not None:
            audio = tmp_path / "clip.flac"
            soundfile.write(audio, samples, SAMPLE_RATE, subtype="PCM_16")
        found = {"identity": Measurement({}, {"face_box": boxes})}
        if sync is not None:
            found["sync"] = Measurement(sync)
        record = ClipRecord("c", "s", 0.0, len(boxes) / FPS, FPS, len(boxes), width, height, "", "")
        return Clip(record, tmp_path / "clip.mp4", audio, found)

    return make


def cropped(clip: Clip, **given: Any) -> Measurement:
    measurement = Crop(CropSettings(**given)).measure(clip)
    assert set(measurement.columns) == set(Crop.columns)
    return measurement


def frames_of(data: bytes, path: Path) -> list[av.VideoFrame]:
    path.write_bytes(data)
    events = list(read_video(path))
    assert all(isinstance(event, DecodedFrame) for event in events)
    return [event.frame for event in events]


# ---- the window ----


def test_the_window_stands_still_while_the_face_sways() -> None:
    t = seconds(250)
    faces = in_pixels(boxes_at(0.5 + 0.02 * np.sin(2 * t) + 0.004 * np.sin(9 * t), 0.4 + 0.01 * np.sin(3 * t)))
    windows = follow_face(faces, 432, 0.08, FRAME, FPS)
    assert (windows == windows[0]).all()
    assert (cut_off(windows, faces) < 0).all()
    # On whole pixels of luma and chroma, so that nothing has to be resampled.
    assert (windows % 2 == 0).all()


def test_a_walking_face_is_followed_evenly() -> None:
    t = seconds(250)
    bobbing = 0.004 * np.sin(2 * np.pi * 2 * t)
    x = 0.3 + np.clip(t - 3, 0, 4) * 0.1 + 0.006 * np.random.default_rng(0).normal(size=250)
    faces = in_pixels(boxes_at(x, 0.4 + bobbing))
    windows = follow_face(faces, 432, 0.08, FRAME, FPS)
    assert (cut_off(windows, faces) < 0).all()
    face_shake = np.abs(np.diff(faces[:, 0], 2)).mean()
    assert np.abs(np.diff(windows[:, 0], 2)).mean() < 0.02 * face_shake
    # No faster than the walk, a tenth of the frame's width each second, and still before and after it.
    speeds = np.abs(np.diff(windows[:, 0])) * FPS
    assert speeds.max() < 1.1 * 0.1 * FRAME[0]
    assert speeds[:40].max() < 1e-3
    assert speeds[-40:].max() < 1e-3
    assert (np.ptp(windows, axis=0) > (200, -1, 200, -1)).all()


def test_a_leaping_face_is_never_cut() -> None:
    x = np.where(seconds(150) < 3, 0.2, 0.75)
    faces = in_pixels(boxes_at(x, np.full(150, 0.4)))
    windows = follow_face(faces, 432, 0.08, FRAME, FPS)
    assert (cut_off(windows, faces) < 0).all()


def test_a_wrong_box_does_not_move_the_window() -> None:
    x = np.full(150, 0.5)
    right = follow_face(in_pixels(boxes_at(x, np.full(150, 0.4))), 432, 0.08, FRAME, FPS)
    x[70:72] = 0.9
    assert (follow_face(in_pixels(boxes_at(x, np.full(150, 0.4))), 432, 0.08, FRAME, FPS) == right).all()


def test_a_face_that_is_lost_for_a_while_is_inside_when_it_comes_back() -> None:
    t = seconds(200)
    truth = in_pixels(boxes_at(0.3 + 0.05 * t, np.full(200, 0.4)))
    faces = truth.copy()
    faces[:5] = faces[60:90] = faces[-12:] = np.nan
    windows = follow_face(faces, 432, 0.08, FRAME, FPS)
    assert (cut_off(windows, truth) < 0).all()
    assert np.isfinite(windows).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    frame=st.tuples(st.integers(80, 1000), st.integers(80, 1000)).map(lambda s: (s[0] * 2, s[1] * 2)),
    count=st.integers(1, 60),
    height=st.floats(0.02, 1.2),
    gap=st.floats(0, 0.8),
    size=st.sampled_from([64, 256, 512]),
)
def test_a_window_is_always_inside_the_frame_and_square(
    seed: int, frame: tuple[int, int], count: int, height: float, gap: float, size: int
) -> None:
    rng = np.random.default_rng(seed)
    # A face that moves anywhere, also out of the frame, and is often lost.
    x, y = (rng.uniform(-0.1, 1.1) + rng.normal(0, rng.uniform(0, 0.05), count).cumsum() for _ in range(2))
    faces = in_pixels(boxes_at(x, y, height, frame), frame)
    faces[rng.random(count) < gap] = np.nan
    faces[rng.integers(count)] = in_pixels(boxes_at(x[:1], y[:1], height, frame), frame)[0]
    given = CropSettings(size=size)
    side = window_side(faces[~np.isnan(faces[:, 0])], size, given.closest, given.widest, frame)
    windows = follow_face(faces, side, 0.08, frame, FPS)
    assert windows.shape == (count, 4)
    assert (windows[:, :2] >= 0).all()
    assert (windows[:, 2:] <= frame).all()
    np.testing.assert_allclose(windows[:, 2:] - windows[:, :2], side, atol=1e-3)


# ---- the stage ----


def test_the_window_is_an_upper_body_with_the_face_in_its_upper_part(make_clip: MakeClip) -> None:
    t = seconds(50)
    clip = make_clip(boxes_at(0.5 + 0.01 * np.sin(t), np.full(50, 0.35), height=0.2))
    found = cropped(clip)
    face_px = 0.2 * FRAME[1]
    # 512 pixels are 4.7 heights of this face, so the picture is neither enlarged nor reduced.
    assert found.columns["scale"] == 1.0
    assert found.columns["face_height"] == pytest.approx(face_px / 512, rel=0.01)
    assert found.columns["face_inside"] == 1.0
    assert found.columns["window_speed"] == 0.0
    box = found.arrays["crop_box"]
    assert box.shape == (50, 4)
    assert box.dtype == np.float32
    below_chin = box[0, 3] - 0.45 * FRAME[1]
    assert below_chin > 2 * face_px


@pytest.mark.parametrize(("height", "side"), [(0.1, 5.25 * 54), (0.5, 540), (0.3, 540)])
def test_faces_of_all_sizes_give_the_same_size_of_picture(
    height: float, side: float, make_clip: MakeClip, tmp_path: Path
) -> None:
    found = cropped(make_clip(boxes_at(np.full(6, 0.5), np.full(6, 0.5), height=height)))
    assert found.columns["scale"] == pytest.approx(side / 512, abs=0.01)
    assert (found.columns["width"], found.columns["height"]) == (512, 512)
    assert {(frame.width, frame.height) for frame in frames_of(found.files["mp4"], tmp_path / "c.mp4")} == {(512, 512)}


def test_the_picture_shows_the_part_of_the_window(make_clip: MakeClip, tmp_path: Path) -> None:
    """The phase of waves tells the place: a window that moves between pixels is right to a tenth of a pixel."""

    def waves(number: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return 126 + 60 * np.sin(x / 6) + 40 * np.sin(y / 7)

    t = seconds(60)
    found = cropped(make_clip(boxes_at(0.35 + 0.12 * t, 0.4 + 0.02 * t, height=0.15), waves), size=256, qp=4)
    windows = found.arrays["crop_box"].astype(np.float64)
    assert np.ptp(windows[:, 0]) > 50
    scale, i = found.columns["scale"], np.arange(256) + 0.5
    assert scale > 1
    for frame, window in list(zip(frames_of(found.files["mp4"], tmp_path / "c.mp4"), windows, strict=True))[::7]:
        luma = frame.to_ndarray()[:256].astype(np.float64)

        def expected(dx: float, window: np.ndarray = window) -> np.ndarray:
            return waves(0, window[0] + dx + i[None] * scale, window[1] + i[:, None] * scale)

        errors = [np.abs(luma - expected(dx))[8:-8, 8:-8].mean() for dx in (-0.2, 0.0, 0.2)]
        assert errors[1] < min(errors[0], errors[2])
        assert errors[1] < 2.0


def test_the_picture_has_the_clips_rate_key_frames_and_colours(make_clip: MakeClip, tmp_path: Path) -> None:
    clip = make_clip(boxes_at(np.full(60, 0.5), np.full(60, 0.5)))
    frames = frames_of(cropped(clip, size=128).files["mp4"], tmp_path / "c.mp4")
    (original, *_) = frames_of(clip.video_path.read_bytes(), tmp_path / "o.mp4")
    assert [frame.time for frame in frames] == pytest.approx([k / FPS for k in range(60)])
    assert [k for k, frame in enumerate(frames) if frame.key_frame] == [0, 25, 50]
    assert {(f.colorspace, f.color_range) for f in frames} == {(original.colorspace, original.color_range)}


def test_earlier_clips_do_not_change_the_bytes(make_clip: MakeClip) -> None:
    t = seconds(30)
    boxes = boxes_at(0.4 + 0.05 * t, np.full(30, 0.4))
    clip, stage = make_clip(boxes), Crop(CropSettings())
    first = stage.measure(clip)
    stage.measure(dataclasses.replace(clip, found={"identity": Measurement({}, {"face_box": boxes[::-1]})}))
    again = Crop(CropSettings()).measure(clip)
    assert stage.measure(clip).files == first.files == again.files
    assert (first.arrays["crop_box"] == again.arrays["crop_box"]).all()


def test_without_a_face_nothing_is_cut_out(make_clip: MakeClip) -> None:
    found = cropped(make_clip(np.full((10, 4), np.nan, np.float32)))
    assert found.columns == {**dict.fromkeys(Crop.columns), "reason": "no face"}
    assert not found.files
    assert not found.arrays


def test_a_face_that_the_edge_of_the_frame_cuts_is_not_inside(make_clip: MakeClip) -> None:
    x = np.where(np.arange(20) < 5, 0.0, 0.3)
    assert cropped(make_clip(boxes_at(x, np.full(20, 0.4)))).columns["face_inside"] == 0.75


def test_the_whole_picture_stays_as_it_is(make_clip: MakeClip) -> None:
    found = cropped(make_clip(boxes_at(np.full(8, 0.5), np.full(8, 0.5))), backend="whole")
    assert not found.files
    assert (found.columns["width"], found.columns["height"], found.columns["scale"]) == (*FRAME, 1.0)
    assert found.columns["face_height"] == pytest.approx(0.2)
    assert (found.arrays["crop_box"] == (0, 0, *FRAME)).all()


def test_a_clip_with_fewer_frames_than_it_should_have_is_an_error(make_clip: MakeClip) -> None:
    clip = make_clip(boxes_at(np.full(20, 0.5), np.full(20, 0.5)))
    more = Measurement({}, {"face_box": boxes_at(np.full(22, 0.5), np.full(22, 0.5))})
    with pytest.raises(Unmeasurable, match="20 frames and should have 22"):
        cropped(dataclasses.replace(clip, found={"identity": more}))


# ---- the sound ----


@pytest.mark.parametrize("offset_s", [0.2, -0.4, 0.0437])
def test_late_sound_is_moved_to_earlier_by_the_offset_that_sync_found(offset_s: float, make_clip: MakeClip) -> None:
    samples = np.random.default_rng(0).integers(-30_000, 30_000, SAMPLE_RATE, dtype=np.int16)
    sync = {"offset_s": offset_s, "confidence": 5.0}
    clip = make_clip(boxes_at(np.full(25, 0.5), np.full(25, 0.5)), samples=samples, sync=sync)
    found = cropped(clip, backend="whole", sound="shift", min_confidence=3.0)
    moved, rate = soundfile.read(io.BytesIO(found.files["flac"]), dtype="int16")
    by = -round(offset_s * SAMPLE_RATE)
    assert rate == SAMPLE_RATE
    assert found.columns["sound_shift_s"] == by / SAMPLE_RATE
    assert found.columns["offset_s"] == pytest.approx(0.0, abs=1 / SAMPLE_RATE)
    assert len(moved) == len(samples)
    assert (moved == shift_sound(samples, by)).all()
    beep = round(0.5 * SAMPLE_RATE)
    assert moved[beep + by] == samples[beep]


@pytest.mark.parametrize(
    ("sync", "given"),
    [
        ({"offset_s": 0.2, "confidence": 5.0}, {"sound": "as_is"}),
        ({"offset_s": 0.2, "confidence": 2.9}, {"sound": "shift"}),
        ({"offset_s": 0.02, "confidence": 5.0}, {"sound": "shift"}),
        ({"offset_s": -1.2, "confidence": 5.0}, {"sound": "shift"}),
        ({"offset_s": None, "confidence": None}, {"sound": "shift"}),
    ],
)
def test_sound_stays_if_the_offset_cannot_be_trusted(
    sync: dict[str, Any], given: dict[str, Any], make_clip: MakeClip
) -> None:
    samples = np.zeros(SAMPLE_RATE, np.int16)
    clip = make_clip(boxes_at(np.full(25, 0.5), np.full(25, 0.5)), samples=samples, sync=sync)
    found = cropped(clip, backend="whole", min_confidence=3.0, **given)
    assert not found.files
    assert found.columns["sound_shift_s"] == 0.0
    assert found.columns["offset_s"] == sync["offset_s"]


def test_shifting_without_a_measured_offset_is_an_error_that_names_the_stage(make_clip: MakeClip) -> None:
    clip = make_clip(boxes_at(np.full(2, 0.5), np.full(2, 0.5)), samples=np.zeros(1280, np.int16))
    with pytest.raises(Unmeasurable, match="needs the stage sync before crop"):
        cropped(clip, backend="whole", sound="shift", min_confidence=3.0)


@given(length=st.integers(0, 40), by=st.integers(-60, 60))
def test_shifting_there_and_back_loses_only_the_ends(length: int, by: int) -> None:
    samples = np.arange(1, length + 1, dtype=np.int16)
    back = shift_sound(shift_sound(samples, by), -by)
    kept = max(0, length - abs(by))
    assert len(back) == length
    assert np.count_nonzero(back) == kept
    assert (back[back > 0] == (samples[:kept] if by >= 0 else samples[length - kept :])).all()


def test_a_lower_bound_above_the_upper_one_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"here: closest 5 is above widest 4"):
        validate(CropSettings, {"closest": 5, "widest": 4}, "here")


def test_shifting_without_a_least_confidence_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"here: sound: shift needs min_confidence"):
        validate(CropSettings, {"sound": "shift"}, "here")
