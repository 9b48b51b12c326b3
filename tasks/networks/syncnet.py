"""SyncNet: do lips and audio belong together (Chung and Zisserman, Out of time, 2016; syncnet_v2.model).

One network embeds a window of five frames of a mouth, the other the 0.2 s of audio of the same time. The audio
embeddings are shifted against those of the lips; the distance is smallest at the offset where the two fit. It is a
re-implementation of the reference (joonson/syncnet_python) with modules named as in its checkpoint, without training.

Frames come at 25 a second, audio at 16 kHz. An offset of +k frames means that the audio is k frames early, as in the
reference.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.media.clip import SAMPLE_RATE
from tasks.networks.device import device
from tasks.networks.mfcc import HOP, WINDOW, mfcc
from tasks.weights import store as weights

FPS = 25
SIDE = 224  # pixels of a mouth crop
FRAMES = 5  # of a window
SHIFT = 15  # frames, the largest offset either way in the published figures: 31 offsets
_SAMPLES = SAMPLE_RATE // FPS  # audio samples of a frame
_STEP = _SAMPLES // HOP  # MFCC columns of a frame, 4
_COLUMNS = FRAMES * _STEP  # MFCC columns of a window
_LIP_BATCH = 16  # windows; about 250 MB at the first layer in float32
_SOUND_BATCH = 64  # windows
_MEDIAN_WINDOWS = 9  # of the median filter over the windows' confidences


def _conv2d(channels: int, out: int, kernel: tuple[int, int] = (3, 3), padding: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, kernel, padding=padding), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


def _conv3d(
    channels: int, out: int, kernel: tuple[int, int, int], stride: int = 1, padding: int = 0
) -> list[nn.Module]:
    convolution = nn.Conv3d(channels, out, kernel, (1, stride, stride), (0, padding, padding))
    return [convolution, nn.BatchNorm3d(out), nn.ReLU(inplace=True)]


def _pool3d(padding: int = 0) -> nn.Module:
    return nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, padding, padding))


def _perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, 1024))


class SyncNet(nn.Module):
    """The network of `syncnet_v2.model`: 13.6 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_conv2d(1, 64),
            nn.Identity(),
            *_conv2d(64, 192),
            nn.MaxPool2d((3, 3), (1, 2)),
            *_conv2d(192, 384),
            *_conv2d(384, 256),
            *_conv2d(256, 256),
            nn.MaxPool2d((3, 3), (2, 2)),
            *_conv2d(256, 512, (5, 4), 0),
        )
        self.netfcaud = _perceptron()
        self.netfclip = _perceptron()
        self.netcnnlip = nn.Sequential(
            *_conv3d(3, 96, (5, 7, 7), 2),
            _pool3d(),
            *_conv3d(96, 256, (1, 5, 5), 2, 1),
            _pool3d(1),
            *_conv3d(256, 256, (1, 3, 3), 1, 1),
            *_conv3d(256, 256, (1, 3, 3), 1, 1),
            *_conv3d(256, 256, (1, 3, 3), 1, 1),
            _pool3d(),
            *_conv3d(256, 512, (1, 6, 6)),
        )

    def sound(self, columns: Tensor) -> Tensor:
        """Embed audio windows. columns: [windows, 1, 13, 20] MFCC. Returns: [windows, 1024]."""
        return self.netfcaud(self.netcnnaud(columns).flatten(1))

    def lips(self, crops: Tensor) -> Tensor:
        """Embed every window of five successive mouth crops.

        Only the first layer spans several frames, and it does not pad them. So the windows of a long strip get the same
        embeddings as each alone.

        crops: [batch, 3, frames, 224, 224] BGR, 0 to 255, at least five frames.

        Returns: [batch, frames - 4, 1024].
        """
        features = self.lip_features(crops)
        return self.netfclip(features.flatten(0, 1)).unflatten(0, features.shape[:2])

    def lip_features(self, crops: Tensor) -> Tensor:
        """The convolutional features of the same windows: [batch, frames - 4, 512]."""
        return self.netcnnlip(crops).flatten(2).transpose(1, 2)


