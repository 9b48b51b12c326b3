"""Subtitles: text drawn over generated footage is found, and its kind is right."""

from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from data_manifests.strict import RecipeError, validate
from tasks.media.clip import Clip, ClipRecord, Unmeasurable
from tasks.stages.subtitles import ocr, text_tracks
from tasks.stages.subtitles.ocr import OcrBackend, RapidOcr, TextBox
from tasks.stages.subtitles.stage import Subtitles, SubtitlesSettings
from tasks.stages.subtitles.text_tracks import TextLine
from tasks.weights.missing import MissingBackend

ClipOf = Callable[..., Clip]
Film = Callable[..., Clip]
Frames = list[np.ndarray]

AREAS = ("subtitle_area", "caption_area", "watermark_area", "scene_text_area")
LATIN = ("We never wanted it this way", "What do you want", "What do you want from me?", "Nothing at all, sir.")
FOOTAGE = Path(__file__).parents[4] / "shared" / "footage"


@pytest.fixture(scope="module")
def stage() -> Subtitles:
    return Subtitles(SubtitlesSettings())


@pytest.fixture(scope="module")
def backdrop(clip_of: ClipOf) -> Callable[[str], Frames]:
    """Gives 8 s of generated footage, 2 frames a second: [360, 640, 3] or [270, 480, 3] each."""
    kept: dict[str, Frames] = {}

    def frames(name: str = "talk_medium.mp4") -> Frames:
        if name not in kept:
            kept[name] = list(islice(clip_of(name).frames(2.0), 16))
        return kept[name]

    return frames


