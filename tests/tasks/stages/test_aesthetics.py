"""Aesthetics: each measure reacts to its own fault, and no fault raises the scores."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_manifests.strict import RecipeError, validate
from tasks.media.clip import Clip, ClipRecord, Unmeasurable
from tasks.stages.aesthetics import measures
from tasks.stages.aesthetics import stage as aesthetics
from tasks.stages.aesthetics.stage import Aesthetics, AestheticsBackend, AestheticsSettings, Classical

ClipOf = Callable[..., Clip]
Image = np.ndarray
Fault = Callable[[Image, float], Image]

# By how much quality and its measures may vary where nothing is wrong; their range is 4.
STEADY = 0.05


def measured(clip: Clip) -> dict[str, float]:
    columns = Aesthetics(AestheticsSettings()).measure(clip).columns
    assert set(columns) == set(Aesthetics.columns)
    assert columns.pop("video_quality") is None  # Q-Align's alone
    assert all(type(value) is float and np.isfinite(value) for value in columns.values())
    return columns  # type: ignore[return-value]


def scored(image: Image) -> dict[str, float]:
    return Classical(AestheticsSettings())([image])  # type: ignore[return-value]


@pytest.fixture(scope="module")
def frames(clip_of: ClipOf) -> Callable[[str], Image]:
    """Gives the first frame of a generated file, [height, width, 3] uint8 RGB."""
    return cache(lambda name: next(clip_of(name).frames(1.0)))


@pytest.fixture
def film(tmp_path: Path) -> Callable[[list[Image]], Clip]:
    """Writes frames, one a second, as a clip of key frames."""

    def write(images: list[Image]) -> Clip:
        path = tmp_path / f"{len(images)}.mp4"
        height, width = images[0].shape[:2]
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=1, options={"crf": "18", "g": "1", "threads": "1"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for image in images:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        return Clip(ClipRecord("c", "s", 0.0, len(images), 1, len(images), width, height, "", ""), path, None)

    return write


def blur(image: Image, sigma: float) -> Image:
    return cv2.GaussianBlur(image, (0, 0), sigma)


def movement(image: Image, pixels: float) -> Image:
    return cv2.blur(image, (int(pixels), 1))


def noise(image: Image, sigma: float) -> Image:
    random = np.random.default_rng(0).normal(0, sigma, image.shape)
    return np.clip(image + random, 0, 255).astype(np.uint8)


def gain(image: Image, factor: float) -> Image:
    return np.clip(image * float(factor), 0, 255).astype(np.uint8)


def flatness(image: Image, factor: float) -> Image:
    return (128 + (image - 128.0) * factor).astype(np.uint8)


def jpeg(image: Image, quality: float) -> Image:
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(quality)])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))


def resolution(image: Image, factor: float) -> Image:
    height, width = image.shape[:2]
    small = cv2.resize(image, (round(width * factor), round(height * factor)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


FAULTS: dict[str, tuple[Fault, tuple[float, ...], str]] = {
    "blur": (blur, (0.7, 1, 1.5, 2, 3), "sharpness"),
    "movement": (movement, (3, 5, 7, 9), "sharpness"),
    "resolution": (resolution, (0.7, 0.5, 0.35, 0.25), "sharpness"),
    "noise": (noise, (3, 6, 10, 15, 20), "noise"),
    "darkness": (gain, (0.7, 0.5, 0.35, 0.25, 0.15), "highlights"),
    "overexposure": (gain, (1.7, 2, 2.5, 3, 4), "clipped"),
    "flatness": (flatness, (0.7, 0.5, 0.3, 0.2, 0.1), "contrast"),
    "blocks": (jpeg, (40, 15, 8), "blockiness"),
}


@pytest.mark.parametrize("name", ["talk_medium.mp4", pytest.param("talk_office.mp4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_that_grows_never_raises_the_scores(fault: str, name: str, frames: Callable[[str], Image]) -> None:
    spoil, strengths, _ = FAULTS[fault]
    found = [scored(image) for image in (frames(name), *(spoil(frames(name), s) for s in strengths))]
    assert found[0]["quality"] > 4.5
    assert found[-1]["quality"] < found[0]["quality"] - 1
    for before, after in pairwise(found):
        assert after["quality"] <= before["quality"] + STEADY
        assert after["aesthetic"] <= before["aesthetic"] + 2 * STEADY
        assert after["sharpness"] <= before["sharpness"] + (0.05 if fault != "overexposure" else 1)
        assert all(1 <= after[name] <= 5 for name in ("quality", "aesthetic"))


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_shows_in_its_own_measure_most(fault: str, frames: Callable[[str], Image]) -> None:
    spoil, strengths, own = FAULTS[fault]
    clean, spoilt = scored(frames("talk_medium.mp4")), scored(spoil(frames("talk_medium.mp4"), strengths[-2]))
    lost = {
        name: aesthetics._worth(clean[name], *bounds) - aesthetics._worth(spoilt[name], *bounds)
        for name, bounds in aesthetics._WORTH.items()
    }
    assert max(lost, key=lambda name: lost[name]) == own
    assert lost[own] > 0.2


def test_faults_are_found_in_a_clip_as_it_was_encoded(film: Any, frames: Callable[[str], Image]) -> None:
    clean = frames("talk_medium.mp4")
    quality = {
        fault: measured(film([spoil(clean, strengths[-2])] * 3))["quality"]
        for fault, (spoil, strengths, _) in FAULTS.items()
    }
    assert max(quality.values()) < 4.2 < measured(film([clean] * 3))["quality"]


@pytest.mark.parametrize(
    "name",
    [
        *("talk_office.mp4", "talk_medium.mp4"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("talk_full.mp4", "talk_long.mp4", "silent.mp4")),
    ],
)
def test_clean_footage_is_good(name: str, clip_of: ClipOf) -> None:
    found = measured(clip_of(name))
    assert found["quality"] > 4
    assert found["aesthetic"] > 3.5


def test_a_fade_in_one_frame_does_not_decide(film: Any, frames: Callable[[str], Image]) -> None:
    clean = frames("talk_medium.mp4")
    steady = measured(film([clean] * 5))
    assert measured(film([clean] * 4 + [gain(clean, 0.05)]))["quality"] == pytest.approx(steady["quality"], abs=STEADY)


def test_a_sharp_face_before_a_blurred_wall_is_sharp(frames: Callable[[str], Image]) -> None:
    clean = frames("talk_medium.mp4")
    height, width = clean.shape[:2]
    face = (slice(0, height * 3 // 4), slice(width * 3 // 8, width * 5 // 8))
    bokeh = blur(clean, 4)
    bokeh[face] = clean[face]
    assert scored(bokeh)["sharpness"] > 0.7 * scored(clean)["sharpness"]
    assert scored(bokeh)["sharpness"] > scored(blur(clean, 4))["sharpness"] + 0.3


def test_a_face_in_a_black_studio_is_not_too_dark(frames: Callable[[str], Image]) -> None:
    clean = frames("talk_medium.mp4")
    width = clean.shape[1]
    studio = np.full_like(clean, 4)
    studio[:, width * 3 // 8 : width * 5 // 8] = clean[:, width * 3 // 8 : width * 5 // 8]
    assert scored(studio)["quality"] > 4


def test_a_grey_frame_has_the_same_quality_and_a_lower_aesthetic_score(frames: Callable[[str], Image]) -> None:
    clean = frames("talk_medium.mp4")
    grey = np.repeat(cv2.cvtColor(clean, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    assert scored(grey)["quality"] == pytest.approx(scored(clean)["quality"], abs=STEADY)
    assert scored(grey)["aesthetic"] < scored(clean)["aesthetic"] - 0.5
    assert scored(grey)["colourfulness"] == pytest.approx(0, abs=0.5)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_empty_frame_has_the_worst_quality(level: int) -> None:
    for size in ((480, 854), (48, 64), (2, 2)):
        assert scored(np.full((*size, 3), level, np.uint8))["quality"] == 1.0


def test_earlier_clips_do_not_change_a_measurement(clip_of: ClipOf) -> None:
    stage = Aesthetics(AestheticsSettings())
    first = stage.measure(clip_of("talk_office.mp4"))
    stage.measure(clip_of("talk_medium.mp4"))
    assert stage.measure(clip_of("talk_office.mp4")) == first


def test_a_narrow_strip_is_not_scaled_up_to_480_lines(tmp_path: Path) -> None:
    strip = Clip(ClipRecord("c", "s", 0.0, 4.0, 25, 100, 1920, 16, "", ""), tmp_path / "no.mp4", None)
    with pytest.raises(Unmeasurable, match="1920x16"):
        Aesthetics(AestheticsSettings()).measure(strip)


def test_an_unknown_backend_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"unknown backend 'clasical'; did you mean 'classical'\?"):
        validate(AestheticsSettings, {"backend": "clasical"}, "here")


def test_a_new_backend_takes_one_class(film: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kind(AestheticsBackend):
        """Gives every clip the best quality, and has no value for most columns."""

        def __init__(self, settings: AestheticsSettings) -> None:
            pass

        @classmethod
        def version(cls) -> str:
            return "kind 1"

        def __call__(self, images: list[Image]) -> dict[str, float | None]:
            return {"quality": 5.0, "aesthetic": float(len(images))}

    monkeypatch.setitem(aesthetics.BACKENDS, "kind", Kind)
    stage = Aesthetics(AestheticsSettings(backend="kind", max_samples=2))
    stage.check()
    assert stage.backend_version() == "kind 1"
    columns = stage.measure(film([np.zeros((64, 64, 3), np.uint8)] * 4)).columns
    assert {name: value for name, value in columns.items() if value is not None} == {"quality": 5.0, "aesthetic": 2.0}


def texture(seed: int) -> Image:
    """Smooth shades with some hard edges, [240, 320] float32."""
    random = np.random.default_rng(seed)
    shades = cv2.resize(random.uniform(60, 190, (6, 8)).astype(np.float32), (320, 240))
    for _ in range(12):
        x, y = (int(v) for v in random.integers(0, (280, 200)))
        shades[y : y + 40, x : x + 50] = random.uniform(60, 190)
    return shades


def squares(seed: int) -> Image:
    """Grey squares of many shades, apart from each other, [480, 640] float32."""
    image = np.full((480, 640), 128, np.float32)
    for k, shade in enumerate(np.random.default_rng(seed).choice([40, 70, 190, 220], 12)):
        y, x = 40 + k // 4 * 150, 40 + k % 4 * 150
        image[y : y + 90, x : x + 90] = shade
    return image


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), sigma=st.floats(1.0, 4.0), height=st.floats(0.1, 1.0))
def test_sharpness_is_the_width_of_edges_whatever_their_height(seed: int, sigma: float, height: float) -> None:
    image = (squares(seed) - 128) * height + 128
    found = measures.sharpness(cv2.GaussianBlur(image, (0, 0), sigma), 0.0)
    # The ratio of an edge's gradients at the scales 1 and 2. Differences of two pixels add 1/3 to the square of each.
    assert found == pytest.approx(((sigma**2 + 4 + 1 / 3) / (sigma**2 + 1 + 1 / 3)) ** 0.5 - 1, abs=0.06)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), sigma=st.floats(0.5, 20.0))
def test_noise_is_its_standard_deviation(seed: int, sigma: float) -> None:
    random = np.random.default_rng(seed)
    image = texture(seed) + random.normal(0, sigma, (240, 320)).astype(np.float32)
    assert measures.noise(image) == pytest.approx(sigma, rel=0.15)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), period=st.floats(5.3, 24), height=st.floats(8, 20))
def test_a_grid_of_any_period_is_found_and_stripes_are_not(seed: int, period: float, height: float) -> None:
    random = np.random.default_rng(seed)
    plain = texture(seed) + random.normal(0, 0.3, (240, 320)).astype(np.float32)
    across, down = (np.arange(n) // period for n in (320, 240))
    levels = random.uniform(-height, height, (len(set(down)), len(set(across)))).astype(np.float32)
    blocks = levels[np.ix_(down.astype(int), across.astype(int))]
    stripes = np.broadcast_to(levels[0][across.astype(int)], (240, 320))
    assert measures.blockiness(plain + blocks) > 0.29
    assert measures.blockiness(plain) < 0.25
    assert measures.blockiness(plain + stripes) < 0.28  # one texture of the thousand, 957, gets 0.27, the others 0.22
