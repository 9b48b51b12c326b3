"""S3FD, the face detector behind SyncNet's published figures (Zhang et al., S3FD, ICCV 2017; sfd_face.pth).

It is a re-implementation of the detector in SyncNet's pipeline (joonson/syncnet_python), without training. Modules are
named as in the checkpoint: `vgg` is VGG-16 up to a dilated fc7, `extras` adds two coarser levels. Boxes and scores come
from six levels of strides 4 to 128, with one prior box at each position.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.networks.device import device
from tasks.weights import store as weights

SCALE = 0.25  # SyncNet's pipeline detects in frames of a quarter of their size
MIN_SCORE = 0.9  # of a face, in SyncNet's pipeline
_MEAN = (123.0, 117.0, 104.0)  # RGB
_STRIDES = (4, 8, 16, 32, 64, 128)
_SIZES = (16, 32, 64, 128, 256, 512)  # pixels of the prior boxes
_CENTRE_VARIANCE, _SIZE_VARIANCE = 0.1, 0.2  # scales of the box regression
_MAX_CANDIDATES, _MAX_FACES = 5000, 750  # before and after the first suppression
_LEVELS_IOU, _FACES_IOU = 0.3, 0.1  # of the first and of the second non-maximum suppression
_BATCH = 8  # images


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
    """The network of `sfd_face.pth`: 22.5 million parameters."""

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
        # the finest level has three background classes
        self.conf = nn.ModuleList(
            nn.Conv2d(channels, 2 if level else 4, 3, padding=1) for level, channels in enumerate(sources)
        )

    def heads(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The raw box regressions and class scores of each level, finest first.

        x: [batch, 3, height, width] RGB, 0 to 255 minus the mean (123, 117, 104).

        Returns: boxes, [batch, 4, h, w] each; scores, [batch, 2, h, w] each, [batch, 4, h, w] at the first level.
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
        """The box and the score of every position.

        images: [batch, 3, height, width] RGB, 0 to 255.

        Returns: boxes, [batch, positions, 4], x0, y0, x1, y1 in pixels; scores of a face, [batch, positions], 0 to 1.
        """
        mean = torch.tensor(_MEAN, device=images.device, dtype=images.dtype)[:, None, None]
        boxes, scores = self.heads(images - mean)
        scores[0] = torch.cat([scores[0][:, :3].amax(1, keepdim=True), scores[0][:, 3:]], 1)
        offsets = torch.cat([each.flatten(2) for each in boxes], 2).transpose(1, 2).float()
        faces = torch.cat([each.float().softmax(1)[:, 1].flatten(1) for each in scores], 1)
        priors = torch.cat([_priors(level, *each.shape[-2:]) for level, each in enumerate(boxes)]).to(offsets.device)
        centre = priors[:, :2] + _CENTRE_VARIANCE * offsets[..., :2] * priors[:, 2:]
        half = priors[:, 2:] * torch.exp(_SIZE_VARIANCE * offsets[..., 2:]) / 2
        return torch.cat([centre - half, centre + half], -1), faces


def _priors(level: int, h: int, w: int) -> Tensor:
    """A level's prior boxes: [h * w, 4], centre x, centre y, width, height in pixels."""
    stride, size = _STRIDES[level], float(_SIZES[level])
    y, x = torch.meshgrid((torch.arange(h) + 0.5) * stride, (torch.arange(w) + 0.5) * stride, indexing="ij")
    sides = torch.full_like(x, size)
    return torch.stack([x, y, sides, sides], -1).flatten(0, 1)


def expected_shapes(folder: Path) -> weights.Shapes:
    """The keys and shapes that the published checkpoint has. folder: not used; there is one layout."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in S3FD().state_dict().items()}


def load(on: torch.device | None = None, dtype: torch.dtype = torch.float32) -> S3FD:
    """Load the network with its published weights, on the GPU where there is one. Raises MissingBackend,
    WrongWeights."""
    (path,) = weights.files("s3fd")
    network = S3FD()
    weights.load_into(network, weights.read(path), path)
    return ready(network, on, dtype)


def ready(network: S3FD, on: torch.device | None = None, dtype: torch.dtype = torch.float32) -> S3FD:
    """Prepare the network for inference: device, dtype, and kernels in the memory layout that is fastest."""
    network = network.to(on or device(), dtype).eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def faces(
    network: S3FD,
    images: Sequence[np.ndarray],
    scale: float = SCALE,
    min_score: float = MIN_SCORE,
    batch: int = _BATCH,
) -> list[np.ndarray]:
    """Detect the faces in each image as SyncNet's pipeline does.

    images: [height, width, 3] uint8 RGB each, all of one size.
    scale: images are scaled by it for detection, bilinear.
    min_score: the score of a face has to exceed it, 0 to 1.
    batch: images that go through the network together. Each takes some 500 bytes a scaled pixel in float32.

    Returns: for each image [faces, 5] float64, x0, y0, x1, y1 in its pixels and the score, highest score first.
    """
    import cv2

    parameter = next(network.parameters())
    found = []
    for first in range(0, len(images), batch):
        scaled = [cv2.resize(image, None, fx=scale, fy=scale) for image in images[first : first + batch]]
        height, width = images[0].shape[:2]
        across, down = width / scaled[0].shape[1], height / scaled[0].shape[0]
        with torch.inference_mode():
            x = torch.from_numpy(np.stack(scaled)).to(parameter.device).permute(0, 3, 1, 2).to(parameter.dtype)
            boxes, scores = (each.cpu().numpy() for each in network(x.contiguous(memory_format=torch.channels_last)))
        for box, score in zip(boxes.astype(np.float64), scores.astype(np.float64), strict=True):
            rows = np.column_stack([box * (across, down, across, down), score])[score > min_score]
            candidates = rows[_suppressed(rows, _LEVELS_IOU)][:_MAX_FACES]
            found.append(candidates[_suppressed(candidates, _FACES_IOU)])
    return found


def _suppressed(rows: np.ndarray, max_iou: float) -> list[int]:
    """Non-maximum suppression: the rows to keep of [boxes, 5], highest score first. A row is dropped where its
    intersection over union with a better one exceeds `max_iou`."""
    order = np.argsort(-rows[:, 4], kind="stable")[:_MAX_CANDIDATES]
    areas = (rows[:, 2] - rows[:, 0]) * (rows[:, 3] - rows[:, 1])
    kept = []
    while order.size:
        best, order = int(order[0]), order[1:]
        kept.append(best)
        sides = np.minimum(rows[best, 2:4], rows[order, 2:4]) - np.maximum(rows[best, :2], rows[order, :2])
        both = np.maximum(sides, 0).prod(axis=1)
        order = order[both <= max_iou * (areas[best] + areas[order] - both)]
    return kept
