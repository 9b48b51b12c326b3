"""Sync: known offsets are found, another person's sound is recognised, and clips that tell nothing get a reason."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from data_manifests.strict import RecipeError, validate
from tasks.media.clip import SAMPLE_RATE, Clip, ClipRecord, Measurement
from tasks.stages.identity.stage import Identity, IdentitySettings
from tasks.stages.sync.backends import BACKENDS, FaceBackend, SyncBackend, SyncFit
from tasks.stages.sync.lip_audio_correlation import RATE, Match, lip_curves, match, sound_curves
from tasks.stages.sync.stage import Sync, SyncSettings

FRAME_S = 0.04
FOOTAGE = Path(__file__).parents[4] / "shared" / "footage"
Watched = Callable[[str], Clip]


@pytest.fixture(scope="module")
def stage() -> Sync:
    return Sync(SyncSettings())


@pytest.fixture(scope="module")
def watched(clip_of: Any) -> Watched:
    """Gives a generated clip with identity's results."""
    pytest.importorskip("mediapipe")
    identity = Identity(IdentitySettings())

    @functools.cache
    def watch(name: str) -> Clip:
        clip = clip_of(name)
        return dataclasses.replace(clip, found={"identity": identity.measure(clip)})

    return watch


def later(samples: np.ndarray, by_s: float) -> np.ndarray:
    """Move a sound to later, or to earlier if `by_s` is negative. The length stays."""
    moved, by = np.zeros_like(samples), round(by_s * SAMPLE_RATE)
    moved[max(0, by) : len(samples) + min(0, by)] = samples[max(0, -by) : len(samples) - max(0, by)]
    return moved


