"""A block of active-mind: three branches with weights of their own, joined by one attention."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from training.models.active_mind.attention import (
    AttentionLayout,
    QueryKeyValue,
    joint_attention,
    shared_joint_attention,
)
from training.models.active_mind.config import Shape
from training.models.active_mind.modulation import Linear, Modulation, RMSNorm, gated, modulated
from training.models.active_mind.rope import apply_rope
from training.models.sequence_parallel import SequenceGroup


class PerBranch(NamedTuple):
    """One tensor for each branch."""

    video: Tensor
    audio: Tensor
    text: Tensor


class Branch(nn.Module):
    """The layers of one modality in a block.

    only_read: True for the text and audio branch of the last block. The video branch attends to their keys and values.
    Their own tokens are used by nothing after that, so they have no query, no output and no MLP.
    """

    def __init__(self, shape: Shape, only_read: bool) -> None:
        super().__init__()
        width, self.heads, self.only_read = shape.width, shape.heads, only_read
        self.modulation = Modulation(2 if only_read else 6, width)
        self.qkv = Linear(width, (2 if only_read else 3) * width)
        self.norm_key = RMSNorm(width // shape.heads)
        if not only_read:
            self.norm_query = RMSNorm(width // shape.heads)
            self.out = Linear(width, width)
            self.up = Linear(width, shape.mlp)
            self.down = Linear(shape.mlp, width)

    def project_qkv(self, x: Tensor, modulation: tuple[Tensor, ...], cos_sin: tuple[Tensor, Tensor]) -> QueryKeyValue:
        """Query, key and value of tokens x [batch, tokens, width]. There may be no tokens."""
        if not x.shape[1]:
            nothing = x.new_zeros(len(x), self.heads, 0, self.norm_key.size)
            return QueryKeyValue(None if self.only_read else nothing, nothing, nothing)
        parts = self.qkv(modulated(x, modulation[0], modulation[1])).unflatten(-1, (-1, self.heads, self.norm_key.size))
        *query, key, value = parts.unbind(2)
        rotated = [apply_rope(self.norm_query(q), *cos_sin).to(value.dtype).transpose(1, 2) for q in query]
        key = apply_rope(self.norm_key(key), *cos_sin).to(value.dtype).transpose(1, 2)
        return QueryKeyValue(rotated[0] if rotated else None, key, value.transpose(1, 2))

    def residual_update(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Tokens x [batch, tokens, width] after the attention's output [batch, heads, tokens, head_dim] and the MLP."""
        if not x.shape[1]:
            return x
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x = gated(x, self.out(attended.transpose(1, 2).flatten(2)), gate)
        hidden = self.up(modulated(x, mlp_shift, mlp_scale))
        return gated(x, self.down(F.gelu(hidden, approximate="tanh")), mlp_gate)


class Block(nn.Module):
    """All three branches, fused by one joint self-attention (active-mind section 3.3)."""

    def __init__(self, shape: Shape, last: bool) -> None:
        super().__init__()
        self.video = Branch(shape, only_read=False)
        self.audio = Branch(shape, only_read=last)
        self.text = Branch(shape, only_read=last)
        self.sequence: SequenceGroup | None = None
        """The workers with which this one shares the visual tokens. None where it has all of them."""

    def forward(
        self,
        x: PerBranch,
        timestep_embedding: PerBranch,
        rope_cos_sin: tuple[tuple[Tensor, Tensor], ...],
        layout: AttentionLayout,
    ) -> PerBranch:
        """The tokens of all branches after this block.

        x: tokens [batch, tokens, width] of each branch, this worker's part of the visual ones. timestep_embedding:
        [batch, groups, 6, width] of each branch. rope_cos_sin: cosines and sines of each branch in the order video,
        audio, text, each [batch or 1, tokens, head_dim / 2].
        """
        branches = (self.video, self.audio, self.text)
        modulations = [branch.modulation(of) for branch, of in zip(branches, timestep_embedding, strict=True)]
        video, audio, text = (
            branch.project_qkv(tokens, modulation, cos_sin)
            for branch, tokens, modulation, cos_sin in zip(branches, x, modulations, rope_cos_sin, strict=True)
        )
        if self.sequence is None:
            attended = joint_attention(video, audio, text, layout)
        else:
            attended = shared_joint_attention(self.sequence, video, audio, text, layout)
        return PerBranch(
            *(
                tokens if branch.only_read else branch.residual_update(tokens, out, modulation)
                for branch, tokens, out, modulation in zip(branches, x, attended, modulations, strict=True)
            )
        )