def expected_shapes(folder: Path) -> weights.Shapes:
    """The keys and shapes that the checkpoint in `folder` should have.

    An old checkpoint lacks the batch normalisations' counters (num_batches_tracked), which inference does not use.
    Then they are not expected.
    """
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in SyncNet().state_dict().items()}
    (name,) = weights.published("syncnet").files
    if (folder / name).is_file() and not any(map(_is_counter, weights.shapes(folder / name))):
        shapes = {key: shape for key, shape in shapes.items() if not _is_counter(key)}
    return shapes


def _is_counter(key: str) -> bool:
    return key.endswith(".num_batches_tracked")


def load(on: torch.device | None = None, dtype: torch.dtype = torch.float32) -> SyncNet:
    """Load the network with its published weights, on the GPU where there is one. Raises MissingBackend,
    WrongWeights."""
    (path,) = weights.files("syncnet")
    state, network = weights.read(path), SyncNet()
    if not any(map(_is_counter, state)):
        state |= {key: value for key, value in network.state_dict().items() if _is_counter(key)}
    weights.load_into(network, state, path)
    return ready(network, on, dtype)


def ready(network: SyncNet, on: torch.device | None = None, dtype: torch.dtype = torch.float32) -> SyncNet:
    """Prepare the network for inference: device, dtype, and kernels in the memory layout that is fastest."""
    network = network.to(on or device(), dtype).eval().requires_grad_(False)
    # takes two thirds of the time on a CPU; torch's stubs do not know the argument
    network.netcnnlip.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return network


def lip_vectors(network: SyncNet, crops: Iterable[np.ndarray], batch: int = _LIP_BATCH) -> Tensor:
    """Embed every window of five successive mouth crops.

    crops: [224, 224, 3] uint8 RGB each, 25 a second. They are read as needed; batch + 4 are held at a time.
    batch: windows that go through the network together, some 16 MB each at its first layer in float32.

    Returns: [windows, 1024] float32 on the CPU. There are crops - 4 windows, none for fewer than five crops.
    """
    parameter = next(network.parameters())
    found = [torch.empty(0, 1024)]
    for strip in _strips(iter(crops), batch):
        with torch.inference_mode():
            bgr = torch.from_numpy(strip).to(parameter.device).flip(-1).permute(3, 0, 1, 2)[None]
            laid_out = bgr.to(parameter.dtype).contiguous(memory_format=torch.channels_last_3d)
            found.append(network.lips(laid_out)[0].float().cpu())
    return torch.cat(found)


def _strips(crops: Iterator[np.ndarray], batch: int) -> Iterator[np.ndarray]:
    """Group crops to arrays of up to `batch` windows, [frames, 224, 224, 3] each. Successive arrays overlap by the
    four frames that windows share."""
    held: list[np.ndarray] = []
    while new := list(islice(crops, batch + FRAMES - 1 - len(held))):
        held += new
        if len(held) >= FRAMES:
            yield np.stack(held)
            held = held[1 - FRAMES :]


def sound_vectors(network: SyncNet, columns: np.ndarray, windows: int, batch: int = _SOUND_BATCH) -> Tensor:
    """Embed the audio of each window.

    columns: [columns, 13] MFCC (tasks.networks.mfcc), at least 4 * windows + 16. Window v has columns 4 v to 4 v + 19.
    windows: how many to embed, from the first.
    batch: windows that go through the network together.

    Returns: [windows, 1024] float32 on the CPU. Raises ValueError where there are too few columns.
    """
    parameter = next(network.parameters())
    inputs = np.lib.stride_tricks.sliding_window_view(columns, _COLUMNS, axis=0)[::_STEP][:windows]
    if len(inputs) < windows:
        raise ValueError(f"{len(columns)} MFCC columns are too few for {windows} windows")
    found = [torch.empty(0, 1024)]
    for first in range(0, windows, batch):
        with torch.inference_mode():
            part = torch.from_numpy(inputs[first : first + batch].astype(np.float32))[:, None]
            found.append(network.sound(part.to(parameter.device, parameter.dtype)).float().cpu())
    return torch.cat(found)


