"""The card of a clip draws results in their places and the audio in sync. Missing results are left out."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

from tasks.media.clip import SAMPLE_RATE, Clip, Measurement
from tasks.media.container import MediaError
from tasks.review import overlay
from tasks.review.clip_card import HEIGHT, WIDTH, show_clip
from tasks.stages.crop.stage import Crop, CropSettings
from tasks.stages.pose.keypoints import PARTS, encode
from tasks.stages.registry import STAGES

ClipOf = Callable[..., Clip]
ROW: dict[str, Any] = {"verdict": "kept", "reason": "", "scores": {"motion.speed": 0.0214, "people.framing": "medium"}}


@pytest.fixture(scope="module")
def talker(clip_of: ClipOf) -> Clip:
    """A clip with results made by hand: a face that moves, lips, a crop that follows the face, and key points."""
    clip = clip_of("talk_3s.mp4", fps=10, short_side=240)
    count = clip.record.frames
    x = np.linspace(0.3, 0.6, count)
    boxes = np.stack([x, np.full(count, 0.2), x + 0.1, np.full(count, 0.4)], axis=1).astype(np.float32)
    boxes[3:5] = np.nan
    lips = np.abs(np.sin(np.arange(count)))[:, None].repeat(4, 1).astype(np.float32)
    lips[3:5] = np.nan
    sync = Measurement({"offset_s": 0.2, "confidence": 4.0, "distance": 0.5, "reason": ""})
    found = {"identity": Measurement({}, {"face_box": boxes, "lips": lips}), "sync": sync}
    clip = dataclasses.replace(clip, found=found)
    found["crop"] = Crop(CropSettings(size=128, sound="shift", min_confidence=3.0)).measure(clip)
    rng = np.random.default_rng(0)
    points = {part: rng.uniform(0.3, 0.7, (count, len(names), 3)) for part, names in PARTS.items()}
    points["body"][..., 2] = 1.0
    points["left_hand"][:] = np.nan
    found["pose"] = Measurement({}, {"pose": encode(points)})
    return dataclasses.replace(clip, found=found)


def card_of(clip: Clip, path: Path, row: dict[str, Any] = ROW) -> np.ndarray:
    show_clip(clip, row, path)
    card = np.asarray(Image.open(path))
    assert card.shape == (HEIGHT, WIDTH, 3)
    return card


def share(image: np.ndarray, colour: tuple[int, int, int]) -> float:
    """The share of an image's pixels that have exactly this colour."""
    return float((image == colour).all(axis=2).mean())


def test_an_image_of_a_card_shows_face_box_crop_window_key_points_and_verdict(talker: Clip, tmp_path: Path) -> None:
    card = card_of(talker, tmp_path / "card.png")
    main, crop = card[88:578, 24:896], card[88:496, 912:1320]
    assert share(main, overlay.FACE_BOX) > 0.0005
    assert share(main, overlay.WINDOW) > 0.001
    for part in ("body", "right_hand"):
        assert share(crop, overlay.PART_COLOURS[part]) > 0.002
    assert share(crop, overlay.PART_COLOURS["left_hand"]) == 0
    assert share(crop, overlay.LIPS) > 0.0001
    assert share(card[20:62, 24:120], overlay.GOOD) > 0.3
    # the box is where the stage identity found the face
    middle = talker.record.frames // 2
    x0, _, x1, _ = talker.found["identity"].arrays["face_box"][middle]
    columns = np.flatnonzero((main == overlay.FACE_BOX).all(axis=2).any(axis=0))
    width = 490 * talker.record.width / talker.record.height
    left = (872 - min(width, 872)) / 2
    assert columns.min() == pytest.approx(left + x0 * min(width, 872), abs=3)
    assert columns.max() == pytest.approx(left + x1 * min(width, 872), abs=3)


