"""Whisper's encoder: equal to the reference, long audio in windows, and the stage `speech` with it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tasks.media.clip import SAMPLE_RATE, Clip
from tasks.networks import whisper
from tasks.stages.speech import Speech, SpeechSettings
from tasks.weights import store as weights
from tasks.weights.missing import MissingBackend
from tests import tiny_weights
from tests.parity import arrays, listing, needs_parity, shapes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Whisper with the fill rule's weights, in the published layout."""
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    folder = tmp_path / "whisper"
    tiny_weights.whisper(folder)
    return folder


@needs_parity
def test_states_equal_the_reference(folder: Path) -> None:
    assert tiny_weights.WHISPER.items() <= listing("whisper/keys_tiny.json")["config"].items()
    known = arrays("whisper/tiny_encoder.npz")
    encoder = whisper.load()
    samples = arrays("whisper/frontend.npz")["signal_int16"] / 32768
    # the fixture has the states of the padding too, which `states` leaves out
    padded = np.pad(samples, (0, 30 * SAMPLE_RATE - len(samples)))
    last, first, second = (whisper.states(encoder, padded, layers) for layers in ("last", 0, 1))
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(last[:200], known["last_hidden_state_first200"], **close)
    np.testing.assert_allclose(last[::25], known["last_hidden_state_every25"], **close)
    np.testing.assert_allclose(first[:50], known["hidden0_first50"], **close)
    np.testing.assert_allclose(second[:100], known["hidden1_first100"], **close)
    np.testing.assert_allclose(whisper.states(encoder, padded, "mean"), (first + second + last) / 3, **close)
    np.testing.assert_allclose(whisper.states(encoder, samples), last[:150], **close)


@needs_parity
@pytest.mark.parametrize("size", ["tiny", "base", "large_v3"])
def test_the_published_keys_are_expected_and_no_others(size: str) -> None:
    known = listing(f"whisper/keys_{size}_encoder.json")
    with torch.device("meta"):
        encoder = WhisperEncoder(WhisperConfig(**known["config"]))
    assert {key: tuple(value.shape) for key, value in encoder.state_dict().items()} == shapes(
        f"whisper/keys_{size}_encoder.json"
    )


def test_a_checkpoint_with_a_language_head_loads_to_the_same_encoder(folder: Path) -> None:
    weights.check("whisper")
    one = whisper.load().state_dict()
    model = WhisperForConditionalGeneration(WhisperConfig(**tiny_weights.WHISPER))
    model.load_state_dict(
        {f"model.{key}": v for key, v in weights.read(folder / "model.safetensors").items()}, strict=False
    )
    model.save_pretrained(folder)
    weights.check("whisper")
    other = whisper.load().state_dict()
    assert all(torch.equal(other[key], value) for key, value in one.items())


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_difference(folder: Path) -> None:
    state = weights.read(folder / "model.safetensors")
    del state["encoder.layer_norm.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(weights.WrongWeights, match=r"1 missing \(layer_norm.weight\)"):
        weights.check("whisper")


def test_long_audio_is_encoded_in_overlapping_windows(folder: Path) -> None:
    encoder = whisper.load()
    samples = np.random.default_rng(0).normal(0, 0.1, 62 * SAMPLE_RATE + 100).astype(np.float32)
    found = whisper.states(encoder, samples)
    assert found.shape == (62 * 50 + 1, 48)
    for start, (first, last) in {0: (0, 27.5), 25: (27.5, 52.5), 50: (52.5, 62)}.items():
        window = whisper.states(encoder, samples[start * SAMPLE_RATE : (start + 30) * SAMPLE_RATE])
        ours = found[round(first * 50) : round(last * 50)]
        np.testing.assert_allclose(ours, window[round((first - start) * 50) :][: len(ours)], atol=1e-4)


def test_the_speech_stage_gives_the_states_of_each_frame(folder: Path, clip_of: Callable[..., Clip]) -> None:
    clip = clip_of("talk_office.mp4")
    stage = Speech(SpeechSettings(backend="whisper"))
    stage.check()
    measured = stage.measure(clip)
    assert measured.columns == pytest.approx(Speech(SpeechSettings()).measure(clip).columns)
    found = measured.arrays["whisper"]
    assert found.shape == (clip.record.frames, -(-50 // clip.record.fps), 48)
    samples = clip.samples()
    assert samples is not None
    np.testing.assert_allclose(found[10, 0], whisper.states(whisper.load(), samples)[20], atol=2e-3)
    other = Speech(SpeechSettings(backend="whisper"))
    before = other.backend_version()
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert other.backend_version() != before


def test_a_layer_that_the_encoder_lacks_is_refused_before_the_run(folder: Path) -> None:
    with pytest.raises(MissingBackend, match=r"speech.layers is 3.*has 2 layers"):
        Speech(SpeechSettings(backend="whisper", layers=3)).check()
