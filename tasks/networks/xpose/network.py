"""The network of X-Pose up to its object level: picture and classes in, a token, scores and a box for each query out.

Axes: B batch, N places of all levels one after another, Q queries, T classes, C = 256 channels.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.networks.xpose.attention import HEADS, LEVELS, WIDTH, DeformableAttention, Fusion, Shapes
from tasks.networks.xpose.clip_text import Clip
from tasks.networks.xpose.swin import Swin

QUERIES = 900
_LAYERS = 6
_OBJECT_LAYERS = 2  # of the decoder; the four after them are of key points
_KEY_POINTS = 68
_LEAST_MARGIN = 0.01  # of the picture; what lies nearer to its border proposes nothing
_PROPOSED = 0.05  # side of the finest level's proposals, in pictures


class Proposals(NamedTuple):
    """The places of the encoder from which the queries start, best first: places [B, Q] int64, logits [B, Q], boxes
    [B, Q, 4]."""

    places: Tensor
    logits: Tensor
    boxes: Tensor


class Objects(NamedTuple):
    """What the object level says: tokens [B, Q, 256], logits [B, Q, T], boxes [B, Q, 4] (centre and size, in
    fractions of the picture)."""

    tokens: Tensor
    logits: Tensor
    boxes: Tensor


class Stages(NamedTuple):
    """The network step by step. text: [B, T, 256], what the classes are after the fusion. before: the objects before
    the last layer norm, by which the network itself chooses; after: behind it, as its heads see them."""

    levels: list[Tensor]
    positions: list[Tensor]
    memory: Tensor
    text: Tensor
    proposals: Proposals
    reference: Tensor
    before: Objects
    after: Objects


class _Perceptron(nn.Module):
    def __init__(self, first: int, last: int, depth: int = 3) -> None:
        super().__init__()
        widths = (first, *(WIDTH,) * (depth - 1), last)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class _TextLayer(nn.Module):
    """A transformer layer in which each class sees itself alone, so that its attention reads its own value."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(WIDTH, HEADS // 2)
        self.linear1, self.linear2 = nn.Linear(WIDTH, 1024), nn.Linear(1024, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, text: Tensor) -> Tensor:
        attention = self.self_attn
        value = F.linear(text, attention.in_proj_weight[2 * WIDTH :], attention.in_proj_bias[2 * WIDTH :])
        text = self.norm1(text + attention.out_proj(value))
        return self.norm2(text + self.linear2(F.relu(self.linear1(text))))


