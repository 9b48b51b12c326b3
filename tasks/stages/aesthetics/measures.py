"""Classical no-reference measures of one image: sharpness, noise, blocks, light, contrast and colour.

Each measure hardly reacts to the faults that the others measure. Sharpness is the width of edges, not their height,
with the noise subtracted. Noise is measured in the smoothest parts. Blocks are steps that repeat at one distance, both
across and down. Light and colour are measured in an image scaled so small that it has neither noise nor blocks.
"""

from typing import NamedTuple

import numpy as np

_FINE, _COARSE = 1.0, 2.0  # pixels, scales of the two gradients at an edge
_FAINT = 0.5  # grey levels a pixel, below which a gradient is not an edge
_TILE = 60  # pixels; a face that is a fifth of a 480p frame's height fills a few tiles
_EDGES = 12  # edge pixels that a tile needs to count
_SHARPEST = 90  # percentile over tiles: an image of a sharp face before a blurred wall is sharp
_SMOOTHEST = 25  # percentile over tiles, of which the noise is the image's

_FFT = 16_384  # points of the spectrum over an image's columns
_FREQUENCIES = np.arange(1 / 48, 1 / 5, 1 / 4096)  # grid lines a pixel
_VISIBLE = 2.0  # grey levels by which a step exceeds its neighbours
_FEW = 0.03  # share of the pixels that is added to the steps, so that a few chance steps do not count as a grid

_SMALL = 90  # pixels of the short side at which light and colour are measured


class Light(NamedTuple):
    """Light and colour of an image."""

    brightness: float
    """Mean luma, 0 to 255."""
    shadows: float
    """10th percentile of luma, 0 to 255."""
    highlights: float
    """90th percentile of luma, 0 to 255."""
    contrast: float
    """From the 1st percentile of luma to the 99th, as a fraction of the whole range."""
    clipped: float
    """Share of the pixels at the upper end, luma 250 and more."""
    colourfulness: float
    """M3 of Hasler and Suesstrunk (Measuring Colourfulness in Natural Images, 2003): 0 is grey, 33 moderately, 59
    quite, 109 extremely colourful."""


def luma(image: np.ndarray) -> np.ndarray:
    """Convert [height, width, 3] uint8 RGB to luma, [height, width] float32, 0 to 255 (BT.601)."""
    import cv2

    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)


def sharpness(grey: np.ndarray, noise_level: float) -> float:
    """How steep the edges of the sharper parts are: 0 (soft edges only, or none) to 1 (steps).

    The ratio of an edge's gradients at two scales tells its width, whatever its height (Zhuo and Sim, Defocus Map
    Estimation from a Single Image, 2011): 1 for a slope, up to 2 for a step. An edge with a width (sigma) of 1 pixel
    has a sharpness of 0.5, one of 2 pixels 0.25, one of 4 pixels 0.08. A step on the pixels' grid has 0.8.

    grey: [height, width] float32, 0 to 255. noise_level: standard deviation of the noise in it.
    """
    # Movement blurs edges in one direction only, so the softer direction counts.
    both = (_steepness(grey, noise_level), _steepness(grey.T, noise_level))
    return min((value for value in both if value is not None), default=0.0)


