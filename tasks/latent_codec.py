"""Video to latents and back: the interface of a codec, one without weights, a 3D cosine transform, and Wan's VAE.

Geometry is that of Wan's VAE (Wan Team 2025, "Wan: Open and Advanced Large-Scale Video Generative Models"): 4n + 1
frames give n + 1 latent frames, the first of the first frame alone and each other of four frames, at an eighth of the
height and width. Latent i >= 1 covers frames 4i - 3 to 4i.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib.metadata import version
from itertools import product
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import numpy as np

from tasks import weights

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

STRIDE_T, STRIDE_S = 4, 8  # frames, and pixels each way, of one latent
WAN_CHANNELS = 16
MAX_CHANNELS = STRIDE_T * STRIDE_S * STRIDE_S * 3  # as many numbers as the pixels have: nothing is lost


class Encoded(NamedTuple):
    """One latent frame.

    latent: [channels, height / 8, width / 8] float32, each channel of about unit variance. squared_error: what decoding
    it loses, (grey levels of 0..255) squared, summed over the pixels and colours of its frames; None from a codec that
    would have to decode to know.
    """

    latent: np.ndarray
    squared_error: float | None


class LatentCodec(Protocol):
    """A video codec. Both ways it streams: it holds a few frames, however long the video, and cutting the work into
    pieces changes no number."""

    channels: int

    def __init__(self, channels: int) -> None:
        """Raises ValueError for a number of channels that the codec does not have."""

    @staticmethod
    def version() -> str:
        """Library and weights, as far as they can change a number."""

    @staticmethod
    def check() -> None:
        """Raises tasks.stage.MissingBackend when the codec cannot run."""

    @property
    def gains(self) -> np.ndarray:
        """How much a unit of each channel changes the picture, but for a factor common to all: [channels] float32; all
        alike where the codec does not know."""

    def encode(self, frames: Iterable[np.ndarray]) -> Iterator[Encoded]:
        """Encode 4n + 1 frames of one size, each [height, width, 3] uint8 RGB, to n + 1 latent frames.

        Height and width that 8 does not divide are filled up by repeating the last row and column.

        Raises ValueError when the frames end elsewhere, or change their size.
        """

    def decode(self, latents: Iterable[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
        """Decode n + 1 latent frames, each [channels, ceil(height / 8), ceil(width / 8)], to 4n + 1 frames.

        Yields: [height, width, 3] uint8 RGB. Raises ValueError for latents of another shape.
        """


def usable_frames(frames: int) -> int:
    """How many of so many frames, from the first, have latents: the largest 4n + 1 that is not above."""
    return (frames - 1) // STRIDE_T * STRIDE_T + 1 if frames > 0 else 0


def latent_frames(frames: int) -> int:
    """How many latent frames 4n + 1 frames have: n + 1."""
    return (frames - 1) // STRIDE_T + 1 if frames > 0 else 0


# The transform's colours: orthonormal, so that what is dropped of it is what is lost of the picture: lightness, red
# against blue, and green against both; the last two do what YCbCr's chroma does.
_COLOURS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
_GREY = 128.0

# How much there is of a coefficient (t, v, u, colour), t slowest, in natural video: its standard deviation is 200 at
# a distance of 1 from the mean and falls with distance^-1.5, where the distance is u + v plus what these say for t and
# for the colour. That is the zigzag of JPEG with time and colour as further axes. The means of the three colours stand
# apart. Chosen once, on nine clips at 480 lines, seven of them talkers, within a factor of 2 down to a distance of 7;
# against the best order for each of those clips it costs 0.6 dB with 16 channels and 2 dB with 96, on average.
_TIME_DISTANCE = (0.0, 2.0, 3.0, 4.0)
_COLOUR_DISTANCE = (0.0, 3.5, 4.0)
_MEAN_STD = (1500.0, 600.0, 250.0)
_STD_AT_1, _FALL = 200.0, -1.5


class _Coefficient(NamedTuple):
    std: float
    t: int
    v: int
    u: int
    colour: int


def _in_order() -> list[_Coefficient]:
    """All coefficients, the most expected first; of equals, the slower, then the one with the coarser rows."""
    found = []
    for t, v, u, colour in product(range(STRIDE_T), range(STRIDE_S), range(STRIDE_S), range(3)):
        distance = u + v + _TIME_DISTANCE[t] + _COLOUR_DISTANCE[colour]
        std = _STD_AT_1 * distance**_FALL if t or v or u else _MEAN_STD[colour]
        found.append(_Coefficient(std, t, v, u, colour))
    return sorted(found, key=lambda c: (-c.std, c[1:]))


class CosineCodec:
    """Blocks of 4 x 8 x 8 pixels by the orthonormal discrete cosine transform in time, height, width and colour, of
    which the `channels` coefficients that natural video has most of are kept, each divided by its expected deviation.

    The first frame stands for four like it: what changes in time is zero there, and every channel means the same.
    """

    def __init__(self, channels: int) -> None:
        if not 1 <= channels <= MAX_CHANNELS:
            raise ValueError(f"{channels} channels: a block of 4x8x8 pixels has 1 to {MAX_CHANNELS}")
        self.channels = channels
        kept = _in_order()[:channels]
        self._std = np.array([c.std for c in kept], np.float32)
        self._t = np.array([c.t for c in kept])
        # the transform is done along one axis after the other, and only for what is kept
        columns = sorted({(c.u, c.colour) for c in kept})
        planes = sorted({(c.v, columns.index((c.u, c.colour))) for c in kept})
        self._plane = np.array([planes.index((c.v, columns.index((c.u, c.colour)))) for c in kept])
        self._plane_v, self._plane_column = np.array(planes).T
        waves = _waves(STRIDE_S)
        # [8 pixels x 3 colours, columns], [rows, 8 pixels], [4, 4 frames]
        self._across = np.stack([np.outer(waves[u], _COLOURS[c]).ravel() for u, c in columns], 1).astype(np.float32)
        self._down = waves[: self._plane_v.max() + 1].astype(np.float32)
        self._in_time = _waves(STRIDE_T).astype(np.float32)

    @staticmethod
    def version() -> str:
        """All in this module."""
        return ""

    @staticmethod
    def check() -> None:
        """NumPy and OpenCV are always installed."""

    @property
    def gains(self) -> np.ndarray:
        """What coefficients were divided by, as the transform is orthonormal."""
        return self._std

    @cached_property
    def basis(self) -> np.ndarray:
        """What encodes four frames at once, as a convolution of stride 4 x 8 x 8 over RGB less 128 would:
        [channels, 3 colours, 4 frames, 8 rows, 8 columns] float32."""
        columns = self._across.reshape(STRIDE_S, 3, -1)[:, :, self._plane_column[self._plane]]
        rows, times = self._down[self._plane_v[self._plane]], self._in_time[self._t]
        basis: np.ndarray = np.einsum("kt,ky,xck,k->kctyx", times, rows, columns, 1 / self._std, optimize=False)
        return basis

    def encode(self, frames: Iterable[np.ndarray]) -> Iterator[Encoded]:
        """As LatentCodec says."""
        # To have its memory made anew for each frame takes as long as all that follows. Not the codec's, which may be
        # encoding in several threads.
        floats = np.empty((0, 0, 3), np.float32)
        for group in _groups(frames):
            if floats.shape != group[0].shape:
                floats = np.empty(group[0].shape, np.float32)
            yield self._encoded([self._planes(frame, floats) for frame in group], sum(map(_energy, group)))

    def _planes(self, frame: np.ndarray, floats: np.ndarray) -> np.ndarray:
        """The coefficients in the picture that are needed: [planes, height / 8, width / 8] float32. floats: of the
        frame's shape, to be written to."""
        height, width = frame.shape[0] // STRIDE_S, frame.shape[1] // STRIDE_S
        np.copyto(floats, frame)
        # row by row: products too small for a library to spread over threads, which costs more than it gives
        across = floats.reshape(-1, width, STRIDE_S * 3) @ self._across
        both = np.matmul(self._down, across.reshape(height, STRIDE_S, -1)).reshape(height, len(self._down), width, -1)
        planes = both[:, self._plane_v, :, self._plane_column]
        planes[0] -= np.float32(_MEAN_OF_GREY)  # plane 0 is the mean of the lightness
        return planes

    def _encoded(self, group: list[np.ndarray], energy: float) -> Encoded:
        coefficients = np.zeros((self.channels, *group[0].shape[1:]), np.float32)
        for t in np.unique(self._t):
            of_t = self._t == t
            if len(group) == 1:
                if t == 0:
                    coefficients[of_t] = 2 * group[0][self._plane[of_t]]
            else:
                # added one by one: the sum does not depend on what a library makes of it
                over_time = self._in_time[t, 0] * group[0]
                for weight, planes in zip(self._in_time[t, 1:], group[1:], strict=True):
                    over_time += weight * planes
                coefficients[of_t] = over_time[self._plane[of_t]]
        kept = float(np.square(coefficients, dtype=np.float64).sum()) * len(group) / STRIDE_T
        return Encoded(coefficients / self._std[:, None, None], max(0.0, energy - kept))

    def decode(self, latents: Iterable[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
        """As LatentCodec says."""
        for number, latent in enumerate(_checked(latents, self.channels, height, width)):
            coefficients = latent.astype(np.float32) * self._std[:, None, None]
            times = self._in_time.T if number else np.array([[0.5, 0, 0, 0]], np.float32)
            for shares in times:
                planes = np.zeros((len(self._plane_v), *latent.shape[1:]), np.float32)
                for t in np.unique(self._t):
                    of_t = self._t == t
                    planes[self._plane[of_t]] += shares[t] * coefficients[of_t]
                yield self._picture(planes)[:height, :width]

    def _picture(self, planes: np.ndarray) -> np.ndarray:
        _, height, width = planes.shape
        both = np.zeros((height, len(self._down), width, self._across.shape[1]), np.float32)
        planes[0] += np.float32(_MEAN_OF_GREY)
        both[:, self._plane_v, :, self._plane_column] = planes
        across = np.matmul(self._down.T, both.reshape(height, len(self._down), -1))
        picture = across.reshape(-1, width, self._across.shape[1]) @ self._across.T
        picture += 0.5
        return np.clip(picture, 0, 255, out=picture).astype(np.uint8).reshape(height * STRIDE_S, width * STRIDE_S, 3)


_MEAN_OF_GREY = _GREY * STRIDE_S * np.sqrt(3)  # the first coefficient of a grey block


def _waves(length: int) -> np.ndarray:
    """The orthonormal discrete cosine transform (DCT-II): [frequencies, places] float64."""
    frequency, place = np.mgrid[:length, :length]
    waves: np.ndarray = np.sqrt(2 / length) * np.cos(np.pi * (place + 0.5) * frequency / length)
    waves[0] = np.sqrt(1 / length)
    return waves


class WanCodec:
    """Wan2.1's VAE with its published weights: the mode of what it encodes to, each channel less its mean and by its
    deviation, in float32. What decoding loses it would have to decode to know."""

    networks: ClassVar = ("wan-vae",)

    def __init__(self, channels: int) -> None:
        if channels != WAN_CHANNELS:
            raise ValueError(f"{channels} channels: latents of Wan's VAE have {WAN_CHANNELS}; set channels to that")
        self.channels = channels

    @staticmethod
    def version() -> str:
        """diffusers, torch and the weights."""
        return f"diffusers {version('diffusers')}, torch {version('torch')}, weights {weights.digest('wan-vae')}"

    @staticmethod
    def check() -> None:
        """Raises tasks.stage.MissingBackend where the weights are missing or do not fit."""
        weights.check("wan-vae")

    @property
    def gains(self) -> np.ndarray:
        """Not known."""
        return np.ones(self.channels, np.float32)

    @cached_property
    def _vae(self) -> "AutoencoderKLWan":
        from tasks.networks import wan_vae
        from tasks.networks.device import device

        return wan_vae.load(device())

    def encode(self, frames: Iterable[np.ndarray]) -> Iterator[Encoded]:
        """As LatentCodec says."""
        import torch

        from tasks.networks import wan_vae

        groups = (torch.from_numpy(np.stack(group)).permute(3, 0, 1, 2)[None] for group in _groups(frames))
        for latent in wan_vae.encode(self._vae, (group.float() / 127.5 - 1 for group in groups)):
            yield Encoded(latent[0].cpu().numpy(), None)

    def decode(self, latents: Iterable[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
        """As LatentCodec says."""
        import torch

        from tasks.networks import wan_vae

        known = _checked(latents, self.channels, height, width)
        for frames in wan_vae.decode(self._vae, (torch.from_numpy(np.float32(latent))[None] for latent in known)):
            pictures = ((frames[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0)
            yield from np.ascontiguousarray(pictures[:, :height, :width].cpu().numpy())


def _groups(frames: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The first frame, then four and four, each filled up to multiples of 8. Raises ValueError as LatentCodec says."""
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
        group.append(_filled(frame))
        if number % STRIDE_T == 0:
            yield group
            group = []
    if group or number < 0:
        raise ValueError(f"{number + 1} frames: a video to encode has 4n + 1, such as {usable_frames(number + 1)}")


def _checked(latents: Iterable[np.ndarray], channels: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Latents of the shape that so many pixels have. Raises ValueError for another."""
    expected = (channels, -(-height // STRIDE_S), -(-width // STRIDE_S))
    for number, latent in enumerate(latents):
        if latent.shape != expected:
            raise ValueError(
                f"latent frame {number} is {list(latent.shape)}; {height}x{width} pixels take {list(expected)}"
            )
        yield latent


def _filled(frame: np.ndarray) -> np.ndarray:
    """Height and width up to multiples of 8, by repeating the last row and column; in one piece of memory."""
    rows, columns = -frame.shape[0] % STRIDE_S, -frame.shape[1] % STRIDE_S
    if rows or columns:
        return np.pad(frame, ((0, rows), (0, columns), (0, 0)), mode="edge")
    return np.ascontiguousarray(frame)


def _energy(frame: np.ndarray) -> float:
    """Sum of (value - 128)^2 of a picture [height, width, 3] uint8, exact."""
    import cv2

    return cv2.norm(frame, cv2.NORM_L2SQR) - 2 * _GREY * sum(cv2.sumElems(frame)) + _GREY**2 * frame.size


CODECS: dict[str, type[LatentCodec]] = {"dct": CosineCodec, "wan": WanCodec}
