"""SyncNet: do these lips and this sound belong together (Chung and Zisserman, Out of time, 2016; syncnet_v2.model).

Two networks give a vector each for five frames of a mouth and for the 0.2 s of sound that go with them. Slid along
each other, the vectors are nearest where sound and picture fit. Modules are named as in the checkpoint. Pictures come
25 a second, sound has 16 kHz. An offset of +k frames means that the sound is k frames early (the reference's sign).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks import weights
from tasks.clip import SAMPLE_RATE
from tasks.networks.device import device
from tasks.networks.mfcc import HOP, WINDOW, mfcc

FPS = 25
SIDE = 224  # pixels of the picture of a mouth
FRAMES = 5  # of a window
SHIFT = 15  # frames either way that the published figures look: 31 offsets
_SAMPLES = SAMPLE_RATE // FPS  # of a frame
_STEP = _SAMPLES // HOP  # columns of sound for a frame, 4
_COLUMNS = FRAMES * _STEP  # of a window
_LIP_BATCH = 16  # windows: about 250 MB at the first layer in float32
_SOUND_BATCH = 64
_SMOOTHED = 9  # frames


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
    """The network of `syncnet_v2.model`: 13.6 M parameters."""

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
        """[windows, 1, 13, 20] coefficients of sound to [windows, 1024]."""
        return self.netfcaud(self.netcnnaud(columns).flatten(1))

    def lips(self, pictures: Tensor) -> Tensor:
        """[batch, 3, frames, 224, 224] BGR, 0 to 255, at least five frames, to [batch, frames - 4, 1024].

        Only the first layer sees several frames, and does not pad them: windows of one strip are what they are alone.
        """
        seen = self.seen(pictures)
        return self.netfclip(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])

    def seen(self, pictures: Tensor) -> Tensor:
        """What the convolutions make of the same: [batch, frames - 4, 512]."""
        return self.netcnnlip(pictures).flatten(2).transpose(1, 2)


def takes(folder: Path) -> weights.Shapes:
    """The keys and shapes of the checkpoint in `folder`. One that is older than the counters of the batch
    normalisations, which nothing is computed from, has none of them."""
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in SyncNet().state_dict().items()}
    (name,) = weights.published("syncnet").files
    if (folder / name).is_file() and not any(map(_is_counter, weights.shapes(folder / name))):
        shapes = {key: shape for key, shape in shapes.items() if not _is_counter(key)}
    return shapes


def _is_counter(key: str) -> bool:
    return key.endswith(".num_batches_tracked")


def load(on: torch.device | None = None, dtype: torch.dtype = torch.float32) -> SyncNet:
    """The network with its published weights, on the GPU where there is one. Raises MissingBackend, WrongWeights."""
    (path,) = weights.files("syncnet")
    state, network = weights.read(path), SyncNet()
    if not any(map(_is_counter, state)):
        state |= {key: value for key, value in network.state_dict().items() if _is_counter(key)}
    weights.fill(network, state, path)
    return ready(network, on, dtype)


def ready(network: SyncNet, on: torch.device | None = None, dtype: torch.dtype = torch.float32) -> SyncNet:
    """To be measured with: where and as what it runs, and its kernels laid out as they are fastest."""
    network = network.to(on or device(), dtype).eval().requires_grad_(False)
    # two thirds of the time on a CPU; torch's stubs do not know the argument
    network.netcnnlip.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return network


def lip_vectors(network: SyncNet, pictures: Iterable[np.ndarray], batch: int = _LIP_BATCH) -> Tensor:
    """A vector for each five successive pictures of a mouth.

    pictures: [224, 224, 3] uint8 RGB each, 25 a second; read one by one, batch + 4 are held at a time. batch: windows
    that go through the network together, some 16 MB each at its first layer in float32.

    Returns: [windows, 1024] float32 on the CPU, pictures - 4 of them; none of fewer than five pictures.
    """
    parameter = next(network.parameters())
    found = [torch.empty(0, 1024)]
    for strip in _strips(iter(pictures), batch):
        with torch.inference_mode():
            bgr = torch.from_numpy(strip).to(parameter.device).flip(-1).permute(3, 0, 1, 2)[None]
            laid_out = bgr.to(parameter.dtype).contiguous(memory_format=torch.channels_last_3d)
            found.append(network.lips(laid_out)[0].float().cpu())
    return torch.cat(found)


def _strips(pictures: Iterator[np.ndarray], batch: int) -> Iterator[np.ndarray]:
    """[frames, 224, 224, 3] with up to `batch` windows each, overlapping by what a window needs of the one before."""
    held: list[np.ndarray] = []
    while new := list(islice(pictures, batch + FRAMES - 1 - len(held))):
        held += new
        if len(held) >= FRAMES:
            yield np.stack(held)
            held = held[1 - FRAMES :]


def sound_vectors(network: SyncNet, columns: np.ndarray, windows: int, batch: int = _SOUND_BATCH) -> Tensor:
    """A vector for the sound of each window.

    columns: [columns, 13] of tasks.networks.mfcc; window v hears 4 v to 4 v + 19, so that it takes 4 * windows + 16.

    Returns: [windows, 1024] float32 on the CPU.
    """
    parameter = next(network.parameters())
    heard = np.lib.stride_tricks.sliding_window_view(columns, _COLUMNS, axis=0)[::_STEP][:windows]
    if len(heard) < windows:
        raise ValueError(f"{len(columns)} columns of sound are too few for {windows} windows")
    found = [torch.empty(0, 1024)]
    for at in range(0, windows, batch):
        with torch.inference_mode():
            some = torch.from_numpy(heard[at : at + batch].astype(np.float32))[:, None]
            found.append(network.sound(some.to(parameter.device, parameter.dtype)).float().cpu())
    return torch.cat(found)


@dataclass(frozen=True)
class Fit:
    """How lips and sound fit.

    offset: frames by which the sound is early, where the mean distance is least. distance: that least mean distance
    (Sync-D, LSE-D). confidence: how far it is below the median of all offsets' (Sync-C, LSE-C). mean_distances:
    [2 * shift + 1] float32, from the offset of +shift to -shift. distances: [windows, 2 * shift + 1] float32, NaN
    where an offset has no sound to a window.
    """

    offset: int
    distance: float
    confidence: float
    mean_distances: np.ndarray
    distances: np.ndarray

    @property
    def confidences(self) -> np.ndarray:
        """[windows] float32, each window's own confidence at the offset, by a median over nine of them."""
        from scipy.signal import medfilt

        at = self.distances[:, int(self.mean_distances.argmin())]
        return medfilt(np.median(self.mean_distances) - at, _SMOOTHED)


