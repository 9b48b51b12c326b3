"""X-Pose's network up to the object level: image and class embeddings in; a token, logits and a box for each query out.

Axes: B batch, N positions of all levels one after another, Q queries, T classes, C = 256 channels.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.networks.xpose.attention import HEADS, LEVELS, WIDTH, DeformableAttention, Fusion, LevelShapes
from tasks.networks.xpose.clip_text import ClipText
from tasks.networks.xpose.swin import Swin

QUERIES = 900
_LAYERS = 6  # of the encoder, and of the decoder
_OBJECT_LAYERS = 2  # of the decoder; the other four are of the keypoint level
_KEY_POINTS = 68
_MARGIN = 0.01  # of the image's side; positions nearer to its border are masked
_PROPOSAL_SIDE = 0.05  # of the finest level's proposals, in sides of the image


class Proposals(NamedTuple):
    """The encoder positions that initialise the queries, best first."""

    places: Tensor
    """[B, Q] int64, the index of each position among the N."""
    logits: Tensor
    """[B, Q], the highest class logit at each position."""
    boxes: Tensor
    """[B, Q, 4], centre and size in fractions of the image."""


class Objects(NamedTuple):
    """The object level's outputs."""

    tokens: Tensor
    """[B, Q, 256]."""
    logits: Tensor
    """[B, Q, T]."""
    boxes: Tensor
    """[B, Q, 4], centre and size in fractions of the image."""


class Stages(NamedTuple):
    """The network's intermediate and final outputs, in order."""

    levels: list[Tensor]
    """The backbone's three feature maps, [B, channels, height, width] each."""
    positions: list[Tensor]
    """The sine position embeddings of the four levels, [256, height, width] each."""
    memory: Tensor
    """[B, N, 256], the encoder's image features."""
    text: Tensor
    """[B, T, 256], the class embeddings after the encoder's fusion."""
    proposals: Proposals
    """The encoder positions that initialise the queries."""
    reference: Tensor
    """[B, Q, 4], the boxes that the last object layer starts from."""
    before: Objects
    """The objects before the last layer norm. The published network selects objects by these logits."""
    after: Objects
    """The objects after the last layer norm, the inputs of its heads."""


class _Mlp(nn.Module):
    def __init__(self, first: int, last: int, depth: int = 3) -> None:
        super().__init__()
        widths = (first, *(WIDTH,) * (depth - 1), last)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class _TextLayer(nn.Module):
    """A transformer layer over the classes. Each class attends to itself alone, so attention returns its own value."""

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

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, shapes: LevelShapes) -> Tensor:
        x = self.norm1(x + self.self_attn(x + position, reference, x, shapes))
        return self.norm2(x + self.linear2(self.linear1(x).relu_()))


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_EncoderLayer() for _ in range(_LAYERS))
        self.text_layers = nn.ModuleList(_TextLayer() for _ in range(_LAYERS))
        self.fusion_layers = nn.ModuleList(Fusion() for _ in range(_LAYERS))

    def forward(self, x: Tensor, position: Tensor, text: Tensor, shapes: LevelShapes) -> tuple[Tensor, Tensor]:
        reference = cell_centres(shapes, x.device)
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
        self, x: Tensor, position: Tensor, boxes: Tensor, text: Tensor, memory: Tensor, shapes: LevelShapes
    ) -> Tensor:
        query = x + position
        x = self.norm2(x + self.self_attn(query, query, x, need_weights=False)[0])
        x = self.catext_norm(x + self.ca_text(x + position, text, text, need_weights=False)[0])
        x = self.norm1(x + self.cross_attn(x + position, boxes, memory, shapes))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


