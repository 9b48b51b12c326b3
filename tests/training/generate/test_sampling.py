"""Sampling: known distributions are recovered, guidance follows its order, given frames stay."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from tasks.stages.latents.codec import CosineCodec
from training.generate.sampling import (
    ClassifierFreeGuidance,
    euler,
    initial_noise,
    reference_latent,
    sample_clip,
    sigma_steps,
)
from training.models.active_mind.config import PSEUDO_LAST, ActiveMindSettings, Shape
from training.models.active_mind.mask_predictor import MaskPredictor
from training.models.active_mind.model import ActiveMind, Conditions

SETTINGS = ActiveMindSettings(
    shape=Shape(width=16, depth=2, heads=2, mlp=32, patch=1), channels=2, text_dim=5, audio_window=1, audio_features=3
)
FRAMES = 4


@pytest.fixture
def model() -> ActiveMind:
    made, draw = ActiveMind(SETTINGS), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    return made


@pytest.fixture
def conditions() -> Conditions:
    no = torch.zeros(2, dtype=torch.bool)
    words = torch.ones(2, 3, dtype=torch.bool)
    return Conditions(initial_noise((2, 4 * FRAMES - 3, 1, 3), 1), initial_noise((2, 3, 5), 2), words, no, no)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_exact_velocity_gives_a_gaussian_back(shift: float) -> None:
    mu, s = 1.5, 0.3

    def velocity(x: Tensor, sigma: float) -> Tensor:
        variance = (1 - sigma) ** 2 * s**2 + sigma**2
        return -mu + (sigma - (1 - sigma) * s**2) / variance * (x - (1 - sigma) * mu)

    found = euler(velocity, initial_noise((4000,), 0).double(), sigma_steps(200, shift))
    assert stats.kstest(found.numpy(), "norm", args=(mu, s)).pvalue > 0.01
    assert found.std().item() == pytest.approx(s, rel=0.05)


def test_the_exact_velocity_gives_two_peaks_back() -> None:
    """The data are -1 with weight 1/3 and 2 with weight 2/3. The velocity is that of their posterior mean."""
    points, weights = torch.tensor([-1.0, 2.0]).double(), torch.tensor([1 / 3, 2 / 3]).double()

    def velocity(x: Tensor, sigma: float) -> Tensor:
        log = weights.log() - (x[:, None] - (1 - sigma) * points).square() / (2 * sigma**2)
        data = (log.softmax(1) * points).sum(1)
        return (x - data) / sigma

    found = euler(velocity, initial_noise((4000,), 1).double(), sigma_steps(100))
    assert (found[:, None] - points).abs().amin(1).max() < 1e-6
    assert (found > 0.5).double().mean().item() == pytest.approx(2 / 3, abs=0.03)


def test_steps_are_shifted_once() -> None:
    assert sigma_steps(50, shift=5.0)[-2].item() == pytest.approx(0.0926, abs=1e-4)  # shifted twice it would be 0.0244
    assert sigma_steps(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("levels", [[1.0], [0.5, 1.0], [1.0, 1.0, 0.0], [2.0, 0.0], [1.0, -0.5], [1.0, float("nan")]])
def test_noise_levels_that_do_not_fall_are_refused(levels: list[float]) -> None:
    with pytest.raises(ValueError, match="noise levels fall from at most 1 to at least 0"):
        euler(lambda x, _: x, torch.zeros(1), torch.tensor(levels))


@pytest.mark.parametrize("order", ["text_then_audio", "audio_then_text"])
def test_guidance_adds_text_and_sound_in_the_order_it_names(
    order: Literal["text_then_audio", "audio_then_text"], model: ActiveMind, conditions: Conditions
) -> None:
    noise, yes = initial_noise((2, 2, FRAMES, 2, 2), 3), torch.ones(2, dtype=torch.bool)

    def told(text: bool, audio: bool) -> Tensor:
        which = replace(
            conditions,
            drop_text=conditions.drop_text if text else yes,
            drop_audio=conditions.drop_audio if audio else yes,
        )
        found: Tensor = model(noise, torch.ones(2), torch.zeros(2, FRAMES, dtype=torch.bool), which).velocity
        return found

    u, both = told(False, False), told(True, True)
    if order == "text_then_audio":
        expected = u + 4.0 * (told(True, False) - u) + 2.5 * (both - told(True, False))
    else:
        expected = u + 2.5 * (told(False, True) - u) + 4.0 * (both - told(False, True))
    guidance = ClassifierFreeGuidance(text=4.0, audio=2.5, order=order)
    found = sample_clip(model, conditions, noise, torch.tensor([1.0, 0.0]), guidance=guidance)
    torch.testing.assert_close(noise - found, expected, atol=1e-4, rtol=1e-4)
    assert (told(True, False) - told(False, True)).abs().max() > 1e-3


def test_the_orders_differ_and_velocities_of_factor_0_are_left_out() -> None:
    assert ClassifierFreeGuidance().shares() == {(True, True): 1.0}
    assert ClassifierFreeGuidance(text=3.0, audio=3.0).shares() == {(False, False): -2.0, (True, True): 3.0}
    assert ClassifierFreeGuidance(3.0, 2.0).shares() == {(False, False): -2.0, (True, False): 1.0, (True, True): 2.0}
    assert ClassifierFreeGuidance(3.0, 2.0, "audio_then_text").shares() == {
        (False, False): -1.0,
        (False, True): -1.0,
        (True, True): 3.0,
    }


def test_given_frames_stay_and_the_reference_is_thrown_away(model: ActiveMind, conditions: Conditions) -> None:
    first, reference = initial_noise((2, 2, 2, 2, 2), 4), initial_noise((2, 2, 2, 2), 5)
    noise, steps = initial_noise((2, 2, FRAMES, 2, 2), 3), sigma_steps(3)
    found = sample_clip(model, conditions, noise, steps, first, reference)
    assert found.shape == noise.shape
    assert torch.equal(found[:, :, :2], first)
    assert found.isfinite().all()
    others = {
        "no reference": sample_clip(model, conditions, noise, steps, first),
        "another": sample_clip(model, conditions, noise, steps, first, reference + 1),
        "nearer": sample_clip(model, conditions, noise, steps, first, reference, pseudo_last=1),
        "no first": sample_clip(model, conditions, noise, steps, None, reference),
    }
    for name, other in others.items():
        assert (found - other)[:, :, 2:].abs().max() > 1e-4, name
    again = sample_clip(model, conditions, noise, steps, first, reference, pseudo_last=PSEUDO_LAST)
    assert torch.equal(found, again)


def test_clips_sampled_together_are_those_sampled_alone(model: ActiveMind, conditions: Conditions) -> None:
    noise, steps, guidance = initial_noise((2, 2, FRAMES, 2, 2), 3), sigma_steps(3), ClassifierFreeGuidance(2.0, 3.0)
    together = sample_clip(model, conditions, noise, steps, guidance=guidance)
    alone = Conditions(*(getattr(conditions, n)[1:] for n in ("audio", "text", "text_mask", "drop_audio", "drop_text")))
    torch.testing.assert_close(
        sample_clip(model, alone, noise[1:], steps, guidance=guidance), together[1:], atol=1e-5, rtol=0
    )


def test_a_reference_is_encoded_as_the_last_latent_of_a_still_video() -> None:
    codec = CosineCodec(48)
    image = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    *_, last = codec.encode([image] * 13)
    found = reference_latent(codec, image)
    assert found.shape == (48, 2, 3)
    np.testing.assert_array_equal(found.numpy(), last.latent)


def test_a_start_that_leaves_nothing_to_make_is_refused(model: ActiveMind, conditions: Conditions) -> None:
    with pytest.raises(ValueError, match="4 latent frames to start from leave none of 4 to sample"):
        noise = initial_noise((2, 2, FRAMES, 2, 2), 3)
        sample_clip(model, conditions, noise, sigma_steps(2), first=noise)


def test_speakers_are_followed_from_step_to_step(model: ActiveMind, conditions: Conditions) -> None:
    """With a predictor that sees the second speaker everywhere and the first nowhere, the sound of the first speaker
    has no effect from the second step on."""

    class Everywhere(MaskPredictor):
        def forward(self, hidden: Tensor, speaker_mask: Tensor, known_frame: int) -> Tensor:
            assert known_frame == -1 and speaker_mask.shape == (2, 2, 1, 2, 2)
            logits = torch.ones(2, 2, *hidden.shape[1:4])
            logits[:, 0] = -1
            return logits

    mask = torch.zeros(2, 2, 1, 2, 2, dtype=torch.bool)
    mask[:, 0, :, 0], mask[:, 1, :, 1] = True, True
    speech = initial_noise((2, 2, 4 * FRAMES - 3, 1, 3), 6)
    heard = replace(conditions, audio=speech, speaker_mask=mask)
    noise, reference, steps = initial_noise((2, 2, FRAMES, 2, 2), 3), initial_noise((2, 2, 2, 2), 5), sigma_steps(2)
    found = sample_clip(model, heard, noise, steps, None, reference, mask_predictor=Everywhere(16))
    fixed = sample_clip(model, heard, noise, steps, None, reference)
    # step by step: one step with the given mask, one with the predicted one
    half = sample_clip(model, heard, noise, steps[:2], None, reference)
    everywhere = torch.zeros(2, 2, FRAMES + 1, 2, 2, dtype=torch.bool)
    everywhere[:, 1] = True
    rest = sample_clip(model, replace(heard, speaker_mask=everywhere), half, steps[1:], None, reference)
    torch.testing.assert_close(found, rest, atol=1e-5, rtol=0)
    assert (found - fixed).abs().max() > 1e-4
