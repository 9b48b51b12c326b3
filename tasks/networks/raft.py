"""RAFT, the large model: dense optical flow by recurrent lookups in all-pairs correlations (Teed and Deng, ECCV 2020).

It is a re-implementation of Princeton's code (princeton-vl/RAFT) for inference. Modules are named as in its checkpoints
(raft-things.pth, raft-sintel.pth, raft-kitti.pth). torchvision's checkpoint (raft_large_C_T_SKHT_V2) holds the same
network under other names and is read too. The small model, dropout and the correlation kernel for CUDA are left out.

Axes: B batch, C channels, H and W pixels, h and w eighths of them.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.networks.device import device
from tasks.weights import store as weights

_LEVELS, _RADIUS = 4, 4  # of the correlation pyramid, and of the window that is looked up in each level
_HIDDEN = 128  # channels of the hidden state
_MIN_SIDE = 128  # pixels; below, the coarsest level of the correlation pyramid has a single row

# From Princeton's names to torchvision's. `norm3` and `downsample.1` are one module under two names.
_RENAMED = (
    (r"^fnet\.", "feature_encoder."),
    (r"^cnet\.", "context_encoder."),
    (r"encoder\.conv2\.", "encoder.conv."),
    (r"encoder\.conv1\.", "encoder.convnormrelu.0."),
    (r"encoder\.norm1\.", "encoder.convnormrelu.1."),
    (r"(layer\d\.\d)\.conv(\d)\.", r"\1.convnormrelu\2.0."),
    (r"(layer\d\.\d)\.norm3\.", r"\1.downsample.1."),
    (r"(layer\d\.\d)\.norm(\d)\.", r"\1.convnormrelu\2.1."),
    (r"^update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"^update_block\.mask\.2\.", "mask_predictor.conv."),
    (r"^update_block\.encoder\.conv\.", "update_block.motion_encoder.conv.0."),
    (r"^update_block\.encoder\.convc(\d)\.", r"update_block.motion_encoder.convcorr\1.0."),
    (r"^update_block\.encoder\.convf(\d)\.", r"update_block.motion_encoder.convflow\1.0."),
    (r"^update_block\.gru\.conv([zrq])(\d)\.", r"update_block.recurrent_block.convgru\2.conv\1."),
)


class _Residual(nn.Module):
    def __init__(self, channels: int, out: int, norm: type[nn.Module], stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)
        self.norm1, self.norm2 = norm(out), norm(out)
        self.downsample: nn.Module | None = None
        if stride > 1:
            self.norm3 = norm(out)
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride), self.norm3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class _Encoder(nn.Module):
    """[B, 3, H, W] to [B, out, h, w]."""

    def __init__(self, out: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm1 = norm(64)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3)
        self.layer1 = nn.Sequential(_Residual(64, 64, norm, 1), _Residual(64, 64, norm, 1))
        self.layer2 = nn.Sequential(_Residual(64, 96, norm, 2), _Residual(96, 96, norm, 1))
        self.layer3 = nn.Sequential(_Residual(96, 128, norm, 2), _Residual(128, 128, norm, 1))
        self.conv2 = nn.Conv2d(128, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class _MotionEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(_LEVELS * (2 * _RADIUS + 1) ** 2, 256, 1)
        self.convc2 = nn.Conv2d(256, 192, 3, padding=1)
        self.convf1 = nn.Conv2d(2, 128, 7, padding=3)
        self.convf2 = nn.Conv2d(128, 64, 3, padding=1)
        self.conv = nn.Conv2d(192 + 64, 128 - 2, 3, padding=1)

    def forward(self, flow: Tensor, correlation: Tensor) -> Tensor:
        correlation = F.relu(self.convc2(F.relu(self.convc1(correlation))))
        motion = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat([F.relu(self.conv(torch.cat([correlation, motion], 1))), flow], 1)


def _gate(kernel: tuple[int, int]) -> nn.Conv2d:
    return nn.Conv2d(3 * _HIDDEN, _HIDDEN, kernel, padding=(kernel[0] // 2, kernel[1] // 2))


class _Gru(nn.Module):
    """A separable convolutional GRU: one step along the rows, then one along the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.convz1, self.convr1, self.convq1 = (_gate((1, 5)) for _ in range(3))
        self.convz2, self.convr2, self.convq2 = (_gate((5, 1)) for _ in range(3))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        for z_of, r_of, q_of in (
            (self.convz1, self.convr1, self.convq1),
            (self.convz2, self.convr2, self.convq2),
        ):
            both = torch.cat([h, x], 1)
            z, r = torch.sigmoid(z_of(both)), torch.sigmoid(r_of(both))
            q = torch.tanh(q_of(torch.cat([r * h, x], 1)))
            h = (1 - z) * h + z * q
        return h


