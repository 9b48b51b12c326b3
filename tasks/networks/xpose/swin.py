"""Swin-T, X-Pose's image backbone: attention in windows that shift from block to block.

Source: Liu et al., Swin Transformer, ICCV 2021. It is a re-implementation for inference with modules named as in the
checkpoints of detectors built on it. The classification head, dropout and stochastic depth are left out.

Axes: B batch, H and W positions of a level, C channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_WIDTHS, _DEPTHS, _HEADS = (96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24)  # channels, blocks, heads of each layer
_WINDOW = 7  # positions a side
_PATCH = 4  # pixels a side


class _Attention(nn.Module):
    """Attention within windows, with a learnt bias for each relative position of two positions."""

    relative_position_index: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * _WINDOW - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_places(_WINDOW))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x: [B, windows, 49, C]. mask: [windows, 1, 49, 49], added to the attention scores; None for no mask."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        attended = F.scaled_dot_product_attention(query, key, value, bias if mask is None else bias + mask)
        return self.proj(attended.transpose(2, 3).flatten(3))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.mlp = _Mlp(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: [B, H, W, C]. mask: the attention mask of shifted windows, see `shifted_mask`."""
        height, width = x.shape[1:3]
        y = _padded(self.norm1(x))
        padded_height, padded_width = y.shape[1:3]
        if self.shift:
            y = y.roll((-self.shift, -self.shift), (1, 2))
        y = y.unflatten(2, (-1, _WINDOW)).unflatten(1, (-1, _WINDOW)).transpose(2, 3)
        rows, columns = y.shape[1:3]
        y = self.attn(y.flatten(3, 4).flatten(1, 2), mask if self.shift else None)
        y = y.unflatten(2, (_WINDOW, _WINDOW)).unflatten(1, (rows, columns)).transpose(2, 3)
        y = y.reshape(len(x), padded_height, padded_width, -1)
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        x = x + y[:, :height, :width]
        return x + self.mlp(self.norm2(x))


class _Downsample(nn.Module):
    """Patch merging: half the height and width, twice the channels. Each 2 x 2 positions are concatenated and
    projected."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        # the order of the weights: the row varies fastest
        four = [x[:, down::2, across::2] for across in (0, 1) for down in (0, 1)]
        return self.reduction(self.norm(torch.cat(four, -1)))


class _Layer(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(width, heads, _WINDOW // 2 * (number % 2)) for number in range(depth))
        self.downsample = None if last else _Downsample(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns: the level's output, and the input of the next layer."""
        mask = shifted_mask(x)
        for block in self.blocks:
            x = block(x, mask)
        return x, x if self.downsample is None else self.downsample(x)


class _Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, _WIDTHS[0], _PATCH, _PATCH)
        self.norm = nn.LayerNorm(_WIDTHS[0])

    def forward(self, images: Tensor) -> Tensor:
        images = F.pad(images, (0, -images.shape[3] % _PATCH, 0, -images.shape[2] % _PATCH))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class Swin(nn.Module):
    """The backbone. It gives the outputs of the last three of its four layers."""

    def __init__(self) -> None:
        super().__init__()
        last = len(_WIDTHS) - 1
        self.patch_embed = _Patches()
        self.layers = nn.ModuleList(_Layer(_WIDTHS[k], _DEPTHS[k], _HEADS[k], k == last) for k in range(last + 1))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for width in _WIDTHS[1:])

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: [B, 3, height, width].

        Returns: [B, 192, ...], [B, 384, ...] and [B, 768, ...] at an 8th, a 16th and a 32nd of the height and width.
        """
        x, levels = self.patch_embed(images), []
        for layer, norm in zip(self.layers, (None, self.norm1, self.norm2, self.norm3), strict=True):
            found, x = layer(x)
            if norm is not None:
                levels.append(norm(found).permute(0, 3, 1, 2))
        return levels


def relative_places(side: int) -> Tensor:
    """The row of the bias table for each pair of positions in a window: [side^2, side^2] int64."""
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    down, across = place[:, :, None] - place[:, None] + side - 1
    return down * (2 * side - 1) + across


def shifted_mask(x: Tensor) -> Tensor:
    """The attention mask of shifted windows: [windows, 1, 49, 49], added to the attention scores.

    A padded map is rolled around its edges before it is cut into windows. Positions of one window attend to each other
    only where they were neighbours before.

    x: [B, H, W, C], the map.
    """
    region = _padded(x.new_zeros(1, *x.shape[1:3], 1))[0, :, :, 0]
    ends = (slice(0, -_WINDOW), slice(-_WINDOW, -(_WINDOW // 2)), slice(-(_WINDOW // 2), None))
    for number, (rows, columns) in enumerate((rows, columns) for rows in ends for columns in ends):
        region[rows, columns] = number
    region = region.unflatten(1, (-1, _WINDOW)).unflatten(0, (-1, _WINDOW)).transpose(1, 2)
    region = region.flatten(2).flatten(0, 1)
    apart = region[:, None, :] != region[:, :, None]
    return torch.zeros_like(apart, dtype=x.dtype).masked_fill(apart, -100.0)[:, None]


def _padded(x: Tensor) -> Tensor:
    """[B, H, W, C] with zeros after the last row and column, up to whole windows."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % _WINDOW, 0, -x.shape[1] % _WINDOW))
