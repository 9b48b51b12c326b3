"""Physical state supervision (physavatar section 3.3, appendix B).

Of some latent frames the sound is masked, and from what one block of the model knows of them a projector must tell the
physical state there: body, face and both hands.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.keypoints import PARTS, SIZE
from training.models.sizes import FRAMES_PER_LATENT

WEIGHT = 10.0  # of this loss beside the flow matching loss: lambda of equation (7)


def mask_sound(sigma: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """Algorithm 1: which latent frames' sound to mask; of the noisier samples fewer.

    sigma: [batch], noise levels. Returns: [batch, frames] bool on the CPU, True = masked: floor(frames x ratio) of
    them, with the ratio drawn from U(0, 1 - sigma).
    """
    most = 1.0 - sigma.double().cpu()
    ratio = torch.rand(len(most), generator=generator, dtype=torch.float64) * most
    number = (frames * ratio).long()
    # the places of the smallest of as many random numbers: all subsets of a size are equally likely
    rank = torch.rand(len(most), frames, generator=generator, dtype=torch.float64).argsort(1).argsort(1)
    return rank < number[:, None]


def states_by_latent(states: Tensor) -> Tensor:
    """Physical states of pixel frames as those of latent frames, the first frame's four times (appendix B).

    states: [batch, 4n + 1, dim]. Returns: [batch, n + 1, 4, dim]. Raises ValueError for another number of frames.
    """
    if states.shape[1] % FRAMES_PER_LATENT != 1:
        raise ValueError(f"physical states of {states.shape[1]} frames; latents are of 4n + 1")
    first = states[:, :1].expand(-1, FRAMES_PER_LATENT - 1, -1)
    return torch.cat((first, states), dim=1).unflatten(1, (-1, FRAMES_PER_LATENT))


class StateProjector(nn.Module):
    """Proj_Phys: a small MLP from a latent frame's visual tokens, averaged, to the states of its four frames."""

    def __init__(self, width: int, dim: int = SIZE) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, FRAMES_PER_LATENT * dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [batch, frames, rows, columns, width], a block's visual tokens. Returns: [batch, frames, 4, dim]."""
        frame = self.norm(hidden.mean(dim=(2, 3)).to(self.norm.weight.dtype))
        states: Tensor = self.out(F.silu(self.hidden(frame)))
        return states.unflatten(-1, (FRAMES_PER_LATENT, -1))


def parts_present(states: Tensor) -> Tensor:
    """Which of body, face and both hands were seen. states: [..., dim], all numbers of a part that was not are zero
    (tasks.pose). Returns: [..., 4] bool."""
    return (states.unflatten(-1, (len(PARTS), -1)) != 0).any(-1)


def physical_state_loss(predicted: Tensor, states: Tensor, masked: Tensor, present: Tensor | None = None) -> Tensor:
    """Equation (4): mean squared error at masked latent frames only, of each sample.

    predicted, states: [batch, frames, 4, dim]. masked: [batch, frames] bool. present: [batch, frames, 4, parts] bool,
    as `parts_present` gives it: a part that was not seen has no state, and is left out of the mean; all count when None
    (the paper says nothing of it). Returns: [batch] float32, not yet weighted; 0 for a sample of which nothing counts.
    """
    counted = masked[:, :, None, None]
    if present is not None:
        counted = counted & present.repeat_interleave(states.shape[-1] // present.shape[-1], dim=-1)
    counted = counted.expand_as(states)
    squares = (predicted.float() - states.float()).square().masked_fill(~counted, 0.0)
    return squares.sum(dim=(1, 2, 3)) / counted.sum(dim=(1, 2, 3)).clamp(min=1)
