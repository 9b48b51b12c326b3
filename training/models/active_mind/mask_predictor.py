"""Predicts each speaker's mask in every frame from the mask of one frame (active-mind appendix B, multi-person).

A light network beside the model, after InterActHuman. It averages the model's tokens over a speaker's mask in the frame
whose mask is known, and compares each visual token to that average. So it follows a speaker who moves. It reads the
model's hidden tokens without passing gradients back to them, and is trained on its own loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.active_mind.model import regions_of


class MaskPredictor(nn.Module):
    """width: of the model's tokens. inner: size of the vectors that are compared."""

    def __init__(self, width: int, inner: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 2 * inner)
        self.token = nn.Linear(2 * inner, inner)
        self.speaker = nn.Linear(2 * inner, inner)
        self.scale = nn.Parameter(torch.tensor([10.0]))
        self.offset = nn.Parameter(torch.tensor([0.0]))

    def new_weight(self, name: str, generator: torch.Generator) -> Tensor:
        """As ActiveMind.new_weight."""
        value = torch.empty(self.get_parameter(name).shape, device="cpu")
        if name in ("scale", "norm.weight"):
            return nn.init.constant_(value, 10.0 if name == "scale" else 1.0)
        if name.endswith(".weight"):
            return nn.init.xavier_uniform_(value, generator=generator)
        return nn.init.zeros_(value)

    def forward(self, hidden: Tensor, speaker_mask: Tensor, known_frame: int) -> Tensor:
        """Logits of how likely each visual token belongs to each speaker.

        hidden: [batch, frames, rows, columns, width], a middle block's visual tokens (Output.hidden). speaker_mask:
        [batch, speakers, frames or 1, height, width] bool, where the speakers are. known_frame: the only frame of the
        mask that is used. Returns: [batch, speakers, frames, rows, columns] float32.
        """
        rows, columns = hidden.shape[2:4]
        tokens = F.gelu(self.hidden(self.norm(hidden.detach().to(self.norm.weight.dtype))))
        known = speaker_mask if speaker_mask.shape[2] == 1 else speaker_mask[:, :, known_frame, None]
        weight = regions_of(known, 1, rows, columns)[:, :, 0].to(tokens.dtype)
        weight = weight / weight.sum(dim=(2, 3), keepdim=True).clamp(min=1)
        of_speaker = torch.einsum("bsyx,byxd->bsd", weight, tokens[:, known_frame])
        # cosine similarity: it does not depend on the size of the block's numbers
        speaker, token = F.normalize(self.speaker(of_speaker), dim=-1), F.normalize(self.token(tokens), dim=-1)
        return (torch.einsum("bsd,btyxd->bstyx", speaker, token) * self.scale + self.offset).float()


def mask_loss(logits: Tensor, speaker_mask: Tensor) -> Tensor:
    """Binary cross entropy of each sample. logits: as MaskPredictor returns. speaker_mask: [batch, speakers, frames,
    height, width] bool, the truth. Returns: [batch] float32."""
    truth = regions_of(speaker_mask, *logits.shape[2:])
    return F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="none").flatten(1).mean(1)
