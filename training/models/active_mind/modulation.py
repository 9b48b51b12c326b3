"""Modulation by the noise level: shift, scale and gate of every block, always in float32."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.active_mind.config import TIME_FEATURES


class Linear(nn.Linear):
    """A linear layer that computes in autocast's type, or in its weights' type without autocast. The input's type does
    not matter."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if torch.is_autocast_enabled(x.device.type) else x.to(self.weight.dtype))


class TimestepEmbedder(nn.Module):
    """Sigma to the six vectors that all blocks share: shift, scale and gate of the attention, then of the MLP.

    It starts at zero, as the branches' offsets do. So each block passes its input on unchanged at first (Peebles & Xie
    2023, adaLN-Zero).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(TIME_FEATURES, width)
        self.second = nn.Linear(width, width)
        self.vectors = nn.Linear(width, 6 * width)

    def forward(self, sigma: Tensor) -> Tensor:
        """sigma: [batch] in 0..1. Returns: [batch, 6, width] float32."""
        with torch.autocast(sigma.device.type, enabled=False):
            hidden = _in_float32(self.first, sinusoid(1000.0 * sigma))
            hidden = _in_float32(self.second, F.silu(hidden))
            return _in_float32(self.vectors, F.silu(hidden)).unflatten(-1, (6, -1))


def sinusoid(timestep: Tensor) -> Tensor:
    """Wan's timestep features: cosines first, then sines. timestep: [batch]. Returns: [batch, 256] float32."""
    half = TIME_FEATURES // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angle = timestep.double()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def _in_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.float(), layer.bias.float())


class Modulation(nn.Module):
    """A branch's own offsets to the timestep embedding.

    vectors: how many of the embedding's six vectors the branch uses, from the first.
    """

    def __init__(self, vectors: int, width: int) -> None:
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(vectors, width))

    def forward(self, timestep_embedding: Tensor) -> tuple[Tensor, ...]:
        """timestep_embedding: [batch, groups, 6, width]. Returns: one [batch, groups, 1, width] float32 a vector."""
        num_vectors = len(self.offsets)
        return (timestep_embedding[:, :, :num_vectors] + self.offsets.float()).split(1, dim=2)


class RMSNorm(nn.Module):
    """Division by the root mean square over a head (Zhang & Sennrich 2019), in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (self.size,), self.weight.float(), eps=1e-6)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise each token, then scale and shift it by the vectors of its group. Frames are the groups of video.

    x: [batch, tokens, width]. shift, scale: [batch, groups, 1, width]. Returns: as x.
    """
    groups = shift.shape[1]
    normal = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).unflatten(1, (groups, -1))
    return torch.addcmul(shift, normal, 1 + scale).flatten(1, 2).to(x.dtype)


def gated(x: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    """x + gate * change, in float32. x, change: [batch, tokens, width]. gate: [batch, groups, 1, width]."""
    groups = gate.shape[1]
    x_grouped = x.float().unflatten(1, (groups, -1))
    return torch.addcmul(x_grouped, gate, change.float().unflatten(1, (groups, -1))).flatten(1, 2).to(x.dtype)