class _EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = DeformableAttention()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.linear1, self.linear2 = nn.Linear(WIDTH, 2048), nn.Linear(2048, WIDTH)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, shapes: Shapes) -> Tensor:
        x = self.norm1(x + self.self_attn(x + position, reference, x, shapes))
        return self.norm2(x + self.linear2(self.linear1(x).relu_()))


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_EncoderLayer() for _ in range(_LAYERS))
        self.text_layers = nn.ModuleList(_TextLayer() for _ in range(_LAYERS))
        self.fusion_layers = nn.ModuleList(Fusion() for _ in range(_LAYERS))

    def forward(self, x: Tensor, position: Tensor, text: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
        reference = centres(shapes, x.device)
        for fusion, text_layer, layer in zip(self.fusion_layers, self.text_layers, self.layers, strict=True):
            x, text = fusion(x, text)
            text = text_layer(text)
            x = layer(x, position, reference, shapes)
        return x, text


class _DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cross_attn = DeformableAttention()
        self.ca_text = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.self_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.catext_norm = nn.LayerNorm(WIDTH)
        self.linear1, self.linear2 = nn.Linear(WIDTH, 2048), nn.Linear(2048, WIDTH)

    def forward(
        self, x: Tensor, position: Tensor, boxes: Tensor, text: Tensor, memory: Tensor, shapes: Shapes
    ) -> Tensor:
        query = x + position
        x = self.norm2(x + self.self_attn(query, query, x, need_weights=False)[0])
        x = self.catext_norm(x + self.ca_text(x + position, text, text, need_weights=False)[0])
        x = self.norm1(x + self.cross_attn(x + position, boxes, memory, shapes))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


class _Decoder(nn.Module):
    """The object level runs; of the key points' level the weights are taken and never used."""

    def __init__(self, box: nn.ModuleList, pose: nn.ModuleList, size: nn.ModuleList) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_DecoderLayer() for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.ref_point_head = _Perceptron(2 * WIDTH, WIDTH, 2)
        self.hw, self.hw_append = nn.Embedding(17, 2), nn.Embedding(_KEY_POINTS - 17, 2)
        self.bbox_embed, self.pose_embed, self.pose_hw_embed = box, pose, size

    def forward(
        self, queries: Tensor, boxes: Tensor, text: Tensor, memory: Tensor, shapes: Shapes
    ) -> tuple[Tensor, Objects, Objects]:
        """Returns: the boxes that the last layer starts from, and the objects before and after the layer norm."""
        x, reference = queries, boxes
        for layer, head in zip(self.layers[:_OBJECT_LAYERS], self.bbox_embed, strict=False):
            reference = boxes
            x = layer(x, self.ref_point_head(box_waves(boxes).to(x.dtype)), boxes, text, memory, shapes)
            boxes = self.moved(head, x, reference)
        after = self.norm(x)
        moved = self.moved(self.bbox_embed[_OBJECT_LAYERS - 1], after, reference)
        return (
            reference,
            Objects(x, x @ text.transpose(1, 2), boxes),
            Objects(after, after @ text.transpose(1, 2), moved),
        )

    @staticmethod
    def moved(head: nn.Module, tokens: Tensor, boxes: Tensor) -> Tensor:
        return (head(tokens).float() + torch.logit(boxes, 1e-3)).sigmoid()


class _Transformer(nn.Module):
    def __init__(self, box: nn.ModuleList, pose: nn.ModuleList, size: nn.ModuleList) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.zeros(LEVELS, WIDTH))
        self.encoder = _Encoder()
        self.decoder = _Decoder(box, pose, size)
        self.tgt_embed = nn.Embedding(QUERIES, WIDTH)
        self.enc_output, self.enc_output_norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.enc_out_bbox_embed = _Perceptron(WIDTH, 4)

    def propose(self, memory: Tensor, text: Tensor, shapes: Shapes) -> Proposals:
        """The 900 places that look most like any of the classes; all of them where there are fewer."""
        boxes = grid_boxes(shapes, memory.device)
        inside = ((boxes > _LEAST_MARGIN) & (boxes < 1 - _LEAST_MARGIN)).all(-1, keepdim=True)
        seen = self.enc_output_norm(self.enc_output(memory * inside))
        logits, places = (seen @ text.transpose(1, 2)).amax(-1).topk(min(QUERIES, memory.shape[1]), dim=1)
        chosen = seen.gather(1, places[:, :, None].expand(-1, -1, WIDTH))
        start = torch.logit(boxes).masked_fill(~inside, torch.inf)[places]
        return Proposals(places, logits, (self.enc_out_bbox_embed(chosen).float() + start).sigmoid())


