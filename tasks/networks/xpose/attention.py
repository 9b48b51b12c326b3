"""Attention of X-Pose: at few sampled places of a pyramid, and between picture and text.

Deformable attention is that of Zhu et al., Deformable DETR, ICLR 2021; the fusion that of Liu et al., Grounding DINO,
2023. Axes: B batch, N places of all levels one after another, Q queries, T classes, C channels; M heads, L levels, P
points.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 256
HEADS, LEVELS, POINTS = 8, 4, 4
FUSION_HEADS, FUSION_WIDTH = 4, 1024
_AT_ONCE = 2048  # queries

Shapes = list[tuple[int, int]]  # height and width of each level


def sample(value: Tensor, shapes: Shapes, places: Tensor, shares: Tensor) -> Tensor:
    """The weighted sum of what lies at the places: the core of deformable attention.

    value: [B, N, M, C]. places: [B, Q, M, L, P, 2], x and y in fractions of a level; outside of it lies zero, and
    between its places what is interpolated of the four next. shares: [B, Q, M, L, P]. Returns: [B, Q, M * C].
    """
    batch, _, heads, channels = value.shape
    value = value.permute(0, 2, 3, 1).reshape(batch * heads, channels, -1)
    levels = value.split([height * width for height, width in shapes], -1)
    maps = [level.unflatten(-1, shape) for level, shape in zip(levels, shapes, strict=True)]
    found = []
    # what is read lies in the processor's cache until it is summed: twice as quick as all queries at once
    for grid, share in zip((2 * places - 1).split(_AT_ONCE, 1), shares.split(_AT_ONCE, 1), strict=True):
        grid, share = grid.transpose(1, 2).flatten(0, 1), share.transpose(1, 2).flatten(0, 1)
        total = value.new_zeros(batch * heads, channels, grid.shape[1])
        for level, part in enumerate(maps):
            seen = F.grid_sample(part, grid[:, :, level], align_corners=False)
            total += (seen * share[:, None, :, level]).sum(-1)
        found.append(total)
    return torch.cat(found, -1).unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


class DeformableAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sampling_offsets = nn.Linear(WIDTH, HEADS * LEVELS * POINTS * 2)
        self.attention_weights = nn.Linear(WIDTH, HEADS * LEVELS * POINTS)
        self.value_proj = nn.Linear(WIDTH, WIDTH)
        self.output_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, query: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes) -> Tensor:
        """query: [B, Q, C]. reference: [B or 1, Q, 2] places, or [B, Q, 4] boxes (centre and size), in fractions of
        the picture; points are sought near a place by pixels of the level, and in a box by halves of its size.
        memory: [B, N, C]. Places, and what is sampled at them, are float32 whatever the network is.
        """
        offsets = self.sampling_offsets(query).float().unflatten(-1, (HEADS, LEVELS, POINTS, 2))
        if reference.shape[-1] == 2:
            unit = 1 / torch.tensor([(w, h) for h, w in shapes], device=query.device)[:, None]
        else:
            unit = reference[:, :, None, None, None, 2:] / (2 * POINTS)
        places = reference[:, :, None, None, None, :2] + offsets * unit
        shares = self.attention_weights(query).float().unflatten(-1, (HEADS, -1)).softmax(-1)
        value = self.value_proj(memory).float().unflatten(-1, (HEADS, -1))
        found = sample(value, shapes, places, shares.unflatten(-1, (LEVELS, POINTS)))
        return self.output_proj(found.to(query.dtype))


class _BothWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v_proj, self.l_proj = nn.Linear(WIDTH, FUSION_WIDTH), nn.Linear(WIDTH, FUSION_WIDTH)
        self.values_v_proj, self.values_l_proj = nn.Linear(WIDTH, FUSION_WIDTH), nn.Linear(WIDTH, FUSION_WIDTH)
        self.out_v_proj, self.out_l_proj = nn.Linear(FUSION_WIDTH, WIDTH), nn.Linear(FUSION_WIDTH, WIDTH)

    def forward(self, picture: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """What picture [B, N, C] and text [B, T, C] take from each other, in their shapes.

        There are many places and few classes, so the projections of the picture are put to the text's side of each
        product: (v W) k = v (W k). The numbers are the same; of the reference's work for a place a hundredth is left.
        """
        batch, classes = text.shape[:2]

        def by_head(x: Tensor) -> Tensor:  # [..., heads x 256] to [..., heads, 256]
            return x.unflatten(-1, (FUSION_HEADS, -1))

        key = by_head(self.l_proj(text)) * (FUSION_WIDTH // FUSION_HEADS) ** -0.5
        seek = torch.einsum("bthd,hdc->bhtc", key, self.v_proj.weight.unflatten(0, (FUSION_HEADS, -1)))
        start = torch.einsum("bthd,hd->bht", key, by_head(self.v_proj.bias))
        scores = seek.flatten(1, 2) @ picture.transpose(1, 2) + start.flatten(1, 2)[:, :, None]  # [B, heads * T, N]
        # the text's share of a place, and what it brings there
        to_picture = scores.unflatten(1, (FUSION_HEADS, classes)).softmax(2).flatten(1, 2)
        out_weight = self.out_v_proj.weight.unflatten(1, (FUSION_HEADS, -1))
        brought = torch.einsum("bthd,chd->bhtc", by_head(self.values_l_proj(text)), out_weight)
        picture_change = to_picture.transpose(1, 2) @ brought.flatten(1, 2) + self.out_v_proj.bias
        # the places' share of a class, and what they bring there
        mean = (scores.softmax(2) @ picture).unflatten(1, (FUSION_HEADS, classes))
        value_weight = self.values_v_proj.weight.unflatten(0, (FUSION_HEADS, -1))
        read = torch.einsum("bhtc,hdc->bthd", mean, value_weight) + by_head(self.values_v_proj.bias)
        return picture_change, self.out_l_proj(read.reshape(batch, classes, FUSION_WIDTH))


class Fusion(nn.Module):
    """Picture and text look at each other."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma_v, self.gamma_l = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.layer_norm_v, self.layer_norm_l = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = _BothWays()

    def forward(self, picture: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        picture, text = self.layer_norm_v(picture), self.layer_norm_l(text)
        picture_change, text_change = self.attn(picture, text)
        return picture + self.gamma_v * picture_change, text + self.gamma_l * text_change
