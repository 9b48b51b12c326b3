"""X-Pose's attention layers: deformable attention, and the fusion of image and text features.

Deformable attention (Zhu et al., Deformable DETR, ICLR 2021) reads a feature pyramid at a few sampling points for each
query. The fusion (Liu et al., Grounding DINO, 2023) lets image and text attend to each other.

Axes: B batch, N positions of all levels one after another, Q queries, T classes, C channels; M heads, L levels, P
sampling points.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 256
HEADS, LEVELS, POINTS = 8, 4, 4
FUSION_HEADS, FUSION_WIDTH = 4, 1024
_QUERY_BLOCK = 2048  # queries that are sampled at a time

LevelShapes = list[tuple[int, int]]  # height and width of each level


def sample_levels(value: Tensor, shapes: LevelShapes, locations: Tensor, attention: Tensor) -> Tensor:
    """The core of deformable attention: the weighted sum of the values at the sampling locations.

    Values between positions are interpolated from the four nearest ones. Outside a level they are zero.

    value: [B, N, M, C].
    locations: [B, Q, M, L, P, 2], x and y in fractions of a level.
    attention: [B, Q, M, L, P], the weights.

    Returns: [B, Q, M * C].
    """
    batch, _, heads, channels = value.shape
    value = value.permute(0, 2, 3, 1).reshape(batch * heads, channels, -1)
    levels = value.split([height * width for height, width in shapes], -1)
    maps = [level.unflatten(-1, shape) for level, shape in zip(levels, shapes, strict=True)]
    found = []
    # in blocks, the sampled values stay in the CPU's cache until they are summed: twice as fast as all queries at once
    for grid, weight in zip((2 * locations - 1).split(_QUERY_BLOCK, 1), attention.split(_QUERY_BLOCK, 1), strict=True):
        grid, weight = grid.transpose(1, 2).flatten(0, 1), weight.transpose(1, 2).flatten(0, 1)
        total = value.new_zeros(batch * heads, channels, grid.shape[1])
        for level, level_map in enumerate(maps):
            sampled = F.grid_sample(level_map, grid[:, :, level], align_corners=False)
            total += (sampled * weight[:, None, :, level]).sum(-1)
        found.append(total)
    return torch.cat(found, -1).unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


class DeformableAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sampling_offsets = nn.Linear(WIDTH, HEADS * LEVELS * POINTS * 2)
        self.attention_weights = nn.Linear(WIDTH, HEADS * LEVELS * POINTS)
        self.value_proj = nn.Linear(WIDTH, WIDTH)
        self.output_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, query: Tensor, reference: Tensor, memory: Tensor, shapes: LevelShapes) -> Tensor:
        """Attend to the feature pyramid around each query's reference.

        Sampling locations, and the values at them, are float32 whatever dtype the network has.

        query: [B, Q, C].
        reference: points, [B or 1, Q, 2], or boxes, [B, Q, 4] centre and size; in fractions of the image. Around a
            point, sampling offsets are in positions of the level; around a box, in units of its size / (2 P).
        memory: [B, N, C], the feature pyramid. shapes: of its levels.

        Returns: [B, Q, C].
        """
        offsets = self.sampling_offsets(query).float().unflatten(-1, (HEADS, LEVELS, POINTS, 2))
        if reference.shape[-1] == 2:
            unit = 1 / torch.tensor([(w, h) for h, w in shapes], device=query.device)[:, None]
        else:
            unit = reference[:, :, None, None, None, 2:] / (2 * POINTS)
        locations = reference[:, :, None, None, None, :2] + offsets * unit
        attention = self.attention_weights(query).float().unflatten(-1, (HEADS, -1)).softmax(-1)
        value = self.value_proj(memory).float().unflatten(-1, (HEADS, -1))
        found = sample_levels(value, shapes, locations, attention.unflatten(-1, (LEVELS, POINTS)))
        return self.output_proj(found.to(query.dtype))


class _BiAttention(nn.Module):
    """Attention between image and text in both directions, with shared scores."""

    def __init__(self) -> None:
        super().__init__()
        self.v_proj, self.l_proj = nn.Linear(WIDTH, FUSION_WIDTH), nn.Linear(WIDTH, FUSION_WIDTH)
        self.values_v_proj, self.values_l_proj = nn.Linear(WIDTH, FUSION_WIDTH), nn.Linear(WIDTH, FUSION_WIDTH)
        self.out_v_proj, self.out_l_proj = nn.Linear(FUSION_WIDTH, WIDTH), nn.Linear(FUSION_WIDTH, WIDTH)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The update of each modality from the other.

        There are many image positions and few classes. So the projections of the image are multiplied into the text's
        side of each product first: (v W) k = v (W k). The result is the same, at a hundredth of the reference's work
        for each position.

        image: [B, N, C]. text: [B, T, C]. Returns: the updates of both, in their shapes.
        """
        batch, classes = text.shape[:2]

        def by_head(x: Tensor) -> Tensor:  # [..., heads x 256] to [..., heads, 256]
            return x.unflatten(-1, (FUSION_HEADS, -1))

        key = by_head(self.l_proj(text)) * (FUSION_WIDTH // FUSION_HEADS) ** -0.5
        projected_key = torch.einsum("bthd,hdc->bhtc", key, self.v_proj.weight.unflatten(0, (FUSION_HEADS, -1)))
        key_bias = torch.einsum("bthd,hd->bht", key, by_head(self.v_proj.bias))
        # [B, heads * T, N]
        scores = projected_key.flatten(1, 2) @ image.transpose(1, 2) + key_bias.flatten(1, 2)[:, :, None]
        # each position attends to the classes
        attention = scores.unflatten(1, (FUSION_HEADS, classes)).softmax(2).flatten(1, 2)
        out_weight = self.out_v_proj.weight.unflatten(1, (FUSION_HEADS, -1))
        text_value = torch.einsum("bthd,chd->bhtc", by_head(self.values_l_proj(text)), out_weight)
        image_update = attention.transpose(1, 2) @ text_value.flatten(1, 2) + self.out_v_proj.bias
        # each class attends to the positions
        mean = (scores.softmax(2) @ image).unflatten(1, (FUSION_HEADS, classes))
        value_weight = self.values_v_proj.weight.unflatten(0, (FUSION_HEADS, -1))
        image_value = torch.einsum("bhtc,hdc->bthd", mean, value_weight) + by_head(self.values_v_proj.bias)
        return image_update, self.out_l_proj(image_value.reshape(batch, classes, FUSION_WIDTH))


class Fusion(nn.Module):
    """A residual layer in which image and text attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma_v, self.gamma_l = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.layer_norm_v, self.layer_norm_l = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = _BiAttention()

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """image: [B, N, C]. text: [B, T, C]. Returns: both, updated."""
        image, text = self.layer_norm_v(image), self.layer_norm_l(text)
        image_update, text_update = self.attn(image, text)
        return image + self.gamma_v * image_update, text + self.gamma_l * text_update