def _steepness(grey: np.ndarray, noise_level: float) -> float | None:
    """Steepness of the edges that are crossed from left to right, 0 to 1. None where there are too few edges."""
    fine, coarse, along = _gradient(grey, _FINE), _gradient(grey, _COARSE), _gradient(grey.T, _COARSE).T
    # White noise has the power sigma^2 / (8 pi scale^4) in a gradient.
    fine_noise, coarse_noise = (noise_level**2 / (8 * np.pi * scale**4) for scale in (_FINE, _COARSE))
    many, strongest = np.percentile(coarse[::2, ::2], (85, 99.5))
    strong = max(float(many), 0.3 * float(strongest), 5 * coarse_noise**0.5, _FAINT)
    ridges = np.zeros(grey.shape, bool)
    ridges[:, 1:-1] = (coarse[:, 1:-1] >= coarse[:, :-2]) & (coarse[:, 1:-1] >= coarse[:, 2:])
    y, x = np.nonzero(ridges & (coarse >= strong) & (coarse >= along))
    ratios = np.sqrt(np.maximum(fine[y, x] ** 2 - fine_noise, 0) / (coarse[y, x] ** 2 - coarse_noise))
    tiles = (y // _TILE) * grey.shape[1] + x // _TILE
    medians = [np.median(ratios[tiles == tile]) for tile in np.unique(tiles) if (tiles == tile).sum() >= _EDGES]
    if not medians:
        return None
    steepest = _COARSE / _FINE
    return float(np.clip((np.percentile(medians, _SHARPEST) - 1) / (steepest - 1), 0, 1))


def _gradient(grey: np.ndarray, scale: float) -> np.ndarray:
    """Size of the gradient from left to right, [height, width] float32, after a Gaussian blur of `scale` pixels."""
    import cv2

    smooth = cv2.GaussianBlur(grey, (0, 0), scale)
    return np.abs(cv2.filter2D(smooth, -1, np.array([[-0.5, 0, 0.5]], np.float32)))


def noise(grey: np.ndarray) -> float:
    """Standard deviation of the noise in the smoother parts, in grey levels.

    The method is Immerkaer's (Fast Noise Variance Estimation, 1996), applied to tiles. Black and white tiles hide their
    noise and do not count. The result is 0 if all tiles are black or white.

    grey: [height, width] float32, 0 to 255.
    """
    import cv2

    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    response = np.abs(cv2.filter2D(grey, -1, kernel))
    size = (max(1, grey.shape[1] // (_TILE // 2)), max(1, grey.shape[0] // (_TILE // 2)))
    levels = cv2.resize(response, size, interpolation=cv2.INTER_AREA)
    means = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    seen = (means > 8) & (means < 247)
    if not seen.any():
        return 0.0
    return float(np.percentile(levels[seen], _SMOOTHEST) * np.sqrt(np.pi / 2) / 6)


def blockiness(grey: np.ndarray) -> float:
    """Share of the visible steps in an image that lie on the block grid of a codec, 0 to 1.

    Blocks are 8 or 16 pixels wide. In an image that was scaled after decoding, the width may be any fraction from 5 to
    48 pixels. Stripes repeat in one direction only and do not count.

    grey: [height, width] float32, 0 to 255. It must not be scaled up, because that makes a grid of its own. An image
    with a side below 64 pixels gives 0, because a grid does not show in it.
    """
    if min(grey.shape) < 64:
        return 0.0
    return float(np.minimum(_on_grid(grey), _on_grid(grey.T)).max())


def _on_grid(grey: np.ndarray) -> np.ndarray:
    """Share of the steps between columns that lie on a grid, for a grid of each of `_FREQUENCIES`."""
    # Scaling and deblocking filters often spread a step over two pixels.
    pairs = (grey[:, 1:] + grey[:, :-1]) / 2
    steps = np.abs(pairs[:, 2:] - pairs[:, :-2])
    is_step = steps[:, 2:-2] > np.maximum(steps[:, :-4], steps[:, 4:]) + _VISIBLE
    share = is_step.mean(axis=0)
    window = np.hanning(len(share))
    # Steps at every p-th column have the full amplitude at the frequency 1 / p and its multiples. Windows and shelves
    # of books do not, so both the frequency and its double have to be strong.
    spectrum = np.abs(np.fft.rfft((share - share.mean()) * window, _FFT)) / (((share + _FEW) * window).sum())
    first, second = (spectrum[np.round(k * _FREQUENCIES * _FFT).astype(int)] for k in (1, 2))
    return np.sqrt(first * second)


def light(image: np.ndarray) -> Light:
    """Light and colour of an image [height, width, 3] uint8 RGB."""
    import cv2

    height, width = image.shape[:2]
    scale = min(1.0, _SMALL / min(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    grey = luma(small)
    darkest, shadows, highlights, brightest = np.percentile(grey, (1, 10, 90, 99))
    red, green, blue = np.moveaxis(small.astype(np.float32), 2, 0)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(), yellow_blue.std())
    return Light(
        brightness=float(grey.mean()),
        shadows=float(shadows),
        highlights=float(highlights),
        contrast=float(brightest - darkest) / 255,
        clipped=float((grey >= 250).mean()),
        colourfulness=float(spread + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean())),
    )
