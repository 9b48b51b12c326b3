"""Flow matching (Liu et al. 2022), in the convention of Wan:

    x_sigma = (1 - sigma) data + sigma noise,    target = noise - data,    sigma in 0..1, timestep = 1000 sigma

Sigma 1 is noise, and sampling goes from 1 down to 0. physavatar section 3.1 counts the other way: its x_1 is data, its
x_0 noise, t = 1 - sigma, and its velocity x_1 - x_0 is the negative of this target. The squared errors are the same.
"""

import torch
from torch import Tensor

from training.config import TimestepSettings


def draw_sigma(count: int, timesteps: TimestepSettings, generator: torch.Generator) -> Tensor:
    """Noise levels to train at: [count] float32, on the CPU. The same on every machine for a generator's seed."""
    if timesteps.sampling == "uniform":
        sigma = torch.rand(count, generator=generator, dtype=torch.float64)
    else:
        normal = torch.randn(count, generator=generator, dtype=torch.float64)
        sigma = torch.sigmoid(timesteps.mean + timesteps.std * normal)
    return shift_sigma(sigma, timesteps.shift).float()


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Noise levels shifted towards noise: shift sigma / (1 + (shift - 1) sigma).

    The same noise hides less of a video with more pixels, so larger videos take a larger shift (Esser et al. 2024b,
    section 5.3.2).
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def clean_frames(drop_first: Tensor, drop_last: Tensor, frames: int) -> Tensor:
    """The latent frames that are conditions: the first and the last, unless they are dropped.

    drop_first, drop_last: [batch] bool. Returns: [batch, frames] bool.
    """
    clean = torch.zeros(len(drop_first), frames, dtype=torch.bool, device=drop_first.device)
    clean[:, 0] |= ~drop_first
    clean[:, -1] |= ~drop_last
    return clean


def add_noise(data: Tensor, noise: Tensor, sigma: Tensor, clean: Tensor) -> Tensor:
    """The data at noise level sigma. Clean frames stay as they are.

    data, noise: [batch, channels, frames, height, width]. sigma: [batch]. clean: [batch, frames] bool.
    """
    level = torch.where(clean, 0.0, sigma[:, None])[:, None, :, None, None]
    return torch.where(clean[:, None, :, None, None], data, (1 - level) * data + level * noise)


def velocity_target(data: Tensor, noise: Tensor) -> Tensor:
    """The velocity to learn."""
    return noise - data


def squared_errors(velocity: Tensor, data: Tensor, noise: Tensor, clean: Tensor) -> Tensor:
    """The loss of each sample: the mean squared error over its frames that are not clean.

    velocity, data, noise: [batch, channels, frames, height, width]. clean: [batch, frames] bool. Returns: [batch]
    float32; 0 for a sample whose frames are all clean.
    """
    by_frame = (velocity.float() - velocity_target(data, noise).float()).square().mean(dim=(1, 3, 4))
    return by_frame.masked_fill(clean, 0.0).sum(1) / (~clean).sum(1).clamp(min=1)