class _FlowHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(_HIDDEN, 256, 3, padding=1)
        self.conv2 = nn.Conv2d(256, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x)))


class _Update(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = _MotionEncoder()
        self.gru = _Gru()
        self.flow_head = _FlowHead()
        self.mask = nn.Sequential(nn.Conv2d(_HIDDEN, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 64 * 9, 1))


class Raft(nn.Module):
    """The network of `raft-things.pth`: 5.3 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.fnet = _Encoder(256, nn.InstanceNorm2d)
        self.cnet = _Encoder(2 * _HIDDEN, nn.BatchNorm2d)
        self.update_block = _Update()

    def features(self, images: Tensor) -> Tensor:
        """The features that are matched. images: [B, 3, H, W] RGB, 0 to 255, H and W multiples of 8.

        Returns: [B, 256, h, w].
        """
        return self.fnet(images / 127.5 - 1)

    def forward(self, images: Tensor, first: Tensor, second: Tensor, iterations: int = 12) -> Tensor:
        """Flow from each first image to its second one.

        images: [B, 3, H, W] RGB, 0 to 255, the first images; H and W multiples of 8, at least 128.
        first, second: [B, 256, h, w], `features` of the first and of the second images.
        iterations: updates of the flow.

        Returns: [B, 2, H, W], x and y in pixels.
        """
        return self.upsampled(*self.iterate(images, first, second, iterations)[-1])

    def iterate(self, images: Tensor, first: Tensor, second: Tensor, iterations: int) -> list[tuple[Tensor, Tensor]]:
        """The hidden state, [B, 128, h, w], and the flow, [B, 2, h, w] in units of 8 pixels, after each iteration.

        Arguments as those of `forward`.
        """
        hidden, context = self.cnet(images / 127.5 - 1).split(_HIDDEN, 1)
        hidden, context = torch.tanh(hidden), F.relu(context)
        pyramid = _correlations(first, second)
        start = _grid(first)
        target, states = start, []
        for _ in range(iterations):
            flow = target - start
            motion = self.update_block.encoder(flow, _lookup(pyramid, target))
            hidden = self.update_block.gru(hidden, torch.cat([context, motion], 1))
            target = target + self.update_block.flow_head(hidden)
            states.append((hidden, target - start))
        return states

    def upsampled(self, hidden: Tensor, flow: Tensor) -> Tensor:
        """Upsample the flow to [B, 2, H, W], in pixels. Each pixel's flow is a convex combination of its nine coarse
        neighbours (section 3.3)."""
        batch, _, h, w = flow.shape
        weight = (0.25 * self.update_block.mask(hidden)).view(batch, 1, 9, 8, 8, h, w).softmax(2)
        near = F.unfold(8 * flow, (3, 3), padding=1).view(batch, 2, 9, 1, 1, h, w)
        fine = (weight * near).sum(2)
        return fine.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, 8 * h, 8 * w)


def _grid(like: Tensor) -> Tensor:
    """Each position's own x and y: [B, 2, h, w]."""
    batch, _, h, w = like.shape
    y, x = torch.meshgrid(torch.arange(h, device=like.device), torch.arange(w, device=like.device), indexing="ij")
    return torch.stack([x, y]).to(like.dtype).expand(batch, 2, h, w)


def _correlations(first: Tensor, second: Tensor) -> list[Tensor]:
    """The correlation pyramid: the dot product of every position of the first features with every position of the
    second, at four resolutions of the second, [B * h * w, 1, h', w'] each."""
    batch, channels, h, w = first.shape
    volume = first.flatten(2).transpose(1, 2) @ second.flatten(2) / channels**0.5
    pyramid = [volume.reshape(batch * h * w, 1, h, w)]
    while len(pyramid) < _LEVELS:
        pyramid.append(F.avg_pool2d(pyramid[-1], 2, 2))
    return pyramid


def _lookup(pyramid: list[Tensor], target: Tensor) -> Tensor:
    """The correlations in a window of 9 x 9 around each target position, [B, 2, h, w]: [B, 4 * 81, h, w].

    The x offset is the slower axis of the window, as in the checkpoints.
    """
    batch, _, h, w = target.shape
    steps = torch.arange(-_RADIUS, _RADIUS + 1, device=target.device, dtype=target.dtype)
    window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)
    centre = target.permute(0, 2, 3, 1).reshape(batch * h * w, 1, 1, 2)
    levels = []
    for level, volume in enumerate(pyramid):
        size = torch.tensor([volume.shape[-1] - 1, volume.shape[-2] - 1], device=target.device, dtype=target.dtype)
        sampled = F.grid_sample(volume, 2 * (centre / 2**level + window) / size - 1, align_corners=True)
        levels.append(sampled.view(batch, h, w, -1))
    return torch.cat(levels, -1).permute(0, 3, 1, 2)


