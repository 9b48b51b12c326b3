"""Speech: Whisper's spectrogram, windows that stay with their frames, and speech where the truth has it."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.media.clip import SAMPLE_RATE, Clip, ClipRecord
from tasks.networks.log_mel import frame_windows, log_mel, mel_filters
from tasks.stages.speech import Speech, SpeechSettings
from tasks.stages.voice_activity import VoiceDetector, speech_spans
from tasks.weights.missing import MissingBackend
from tests.parity import arrays, needs_parity

ClipOf = Callable[..., Clip]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def speech() -> Speech:
    return Speech(SpeechSettings())


def sound(seconds: float) -> np.ndarray:
    """A buzz like a voice that rises and falls, [samples] float32."""
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    buzz = sum(np.sin(2 * np.pi * 140 * k * t) / k for k in range(1, 20))
    return (0.1 * buzz * (1 + np.sin(2 * np.pi * 0.7 * t))).astype(np.float32)


def clip_with(samples: np.ndarray | None, folder: Path, frames: int = 50, fps: int = 25) -> Clip:
    path = None
    if samples is not None:
        path = folder / "sound.flac"
        soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
    return Clip(ClipRecord("c", "s", 0.0, frames / fps, fps, frames, 64, 64, "", ""), folder / "no.mp4", path)


@needs_parity
@pytest.mark.parametrize("num_mels", [80, 128])
def test_the_front_end_gives_whispers_numbers(num_mels: int) -> None:
    reference = arrays("whisper/frontend.npz")
    found = log_mel(reference["signal_int16"] / 32768, num_mels)
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(mel_filters(num_mels), reference[f"mel_filters{num_mels}"], **close)
    np.testing.assert_allclose(found[:320].T, reference[f"logmel{num_mels}_first320"], **close)
    tail = np.broadcast_to(reference[f"logmel{num_mels}_tail_value"], (2680, num_mels))
    np.testing.assert_allclose(found[320:], tail, **close)
    statistics = [found.mean(), found.std(), found.min(), found.max(), np.abs(found).sum(dtype=np.float64)]
    np.testing.assert_allclose(statistics, reference[f"logmel{num_mels}_stats"], rtol=1e-5)


def test_a_full_window_keeps_its_last_column() -> None:
    samples = np.zeros(30 * SAMPLE_RATE)
    samples[-400:] = 0.5 * np.sin(np.arange(400))
    columns = log_mel(samples)
    assert columns.shape == (3000, 80)
    assert columns[-1].max() == columns.max()


def test_windows_tile_the_spectrogram_at_25_frames_a_second() -> None:
    samples = sound(2.0)
    windows = frame_windows(samples, 50, 25)
    assert windows.dtype == np.float16
    np.testing.assert_array_equal(windows.reshape(200, 80), log_mel(samples)[:200].astype(np.float16))


def test_a_click_lands_in_the_window_of_its_frame() -> None:
    for fps in (24, 25, 30):
        for frame in (0, 7, 40):
            samples = np.zeros(2 * SAMPLE_RATE, np.float32)
            samples[round((frame + 0.5) / fps * SAMPLE_RATE)] = 1.0
            loud = frame_windows(samples, 2 * fps, fps).astype(np.float32).mean(axis=(1, 2))
            assert loud.argmax() == frame


def test_long_sound_is_processed_in_windows_of_30_s() -> None:
    samples = sound(65.0)
    samples[30 * SAMPLE_RATE : 60 * SAMPLE_RATE] *= 0.01
    windows = frame_windows(samples, 65 * 25, 25).reshape(-1, 80)
    for number, chunk in enumerate((samples[:480000], samples[480000:960000], samples[960000:])):
        expected = log_mel(chunk).astype(np.float16)[: len(chunk) // 160]
        np.testing.assert_array_equal(windows[number * 3000 :][: len(expected)], expected)


@settings(max_examples=30, deadline=None)
@given(fps=st.integers(1, 120), frames=st.integers(1, 120))
def test_windows_begin_at_the_column_nearest_their_frame(fps: int, frames: int) -> None:
    # A sound of one second at most, with a spectrogram that differs from column to column.
    frames = min(frames, fps)
    samples = sound(frames / fps)
    columns = log_mel(samples).astype(np.float16)
    windows = frame_windows(samples, frames, fps)
    assert windows.shape == (frames, -(-100 // fps), 80)
    for k in range(frames):
        nearest = int(np.floor(100 * k / fps + 0.5 + 1e-9))
        np.testing.assert_array_equal(windows[k], columns[nearest : nearest + windows.shape[1]])


@pytest.mark.parametrize("name", ["talk_office.mp4", "speech_sparse.mp4", "nobody.mp4", "silent.mp4"])
def test_the_fraction_of_speech_is_that_of_the_truth(name: str, speech: Speech, clip_of: ClipOf, world: Any) -> None:
    truth, clip = world.truth(name), clip_of(name)
    measured = speech.measure(clip)
    spoken = sum(end - start for start, end in truth.speech_s) / truth.duration_s
    assert measured.columns["fraction"] == pytest.approx(spoken, abs=0.1)
    assert measured.arrays["log_mel"].shape == (clip.record.frames, 4, 80)
    assert measured.arrays["log_mel"].dtype == np.float16


def test_earlier_clips_do_not_change_a_measurement(speech: Speech, clip_of: ClipOf) -> None:
    first = speech.measure(clip_of("talk_office.mp4"))
    speech.measure(clip_of("speech_sparse.mp4"))
    again = speech.measure(clip_of("talk_office.mp4"))
    assert again.columns == first.columns
    assert again.arrays["log_mel"].tobytes() == first.arrays["log_mel"].tobytes()


def test_a_clip_without_sound_has_no_values(speech: Speech, tmp_path: Path) -> None:
    measured = speech.measure(clip_with(None, tmp_path))
    assert measured.columns == {"fraction": None, "loudness_db": None}
    assert measured.arrays == {}


def test_loudness_is_in_decibels_of_full_scale(speech: Speech, tmp_path: Path) -> None:
    wave = np.sin(2 * np.pi * 440 * np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE)
    for amplitude, loudness in ((1.0, -3.01), (0.1, -23.01), (0.0, -120.0)):
        columns = speech.measure(clip_with(amplitude * wave, tmp_path)).columns
        assert columns["loudness_db"] == pytest.approx(loudness, abs=0.02)
        assert columns["fraction"] == 0.0


def test_speech_is_where_the_silero_package_finds_it(clip_of: ClipOf) -> None:
    from silero_vad import get_speech_timestamps, load_silero_vad

    for name in ("speech_sparse.mp4", "nobody.mp4"):
        samples = clip_of(name).samples()
        assert samples is not None
        expected = get_speech_timestamps(samples, load_silero_vad())
        assert VoiceDetector().spans(samples) == [(span["start"], span["end"]) for span in expected]


@settings(max_examples=200, deadline=None)
@given(
    runs=st.lists(st.tuples(st.sampled_from([0.0, 0.3, 0.4, 0.5, 0.9]), st.integers(1, 20)), max_size=20),
    short=st.integers(0, 511),
)
def test_spans_follow_sileros_rule(runs: list[tuple[float, int]], short: int) -> None:
    from silero_vad.utils_vad import get_speech_timestamps_from_probs

    probabilities = np.concatenate([np.full(n, p) for p, n in runs] or [np.zeros(0)])
    length = max(0, len(probabilities) * 512 - short)
    expected = get_speech_timestamps_from_probs(list(probabilities), audio_length_samples=length)
    assert speech_spans(probabilities, length) == [(span["start"], span["end"]) for span in expected]


def test_the_stage_runs_without_torch() -> None:
    code = (
        "import sys, numpy; from tasks.stages.speech import Speech, SpeechSettings;"
        "from tasks.stages.voice_activity import VoiceDetector;"
        "Speech(SpeechSettings()).check();"
        "VoiceDetector().spans(numpy.zeros(16000, 'f4')); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout) == (0, "False\n"), run.stderr


def test_a_missing_voice_detector_is_an_error_before_work_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingBackend, match=r"silero-vad is not installed in .*pip install --no-deps silero-vad"):
        Speech(SpeechSettings()).check()
