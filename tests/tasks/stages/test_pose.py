"""Pose: the layout of the tokens, the orders of the key points, and both backends."""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tasks.cutting.ingest import ingest
from tasks.media.clip import Clip, ClipRecord, Measurement, Unmeasurable
from tasks.stages.pose.keypoints import BODY, FACE, HAND, LINES, MEDIAPIPE_BODY, MEDIAPIPE_FACE, PARTS, decode, encode
from tasks.stages.pose.stage import Pose, PoseSettings, XPoseTokens
from tasks.weights.missing import MissingBackend
from tests import tiny_weights

ClipOf = Callable[..., Clip]
SHARED = Path(__file__).parents[4] / "shared"
SEEDS, FOOTAGE = SHARED / "seeds", SHARED / "footage"


@pytest.fixture(scope="module")
def talker(clip_of: ClipOf) -> tuple[Clip, Measurement]:
    clip = clip_of("talk_3s.mp4", short_side=360)
    return clip, Pose(PoseSettings()).measure(clip)


# ---- the layout ----


@st.composite
def key_points(draw: st.DrawFn) -> dict[str, np.ndarray]:
    frames = draw(st.integers(1, 4))
    points = {}
    for part, names in PARTS.items():
        shape = (frames, len(names))
        places = draw(hnp.arrays(np.float32, (*shape, 2), elements=st.floats(-1, 2, width=32)))
        confidences = draw(hnp.arrays(np.float32, (*shape, 1), elements=st.floats(0, 1, width=32)))
        points[part] = np.concatenate([places, confidences], axis=2)
        points[part][draw(hnp.arrays(bool, frames))] = np.nan
    return points


@given(key_points())
def test_decoding_the_tokens_gives_the_key_points_back(points: dict[str, np.ndarray]) -> None:
    tokens = encode(points)
    assert tokens.shape == (len(points["body"]), 1024)
    assert tokens.dtype == np.float16
    assert np.isfinite(tokens).all()
    back = decode(tokens)
    for part in PARTS:
        # float16 keeps 11 bits: half a thousandth of the frame
        np.testing.assert_allclose(back[part], points[part], atol=0.0005)
    assert (encode(back) == tokens).all()


def test_a_part_has_256_numbers_and_the_last_says_whether_it_is_seen() -> None:
    points = {part: np.full((2, len(names), 3), 0.5, np.float32) for part, names in PARTS.items()}
    points["left_hand"][1] = np.nan
    body, face, left, right = np.split(encode(points), 4, axis=1)
    for numbers, part in ((body, BODY), (face, FACE), (left, HAND), (right, HAND)):
        assert (numbers[0, : 3 * len(part)] == 0.5).all()
        assert (numbers[:, 3 * len(part) : -1] == 0).all()
    assert (left[1] == 0).all()
    assert [part[1, -1] for part in (body, face, left, right)] == [1, 1, 0, 1]


def test_points_far_outside_the_frame_are_clipped_to_one_frame_beyond_it() -> None:
    points = {part: np.full((1, len(names), 3), 0.5, np.float32) for part, names in PARTS.items()}
    points["body"][0, 15] = (7.0, -4.0, 0.1)
    assert decode(encode(points))["body"][0, 15] == pytest.approx([2.0, -1.0, 0.1], abs=0.001)


def test_incomplete_key_points_and_other_shapes_are_refused() -> None:
    points = {part: np.full((1, len(names), 3), 0.5, np.float32) for part, names in PARTS.items()}
    with pytest.raises(ValueError, match="face: key points of shape"):
        encode({**points, "face": points["face"][:, :67]})
    points["body"][0, 3] = np.nan
    with pytest.raises(ValueError, match="body: a frame has some of its key points and lacks others"):
        encode(points)
    with pytest.raises(ValueError, match=r"stored as \[frames, 1024\], not as \[2, 1000\]"):
        decode(np.zeros((2, 1000), np.float16))


# ---- the orders ----


@pytest.mark.skipif(not SEEDS.is_dir(), reason="the papers are not here")
def test_the_orders_equal_those_of_the_papers_figure() -> None:
    (paper,) = SEEDS.glob("003_*.txt")
    text = paper.read_text(encoding="utf-8")
    for heading, names in (("Body (person)", BODY), ("Face", FACE), ("Hand", HAND)):
        found = re.search(rf"^{re.escape(heading)} : \[(.*)\]$", text, re.MULTILINE)
        assert found
        assert tuple(found[1].split(", ")) == names


