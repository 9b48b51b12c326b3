"""Video codecs, from frames to latents and back: a 3D cosine transform without weights, and Wan's VAE.

The geometry is that of Wan's VAE (tasks.networks.latent_geometry). 4n + 1 frames give n + 1 latent frames at an eighth
of the height and width. Latent frame 0 is of frame 0 alone; latent frame i >= 1 covers frames 4i - 3 to 4i.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib.metadata import version
from itertools import product
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from tasks.networks.latent_geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE, WAN_CHANNELS, usable_frames
from tasks.stages.backend import Backend, Resources
from tasks.weights import store as weights

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

MAX_CHANNELS = TEMPORAL_STRIDE * SPATIAL_STRIDE * SPATIAL_STRIDE * 3
"""Channels at which the cosine transform loses nothing: as many numbers as the pixels of a block have."""


class Encoded(NamedTuple):
    """One latent frame."""

    latent: np.ndarray
    """[channels, height / 8, width / 8] float32, each channel of about unit variance."""
    squared_error: float | None
    """The squared error of decoding it, in squared grey levels of 0..255, summed over the pixels and colours of its
    frames. None from a codec that would have to decode to know it."""


class LatentCodec(Backend, ABC):
    """A video codec.

    It streams in both directions: it holds a few frames at a time, however long the video is. A video gives the same
    numbers in pieces as at once.
    """

    channels: int
    """Channels of a latent."""

    @abstractmethod
    def __init__(self, channels: int) -> None:
        """Raises ValueError for a number of channels that the codec cannot have."""

    @property
    @abstractmethod
    def gains(self) -> np.ndarray:
        """How much a unit of each channel changes the decoded frame, up to a common factor: [channels] float32. All are
        equal from a codec that does not know it."""

    @abstractmethod
    def encode(self, frames: Iterable[np.ndarray]) -> Iterator[Encoded]:
        """Encode 4n + 1 frames to n + 1 latent frames.

        A height or width that is not a multiple of 8 is padded by repeating the last row or column.

        frames: [height, width, 3] uint8 RGB each, all of one size.

        Raises ValueError for another number of frames, and for a frame of another size or dtype.
        """

    @abstractmethod
    def decode(self, latents: Iterable[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
        """Decode n + 1 latent frames to 4n + 1 frames.

        latents: [channels, ceil(height / 8), ceil(width / 8)] each.
        height, width: of the frames in pixels.

        Yields: [height, width, 3] uint8 RGB. Raises ValueError for latents of another shape.
        """


# The colour transform: lightness, red against blue, and green against both; the last two correspond to YCbCr's chroma.
# It is orthonormal, so the energy of dropped coefficients is the squared error of the decoded frame.
_COLOURS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
_GREY = 128.0

# The expected standard deviation of a coefficient (t, v, u, colour) in natural video: 200 x distance^-1.5. The distance
# is u + v plus the entries below for t and for the colour. This is the zigzag order of JPEG with time and colour as
# further axes. The three means (t = v = u = 0) have standard deviations of their own. The numbers were chosen once, on
# nine clips at 480 lines, seven of them talkers. They are right within a factor of 2 down to a distance of 7. Against
# the best order for each of those clips, this order costs 0.6 dB with 16 channels and 2 dB with 96, on average.
_TIME_DISTANCE = (0.0, 2.0, 3.0, 4.0)
_COLOUR_DISTANCE = (0.0, 3.5, 4.0)
_MEAN_STD = (1500.0, 600.0, 250.0)
_STD_AT_1, _FALL = 200.0, -1.5


class _Coefficient(NamedTuple):
    """A coefficient of the transform of one block."""

    std: float
    """The expected standard deviation in natural video."""
    t: int
    """Frequency in time."""
    v: int
    """Frequency over the rows."""
    u: int
    """Frequency over the columns."""
    colour: int
    """Row of _COLOURS."""


def _in_order() -> list[_Coefficient]:
    """All coefficients, that with the largest expected standard deviation first. Ties go to the lower t, then the lower
    v, u and colour."""
    found = []
    for t, v, u, colour in product(range(TEMPORAL_STRIDE), range(SPATIAL_STRIDE), range(SPATIAL_STRIDE), range(3)):
        distance = u + v + _TIME_DISTANCE[t] + _COLOUR_DISTANCE[colour]
        std = _STD_AT_1 * distance**_FALL if t or v or u else _MEAN_STD[colour]
        found.append(_Coefficient(std, t, v, u, colour))
    return sorted(found, key=lambda c: (-c.std, c[1:]))


class CosineCodec(LatentCodec):
    """The orthonormal discrete cosine transform of blocks of 4 x 8 x 8 pixels in time, height, width and colour.

    The `channels` coefficients that are largest in natural video are kept, each divided by its expected standard
    deviation. The first frame is encoded as four equal frames: coefficients of change in time are zero there, and a
    channel has the same meaning in every latent frame.
    """

    resources: ClassVar[Resources] = Resources(memory_gb=0.1)

    def __init__(self, channels: int) -> None:
        if not 1 <= channels <= MAX_CHANNELS:
            raise ValueError(f"{channels} channels: a block of 4x8x8 pixels has 1 to {MAX_CHANNELS}")
        self.channels = channels
        kept = _in_order()[:channels]
        self._std = np.array([c.std for c in kept], np.float32)
        self._t = np.array([c.t for c in kept])
        # the transform runs along one axis after the other, for the coefficients that are kept alone
        columns = sorted({(c.u, c.colour) for c in kept})
        planes = sorted({(c.v, columns.index((c.u, c.colour))) for c in kept})
        self._plane = np.array([planes.index((c.v, columns.index((c.u, c.colour)))) for c in kept])
        self._plane_v, self._plane_column = np.array(planes).T
        waves = _waves(SPATIAL_STRIDE)
        # [8 pixels x 3 colours, columns], [rows, 8 pixels], [4, 4 frames]
        self._across = np.stack([np.outer(waves[u], _COLOURS[c]).ravel() for u, c in columns], 1).astype(np.float32)
        self._down = waves[: self._plane_v.max() + 1].astype(np.float32)
        self._in_time = _waves(TEMPORAL_STRIDE).astype(np.float32)

    @property
    def gains(self) -> np.ndarray:
        """The expected standard deviations that the coefficients were divided by; the transform is orthonormal."""
        return self._std

    @cached_property
    def basis(self) -> np.ndarray:
        """The kernel of a convolution of stride 4 x 8 x 8 that encodes four frames of RGB minus 128: [channels, 3
        colours, 4 frames, 8 rows, 8 columns] float32."""
        columns = self._across.reshape(SPATIAL_STRIDE, 3, -1)[:, :, self._plane_column[self._plane]]
        rows, times = self._down[self._plane_v[self._plane]], self._in_time[self._t]
        basis: np.ndarray = np.einsum("kt,ky,xck,k->kctyx", times, rows, columns, 1 / self._std, optimize=False)
        return basis

    def encode(self, frames: Iterable[np.ndarray]) -> Iterator[Encoded]:
        # One buffer for all frames: allocating it for each frame takes as long as all that follows. It is not the
        # codec's own, because several threads may encode at once.
        floats = np.empty((0, 0, 3), np.float32)
        for group in _groups(frames):
            if floats.shape != group[0].shape:
                floats = np.empty(group[0].shape, np.float32)
            yield self._encoded([self._planes(frame, floats) for frame in group], sum(map(_energy, group)))

    def _planes(self, frame: np.ndarray, floats: np.ndarray) -> np.ndarray:
        """The spatial coefficients of one frame: [planes, height / 8, width / 8] float32. floats: a buffer of the
        frame's shape."""
        height, width = frame.shape[0] // SPATIAL_STRIDE, frame.shape[1] // SPATIAL_STRIDE
        np.copyto(floats, frame)
        # row by row: the products are too small for the library to split them over threads, which would be slower
        across = floats.reshape(-1, width, SPATIAL_STRIDE * 3) @ self._across
        both = np.matmul(self._down, across.reshape(height, SPATIAL_STRIDE, -1)).reshape(
            height, len(self._down), width, -1
        )
        planes = both[:, self._plane_v, :, self._plane_column]
        planes[0] -= np.float32(_MEAN_OF_GREY)  # plane 0 is the mean lightness
        return planes

    def _encoded(self, group: list[np.ndarray], energy: float) -> Encoded:
        """The latent frame of one or four frames. group: their spatial coefficients. energy: of their pixels."""
        coefficients = np.zeros((self.channels, *group[0].shape[1:]), np.float32)
        for t in np.unique(self._t):
            of_t = self._t == t
            if len(group) == 1:
                if t == 0:
                    coefficients[of_t] = 2 * group[0][self._plane[of_t]]
            else:
                # added one by one, so that the sum does not depend on a library's order of additions
                over_time = self._in_time[t, 0] * group[0]
                for weight, planes in zip(self._in_time[t, 1:], group[1:], strict=True):
                    over_time += weight * planes
                coefficients[of_t] = over_time[self._plane[of_t]]
        kept = float(np.square(coefficients, dtype=np.float64).sum()) * len(group) / TEMPORAL_STRIDE
        return Encoded(coefficients / self._std[:, None, None], max(0.0, energy - kept))

    def decode(self, latents: Iterable[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
        for number, latent in enumerate(_checked(latents, self.channels, height, width)):
            coefficients = latent.astype(np.float32) * self._std[:, None, None]
            times = self._in_time.T if number else np.array([[0.5, 0, 0, 0]], np.float32)
            for weights_t in times:
                planes = np.zeros((len(self._plane_v), *latent.shape[1:]), np.float32)
                for t in np.unique(self._t):
                    of_t = self._t == t
                    planes[self._plane[of_t]] += weights_t[t] * coefficients[of_t]
                yield self._frame(planes)[:height, :width]

    def _frame(self, planes: np.ndarray) -> np.ndarray:
        """The frame, [height, width, 3] uint8, of spatial coefficients."""
        _, height, width = planes.shape
        both = np.zeros((height, len(self._down), width, self._across.shape[1]), np.float32)
        planes[0] += np.float32(_MEAN_OF_GREY)
        both[:, self._plane_v, :, self._plane_column] = planes
        across = np.matmul(self._down.T, both.reshape(height, len(self._down), -1))
        frame = across.reshape(-1, width, self._across.shape[1]) @ self._across.T
        frame += 0.5
        return (
            np.clip(frame, 0, 255, out=frame)
            .astype(np.uint8)
            .reshape(height * SPATIAL_STRIDE, width * SPATIAL_STRIDE, 3)
        )


_MEAN_OF_GREY = _GREY * SPATIAL_STRIDE * np.sqrt(3)  # the first coefficient of a grey block


def _waves(length: int) -> np.ndarray:
    """The orthonormal discrete cosine transform (DCT-II): [frequencies, positions] float64."""
    frequency, place = np.mgrid[:length, :length]
    waves: np.ndarray = np.sqrt(2 / length) * np.cos(np.pi * (place + 0.5) * frequency / length)
    waves[0] = np.sqrt(1 / length)
    return waves


class WanCodec(LatentCodec):
    """Wan2.1's VAE with its published weights, in float32.

    Latents are the mode of its posterior. Of each channel its mean is subtracted, and it is divided by its standard
    deviation. The error of decoding is not known without decoding.
    """

    networks: ClassVar = ("wan-vae",)
    resources: ClassVar[Resources] = Resources(gpu=0.5, memory_gb=4.0, batch=TEMPORAL_STRIDE)
    """Memory by the size of its weights, not measured: the catalogue's 0.5 GB in float32, in which it computes, and an
    allowance of 3.5 GB for libraries and the activations of four frames at 480 lines."""

    def __init__(self, channels: int) -> None:
        if channels != WAN_CHANNELS:
            raise ValueError(
                f"channels is {channels}, and latents of Wan's VAE have {WAN_CHANNELS}; set channels: {WAN_CHANNELS}"
            )
        self.channels = channels

    @classmethod
    def version(cls) -> str:
        return f"diffusers {version('diffusers')}, torch {version('torch')}, weights {weights.digest('wan-vae')}"

    @property
    def gains(self) -> np.ndarray:
        return np.ones(self.channels, np.float32)

    @cached_property
    def _vae(self) -> "AutoencoderKLWan":
        from tasks.networks import wan_vae
        from tasks.networks.device import device

        return wan_vae.load(device())

    def encode(self, frames: Iterable[np.ndarray]) -> Iterator[Encoded]:
        import torch

        from tasks.networks import wan_vae

        groups = (torch.from_numpy(np.stack(group)).permute(3, 0, 1, 2)[None] for group in _groups(frames))
        for latent in wan_vae.encode(self._vae, (group.float() / 127.5 - 1 for group in groups)):
            yield Encoded(latent[0].cpu().numpy(), None)

    def decode(self, latents: Iterable[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
        import torch

        from tasks.networks import wan_vae

        checked = _checked(latents, self.channels, height, width)
        for frames in wan_vae.decode(self._vae, (torch.from_numpy(np.float32(latent))[None] for latent in checked)):
            pixels = ((frames[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0)
            yield from np.ascontiguousarray(pixels[:, :height, :width].cpu().numpy())


def _groups(frames: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The first frame, then groups of four frames, each padded to multiples of 8. Raises ValueError as
    LatentCodec.encode does."""
    shape: tuple[int, ...] | None = None
    group: list[np.ndarray] = []
    number = -1
    for number, frame in enumerate(frames):
        shape = shape or frame.shape
        if frame.shape != shape or frame.dtype != np.uint8 or frame.shape[2:] != (3,) or not frame.size:
            raise ValueError(
                f"frame {number} is {frame.dtype} {list(frame.shape)} after {list(shape)}; frames are uint8 "
                "[height, width, 3], all of one size"
            )
        group.append(_padded(frame))
        if number % TEMPORAL_STRIDE == 0:
            yield group
            group = []
    if group or number < 0:
        raise ValueError(f"{number + 1} frames: a video to encode has 4n + 1, such as {usable_frames(number + 1)}")


def _checked(latents: Iterable[np.ndarray], channels: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Pass on latents of the shape that `height` x `width` pixels take. Raises ValueError for another shape."""
    expected = (channels, -(-height // SPATIAL_STRIDE), -(-width // SPATIAL_STRIDE))
    for number, latent in enumerate(latents):
        if latent.shape != expected:
            raise ValueError(
                f"latent frame {number} is {list(latent.shape)}; {height}x{width} pixels take {list(expected)}"
            )
        yield latent


def _padded(frame: np.ndarray) -> np.ndarray:
    """A frame padded to multiples of 8 by repeating the last row and column, contiguous in memory."""
    rows, columns = -frame.shape[0] % SPATIAL_STRIDE, -frame.shape[1] % SPATIAL_STRIDE
    if rows or columns:
        return np.pad(frame, ((0, rows), (0, columns), (0, 0)), mode="edge")
    return np.ascontiguousarray(frame)


def _energy(frame: np.ndarray) -> float:
    """The exact sum of (value - 128)^2 over a frame, [height, width, 3] uint8."""
    import cv2

    return cv2.norm(frame, cv2.NORM_L2SQR) - 2 * _GREY * sum(cv2.sumElems(frame)) + _GREY**2 * frame.size


CODECS: dict[str, type[LatentCodec]] = {"dct": CosineCodec, "wan": WanCodec}
