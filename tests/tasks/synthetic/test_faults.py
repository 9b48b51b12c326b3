"""The faults are in the footage as the table says, and the talkers are realistic enough for detectors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.synthetic import catalogue, lines
from tasks.synthetic.catalogue import files
from tasks.synthetic.faults import QUALITY
from tasks.synthetic.film import Film
from tasks.synthetic.speech import Utterance, say
from tasks.synthetic.spoil import spoil


def pictures(path: Path, every: int = 1) -> list[tuple[float, np.ndarray]]:
    """Times and frames, each [height, width, 3] uint8 RGB. every: the step from one frame to the next."""
    import av

    with av.open(str(path)) as container:
        shown = enumerate(container.decode(video=0))
        return [(f.time, f.to_ndarray(format="rgb24")) for k, f in shown if k % every == 0]


def sound(path: Path) -> np.ndarray:
    """The sound of a file whose sound and video begin together: [samples] at 48 kHz."""
    import av

    with av.open(str(path)) as container:
        return np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])


def in_sync(film: Any) -> Utterance:
    """The speech of a film as the lips form it, without the offset of the sound."""
    ahead = abs(film.late_s)
    length = float(film.end_s)
    said = say(length + 2 * ahead, film.voice, (), film.pause_s, film.first_sentence)
    return said.part(ahead, length)


def lip_shapes(path: Path) -> np.ndarray:
    """[frames, 2]: inner opening and width of the lips, divided by the distance of the eyes."""
    solutions = pytest.importorskip("mediapipe").solutions
    shapes = []
    with solutions.face_mesh.FaceMesh() as mesh:
        for _, picture in pictures(path):
            marks = mesh.process(picture).multi_face_landmarks[0].landmark
            height, width = picture.shape[:2]
            at = {k: np.array([marks[k].x * width, marks[k].y * height]) for k in (13, 14, 33, 61, 263, 291)}
            eyes = np.linalg.norm(at[33] - at[263])
            shapes.append([np.linalg.norm(at[13] - at[14]) / eyes, np.linalg.norm(at[61] - at[291]) / eyes])
    return np.array(shapes)


@pytest.mark.parametrize("name", ["late_0.4_a.mp4", "early_1.0_a.mp4", "clean_a.mp4"])
def test_the_sound_is_as_late_as_the_table_says_to_a_millisecond(world: Any, name: str) -> None:
    from scipy.signal import correlate, resample_poly

    expected = resample_poly(in_sync(files()[name]).samples, 3, 1)
    heard = sound(world.path(name))
    at = np.argmax(correlate(heard, expected, "full", "fft")) - (len(expected) - 1)
    assert at / 48_000 == pytest.approx(world.truth(name).sound_offset_s, abs=0.001)


@pytest.mark.slow
def test_the_lips_form_the_speech_whatever_the_offset_of_the_sound(world: Any) -> None:
    for name in ("clean_a.mp4", "late_0.4_a.mp4"):
        shapes, said = lip_shapes(world.path(name)), in_sync(files()[name])
        middles = (np.arange(len(shapes)) + 0.5) / 25
        fits = []
        for late in range(-5, 6):  # frames
            formed = np.array([said.mouth(t + late / 25) for t in middles])
            fits.append([np.corrcoef(shapes[:, k], formed[:, k])[0, 1] for k in (0, 1)])
        assert np.argmax(fits, axis=0)[0] == 5, name  # the best lag is zero, whatever the offset of the sound
        assert fits[5][0] > 0.85 and fits[5][1] > 0.3, name
    shut = lip_shapes(world.path("voice_over_a.mp4"))
    assert np.ptp(shut[:, 0]) < 0.5 * np.ptp(shapes[:, 0])


def test_text_is_where_and_when_the_table_says(world: Any) -> None:
    def lit(picture: np.ndarray, box: Any) -> float:
        height, width = picture.shape[:2]
        x0, y0, x1, y1 = (round(v * n) for v, n in zip(box, (width, height, width, height), strict=True))
        return float((picture[y0:y1, x0:x1].min(axis=2) > 190).mean())

    truth = world.truth("subtitles_a.mp4")
    seen: dict[bool, list[float]] = {True: [], False: []}
    for time, picture in pictures(world.path("subtitles_a.mp4"), every=7):
        shown = any(a <= time < b for a, b in truth.subtitles_s)
        seen[shown].append(lit(picture, truth.subtitle_box))
    assert min(seen[True]) > max(seen[False]) + 0.05
    assert len(truth.subtitles_s) == 3
    truth = world.truth("watermark_a.mp4")
    assert min(lit(picture, truth.watermark_box) for _, picture in pictures(world.path(truth.file), every=25)) > 0.1


def test_each_line_of_text_has_letters_of_its_own() -> None:
    masks = [lines.mask(name, 40) for name in lines.LINES]
    assert all(m.shape[1] > 20 and (m > 128).mean() > 0.1 for m in masks)
    assert len({m.tobytes() for m in masks}) == len(masks)


def test_faults_of_image_quality_grow_with_their_strength() -> None:
    import cv2

    film = files()["clean_a.mp4"]
    assert isinstance(film, Film)
    _, picture = next(film.pictures())

    def edges(image: np.ndarray) -> float:
        return float(cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())

    def after(fault: str, strength: float) -> np.ndarray:
        return spoil(picture, fault, strength, 0.0)

    assert edges(picture) > edges(after("blur", 1)) > edges(after("blur", 3))
    assert edges(picture) > edges(after("motion blur", 9)) > edges(after("motion blur", 19))
    assert edges(picture) < edges(after("noise", 10)) < edges(after("noise", 30))
    assert picture.mean() > after("dark", 0.5).mean() > after("dark", 0.2).mean()
    assert picture.mean() < after("bright", 0.3).mean() < after("bright", 0.6).mean()


def test_coarse_compression_leaves_blocks(world: Any) -> None:
    def grid(path: Path) -> float:
        """Mean step between columns at the borders of blocks, divided by that elsewhere."""
        grey = np.mean([p.mean(axis=2) for _, p in pictures(path, every=25)], axis=0)
        steps = np.abs(np.diff(grey, axis=1)).mean(axis=0)
        border = np.arange(1, len(steps) + 1) % 4 == 0
        return float(steps[border].mean() / steps[~border].mean())

    assert grid(world.path("blocks_a.mp4")) > 2 * grid(world.path("clean_a.mp4"))


@pytest.mark.slow
def test_as_many_faces_are_in_view_as_the_table_says(world: Any) -> None:
    solutions = pytest.importorskip("mediapipe").solutions
    with solutions.face_detection.FaceDetection(model_selection=1) as faces:
        for name in ("second_face_a.mp4", "two_people_a.mp4", "nobody_a.mp4"):
            truth = world.truth(name)
            for time, picture in pictures(world.path(name), every=20):
                second = any(a <= time < b for a, b in truth.second_s)
                expected = bool(truth.person_s) + second
                assert len(faces.process(picture).detections or []) == expected, (name, time)
        assert truth.people == 0


def test_a_copy_shows_and_says_the_same(world: Any) -> None:
    import cv2

    truth = world.truth("copy_small_a.mp4")
    copied, first = pictures(world.path(truth.file), every=50), pictures(world.path(truth.like), every=50)
    for (_, small), (_, large) in zip(copied, first, strict=True):
        assert small.shape == (270, 480, 3)
        large = cv2.resize(large, (480, 270), interpolation=cv2.INTER_AREA)
        assert np.abs(small.astype(int) - large).mean() < 6
    a, b = sound(world.path(truth.file)), sound(world.path(truth.like))
    assert np.corrcoef(a, b)[0, 1] > 0.99


def test_every_variant_has_every_fault() -> None:
    films = [f for f in files().values() if isinstance(f, Film) and {"faults", "faults_more"} & set(f.groups)]
    kinds = {letter: sorted(f.fault for f in films if f.name[-5] == letter) for letter in "abcdef"}
    assert all(found == kinds["a"] for found in kinds.values())
    assert set(QUALITY) < set(kinds["a"])
    assert len(catalogue(["faults"])) == len(kinds["a"])
