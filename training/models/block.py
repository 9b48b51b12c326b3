"""A block of active-mind: three branches alike, each with weights of its own, that meet in one attention."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from training.models.attention import Heads, Layout, joint_attention
from training.models.modulation import Linear, Modulation, RMSNorm, gated, modulated
from training.models.rope import rotate
from training.models.sizes import Shape


class Streams(NamedTuple):
    """Something of each branch."""

    video: Tensor
    audio: Tensor
    text: Tensor


class Branch(nn.Module):
    """What one modality does in a block.

    only_read: of the last block's text and audio branch, which the video branch reads, and nobody reads after it.
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

    def read(self, x: Tensor, vectors: tuple[Tensor, ...], turn: tuple[Tensor, Tensor]) -> Heads:
        """Query, key and value of tokens x [batch, tokens, width]."""
        parts = self.qkv(modulated(x, vectors[0], vectors[1])).unflatten(-1, (-1, self.heads, self.norm_key.size))
        *query, key, value = parts.unbind(2)
        turned = [rotate(self.norm_query(q), *turn).to(value.dtype).transpose(1, 2) for q in query]
        key = rotate(self.norm_key(key), *turn).to(value.dtype).transpose(1, 2)
        return Heads(turned[0] if turned else None, key, value.transpose(1, 2))

    def write(self, x: Tensor, read: Tensor, vectors: tuple[Tensor, ...]) -> Tensor:
        """Tokens x [batch, tokens, width] after what they have read [batch, heads, tokens, head_dim]."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = vectors
        x = gated(x, self.out(read.transpose(1, 2).flatten(2)), gate)
        hidden = self.up(modulated(x, mlp_shift, mlp_scale))
        return gated(x, self.down(F.gelu(hidden, approximate="tanh")), mlp_gate)


class Block(nn.Module):
    """All three branches, fused by one joint self-attention (active-mind section 3.3)."""

    def __init__(self, shape: Shape, last: bool) -> None:
        super().__init__()
        self.video = Branch(shape, only_read=False)
        self.audio = Branch(shape, only_read=last)
        self.text = Branch(shape, only_read=last)

    def forward(self, x: Streams, level: Streams, turns: tuple[tuple[Tensor, Tensor], ...], layout: Layout) -> Streams:
        """x: tokens [batch, tokens, width]. level: [batch, groups, 6, width]. turns: cosines and sines, each [batch or
        1, tokens, head_dim / 2]; all three by branch: video, audio, text."""
        branches = (self.video, self.audio, self.text)
        vectors = [branch.modulation(at) for branch, at in zip(branches, level, strict=True)]
        video, audio, text = (branch.read(*args) for branch, *args in zip(branches, x, vectors, turns, strict=True))
        read = joint_attention(video, audio, text, layout)
        every = zip(branches, x, read, vectors, strict=True)
        return Streams(*(was if branch.only_read else branch.write(was, now, at) for branch, was, now, at in every))