def test_the_map_from_mediapipe_is_as_symmetric_as_a_face(talker: tuple[Clip, Measurement]) -> None:
    assert len(set(MEDIAPIPE_FACE)) == len(FACE)
    assert len(set(MEDIAPIPE_BODY)) == len(BODY)
    clip, found = talker
    face = decode(found.arrays["pose"])["face"].mean(axis=0)[:, :2] * (clip.record.width, clip.record.height)
    partner = [
        *(*range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1)),
        *(45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40),
        *(*range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), *range(67, 64, -1)),
    ]
    across = face[45] - face[36]  # from the outer corner of one eye to that of the other eye
    width = np.hypot(*across)
    x_axis, y_axis = across / width, np.array([-across[1], across[0]]) / width
    centre = face[27:31].mean(axis=0)
    x, y = (face - centre) @ x_axis, (face - centre) @ y_axis
    np.testing.assert_allclose(x[partner], -x, atol=0.15 * width)
    np.testing.assert_allclose(y[partner], y, atol=0.1 * width)


# ---- the stage ----


def test_the_persons_left_side_is_at_the_right_of_the_frame(talker: tuple[Clip, Measurement]) -> None:
    points = decode(talker[1].arrays["pose"])
    body = dict(zip(BODY, np.moveaxis(points["body"], 1, 0), strict=True))
    face = dict(zip(FACE, np.moveaxis(points["face"], 1, 0), strict=True))
    for limb in ("eye", "ear", "shoulder"):
        assert (body[f"left {limb}"][:, 0] > body[f"right {limb}"][:, 0]).all()
    assert (face["left mouth corner"][:, 0] > face["right mouth corner"][:, 0]).all()
    assert (face["chin center"][:, 1] > face["lower lip outer edge 3"][:, 1]).all()
    assert (face["upper lip outer edge 3"][:, 1] > face["nasal bridge 4"][:, 1]).all()
    assert (body["left shoulder"][:, 1] > body["nose"][:, 1]).all()
    # the networks of body and face agree on the nose
    assert np.abs(body["nose"][:, :2] - face["nasal bridge 4"][:, :2]).max() < 0.05


@pytest.mark.skipif(not FOOTAGE.is_dir(), reason="the real footage is not here")
def test_each_hand_is_at_the_wrist_of_its_side() -> None:
    info = ingest(str(FOOTAGE / "silent_sign_help.mkv"))
    record = ClipRecord("c", "s", 0.0, info.duration_s, 30, 58, info.width, info.height, "", "")
    points = decode(Pose(PoseSettings()).measure(Clip(record, Path(info.uri), None)).arrays["pose"])
    body = dict(zip(BODY, np.moveaxis(points["body"], 1, 0), strict=True))
    for side in ("left", "right"):
        hand = points[f"{side}_hand"]
        seen = ~np.isnan(hand[:, 0, 0])
        assert seen.mean() > 0.5
        assert np.abs(hand[seen, 0, :2] - body[f"{side} wrist"][seen, :2]).mean() < 0.05
        # each fingertip is further from the wrist than the finger's root
        length = np.hypot(*(hand[seen][:, :, :2] - hand[seen][:, :1, :2]).mean(axis=0).T)
        assert (length[8::4] > length[5::4]).all()
        assert hand[seen, :, 2].mean() > 0.5


def test_columns_are_the_shares_of_frames_in_which_parts_are_seen(talker: tuple[Clip, Measurement]) -> None:
    clip, found = talker
    assert set(found.columns) == set(Pose.columns)
    assert found.columns["body_share"] == found.columns["face_share"] == 1.0
    points = decode(found.arrays["pose"])
    assert len(points["body"]) == clip.record.frames
    for part in PARTS:
        assert found.columns[f"{part}_share"] == pytest.approx(float((~np.isnan(points[part][:, 0, 0])).mean()))


def test_lips_open_when_the_person_speaks(talker: tuple[Clip, Measurement]) -> None:
    clip, found = talker
    face = dict(zip(FACE, np.moveaxis(decode(found.arrays["pose"])["face"], 1, 0), strict=True))
    opening = face["lower lip inter edge 2"][:, 1] - face["upper lip inter edge 3"][:, 1]
    samples = clip.samples()
    assert samples is not None
    edges = np.linspace(0, len(samples), clip.record.frames + 1).astype(int)
    loudness = np.array([np.sqrt(np.mean(samples[a:b] ** 2)) for a, b in pairwise(edges)])
    assert np.corrcoef(opening, loudness)[0, 1] > 0.5


