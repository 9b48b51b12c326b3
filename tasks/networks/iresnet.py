"""ArcFace's residual networks, IResNet-50 and -100: an embedding of 512 numbers for each aligned face.

They are a re-implementation of arcface_torch's (deepinsight/insightface) and take its PyTorch checkpoints. Dropout and
the half-precision switch are left out. They serve to compare identities of generated faces (CSIM) with a PyTorch
checkpoint; tasks.networks.insightface runs the same networks from ONNX files.

Axes: B batch, C channels.
"""

import torch
from torch import Tensor, nn

# Blocks in each of the four stages.
LAYERS = {"iresnet50": (3, 4, 14, 3), "iresnet100": (3, 13, 30, 3)}
_EPS = 1e-5


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels, eps=_EPS)
        self.conv1 = nn.Conv2d(channels, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out, eps=_EPS)
        self.prelu = nn.PReLU(out)
        self.conv2 = nn.Conv2d(out, out, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out, eps=_EPS)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out, eps=_EPS))
            if stride > 1
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return y + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """An IResNet. layers: blocks in each of the four stages, one of LAYERS."""

    def __init__(self, layers: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64, eps=_EPS)
        self.prelu = nn.PReLU(64)
        channels = 64
        for number, (count, out) in enumerate(zip(layers, (64, 128, 256, 512), strict=True), start=1):
            blocks = [_Block(channels, out, 2), *(_Block(out, out, 1) for _ in range(count - 1))]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            channels = out
        self.bn2 = nn.BatchNorm2d(512, eps=_EPS)
        self.fc = nn.Linear(512 * 7 * 7, 512)
        self.features = nn.BatchNorm1d(512, eps=_EPS)

    def forward(self, faces: Tensor) -> Tensor:
        """faces: [B, 3, 112, 112] RGB, -1 to 1 (tasks.networks.insightface.blob). Returns: [B, 512], not normalised."""
        x = self.prelu(self.bn1(self.conv1(faces)))
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return self.features(self.fc(torch.flatten(self.bn2(x), 1)))