@pytest.fixture
def film(tmp_path: Path) -> Film:
    """Writes frames, 2 a second, as a clip with a key frame every second."""

    def write(frames: Frames) -> Clip:
        path = tmp_path / f"{len(frames)}.mp4"
        height, width = frames[0].shape[:2]
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=2, options={"crf": "20", "g": "2", "threads": "1"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        return Clip(ClipRecord("c", "s", 0.0, len(frames) / 2, 2, len(frames), width, height, "", ""), path, None)

    return write


def written(
    frame: np.ndarray, text: str, x: float = 0.5, y: float = 0.9, size: float = 0.05, **more: Any
) -> np.ndarray:
    """Draw a line of text around a point of a frame. Place and size are in fractions of the frame."""
    image = Image.fromarray(frame)
    height, width = frame.shape[:2]
    font = more.pop("font", None)
    pixels = round(size * height)
    style: dict[str, Any] = {"fill": "white", "stroke_width": 2, "stroke_fill": "black"} | more
    font = ImageFont.truetype(font, pixels) if font else ImageFont.load_default(pixels)
    ImageDraw.Draw(image).text((x * width, y * height), text, font=font, anchor="mm", **style)
    return np.asarray(image)


def drawn_area(before: Frames, after: Frames) -> float:
    """The area of the box around the drawn text, as a share of the frame: the median over the frames with text."""
    areas = []
    for clean, full in zip(before, after, strict=True):
        y, x = np.nonzero((clean != full).any(axis=2))
        if len(x):
            areas.append((np.ptp(x) + 1) * (np.ptp(y) + 1) / clean[..., 0].size)
    return float(np.median(areas))


def measured(stage: Subtitles, clip: Clip) -> dict[str, Any]:
    columns = stage.measure(clip).columns
    assert {name: type(value) for name, value in columns.items() if value is not None} == {
        name: kind for name, kind in Subtitles.columns.items() if columns[name] is not None
    }
    return columns


def only(columns: dict[str, Any], kind: str, area: float, most: float = 2.1) -> None:
    """Assert that a clip has text of one kind only, in boxes of 0.8 to `most` times the area of the letters."""
    assert [name for name in AREAS if columns[name]] == [kind]
    assert 0.8 * area < columns[kind] < most * area
    assert columns["text_area"] == columns[kind]


@pytest.mark.parametrize(
    "name",
    [
        *("talk_medium.mp4", "shake.mp4"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("talk_office.mp4", "talk_long.mp4", "pan.mp4")),
    ],
)
def test_footage_without_text_has_none(name: str, stage: Subtitles, clip_of: ClipOf) -> None:
    found = measured(stage, clip_of(name))
    assert not any(found[name] for name in (*AREAS, "text_area", "subtitle_share", "changing_share"))
    assert found["left"] is found["top"] is found["right"] is found["bottom"] is None


def test_textures_are_not_text(stage: Subtitles, film: Film) -> None:
    y, x = np.mgrid[:360, :640]
    offset = y // 24 % 2 * 24
    random = np.random.default_rng(0)
    textures = [
        np.where((y % 24 < 3) | ((x + offset) % 48 < 3), 210, 120),  # bricks
        128 + 80 * np.sign(np.sin(x / 6)),  # a fence
        128 + 80 * np.sign(np.sin(y / 5)),  # blinds
        np.where((y % 60 < 36) & (x % 45 < 22), 60, 150),  # windows
        np.kron(random.uniform(0, 255, (45, 80)), np.ones((8, 8))),
    ]
    pictures = [np.repeat(t[..., None], 3, axis=2).astype(np.uint8) for t in textures]
    found = measured(stage, film([picture for picture in pictures for _ in range(4)]))
    assert found["text_area"] == 0.0


def test_changing_subtitles_are_found_and_nothing_else(stage: Subtitles, film: Film, backdrop: Any) -> None:
    lines = [LATIN[k // 4] for k in range(16)]
    frames = [written(frame, line) for frame, line in zip(backdrop(), lines, strict=True)]
    found = measured(stage, film(frames))
    only(found, "subtitle_area", drawn_area(backdrop(), frames))
    assert found["subtitle_share"] == 1.0
    # Key frames are a second apart: two frames.
    assert found["changing_share"] == np.mean([before != after for before, after in pairwise(lines[::2])])
    assert found["samples"] == 8
    assert 0.2 < found["left"] < 0.35 and 0.65 < found["right"] < 0.8
    assert 0.82 < found["top"] < 0.88 and 0.92 < found["bottom"] < 0.98


@pytest.mark.parametrize(
    "lines",
    [
        ("Мы никогда этого не хотели", "А что вы хотите от меня?", "Спасибо вам большое"),
        ("Δεν το θέλαμε ποτέ έτσι", "Τίποτα απολύτως, κύριε", "Τι θέλετε από εμένα;"),
        ("لم نكن نريد ذلك أبدا", "لا شيء على الإطلاق", "ماذا تريد مني الآن"),
    ],
    ids=["Cyrillic", "Greek", "Arabic"],
)
def test_changing_subtitles_in_other_scripts_are_found(
    lines: tuple[str, ...], stage: Subtitles, film: Film, backdrop: Any
) -> None:
    try:
        ImageFont.truetype("DejaVuSans.ttf")
    except OSError:
        pytest.skip("the font DejaVuSans.ttf is not installed")
    frames = [written(f, lines[min(k // 5, 2)], font="DejaVuSans.ttf") for k, f in enumerate(backdrop())]
    found = measured(stage, film(frames))
    only(found, "subtitle_area", drawn_area(backdrop(), frames))
    assert found["changing_share"] == pytest.approx(2 / 7)


def test_a_subtitle_that_shows_for_a_part_of_the_time_is_found(stage: Subtitles, film: Film, backdrop: Any) -> None:
    frames = [written(f, LATIN[0]) if 5 <= k < 9 else f for k, f in enumerate(backdrop())]
    found = measured(stage, film(frames))
    only(found, "subtitle_area", drawn_area(backdrop(), frames))
    assert found["subtitle_share"] == 2 / 8
    assert found["changing_share"] == 2 / 7


def test_captions_that_roll_up_are_subtitles(stage: Subtitles, film: Film, backdrop: Any) -> None:
    frames = [
        written(written(f, LATIN[k // 4], y=0.83), (*LATIN, "Goodbye, then.")[k // 4 + 1], y=0.9)
        for k, f in enumerate(backdrop())
    ]
    found = measured(stage, film(frames))
    assert [name for name in AREAS if found[name]] == ["subtitle_area"]
    assert found["subtitle_share"] == 1.0


def test_a_subtitle_that_stays_is_a_caption(stage: Subtitles, film: Film, backdrop: Any) -> None:
    frames = [written(frame, LATIN[0]) for frame in backdrop()]
    found = measured(stage, film(frames))
    only(found, "caption_area", drawn_area(backdrop(), frames))
    assert found["changing_share"] == found["subtitle_share"] == 0.0
    assert found["top"] > 0.8


@pytest.mark.parametrize("size", [0.04, 0.06])
def test_a_logo_in_a_corner_is_a_watermark(size: float, stage: Subtitles, film: Film, backdrop: Any) -> None:
    # Also over frames that move.
    for frames in (backdrop(), backdrop("pan.mp4")):
        marked = [written(frame, "ACME TV", 0.88, 0.08, size) for frame in frames]
        found = measured(stage, film(marked))
        only(found, "watermark_area", drawn_area(frames, marked))
        assert found["left"] is None


@pytest.mark.parametrize(("x", "step"), [(0.5, (0.04, 0.0)), (0.8, (0.006, 0.004)), (0.75, (-0.02, 0.01))])
def test_a_sign_that_moves_is_text_in_the_scene(
    x: float, step: tuple[float, float], stage: Subtitles, film: Film, backdrop: Any
) -> None:
    frames = [
        written(f, "PLATFORM 4", x + step[0] * (k - 8), 0.4 + step[1] * (k - 8), 0.06, fill="black", stroke_width=0)
        for k, f in enumerate(backdrop())
    ]
    only(measured(stage, film(frames)), "scene_text_area", drawn_area(backdrop(), frames), most=2.6)


def test_a_subtitle_that_changes_over_a_still_frame_is_found(stage: Subtitles, film: Film, backdrop: Any) -> None:
    frames = [written(backdrop()[0], line) for line in ("Not on a Monday.",) * 8 + ("On every Sunday.",) * 8]
    found = measured(stage, film(frames))
    assert found["changing_share"] == 1 / 7
    assert found["subtitle_area"] > 0


def test_a_subtitle_and_a_watermark_are_told_apart(stage: Subtitles, film: Film, backdrop: Any) -> None:
    frames = [written(written(f, "ACME TV", 0.1, 0.08), LATIN[k // 4]) for k, f in enumerate(backdrop())]
    found = measured(stage, film(frames))
    assert [name for name in AREAS if found[name]] == ["subtitle_area", "watermark_area"]
    assert found["text_area"] == pytest.approx(found["subtitle_area"] + found["watermark_area"], abs=0.003)


def test_earlier_clips_do_not_change_a_measurement(
    stage: Subtitles, film: Film, backdrop: Any, clip_of: ClipOf
) -> None:
    clip = film([written(frame, LATIN[k // 4]) for k, frame in enumerate(backdrop())])
    first = stage.measure(clip)
    stage.measure(clip_of("talk_office.mp4"))
    assert stage.measure(clip) == first == Subtitles(SubtitlesSettings()).measure(clip)


def test_a_clip_of_one_key_frame_is_measured(stage: Subtitles, film: Film, backdrop: Any) -> None:
    found = measured(stage, film([written(backdrop()[0], LATIN[0])]))
    assert found["caption_area"] > 0.02
    assert found["changing_share"] == 0.0
    assert found["samples"] == 1


def test_tiny_frames_are_measured(stage: Subtitles, film: Film) -> None:
    assert measured(stage, film([np.zeros((48, 64, 3), np.uint8)] * 2))["text_area"] == 0.0


def test_a_very_narrow_frame_cannot_be_measured(stage: Subtitles, film: Film) -> None:
    with pytest.raises(Unmeasurable, match="512x32 is too narrow"):
        stage.measure(film([np.zeros((32, 512, 3), np.uint8)] * 2))


def test_an_unknown_backend_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"unknown backend 'rapidorc'; did you mean 'rapidocr'\?"):
        validate(SubtitlesSettings, {"backend": "rapidorc"}, "here")


def test_a_missing_model_is_named_before_work_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr, "_MODELS", ("models/gone.onnx",))
    with pytest.raises(MissingBackend, match=r"lacks .*gone\.onnx; install it with"):
        Subtitles(SubtitlesSettings()).check()


class Counting(OcrBackend):
    """Finds the same box in each frame, and counts its calls."""

    def __init__(self) -> None:
        self.finds = self.reads = 0

    @classmethod
    def version(cls) -> str:
        return "counting 1"

    def find(self, image: np.ndarray, short_side: int) -> list[TextBox]:
        self.finds += 1
        return [TextBox(200, 300, 440, 330)]

    def read(self, images: list[np.ndarray]) -> list[tuple[str, float]]:
        self.reads += 1
        return [("the same words", 1.0)] * len(images)


def test_repeated_frames_are_searched_once_and_texts_read_once(
    film: Film, backdrop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ocr.BACKENDS, "counting", Counting)
    still = Subtitles(SubtitlesSettings(backend="counting"))
    still.check()
    assert still.backend_version().startswith("counting 1, ")
    found = measured(still, film([written(backdrop()[0], LATIN[0])] * 16))
    assert (still._backend.finds, still._backend.reads) == (1, 1)  # type: ignore[attr-defined]
    assert found["samples"] == 8 and found["caption_area"] == pytest.approx(240 * 30 / 640 / 360)

    moving = Subtitles(SubtitlesSettings(backend="counting", max_samples=4))
    assert measured(moving, film([written(f, LATIN[0], y=0.875) for f in backdrop()]))["samples"] == 4


@pytest.mark.parametrize(
    ("name", "start_s", "kinds"),
    [
        ("subs_cartoon.mp4", 0.0, ["subtitle_area", "watermark_area"]),
        ("cuts_fades_testvideo.mp4", 15.0, ["caption_area", "watermark_area"]),
        ("talk_vrt_2.mp4", 0.0, []),
        ("talk_ref_square.mp4", 0.0, []),
        ("static_walkers_10fps.mp4", 0.0, []),
        ("noperson_wall_silent.mp4", 0.0, []),
    ],
)
def test_real_footage_has_the_text_that_its_labels_say(
    name: str, start_s: float, kinds: list[str], stage: Subtitles, film: Film
) -> None:
    if not (FOOTAGE / name).is_file():
        pytest.skip("the footage is not here")
    frames: Frames = []
    with av.open(str(FOOTAGE / name)) as container:
        for frame in container.decode(video=0):
            if frame.time >= start_s + len(frames) / 2:
                frames.append(frame.reformat(frame.width // 2 * 2, frame.height // 2 * 2).to_ndarray(format="rgb24"))
            if len(frames) == 10:
                break
    found = measured(stage, film(frames))
    assert [kind for kind in AREAS if found[kind]] == kinds


def pattern(seed: int) -> np.ndarray:
    """A random pattern that has strokes, [12, 60] float32."""
    return np.random.default_rng(seed).choice([-60.0, 60.0], (12, 60)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 130), st.integers(0, 70)), min_size=3, max_size=6),
    noise=st.just(0.0) | st.floats(1, 25),
    seed=st.integers(0, 99),
)
def test_a_text_that_rests_is_constant_and_one_that_moves_is_part_of_the_scene(
    places: list[tuple[int, int]], noise: float, seed: int
) -> None:
    assume(all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) > 8 for a, b in pairwise(places)))
    random = np.random.default_rng(seed)

    def kinds(at: list[tuple[int, int]]) -> list[str]:
        pictures = [random.normal(0, noise, (90, 200)).astype(np.float32) for _ in at]
        for picture, (x, y) in zip(pictures, at, strict=True):
            picture[y : y + 12, x : x + 60] += pattern(seed)
        lines = [[TextLine(TextBox(x, y, x + 60, y + 12), "platform", True)] for x, y in at]
        return list(text_tracks.kinds(text_tracks.follow_lines(lines, pictures), len(at), 200, 90))

    assert len(kinds(places[:1] * len(places))) == 1
    assert kinds(places[:1] * len(places))[0] in ("caption", "watermark")
    assert set(kinds(places)) == {"scene"}


@settings(max_examples=60, deadline=None)
@given(
    shown=st.lists(st.integers(0, 3), min_size=3, max_size=10), noise=st.just(0.0) | st.floats(1, 25), missed=st.data()
)
def test_texts_that_replace_each_other_in_one_place_are_subtitles(
    shown: list[int], noise: float, missed: st.DataObject
) -> None:
    words = ("good morning", "fine thanks", "see you", "buy milk")
    assume(len(set(shown)) > 1)
    random = np.random.default_rng(1)
    pictures, lines = [], []
    for number in shown:
        picture = random.normal(0, noise, (90, 200)).astype(np.float32)
        picture[70:82, 70:130] += pattern(number)
        pictures.append(picture)
        lines.append([TextLine(TextBox(70, 70, 130, 82), words[number], True)])
    # The detector may miss a text in some samples.
    for number in set(shown):
        again = [k for k, n in enumerate(shown) if n == number][1:]
        for k in missed.draw(st.sets(st.sampled_from(again))) if again else ():
            lines[k] = []
    found = text_tracks.follow_lines(lines, pictures)
    assert text_tracks.kinds(found, len(shown), 200, 90) == ["subtitle"] * len(set(shown))
    assert sorted(k for text in found for k in text.boxes) == list(range(len(shown)))


def test_a_mark_inside_a_line_is_not_taken_for_the_line() -> None:
    pictures, lines = [], []
    mark = pattern(9)[:8, :8]
    for number, words in enumerate(("good morning", "fine thanks", "see you")):
        picture = np.zeros((90, 200), np.float32)
        picture[70:82, 70:130] = pattern(number)
        picture[72:80, 135:143] = mark
        pictures.append(picture)
        lines.append([TextLine(TextBox(134, 71, 144, 81), "", False), TextLine(TextBox(70, 70, 146, 82), words, True)])
    found = text_tracks.follow_lines(lines, pictures)
    assert [text.letters for text in found] == ["goodmorning", "finethanks", "seeyou"]
    assert text_tracks.kinds(found, 3, 200, 90) == ["subtitle"] * 3


def test_the_detector_gives_boxes_in_pixels_of_the_given_image() -> None:
    frame = written(np.full((720, 1280, 3), 90, np.uint8), "Understudy", 0.25, 0.5, 0.06)
    (box,) = RapidOcr().find(frame, 192)
    assert abs((box.x0 + box.x1) / 2 - 320) < 8 and abs((box.y0 + box.y1) / 2 - 360) < 8
    ((text, sure),) = RapidOcr().read([text_tracks.cut_box(frame, box)])
    assert text == "Understudy" and sure > 0.9