def test_a_clip_without_a_person_has_no_key_points(clip_of: ClipOf) -> None:
    found = Pose(PoseSettings()).measure(clip_of("pan_fast_no_cut.mp4", short_side=180))
    assert found.columns["face_share"] == found.columns["left_hand_share"] == found.columns["right_hand_share"] == 0.0
    assert found.columns["hand_confidence"] is None
    assert np.isfinite(found.arrays["pose"]).all()


@pytest.mark.slow
def test_an_earlier_clip_changes_nothing(talker: tuple[Clip, Measurement], clip_of: ClipOf) -> None:
    clip, first = talker
    stage = Pose(PoseSettings())
    stage.measure(clip_of("talk_medium.mp4", fps=5, short_side=180))
    again = stage.measure(clip)
    assert again.columns == first.columns
    assert again.arrays["pose"].tobytes() == first.arrays["pose"].tobytes()


def test_all_lines_join_existing_points() -> None:
    for part, names in PARTS.items():
        assert {point for line in LINES[part] for point in line} <= set(range(len(names)))


def test_a_clip_without_frames_cannot_be_measured() -> None:
    class Empty:
        def frames(self) -> Any:
            return iter(())

    with pytest.raises(Unmeasurable, match="no frame"):
        Pose(PoseSettings()).measure(Empty())  # type: ignore[arg-type]


# ---- by X-Pose ----

XPOSE = PoseSettings(backend="xpose", short_side=128, min_score=0.5)


@pytest.fixture
def weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A weights folder with random weights of X-Pose in the published layout."""
    import torch

    threads = torch.get_num_threads()
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    tiny_weights.xpose(tmp_path / "xpose")
    yield tmp_path
    torch.set_num_threads(threads)


def test_x_poses_batch_is_what_its_resources_say() -> None:
    from tasks.networks.xpose import BATCH

    assert XPoseTokens.resources.batch == BATCH


@pytest.mark.slow
def test_tokens_of_x_pose_have_the_same_layout(weights_folder: Path, clip_of: ClipOf) -> None:
    clip = clip_of("talk_3s.mp4", fps=1, short_side=120)
    stage = Pose(XPOSE)
    stage.check()
    found = stage.measure(clip)
    frames = clip.record.frames
    assert found.arrays["pose"].dtype == np.float16
    parts = found.arrays["pose"].reshape(frames, len(PARTS), 256)
    boxes = found.arrays["pose_box"]
    assert boxes.shape == (frames, len(PARTS), 4)
    seen = ~np.isnan(boxes[:, :, 0])
    assert (parts.any(axis=2) == seen).all()
    # tokens are outputs of a layer norm
    np.testing.assert_allclose(parts[seen].astype(float).std(axis=1), 1, atol=0.2)
    assert set(found.columns) == set(Pose.columns)
    for part, share in zip(PARTS, seen.mean(axis=0), strict=True):
        assert found.columns[f"{part}_share"] == pytest.approx(share)
    confidence = found.columns["hand_confidence"]
    assert isinstance(confidence, float) if seen[:, 2:].any() else confidence is None
    again = stage.measure(clip)
    assert again.arrays["pose"].tobytes() == found.arrays["pose"].tobytes()


def test_x_pose_without_weights_fails_before_the_run(weights_folder: Path) -> None:
    before = Pose(XPOSE).backend_version()
    with (weights_folder / "xpose" / "unipose_swint.pth").open("ab") as file:
        file.write(b"\0")
    assert Pose(XPOSE).backend_version() != before
    (weights_folder / "xpose" / "unipose_swint.pth").unlink()
    with pytest.raises(MissingBackend, match=r"unipose_swint.pth.*looked in.*landmarks"):
        Pose(XPOSE).check()


def test_x_poses_licence_is_logged_when_it_is_chosen(weights_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Pose(XPOSE).check()
    assert "non-commercial" in caplog.text


def test_settings_of_one_backend_are_refused_with_another() -> None:
    with pytest.raises(ValueError, match="min_score can be set for backend 'xpose' only"):
        PoseSettings(backend="landmarks", min_score=0.3)
    with pytest.raises(ValueError, match=r"unknown backend 'xpos'.*xpose"):
        PoseSettings(backend="xpos")