class XPose(nn.Module):
    """All of the published weights, 220 M; `serve` leaves the 56 M that the object level runs."""

    def __init__(self) -> None:
        super().__init__()
        # heads that all layers share, under all their names
        box = nn.ModuleList([_Perceptron(WIDTH, 4)] * _LAYERS)
        pose = nn.ModuleList([_Perceptron(WIDTH, 2)] * (_LAYERS - _OBJECT_LAYERS + 1))
        size = nn.ModuleList([_Perceptron(WIDTH, 2)] * (_LAYERS - _OBJECT_LAYERS))
        self.transformer = _Transformer(box, pose, size)
        # of the key points, and of the training and the prompts by pictures: taken and never used
        self.label_enc = nn.Embedding(2001, WIDTH)
        self.projection_kpt = _Perceptron(512, WIDTH)
        self.pos_proj, self.padding = nn.Linear(WIDTH, 768), nn.Embedding(1, 768)

        self.projection = _Perceptron(512, WIDTH)
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, WIDTH, side, stride, side // 2), nn.GroupNorm(32, WIDTH))
            for channels, side, stride in ((192, 1, 1), (384, 1, 1), (768, 1, 1), (768, 3, 2))
        )
        self.backbone = nn.Sequential(Swin())
        self.bbox_embed, self.pose_embed, self.pose_hw_embed = box, pose, size
        self.clip_model = Clip()

    def serve(self) -> None:
        """Let go of what only the key points and the prompts need; `forward` is as before."""
        decoder = self.transformer.decoder
        decoder.layers = decoder.layers[:_OBJECT_LAYERS]
        for owner, names in (
            (decoder, ("hw", "hw_append", "pose_embed", "pose_hw_embed")),
            (self, ("label_enc", "projection_kpt", "pos_proj", "padding")),
            (self, ("pose_embed", "pose_hw_embed", "projection", "clip_model")),
        ):
            for name in names:
                delattr(owner, name)

    def classes(self, features: Tensor) -> Tensor:
        """The classes to look for, from CLIP's features [T, 512] of their prompts: [T, 256]."""
        return self.projection(features)

    def forward(self, images: Tensor, classes: Tensor) -> Stages:
        """images: [B, 3, height, width], RGB, normalised by ImageNet's mean and deviation. classes: [T, 256]. Both of
        the network's type; boxes are float32 whatever that is.

        The published network pads the classes to 350 and masks what it has added; without, the numbers are the same.
        """
        levels = self.backbone(images)
        last = self.input_proj[-1](levels[-1])
        maps = [*(project(x) for project, x in zip(self.input_proj, levels, strict=False)), last]
        shapes: Shapes = [(x.shape[2], x.shape[3]) for x in maps]
        positions = [waves(shape, images.device) for shape in shapes]
        transformer = self.transformer
        levels_apart = zip(positions, transformer.level_embed, strict=True)
        position = torch.cat([x.flatten(1).T.to(own.dtype) + own for x, own in levels_apart])
        places = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        text = classes.expand(len(images), -1, -1)
        memory, text = transformer.encoder(places, position, text, shapes)
        proposals = transformer.propose(memory, text, shapes)
        queries = transformer.tgt_embed.weight[: proposals.places.shape[1]].expand(len(images), -1, -1)
        found = transformer.decoder(queries, proposals.boxes, text, memory, shapes)
        return Stages(levels, positions, memory, text, proposals, *found)


def _turned(angle: Tensor, temperature: float, count: int) -> Tensor:
    """Sines and cosines of `count` frequencies, in turns: [...] to [..., count]."""
    pair = torch.arange(count, device=angle.device).div(2, rounding_mode="floor")
    turned = angle[..., None] / temperature ** (2 * pair.to(angle.dtype) / count)
    return torch.stack([turned[..., 0::2].sin(), turned[..., 1::2].cos()], -1).flatten(-2)


def waves(shape: tuple[int, int], where: torch.device) -> Tensor:
    """The place of each of a level's places, [256, height, width]: half of it tells y, half x."""
    height, width = shape
    y, x = (
        _turned(torch.arange(1.0, n + 1, device=where) / (n + 1e-6) * (2 * math.pi), 20, 128) for n in (height, width)
    )
    both = torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], -1)
    return both.permute(2, 0, 1)


def box_waves(boxes: Tensor) -> Tensor:
    """Boxes, [B, Q, 4] centre and size, as waves: [B, Q, 512], y before x."""
    return _turned(boxes[..., [1, 0, 2, 3]] * (2 * math.pi), 10000, 128).flatten(-2)


def centres(shapes: Shapes, where: torch.device) -> Tensor:
    """The middle of each place in fractions of the picture: [1, N, 2], x and y."""
    rows = []
    for height, width in shapes:
        y, x = (torch.arange(0.5, n, device=where) / n for n in (height, width))
        rows.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1))
    return torch.cat(rows)[None]


def grid_boxes(shapes: Shapes, where: torch.device) -> Tensor:
    """The boxes from which the places' proposals start, [N, 4]: a twentieth of the picture wide at the finest level,
    twice as wide at each one after it."""
    sides = [torch.full((h * w, 2), _PROPOSED * 2**level, device=where) for level, (h, w) in enumerate(shapes)]
    return torch.cat([centres(shapes, where)[0], torch.cat(sides)], -1)