class _Decoder(nn.Module):
    """The decoder. Only its object level runs; the keypoint level's modules are there for the checkpoint's keys."""

    def __init__(self, box: nn.ModuleList, pose: nn.ModuleList, size: nn.ModuleList) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_DecoderLayer() for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.ref_point_head = _Mlp(2 * WIDTH, WIDTH, 2)
        self.hw, self.hw_append = nn.Embedding(17, 2), nn.Embedding(_KEY_POINTS - 17, 2)
        self.bbox_embed, self.pose_embed, self.pose_hw_embed = box, pose, size

    def forward(
        self, queries: Tensor, boxes: Tensor, text: Tensor, memory: Tensor, shapes: LevelShapes
    ) -> tuple[Tensor, Objects, Objects]:
        """Run the object level.

        queries: [B, Q, C]. boxes: [B, Q, 4], those of the proposals. text: [B, T, C]. memory: [B, N, C].

        Returns: the boxes that its last layer starts from, [B, Q, 4], and the objects before and after the layer norm.
        """
        x, reference = queries, boxes
        for layer, head in zip(self.layers[:_OBJECT_LAYERS], self.bbox_embed, strict=False):
            reference = boxes
            x = layer(x, self.ref_point_head(box_embedding(boxes).to(x.dtype)), boxes, text, memory, shapes)
            boxes = self.refined(head, x, reference)
        after = self.norm(x)
        refined = self.refined(self.bbox_embed[_OBJECT_LAYERS - 1], after, reference)
        return (
            reference,
            Objects(x, x @ text.transpose(1, 2), boxes),
            Objects(after, after @ text.transpose(1, 2), refined),
        )

    @staticmethod
    def refined(head: nn.Module, tokens: Tensor, boxes: Tensor) -> Tensor:
        """The boxes, moved by the head's offsets in logit space."""
        return (head(tokens).float() + torch.logit(boxes, 1e-3)).sigmoid()


class _Transformer(nn.Module):
    def __init__(self, box: nn.ModuleList, pose: nn.ModuleList, size: nn.ModuleList) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.zeros(LEVELS, WIDTH))
        self.encoder = _Encoder()
        self.decoder = _Decoder(box, pose, size)
        self.tgt_embed = nn.Embedding(QUERIES, WIDTH)
        self.enc_output, self.enc_output_norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.enc_out_bbox_embed = _Mlp(WIDTH, 4)

    def propose(self, memory: Tensor, text: Tensor, shapes: LevelShapes) -> Proposals:
        """The 900 positions with the highest logit of any class; all of them where there are fewer."""
        boxes = proposal_boxes(shapes, memory.device)
        inside = ((boxes > _MARGIN) & (boxes < 1 - _MARGIN)).all(-1, keepdim=True)
        features = self.enc_output_norm(self.enc_output(memory * inside))
        logits, places = (features @ text.transpose(1, 2)).amax(-1).topk(min(QUERIES, memory.shape[1]), dim=1)
        chosen = features.gather(1, places[:, :, None].expand(-1, -1, WIDTH))
        start = torch.logit(boxes).masked_fill(~inside, torch.inf)[places]
        return Proposals(places, logits, (self.enc_out_bbox_embed(chosen).float() + start).sigmoid())


