"""The Inception v3 network of the Fréchet inception distance (FID).

It is a re-implementation of the TensorFlow graph of 2015-12-05 by the names of its PyTorch port, pytorch-fid
(mseitzer/pytorch-fid). It differs from torchvision's Inception v3 in three places: average pools do not count their
padding, the last block pools by maximum, and there are 1008 classes. The auxiliary classifier is left out, as in the
port. The final layer's weights are loaded but not applied.

Axes: B batch, C channels, H and W pixels.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.networks.device import device
from tasks.weights import store as weights

FEATURES = 2048  # of one image
_SIDE = 299  # pixels; images are scaled to a square of this side

_average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_strided_max_pool = partial(F.max_pool2d, kernel_size=3, stride=2)


class _Conv(nn.Module):
    """Convolution, batch normalisation, ReLU. kernel: (height, width), or one number for both."""

    def __init__(
        self, channels: int, out: int, kernel: int | tuple[int, int] = 1, stride: int = 1, pad: bool = True
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if pad and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(channels, out, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """A block of parallel branches. Each branch is a chain of convolutions whose names share a prefix."""

    def chain(self, prefix: str, channels: int, *layers: tuple[int, int | tuple[int, int], int]) -> None:
        """Add the convolutions `prefix`_1, `prefix`_2, ... layers: (output channels, kernel, stride) of each."""
        for number, (out, kernel, stride) in enumerate(layers, start=1):
            self.add_module(f"{prefix}_{number}", _Conv(channels, out, kernel, stride))
            channels = out

    def through(self, prefix: str, x: Tensor) -> Tensor:
        """Apply one branch."""
        for name, layer in self.named_children():
            if name.startswith(f"{prefix}_"):
                x = layer(x)
        return x


class _InceptionA(_Mixed):
    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(channels, 64)
        self.chain("branch5x5", channels, (48, 1, 1), (64, 5, 1))
        self.chain("branch3x3dbl", channels, (64, 1, 1), (96, 3, 1), (96, 3, 1))
        self.branch_pool = _Conv(channels, pooled)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.through(name, x) for name in ("branch5x5", "branch3x3dbl")]
        return torch.cat([self.branch1x1(x), *branches, self.branch_pool(_average_pool(x))], 1)


class _InceptionB(_Mixed):
    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = _Conv(288, 384, 3, 2)
        self.chain("branch3x3dbl", 288, (64, 1, 1), (96, 3, 1), (96, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch3x3(x), self.through("branch3x3dbl", x), _strided_max_pool(x)], 1)


class _InceptionC(_Mixed):
    def __init__(self, width: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = _Conv(768, 192)
        self.chain("branch7x7", 768, (width, 1, 1), (width, row, 1), (192, column, 1))
        self.chain(
            "branch7x7dbl", 768, (width, 1, 1), (width, column, 1), (width, row, 1), (width, column, 1), (192, row, 1)
        )
        self.branch_pool = _Conv(768, 192)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.through(name, x) for name in ("branch7x7", "branch7x7dbl")]
        return torch.cat([self.branch1x1(x), *branches, self.branch_pool(_average_pool(x))], 1)


class _InceptionD(_Mixed):
    def __init__(self) -> None:
        super().__init__()
        self.chain("branch3x3", 768, (192, 1, 1), (320, 3, 2))
        self.chain("branch7x7x3", 768, (192, 1, 1), (192, (1, 7), 1), (192, (7, 1), 1), (192, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.through("branch3x3", x), self.through("branch7x7x3", x), _strided_max_pool(x)], 1)


class _InceptionE(nn.Module):
    def __init__(self, channels: int, last: bool) -> None:
        super().__init__()
        self._pool = _max_pool if last else _average_pool
        self.branch1x1 = _Conv(channels, 320)
        self.branch3x3_1 = _Conv(channels, 384)
        self.branch3x3_2a = _Conv(384, 384, (1, 3))
        self.branch3x3_2b = _Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = _Conv(channels, 448)
        self.branch3x3dbl_2 = _Conv(448, 384, 3)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1))
        self.branch_pool = _Conv(channels, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        branches += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *branches, self.branch_pool(self._pool(x))], 1)


class FidInception(nn.Module):
    """The network of `pt_inception-2015-12-05-6726825d.pth`: 23.9 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _InceptionA(192, 32), _InceptionA(256, 64), _InceptionA(288, 64)
        self.Mixed_6a = _InceptionB()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            _InceptionC(128),
            _InceptionC(160),
            _InceptionC(160),
            _InceptionC(192),
        )
        self.Mixed_7a = _InceptionD()
        self.Mixed_7b, self.Mixed_7c = _InceptionE(1280, last=False), _InceptionE(2048, last=True)
        self.fc = nn.Linear(2048, 1008)  # part of the checkpoint; FID does not need it

    def blocks(self, images: Tensor) -> list[Tensor]:
        """The outputs of pytorch-fid's four blocks.

        images: [B, 3, H, W] RGB, 0 to 1, of any size.

        Returns: [B, 64, 73, 73], [B, 192, 35, 35], [B, 768, 17, 17] and [B, 2048, 1, 1]. FID is computed on the last.
        """
        x = F.interpolate(images, (_SIDE, _SIDE), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))
        blocks = [_strided_max_pool(x)]
        blocks.append(_strided_max_pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(blocks[-1]))))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(blocks[-1]))))
        blocks.append(self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(blocks[-1])))
        return [*blocks, F.adaptive_avg_pool2d(x, 1)]


def expected_shapes(folder: Path) -> weights.Shapes:
    """The keys and shapes that the published checkpoint has. folder: not used; there is one layout."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in FidInception().state_dict().items()}


def load(dtype: torch.dtype = torch.float32) -> FidInception:
    """The network with its published weights. Raises MissingBackend, WrongWeights."""
    (path,) = weights.files("fid-inception")
    network = FidInception()
    weights.load_into(network, weights.read(path), path)
    return network.to(device(), dtype).eval().requires_grad_(False)


@torch.inference_mode()
def features(network: FidInception, images: Tensor, batch: int = 16) -> Tensor:
    """The features that FID is computed on.

    images: [images, 3, H, W] float RGB, 0 to 1. batch: images that go through the network at a time.

    Returns: [images, 2048] float64 on the CPU.
    """
    parameter = next(network.parameters())
    parts = [network.blocks(part.to(parameter.device, parameter.dtype))[-1].flatten(1) for part in images.split(batch)]
    return torch.cat(parts).double().cpu()
