"""S3FD: the face detector that SyncNet's published figures start from (Zhang et al., S3FD, ICCV 2017; sfd_face.pth).

Modules are named as in the checkpoint: `vgg` is VGG-16 up to a dilated fc7, `extras` two coarser levels; boxes and
scores come from six levels of strides 4 to 128, one prior box a place.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks import weights
from tasks.networks.device import device

SCALE = 0.25  # of the picture that is searched, in SyncNet's pipeline
MIN_SCORE = 0.9
_MEAN = (123.0, 117.0, 104.0)  # RGB
_STRIDES = (4, 8, 16, 32, 64, 128)
_SIZES = (16, 32, 64, 128, 256, 512)  # pixels of the priors
_CENTRE, _SIZE = 0.1, 0.2  # what the regression was scaled by
_MOST_SEEN, _MOST_KEPT = 5000, 750
_SAME_LEVELS, _SAME_FACE = 0.3, 0.1  # overlaps from which two boxes are of one face
_BATCH = 8


class _L2Norm(nn.Module):
    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) * self.weight[:, None, None]


def _vgg() -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for level, (out, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        for _ in range(count):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(inplace=True)]
            channels = out
        layers.append(nn.MaxPool2d(2, 2, ceil_mode=level == 2))
    dilated = [nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.ReLU(inplace=True)]
    return [*layers, *dilated, nn.Conv2d(1024, 1024, 1), nn.ReLU(inplace=True)]


class S3FD(nn.Module):
    """The network of `sfd_face.pth`: 22.5 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.vgg = nn.ModuleList(_vgg())
        self.L2Norm3_3, self.L2Norm4_3, self.L2Norm5_3 = _L2Norm(256, 10.0), _L2Norm(512, 8.0), _L2Norm(512, 5.0)
        self.extras = nn.ModuleList(
            [
                nn.Conv2d(1024, 256, 1),
                nn.Conv2d(256, 512, 3, 2, 1),
                nn.Conv2d(512, 128, 1),
                nn.Conv2d(128, 256, 3, 2, 1),
            ]
        )
        sources = (256, 512, 512, 1024, 512, 256)
        self.loc = nn.ModuleList(nn.Conv2d(channels, 4, 3, padding=1) for channels in sources)
        # at the finest level, three kinds of background
        self.conf = nn.ModuleList(
            nn.Conv2d(channels, 2 if level else 4, 3, padding=1) for level, channels in enumerate(sources)
        )

    def heads(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The last convolutions' outputs, finest level first.

        x: [batch, 3, height, width] RGB, 0 to 255 less the mean (123, 117, 104).

        Returns: boxes, [batch, 4, h, w] each; scores, [batch, 2, h, w] each, 4 for 2 at the first.
        """
        sources = []
        for number, layer in enumerate(self.vgg):
            if number in (16, 23, 30):  # the pool after conv3_3, conv4_3, conv5_3
                norm = {16: self.L2Norm3_3, 23: self.L2Norm4_3, 30: self.L2Norm5_3}[number]
                sources.append(norm(x))
            x = layer(x)
        sources.append(x)
        for number, layer in enumerate(self.extras):
            x = F.relu(layer(x))
            if number % 2:
                sources.append(x)
        boxes = [head(source) for head, source in zip(self.loc, sources, strict=True)]
        return boxes, [head(source) for head, source in zip(self.conf, sources, strict=True)]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Every place's box and how sure it is that this is a face.

        images: [batch, 3, height, width] RGB, 0 to 255.

        Returns: [batch, places, 4] x0, y0, x1, y1 in pixels; [batch, places], 0 to 1.
        """
        mean = torch.tensor(_MEAN, device=images.device, dtype=images.dtype)[:, None, None]
        boxes, scores = self.heads(images - mean)
        scores[0] = torch.cat([scores[0][:, :3].amax(1, keepdim=True), scores[0][:, 3:]], 1)
        moved = torch.cat([each.flatten(2) for each in boxes], 2).transpose(1, 2).float()
        faces = torch.cat([each.float().softmax(1)[:, 1].flatten(1) for each in scores], 1)
        priors = torch.cat([_priors(level, *each.shape[-2:]) for level, each in enumerate(boxes)]).to(moved.device)
        centre = priors[:, :2] + _CENTRE * moved[..., :2] * priors[:, 2:]
        half = priors[:, 2:] * torch.exp(_SIZE * moved[..., 2:]) / 2
        return torch.cat([centre - half, centre + half], -1), faces


def _priors(level: int, h: int, w: int) -> Tensor:
    """[h * w, 4]: centre x, centre y, width, height of a level's prior boxes, pixels."""
    stride, size = _STRIDES[level], float(_SIZES[level])
    y, x = torch.meshgrid((torch.arange(h) + 0.5) * stride, (torch.arange(w) + 0.5) * stride, indexing="ij")
    sides = torch.full_like(x, size)
    return torch.stack([x, y, sides, sides], -1).flatten(0, 1)


def takes(folder: Path) -> weights.Shapes:
    """The keys and shapes of the checkpoint in `folder`."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in S3FD().state_dict().items()}


def load(on: torch.device | None = None, dtype: torch.dtype = torch.float32) -> S3FD:
    """The network with its published weights, on the GPU where there is one. Raises MissingBackend, WrongWeights."""
    (path,) = weights.files("s3fd")
    network = S3FD()
    weights.fill(network, weights.read(path), path)
    return ready(network, on, dtype)


def ready(network: S3FD, on: torch.device | None = None, dtype: torch.dtype = torch.float32) -> S3FD:
    """To be measured with: where and as what it runs, and its kernels laid out as they are fastest."""
    network = network.to(on or device(), dtype).eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def faces(
    network: S3FD,
    images: Sequence[np.ndarray],
    scale: float = SCALE,
    min_score: float = MIN_SCORE,
    batch: int = _BATCH,
) -> list[np.ndarray]:
    """The faces in each picture as SyncNet's pipeline finds them.

    images: [height, width, 3] uint8 RGB each, all of one size. scale: they are searched at, bilinear. min_score: 0 to
    1. batch: pictures that go through the network together, each some 500 bytes a pixel searched in float32.

    Returns: for each picture [faces, 5] float64, x0, y0, x1, y1 in its pixels and the score, surest first.
    """
    import cv2

    parameter = next(network.parameters())
    found = []
    for at in range(0, len(images), batch):
        some = [cv2.resize(image, None, fx=scale, fy=scale) for image in images[at : at + batch]]
        height, width = images[0].shape[:2]
        across, down = width / some[0].shape[1], height / some[0].shape[0]
        with torch.inference_mode():
            x = torch.from_numpy(np.stack(some)).to(parameter.device).permute(0, 3, 1, 2).to(parameter.dtype)
            boxes, scores = (each.cpu().numpy() for each in network(x.contiguous(memory_format=torch.channels_last)))
        for places, sure in zip(boxes.astype(np.float64), scores.astype(np.float64), strict=True):
            rows = np.column_stack([places * (across, down, across, down), sure])[sure > min_score]
            levels = rows[_kept(rows, _SAME_LEVELS)][:_MOST_KEPT]
            found.append(levels[_kept(levels, _SAME_FACE)])
    return found


def _kept(rows: np.ndarray, overlap: float) -> list[int]:
    """Of [boxes, 5] those that no surer one overlaps by more than this (intersection over union), surest first."""
    order = np.argsort(-rows[:, 4], kind="stable")[:_MOST_SEEN]
    areas = (rows[:, 2] - rows[:, 0]) * (rows[:, 3] - rows[:, 1])
    kept = []
    while order.size:
        best, order = int(order[0]), order[1:]
        kept.append(best)
        sides = np.minimum(rows[best, 2:4], rows[order, 2:4]) - np.maximum(rows[best, :2], rows[order, :2])
        both = np.maximum(sides, 0).prod(axis=1)
        order = order[both <= overlap * (areas[best] + areas[order] - both)]
    return kept