@dataclass(frozen=True)
class Fit:
    """How well lips and audio fit."""

    offset: int
    """The offset of the smallest mean distance: frames by which the audio is early."""
    distance: float
    """The smallest mean distance (Sync-D, LSE-D)."""
    confidence: float
    """The median of all offsets' mean distances minus the smallest one (Sync-C, LSE-C)."""
    mean_distances: np.ndarray
    """[2 * shift + 1] float32, the mean over the windows, from the offset +shift to -shift."""
    distances: np.ndarray
    """[windows, 2 * shift + 1] float32, NaN where a window has no audio at an offset."""

    @property
    def confidences(self) -> np.ndarray:
        """[windows] float32, each window's own confidence at the offset, smoothed by a median over nine windows."""
        from scipy.signal import medfilt

        best = self.distances[:, int(self.mean_distances.argmin())]
        return medfilt(np.median(self.mean_distances) - best, _MEDIAN_WINDOWS)


def evaluate(network: SyncNet, crops: Iterable[np.ndarray], samples: np.ndarray, shift: int = SHIFT) -> Fit:
    """Compare lips and audio exactly as the reference does. The figures are comparable to published ones.

    The reference leaves out the last window. Beyond either end of the audio it compares with vectors of zeros
    (`zero_padded`), which distorts the figures of short videos most.

    crops: [224, 224, 3] uint8 RGB each, 25 a second.
    samples: [samples] at 16 kHz on the scale of int16, from the time of the first crop.
    shift: the largest offset in frames, either way.

    Raises ValueError where there is no whole window.
    """
    lips = lip_vectors(network, crops)
    windows = min(len(lips) + FRAMES - 1, len(samples) // _SAMPLES) - FRAMES
    if windows < 1:
        raise ValueError(f"frames and audio together are shorter than {FRAMES + 1} frames")
    return zero_padded(lips[:windows], sound_vectors(network, mfcc(samples), windows), shift)


def compare_windows(
    network: SyncNet, crops: Iterable[np.ndarray], samples: np.ndarray, shift: int = SHIFT, batch: int = _LIP_BATCH
) -> Fit:
    """Compare lips and audio as `evaluate` does, but over all windows and without padding (`overlapping`), so that the
    figures of short clips are not distorted.

    batch: as for `lip_vectors`. The other arguments are as those of `evaluate`. Raises ValueError for fewer than
    2 * shift windows.
    """
    lips = lip_vectors(network, crops, batch)
    windows = min(len(lips) + FRAMES - 1, len(samples) // _SAMPLES) - FRAMES + 1
    if windows < max(1, 2 * shift):
        raise ValueError(f"{max(windows, 0)} windows are too few for offsets of {shift} frames either way")
    # the last window's audio is 15 ms longer than its frames
    end = (windows + FRAMES - 1) * _SAMPLES + WINDOW - HOP
    audio = np.pad(samples[:end], (0, max(0, end - len(samples))))
    return overlapping(lips[:windows], sound_vectors(network, mfcc(audio), windows), shift)


def zero_padded(lips: Tensor, sound: Tensor, shift: int) -> Fit:
    """Fit with the reference's distances. The audio embeddings are padded with zeros at both ends.

    lips, sound: [windows, size] embeddings each. shift: the largest offset in frames, either way.
    """
    padded = F.pad(sound, (0, 0, shift, shift))
    return _fit(torch.stack([F.pairwise_distance(lips, row) for row in padded.unfold(0, len(lips), 1).mT], 1))


def overlapping(lips: Tensor, sound: Tensor, shift: int) -> Fit:
    """Fit without padding. Each offset's mean is over the windows that have audio at it.

    Arguments as those of `zero_padded`.
    """
    padded = F.pad(sound, (0, 0, shift, shift), value=float("nan"))
    return _fit(torch.stack([F.pairwise_distance(lips, row) for row in padded.unfold(0, len(lips), 1).mT], 1))


def _fit(distances: Tensor) -> Fit:
    """distances: [windows, 2 * shift + 1], NaN where a window has no audio at an offset."""
    mean = distances.nanmean(0)
    least = int(mean.argmin())
    return Fit(
        offset=len(mean) // 2 - least,
        distance=float(mean[least]),
        confidence=float(mean.median() - mean[least]),
        mean_distances=mean.numpy(),
        distances=distances.numpy(),
    )
