"""I3D, an Inception network inflated to three dimensions (Carreira and Zisserman, CVPR 2017).

It gives the features of the Fréchet video distance (FVD) in its "videogpt" variant: the 400 logits of Kinetics. It is a
re-implementation by the names of pytorch-i3d (piergiaj/pytorch-i3d); dropout is left out. Many papers compute FVD with
StyleGAN-V's TorchScript file instead, which has the same graph and a preprocessing of its own: their figures are not
comparable with these.

Axes: B batch, C channels, T frames, H and W pixels.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.networks.device import device
from tasks.weights import store as weights

FEATURES = 400  # of one video
SIDE = 224  # pixels
LEAST_FRAMES = 9  # fewer leave no frame for the last average pool

# Channels of each block: of its input, then of the convolutions of its four branches: 1x1; 1x1 and 3x3; 1x1 and 3x3;
# 1x1 after a pool.
_MIXED = {
    "3b": (192, 64, 96, 128, 16, 32, 32),
    "3c": (256, 128, 128, 192, 32, 96, 64),
    "4b": (480, 192, 96, 208, 16, 48, 64),
    "4c": (512, 160, 112, 224, 24, 64, 64),
    "4d": (512, 128, 128, 256, 24, 64, 64),
    "4e": (512, 112, 144, 288, 32, 64, 64),
    "4f": (528, 256, 160, 320, 32, 128, 128),
    "5b": (832, 256, 160, 320, 32, 128, 128),
    "5c": (832, 384, 192, 384, 48, 128, 128),
}


def _padded(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """x with TensorFlow's SAME padding: zeros up to a whole number of strides, an odd one at the end."""
    padding: list[int] = []
    for size, side, step in zip(x.shape[2:], kernel, stride, strict=True):
        missing = max(side - (size % step or step), 0)
        padding = [missing // 2, missing - missing // 2, *padding]
    return F.pad(x, padding)


def _pooled(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return F.max_pool3d(_padded(x, kernel, stride), kernel, stride)


class _Unit(nn.Module):
    def __init__(self, channels: int, out: int, side: int = 1, stride: int = 1, last: bool = False) -> None:
        super().__init__()
        self._kernel, self._stride = (side,) * 3, (stride,) * 3
        self.conv3d = nn.Conv3d(channels, out, self._kernel, self._stride, bias=last)
        self.bn = None if last else nn.BatchNorm3d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(_padded(x, self._kernel, self._stride))
        return x if self.bn is None else F.relu(self.bn(x))


class _Mixed(nn.Module):
    def __init__(self, channels: int, b0: int, b1a: int, b1b: int, b2a: int, b2b: int, b3b: int) -> None:
        super().__init__()
        self.b0 = _Unit(channels, b0)
        self.b1a, self.b1b = _Unit(channels, b1a), _Unit(b1a, b1b, 3)
        self.b2a, self.b2b = _Unit(channels, b2a), _Unit(b2a, b2b, 3)
        self.b3b = _Unit(channels, b3b)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.b3b(_pooled(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), pooled], 1)


class I3d(nn.Module):
    """The network of `i3d_pretrained_400.pt` and `rgb_imagenet.pt`: 12.7 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = _Unit(1024, FEATURES, last=True)
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = _Unit(64, 64)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        for name, channels in _MIXED.items():
            self.add_module(f"Mixed_{name}", _Mixed(*channels))

    def forward(self, videos: Tensor) -> Tensor:
        """videos: [B, 3, T, 224, 224] RGB, -1 to 1. Returns: [B, 400] logits, averaged over time."""
        x = _pooled(self.Conv3d_1a_7x7(videos), (1, 3, 3), (1, 2, 2))
        x = _pooled(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name in _MIXED:
            if name == "4b":
                x = _pooled(x, (3, 3, 3), (2, 2, 2))
            if name == "5b":
                x = _pooled(x, (2, 2, 2), (2, 2, 2))
            x = self.get_submodule(f"Mixed_{name}")(x)
        return self.logits(F.avg_pool3d(x, (2, 7, 7), stride=1)).mean((2, 3, 4))


def expected_shapes(folder: Path) -> weights.Shapes:
    """The keys and shapes that the published checkpoint has. folder: not used; there is one layout."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in I3d().state_dict().items()}


def load(dtype: torch.dtype = torch.float32) -> I3d:
    """The network with its published weights. Raises MissingBackend, WrongWeights."""
    (path,) = weights.files("i3d")
    network = I3d()
    weights.load_into(network, weights.read(path), path)
    return network.to(device(), dtype).eval().requires_grad_(False)


def prepared(frames: Tensor) -> Tensor:
    """Preprocess the frames of one video: scale the short side to 224 (bilinear) and crop the centre.

    frames: [T, H, W, 3] uint8 RGB. Returns: [3, T, 224, 224] float32, -1 to 1.
    """
    x = frames.permute(0, 3, 1, 2).float() / 255
    height, width = x.shape[-2:]
    scale = SIDE / min(height, width)
    size = (SIDE, -int(-width * scale // 1)) if height < width else (-int(-height * scale // 1), SIDE)
    x = F.interpolate(x, size, mode="bilinear", align_corners=False)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    return (x[:, :, top : top + SIDE, left : left + SIDE] * 2 - 1).permute(1, 0, 2, 3).contiguous()


@torch.inference_mode()
def features(network: I3d, videos: Tensor, batch: int = 4) -> Tensor:
    """The features that FVD is computed on.

    videos: [videos, 3, T, 224, 224], -1 to 1, T at least 9. batch: videos that go through the network at a time.

    Returns: [videos, 400] float64 on the CPU. Raises ValueError for videos of fewer than 9 frames.
    """
    if videos.shape[2] < LEAST_FRAMES:
        raise ValueError(f"a video of {videos.shape[2]} frames is too short for I3D, which needs {LEAST_FRAMES}")
    parameter = next(network.parameters())
    parts = [network(part.to(parameter.device, parameter.dtype)) for part in videos.split(batch)]
    return torch.cat(parts).double().cpu()
