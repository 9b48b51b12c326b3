"""Flow matching against results in closed form."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.config import TimestepSettings
from training.loop.flow_matching import (
    add_noise,
    clean_frames,
    draw_sigma,
    shift_sigma,
    squared_errors,
    velocity_target,
)

NORMAL_QUANTILES = {0.1: -1.2815516, 0.25: -0.6744898, 0.5: 0.0, 0.75: 0.6744898, 0.9: 1.2815516}


def drawn(**how: object) -> torch.Tensor:
    return draw_sigma(20_000, TimestepSettings.model_validate(how), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_have_the_quantiles_of_their_density(shift: float) -> None:
    uniform = drawn(sampling="uniform", shift=shift)
    logit_normal = drawn(sampling="logit_normal", mean=-0.5, std=1.2, shift=shift)
    for share, z in NORMAL_QUANTILES.items():
        # a monotonous function maps quantiles to quantiles
        assert uniform.quantile(share).item() == pytest.approx(shift * share / (1 + (shift - 1) * share), abs=0.01)
        at = 1 / (1 + math.exp(0.5 - 1.2 * z))
        assert logit_normal.quantile(share).item() == pytest.approx(shift * at / (1 + (shift - 1) * at), abs=0.01)
    assert min(uniform.min(), logit_normal.min()) >= 0 and max(uniform.max(), logit_normal.max()) <= 1


def test_the_same_seed_draws_the_same_noise_levels() -> None:
    assert torch.equal(drawn(shift=2.0), drawn(shift=2.0))


@settings(deadline=None)
@given(sigma=st.floats(0, 1), a=st.floats(0.1, 20), b=st.floats(0.1, 20))
def test_shifts_multiply_and_keep_the_ends(sigma: float, a: float, b: float) -> None:
    at = torch.tensor([sigma, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(shift_sigma(shift_sigma(at, a), b), shift_sigma(at, a * b))
    assert shift_sigma(at, a)[1:].tolist() == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_the_target_means_the_known_velocity_of_a_gaussian(sigma: float) -> None:
    """With data ~ N(mu, s^2), E[noise - data | x] is linear in x. Least squares on many draws must find it."""
    mu, s, count = 0.7, 0.4, 200_000
    draw = torch.Generator().manual_seed(1)
    data = mu + s * torch.randn(count, 1, 1, 1, 1, generator=draw, dtype=torch.float64)
    noise = torch.randn(data.shape, generator=draw, dtype=torch.float64)
    none = torch.zeros(count, 1, dtype=torch.bool)
    x = add_noise(data, noise, torch.full((count,), sigma, dtype=torch.float64), none).flatten()
    fit = torch.linalg.lstsq(torch.stack((x, torch.ones_like(x)), 1), velocity_target(data, noise).flatten()).solution
    variance = (1 - sigma) ** 2 * s**2 + sigma**2
    slope = (sigma - (1 - sigma) * s**2) / variance
    assert fit[0].item() == pytest.approx(slope, abs=0.02)
    assert fit[1].item() == pytest.approx(-mu - slope * (1 - sigma) * mu, abs=0.02)


def test_physavatars_convention_has_the_same_error() -> None:
    """Its x_t = t x_1 + (1 - t) x_0 with data x_1 and velocity x_1 - x_0, at t = 1 - sigma."""
    draw = torch.Generator().manual_seed(2)
    data, noise, told = torch.randn(3, 2, 2, 3, 2, 2, generator=draw)
    sigma, none = torch.tensor([0.2, 0.8]), torch.zeros(2, 3, dtype=torch.bool)
    t = (1 - sigma)[:, None, None, None, None]
    torch.testing.assert_close(add_noise(data, noise, sigma, none), t * data + (1 - t) * noise)
    theirs = (-told - (data - noise)).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(squared_errors(told, data, noise, none), theirs)


def test_conditions_are_clean_where_they_are_not_dropped() -> None:
    drop_first, drop_last = torch.tensor([False, True, False, True]), torch.tensor([False, False, True, True])
    assert clean_frames(drop_first, drop_last, 3).int().tolist() == [[1, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert clean_frames(drop_first, drop_last, 1).flatten().tolist() == [True, True, True, False]


def test_clean_frames_are_given_as_they_are_and_left_out_of_the_loss() -> None:
    draw = torch.Generator().manual_seed(3)
    data, noise, told = torch.randn(3, 2, 2, 4, 2, 2, generator=draw)
    clean = torch.tensor([[True, False, False, True], [True, True, True, True]])
    x = add_noise(data, noise, torch.tensor([0.5, 0.5]), clean)
    assert torch.equal(x[0, :, [0, 3]], data[0, :, [0, 3]]) and torch.equal(x[1], data[1])
    torch.testing.assert_close(x[0, :, 1], 0.5 * (data + noise)[0, :, 1])
    told.requires_grad_()
    errors = squared_errors(told, data, noise, clean)
    errors.sum().backward()
    assert told.grad is not None
    assert told.grad[0, :, [0, 3]].abs().max() == told.grad[1].abs().max() == 0 < told.grad[0, :, 1].abs().min()
    assert errors[0].item() == pytest.approx((told - noise + data)[0, :, 1:3].square().mean().item(), rel=1e-5)
    assert errors[1] == 0