class XPose(nn.Module):
    """X-Pose with all 220 million published parameters. `serve` leaves the 56 million that the object level needs."""

    def __init__(self) -> None:
        super().__init__()
        # heads shared by all layers, under each name that the checkpoint has for them
        box = nn.ModuleList([_Mlp(WIDTH, 4)] * _LAYERS)
        pose = nn.ModuleList([_Mlp(WIDTH, 2)] * (_LAYERS - _OBJECT_LAYERS + 1))
        size = nn.ModuleList([_Mlp(WIDTH, 2)] * (_LAYERS - _OBJECT_LAYERS))
        self.transformer = _Transformer(box, pose, size)
        # of the keypoint level, of training and of prompts by images: for the checkpoint's keys alone
        self.label_enc = nn.Embedding(2001, WIDTH)
        self.projection_kpt = _Mlp(512, WIDTH)
        self.pos_proj, self.padding = nn.Linear(WIDTH, 768), nn.Embedding(1, 768)

        self.projection = _Mlp(512, WIDTH)
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, WIDTH, side, stride, side // 2), nn.GroupNorm(32, WIDTH))
            for channels, side, stride in ((192, 1, 1), (384, 1, 1), (768, 1, 1), (768, 3, 2))
        )
        self.backbone = nn.Sequential(Swin())
        self.bbox_embed, self.pose_embed, self.pose_hw_embed = box, pose, size
        self.clip_model = ClipText()

    def serve(self) -> None:
        """Remove the modules that only the keypoint level and the prompts need. `forward` gives the same outputs."""
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
        """The class embeddings, [T, 256]. features: [T, 512], CLIP's embeddings of the prompts."""
        return self.projection(features)

    def forward(self, images: Tensor, classes: Tensor) -> Stages:
        """Find the classes in images.

        The published network pads the classes to 350 and masks the padding. Without padding the numbers are the same.

        images: [B, 3, height, width] RGB, normalised by ImageNet's mean and standard deviation, in the network's dtype.
        classes: [T, 256] from `classes`, in the network's dtype.

        Returns: every step's outputs. Boxes are float32 whatever dtype the network has.
        """
        levels = self.backbone(images)
        last = self.input_proj[-1](levels[-1])
        maps = [*(project(x) for project, x in zip(self.input_proj, levels, strict=False)), last]
        shapes: LevelShapes = [(x.shape[2], x.shape[3]) for x in maps]
        positions = [position_embedding(shape, images.device) for shape in shapes]
        transformer = self.transformer
        with_level = zip(positions, transformer.level_embed, strict=True)
        position = torch.cat([x.flatten(1).T.to(level.dtype) + level for x, level in with_level])
        features = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        text = classes.expand(len(images), -1, -1)
        memory, text = transformer.encoder(features, position, text, shapes)
        proposals = transformer.propose(memory, text, shapes)
        queries = transformer.tgt_embed.weight[: proposals.places.shape[1]].expand(len(images), -1, -1)
        found = transformer.decoder(queries, proposals.boxes, text, memory, shapes)
        return Stages(levels, positions, memory, text, proposals, *found)


def _sine_embedding(angle: Tensor, temperature: float, dim: int) -> Tensor:
    """`dim` / 2 sines and as many cosines, alternating, of falling frequency: [...] to [..., dim]."""
    pair = torch.arange(dim, device=angle.device).div(2, rounding_mode="floor")
    angles = angle[..., None] / temperature ** (2 * pair.to(angle.dtype) / dim)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(-2)


def position_embedding(shape: tuple[int, int], where: torch.device) -> Tensor:
    """The sine embedding of each position of a level: [256, height, width], half of it for y, half for x."""
    height, width = shape
    y, x = (
        _sine_embedding(torch.arange(1.0, n + 1, device=where) / (n + 1e-6) * (2 * math.pi), 20, 128)
        for n in (height, width)
    )
    both = torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], -1)
    return both.permute(2, 0, 1)


def box_embedding(boxes: Tensor) -> Tensor:
    """The sine embedding of boxes. boxes: [B, Q, 4], centre and size. Returns: [B, Q, 512], y before x."""
    return _sine_embedding(boxes[..., [1, 0, 2, 3]] * (2 * math.pi), 10000, 128).flatten(-2)


def cell_centres(shapes: LevelShapes, where: torch.device) -> Tensor:
    """The centre of each position's cell: [1, N, 2], x and y in fractions of the image."""
    rows = []
    for height, width in shapes:
        y, x = (torch.arange(0.5, n, device=where) / n for n in (height, width))
        rows.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1))
    return torch.cat(rows)[None]


def proposal_boxes(shapes: LevelShapes, where: torch.device) -> Tensor:
    """The box that each position's proposal starts from: [N, 4], centre and size in fractions of the image.

    It is a twentieth of the image wide at the finest level and doubles at each coarser one.
    """
    sides = [torch.full((h * w, 2), _PROPOSAL_SIDE * 2**level, device=where) for level, (h, w) in enumerate(shapes)]
    return torch.cat([cell_centres(shapes, where)[0], torch.cat(sides)], -1)