def to_torchvision(key: str) -> str:
    """Torchvision's name of one of Princeton's keys."""
    for pattern, renamed in _RENAMED:
        key = re.sub(pattern, renamed, key)
    return key


def expected_shapes(folder: Path) -> weights.Shapes:
    """The keys and shapes that the checkpoint in `folder` should have, in its own one of the two namings."""
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in Raft().state_dict().items()}
    return {to_torchvision(key): shape for key, shape in shapes.items()} if _of_torchvision(folder) else shapes


def _of_torchvision(folder: Path) -> bool:
    return any(key.startswith("feature_encoder.") for key in weights.shapes(*weights.files("raft", folder)))


def load(dtype: torch.dtype = torch.float32) -> Raft:
    """Load the network with its published weights, in either naming. Raises MissingBackend, WrongWeights."""
    (path,) = weights.files("raft")
    state, network = weights.read(path), Raft()
    if any(key.startswith("feature_encoder.") for key in state):
        renamed = {key: to_torchvision(key) for key in network.state_dict()}
        left_over = state.keys() - set(renamed.values())
        state = {key: state[name] for key, name in renamed.items() if name in state} | {k: state[k] for k in left_over}
    weights.load_into(network, state, path)
    return network.to(device(), dtype).eval().requires_grad_(False)


@torch.inference_mode()
def flows(network: Raft, images: Tensor, iterations: int = 12) -> Tensor:
    """Flow between successive images.

    All pairs go through the network together. A pair of 320x180 takes some 60 MB. A side that is below 128 pixels or
    not a multiple of 8 is padded by repeating the border, half of it at either end.

    images: [frames, 3, H, W] uint8 RGB of any size.

    Returns: [frames - 1, 2, H, W] float32 on the CPU, x and y in pixels.
    """
    parameter = next(network.parameters())
    height, width = images.shape[-2:]
    down, across = (max(_MIN_SIDE, -(-side // 8) * 8) - side for side in (height, width))
    left, top = across // 2, down // 2
    padded = F.pad(
        images.to(parameter.device, parameter.dtype), (left, across - left, top, down - top), mode="replicate"
    )
    features = network.features(padded)
    flow = network(padded[:-1], features[:-1], features[1:], iterations)
    return flow[:, :, top : top + height, left : left + width].float().cpu()