def test_a_video_of_a_card_has_every_frame_and_its_audio_in_sync(talker: Clip, tmp_path: Path) -> None:
    path = tmp_path / "card.mp4"
    show_clip(talker, ROW, path)
    with av.open(str(path)) as container:
        frames = [frame.time for frame in container.decode(video=0)]
    assert frames == pytest.approx([k / 10 for k in range(talker.record.frames)])
    with av.open(str(path)) as container:
        audio = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    # the audio is the one that the stage crop has shifted by 0.2 s
    original = talker.samples()
    assert original is not None
    shifted = np.roll(original, -SAMPLE_RATE // 5)
    part = slice(SAMPLE_RATE // 2, 2 * SAMPLE_RATE)
    lags = range(-400, 401, 4)
    correlation = [float(np.dot(audio[part.start + lag : part.stop + lag], shifted[part])) for lag in lags]
    assert abs(lags[int(np.argmax(correlation))]) <= SAMPLE_RATE // 1000
    assert list(tmp_path.iterdir()) == [path]


def test_a_clip_without_results_has_a_card(clip_of: ClipOf, tmp_path: Path) -> None:
    clip = dataclasses.replace(clip_of("pan.mp4", fps=10, short_side=120), audio_path=None)
    card = card_of(clip, tmp_path / "card.png", {})
    assert share(card[88:578, 24:896], overlay.PANEL) < 0.2  # the frame is drawn
    assert share(card[88:496, 912:1320], overlay.GROUND) == 1.0  # the crop is not


def test_only_what_moves_has_arrows() -> None:
    still = np.zeros((180, 320, 3), np.uint8)
    overlay.arrows(still, np.full((180, 320, 2), 0.1, np.float32), 25)
    assert not still.any()
    moving = np.zeros((360, 640, 3), np.uint8)
    flow = np.zeros((180, 320, 2), np.float32)
    flow[:, 160:] = (3, 0)
    overlay.arrows(moving, flow, 25)
    assert not moving[:, :300].any()
    assert moving[:, 340:].any()


def test_a_curve_has_gaps_where_values_are_missing() -> None:
    image = np.zeros((50, 100, 3), np.uint8)
    values = np.full(100, 0.5)
    values[40:60] = np.nan
    overlay.curve(image, values, overlay.LIPS)
    drawn = image.any(axis=(0, 2))
    assert drawn[:39].all()
    assert not drawn[42:58].any()
    assert drawn[61:].all()


def test_any_text_is_written_as_one_line_within_its_width() -> None:
    image = Image.new("RGB", (300, 100))
    text = "a\nb\x00\t<script>\u202e" + "x" * 10_000
    assert overlay.write(ImageDraw.Draw(image), (10, 10), text, 14, overlay.TEXT, 200) <= 200
    rows, columns = np.nonzero(np.asarray(image).any(axis=2))
    assert columns.max() < 212
    assert rows.max() < 30


def test_every_score_of_every_stage_fits_on_the_card(
    clip_of: ClipOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = overlay.write

    def recorded(draw: Any, at: tuple[int, int], text: str, *style: Any) -> int:
        written.append(text)
        return write(draw, at, text, *style)

    monkeypatch.setattr(overlay, "write", recorded)
    scores = {f"{name}.{column}": 0.0 for name, stage in STAGES.items() for column in stage.columns}
    show_clip(clip_of("pan.mp4", fps=10, short_side=120), {"scores": scores}, tmp_path / "card.png")
    assert {*STAGES, *(score.partition(".")[2] for score in scores)} <= set(written)


def test_the_legend_names_what_is_drawn_and_nothing_else(talker: Clip, clip_of: ClipOf, tmp_path: Path) -> None:
    legend = np.s_[508:580, 912:1330]
    card = card_of(talker, tmp_path / "card.png")[legend]
    colours = [overlay.FACE_BOX, overlay.WINDOW, overlay.ARROW, overlay.LIPS, *overlay.PART_COLOURS.values()]
    # no left hand is seen, and of the face's key points the legend names the lips
    absent = [overlay.PART_COLOURS["left_hand"], overlay.PART_COLOURS["face"]]
    assert [share(card, colour) > 0 for colour in colours] == [colour not in absent for colour in colours]
    without = card_of(clip_of("pan.mp4", fps=10, short_side=120), tmp_path / "without.png")[legend]
    assert [share(without, colour) > 0 for colour in colours] == [colour == overlay.ARROW for colour in colours]


def test_a_pose_without_key_points_is_shown_by_its_boxes(talker: Clip, tmp_path: Path) -> None:
    count = talker.record.frames
    boxes = np.tile(np.array([0.2, 0.3, 0.6, 0.9], np.float32), (count, len(PARTS), 1))
    boxes[:, 1:3] = np.nan  # no face, no left hand
    boxes[:, 3, :2] = 0.4
    tokens = np.random.default_rng(0).standard_normal((count, 1024)).astype(np.float16)
    pose = Measurement({}, {"pose": tokens, "pose_box": boxes})
    card = card_of(dataclasses.replace(talker, found={**talker.found, "pose": pose}), tmp_path / "card.png")
    for area in (card[88:496, 912:1320], card[508:580, 912:1330]):  # the crop and the legend
        drawn = {part for part, colour in overlay.PART_COLOURS.items() if share(area, colour) > 0.0005}
        assert drawn == {"body", "right_hand"}


def test_unusual_scores_and_reasons_do_not_break_the_card(talker: Clip, tmp_path: Path) -> None:
    scores = {
        f"stage{k // 8}.column{k}": v for k, v in enumerate([None, True, 1e9, -1e-9, 3, "", "words", np.nan] * 30)
    }
    card_of(talker, tmp_path / "card.png", {"verdict": "error\n" * 9, "reason": "r" * 5000, "scores": scores})


def test_a_file_of_another_kind_is_refused_with_the_kinds_there_are(talker: Clip, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"card\.gif: .* \.mp4 \(a video\) or \.png \(an image\), not as '\.gif'"):
        show_clip(talker, ROW, tmp_path / "card.gif")


def test_a_clip_that_cannot_be_decoded_leaves_no_file(talker: Clip, tmp_path: Path) -> None:
    broken = tmp_path / "clip.mp4"
    data = bytearray(talker.video_path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    broken.write_bytes(data)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(MediaError):
        show_clip(dataclasses.replace(talker, video_path=broken), ROW, out / "card.mp4")
    assert list(out.iterdir()) == []
