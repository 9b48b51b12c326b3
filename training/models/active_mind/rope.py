"""Rotary position embedding in time, height and width (Su et al. 2024), as in Wan.

Neighbouring numbers of a head form pairs. Each pair is rotated by an angle proportional to the token's position. Of a
head of 128 numbers, 44 are rotated by the frame, 42 by the row and 42 by the column. The attention score of two tokens
then depends on the distance between them. Positions may be fractions, and may lie outside of the clip.
"""

import torch
from torch import Tensor

THETA = 10000.0


def axis_split(head_dim: int) -> tuple[int, int, int]:
    """How many numbers of a head encode time, height and width: (44, 42, 42) of 128."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rope_cos_sin(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation of tokens at these positions.

    positions: [..., 3], time (latent frames), row, column. Returns: two [..., head_dim / 2] float32. The angles are
    computed in float64.
    """
    angles = []
    for axis, size in enumerate(axis_split(head_dim)):
        exponent = torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size
        angles.append(positions[..., axis, None].double() * THETA**-exponent)
    angle = torch.cat(angles, dim=-1)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[2i], x[2i + 1]) by its angle, in float32.

    x: [batch, tokens, heads, head_dim]. cos, sin: [batch or 1, tokens, head_dim / 2]. Returns: as x, float32.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = cos[:, :, None], sin[:, :, None]
    if x.device.type == "cpu":  # as complex numbers, in one pass; compilers for GPUs do not support them
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2)
    even, odd = pairs.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def grid_positions(frames: Tensor, height: int, width: int) -> Tensor:
    """Positions of visual tokens in the order frame, row, column.

    frames: [frames], the time of each. Returns: [1, frames x height x width, 3] float64.
    """
    rows = torch.arange(height, dtype=torch.float64, device=frames.device)
    columns = torch.arange(width, dtype=torch.float64, device=frames.device)
    grid = torch.meshgrid(frames.double(), rows, columns, indexing="ij")
    return torch.stack(grid, dim=-1).reshape(1, -1, 3)


def time_positions(times: Tensor) -> Tensor:
    """Positions of audio and text tokens, which have a time but no place in the frame: row and column are 0.

    times: [batch or 1, tokens]. Returns: [batch or 1, tokens, 3] float64.
    """
    times = times.double()
    return torch.stack((times, torch.zeros_like(times), torch.zeros_like(times)), dim=-1)