def with_sound(clip: Clip, samples: np.ndarray, path: Path) -> Clip:
    soundfile.write(path, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return dataclasses.replace(clip, audio_path=path)


def made(lips: np.ndarray, samples: np.ndarray | None, folder: Path, fps: int = 25) -> Clip:
    """A clip without a picture, with given lips, [frames, 4], and a face where they are not NaN."""
    box = np.where(np.isnan(lips), np.nan, np.array([[0.4, 0.3, 0.6, 0.6]])).astype(np.float32)
    found = Measurement({}, {"face_box": box, "lips": lips.astype(np.float32)})
    record = ClipRecord("c", "s", 0.0, len(lips) / fps, fps, len(lips), 640, 360, "", "")
    clip = Clip(record, folder / "none.mp4", None, found={"identity": found})
    return clip if samples is None else with_sound(clip, samples, folder / "made.flac")


def utterance(seconds: float, fps: float = 25, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lips, [frames, 4], that open with the loudness of a sound; and the sound, noise with the rhythm of syllables."""
    from scipy.ndimage import gaussian_filter1d

    rng = np.random.default_rng(seed)
    steps = round(seconds * 1000)
    loudness = gaussian_filter1d(rng.normal(0, 1, steps), 60)
    loudness = np.clip(0.5 + loudness / loudness.std() / 4, 0.01, 1)
    samples = rng.normal(0, 0.2, round(seconds * SAMPLE_RATE)) * np.repeat(loudness, SAMPLE_RATE // 1000)
    shown_s = (np.arange(round(seconds * fps)) + 0.5) / fps
    opening = np.interp(shown_s, (np.arange(steps) + 0.5) / 1000, loudness)
    others = rng.normal(0, 0.05, (len(shown_s), 3)) + opening[:, None] * (0.2, 1, 0.5)
    return np.column_stack([opening, others]), samples.astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(
    offset_s=st.floats(-1.2, 1.2),
    fps=st.sampled_from([24, 25, 30]),
    seed=st.integers(0, 99),
    gap=st.integers(0, 40),
)
def test_an_offset_is_found_to_half_a_frame_at_any_rate_and_across_gaps(
    offset_s: float, fps: int, seed: int, gap: int
) -> None:
    lips, samples = utterance(8, fps, seed)
    lips[fps : fps + gap] = np.nan
    found = match(lip_curves(lips, fps), sound_curves(later(samples, offset_s)), 1.5)
    assert found is not None
    assert found.offset_s == pytest.approx(offset_s, abs=FRAME_S / 2)


def test_a_chance_fit_has_a_low_confidence() -> None:
    own: list[Match] = []
    strangers: list[Match] = []
    for seed in range(12):
        lips, samples = utterance(6, seed=seed)
        _, other = utterance(6, seed=seed + 1000)
        for sound, into in ((samples, own), (other, strangers)):
            found = match(lip_curves(lips, 25), sound_curves(sound), 1.5)
            assert found is not None
            into.append(found)
    assert min(m.confidence for m in own) > max(m.confidence for m in strangers)
    assert np.median([m.confidence for m in own]) > 2 * np.median([m.confidence for m in strangers])
    assert min(m.correlation for m in own) > max(m.correlation for m in strangers)
    assert max(m.confidence for m in strangers) < 5


def test_curves_have_50_steps_a_second() -> None:
    lips, samples = utterance(4, fps=24)
    assert lip_curves(lips, 24).shape == (4 * RATE, 4)
    assert sound_curves(samples).shape == (4 * RATE, 5)
    assert not lip_curves(np.full((50, 4), np.nan), 25).any()
    assert sound_curves(np.zeros(100, np.float32)).shape == (0, 5)


@pytest.mark.parametrize(
    "name",
    ["talk_medium.mp4", *(pytest.param(n, marks=pytest.mark.slow) for n in ("talk_office.mp4", "talk_full.mp4"))],
)
def test_offsets_built_into_generated_speech_are_found_to_one_frame(
    name: str, watched: Watched, stage: Sync, tmp_path: Path
) -> None:
    clip = watched(name)
    samples = clip.samples()
    assert samples is not None
    for offset_s in (0.0, 0.2, 0.4, 1.0, -0.2, -0.4, -1.0):
        found: dict[str, Any] = stage.measure(
            with_sound(clip, later(samples, offset_s), tmp_path / f"{offset_s}.flac")
        ).columns
        assert found["reason"] == ""
        assert found["offset_s"] == pytest.approx(offset_s, abs=FRAME_S)
        assert found["confidence"] > 7
        assert found["distance"] < 0.3


def test_the_speakers_own_speech_fits_better_than_anothers(watched: Watched, stage: Sync, tmp_path: Path) -> None:
    office, medium = watched("talk_office.mp4"), watched("talk_medium.mp4")
    samples, others = office.samples(), medium.samples()
    assert samples is not None and others is not None
    others = np.resize(others, len(samples))
    own = stage.measure(office).columns
    strange = stage.measure(with_sound(office, others, tmp_path / "other.flac")).columns
    assert own["confidence"] > 2.5 * strange["confidence"] > 0  # type: ignore[operator]
    assert strange["confidence"] < 4  # type: ignore[operator]
    assert own["distance"] < strange["distance"]  # type: ignore[operator]


def test_a_voice_over_lips_that_do_not_move_has_no_offset(watched: Watched, stage: Sync, tmp_path: Path) -> None:
    samples = watched("talk_office.mp4").samples()
    assert samples is not None
    still = np.tile(np.array([0.02, 0.7, 0.2, 0.8]), (250, 1))
    found = stage.measure(made(still, samples, tmp_path)).columns
    assert found == {"offset_s": None, "confidence": 0.0, "distance": 1.0, "reason": ""}
    trembling = still + np.random.default_rng(1).normal(0, 0.003, still.shape)
    assert stage.measure(made(trembling, samples, tmp_path)).columns["confidence"] < 4  # type: ignore[operator]


@pytest.mark.parametrize("name", ["nobody.mp4", "silent.mp4"])
def test_a_clip_that_cannot_be_measured_has_a_reason(name: str, watched: Watched, stage: Sync) -> None:
    reason = {"nobody.mp4": "no face", "silent.mp4": "no speech"}[name]
    found = stage.measure(watched(name)).columns
    assert found == {"offset_s": None, "confidence": None, "distance": None, "reason": reason}


def test_reasons_of_clips_without_a_picture(stage: Sync, tmp_path: Path) -> None:
    lips, samples = utterance(4)

    def reason(lips: np.ndarray, samples: np.ndarray | None) -> Any:
        return stage.measure(made(lips, samples, tmp_path)).columns["reason"]

    assert reason(lips, None) == reason(lips, np.zeros_like(samples)) == "no sound"
    assert reason(lips[:74], samples[: 74 * 640]) == "too short"
    hidden = np.where(np.arange(len(lips))[:, None] < 49, lips, np.nan)
    assert reason(hidden, samples) == "no face"
    assert reason(lips, samples) == "no speech"  # the noise is not a voice


def test_earlier_clips_do_not_change_a_measurement(watched: Watched, stage: Sync) -> None:
    first = Sync(SyncSettings()).measure(watched("talk_office.mp4")).columns
    stage.measure(watched("talk_medium.mp4"))
    assert stage.measure(watched("talk_office.mp4")).columns == first


def test_a_new_backend_takes_one_class(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(SyncBackend):
        """Finds the largest offset in every clip."""

        def __init__(self, max_offset_s: float, face: FaceBackend) -> None:
            self.max_offset_s = max_offset_s

        @classmethod
        def version(cls) -> str:
            return "late 1"

        def __call__(self, clip: Clip, samples: np.ndarray) -> SyncFit:
            return SyncFit(self.max_offset_s, 9.0, 0.25)

    monkeypatch.setitem(BACKENDS, "late", Late)
    stage = Sync(SyncSettings(backend="late", natural_s=0.0))
    stage.check()
    assert stage.backend_version().startswith("late 1, ")
    found = stage.measure(watched("talk_office.mp4")).columns
    assert found == {"offset_s": 1.5, "confidence": 9.0, "distance": 0.25, "reason": ""}
    with pytest.raises(RecipeError, match=r"here: backend: unknown backend 'lip'; did you mean 'lips'\?"):
        validate(SyncSettings, {"backend": "lip"}, "here")


@pytest.mark.skipif(not FOOTAGE.is_dir(), reason="needs the shared footage")
def test_a_real_talker_is_in_sync_and_a_shift_is_found_to_half_a_frame(stage: Sync, tmp_path: Path) -> None:
    pytest.importorskip("mediapipe")
    from data_manifests.storage import Storage
    from tasks.cutting.clip_plan import ClipSettings, plan_clips
    from tasks.cutting.clip_writer import write_clips
    from tasks.cutting.ingest import ingest
    from tasks.cutting.shots import Shot

    path, storage = FOOTAGE / "talk_ref_square.mp4", Storage(str(tmp_path / "clips"))
    source, how = (
        ingest(str(path)),
        ClipSettings.model_validate({"fps": 25, "short_side": 458, "min_s": 1, "max_s": 60}),
    )
    shot = Shot(0.0, 8.0, 0.0, 8.0, False, False)
    (record,) = write_clips(source, path, plan_clips(source, [shot], [], how)[0], how, storage)
    clip = Clip(record, Path(storage.path(record.video)), Path(storage.path(record.audio)))
    clip = dataclasses.replace(clip, found={"identity": Identity(IdentitySettings()).measure(clip)})
    samples = clip.samples()
    assert samples is not None
    own: dict[str, Any] = stage.measure(clip).columns
    assert abs(own["offset_s"]) < 0.12
    assert own["confidence"] > 4.5
    for offset_s in (0.4, -0.4):
        found: dict[str, Any] = stage.measure(
            with_sound(clip, later(samples, offset_s), tmp_path / "shifted.flac")
        ).columns
        assert found["offset_s"] - own["offset_s"] == pytest.approx(offset_s, abs=FRAME_S / 2)