def evaluate(network: SyncNet, pictures: Iterable[np.ndarray], samples: np.ndarray, shift: int = SHIFT) -> Fit:
    """Lips against sound exactly as the reference does, for figures that are comparable to published ones.

    It leaves out the last window, and beyond either end of the sound it compares with vectors of zeros
    (`zero_padded`), which weighs the more the shorter a video is.

    pictures: [224, 224, 3] uint8 RGB, 25 a second. samples: [samples] on the scale of int16, from the time of the
    first picture. Raises ValueError when there is not one window.
    """
    lips = lip_vectors(network, pictures)
    windows = min(len(lips) + FRAMES - 1, len(samples) // _SAMPLES) - FRAMES
    if windows < 1:
        raise ValueError(f"picture and sound together are shorter than {FRAMES + 1} frames")
    return zero_padded(lips[:windows], sound_vectors(network, mfcc(samples), windows), shift)


def compare(network: SyncNet, pictures: Iterable[np.ndarray], samples: np.ndarray, shift: int = SHIFT) -> Fit:
    """Lips against sound as `evaluate` does, but of all windows and with nothing beyond the ends (`overlapping`), so
    that short clips are measured by what is in them. Arguments likewise; Raises ValueError when the windows are fewer
    than 2 * shift."""
    lips = lip_vectors(network, pictures)
    windows = min(len(lips) + FRAMES - 1, len(samples) // _SAMPLES) - FRAMES + 1
    if windows < max(1, 2 * shift):
        raise ValueError(f"{max(windows, 0)} windows are too few to look {shift} frames either way")
    # the last window hears 15 ms more than its frames last
    end = (windows + FRAMES - 1) * _SAMPLES + WINDOW - HOP
    heard = np.pad(samples[:end], (0, max(0, end - len(samples))))
    return overlapping(lips[:windows], sound_vectors(network, mfcc(heard), windows), shift)


def zero_padded(lips: Tensor, sound: Tensor, shift: int) -> Fit:
    """The reference's distances: [windows, size] both, sound's continued by vectors of zeros on both sides."""
    padded = F.pad(sound, (0, 0, shift, shift))
    return _fit(torch.stack([F.pairwise_distance(lips, row) for row in padded.unfold(0, len(lips), 1).mT], 1))


def overlapping(lips: Tensor, sound: Tensor, shift: int) -> Fit:
    """Distances where there is both: [windows, size] both; each offset's mean is over the windows that it has."""
    padded = F.pad(sound, (0, 0, shift, shift), value=float("nan"))
    return _fit(torch.stack([F.pairwise_distance(lips, row) for row in padded.unfold(0, len(lips), 1).mT], 1))


def _fit(distances: Tensor) -> Fit:
    """From [windows, 2 * shift + 1] distances, NaN where there is none."""
    mean = distances.nanmean(0)
    least = int(mean.argmin())
    return Fit(
        offset=len(mean) // 2 - least,
        distance=float(mean[least]),
        confidence=float(mean.median() - mean[least]),
        mean_distances=mean.numpy(),
        distances=distances.numpy(),
    )
