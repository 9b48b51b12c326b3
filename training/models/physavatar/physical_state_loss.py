"""Physical state supervision (physavatar section 3.3, appendix B).

The sound of some latent frames is masked. A projector predicts the physical state of those frames, body, face and both
hands, from the visual tokens of one block of the model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.networks.latent_geometry import TEMPORAL_STRIDE
from tasks.stages.pose.keypoints import PARTS, SIZE

WEIGHT = 10.0  # of this loss, lambda of equation (7); the flow matching loss has weight 1


def mask_sound(sigma: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """Algorithm 1: the latent frames whose sound is masked. Noisier samples have fewer of them.

    sigma: [batch], noise levels. Returns: [batch, frames] bool on the CPU, True = masked. floor(frames x ratio) frames
    of a sample are masked, with the ratio drawn from U(0, 1 - sigma).
    """
    max_ratio = 1.0 - sigma.double().cpu()
    ratio = torch.rand(len(max_ratio), generator=generator, dtype=torch.float64) * max_ratio
    num_masked = (frames * ratio).long()
    # ranks of independent random numbers: every subset of this size is equally likely
    rank = torch.rand(len(max_ratio), frames, generator=generator, dtype=torch.float64).argsort(1).argsort(1)
    return rank < num_masked[:, None]


def states_by_latent(states: Tensor) -> Tensor:
    """Physical states of pixel frames, grouped by latent frame. The first frame's is repeated four times (appendix B).

    states: [batch, 4n + 1, dim]. Returns: [batch, n + 1, 4, dim]. Raises ValueError for another number of frames.
    """
    if states.shape[1] % TEMPORAL_STRIDE != 1:
        raise ValueError(f"physical states of {states.shape[1]} frames; latents are of 4n + 1 frames")
    first = states[:, :1].expand(-1, TEMPORAL_STRIDE - 1, -1)
    return torch.cat((first, states), dim=1).unflatten(1, (-1, TEMPORAL_STRIDE))


class StateProjector(nn.Module):
    """Proj_Phys: a small MLP from the average of a latent frame's visual tokens to the states of its four frames."""

    def __init__(self, width: int, dim: int = SIZE) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, TEMPORAL_STRIDE * dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [batch, frames, rows, columns, width], a block's visual tokens. Returns: [batch, frames, 4, dim]."""
        frame = self.norm(hidden.mean(dim=(2, 3)).to(self.norm.weight.dtype))
        states: Tensor = self.out(F.silu(self.hidden(frame)))
        return states.unflatten(-1, (TEMPORAL_STRIDE, -1))


def parts_present(states: Tensor) -> Tensor:
    """Which of body, face and both hands were seen.

    states: [..., dim]. All numbers of a part that was not seen are zero (tasks.stages.pose.stage). Returns: [..., 4]
    bool.
    """
    return (states.unflatten(-1, (len(PARTS), -1)) != 0).any(-1)


def physical_state_loss(predicted: Tensor, states: Tensor, masked: Tensor, present: Tensor | None = None) -> Tensor:
    """Equation (4): the mean squared error of each sample, over masked latent frames only.

    predicted, states: [batch, frames, 4, dim]. masked: [batch, frames] bool. present: [batch, frames, 4, parts] bool,
    as `parts_present` gives it. A part that was not seen has no state and is left out of the mean. None: all parts
    count. The paper does not say which.

    Returns: [batch] float32, not yet weighted. 0 for a sample in which nothing counts.
    """
    counted = masked[:, :, None, None]
    if present is not None:
        counted = counted & present.repeat_interleave(states.shape[-1] // present.shape[-1], dim=-1)
    counted = counted.expand_as(states)
    squares = (predicted.float() - states.float()).square().masked_fill(~counted, 0.0)
    return squares.sum(dim=(1, 2, 3)) / counted.sum(dim=(1, 2, 3)).clamp(min=1)
