"""Classical no-reference measures of one picture: sharpness, noise, blocks, light, contrast and colour.

Each is made so that the others' faults hardly move it: sharpness is read from the width of edges, not their height, and
the noise taken out of it; noise from the smoothest parts; blocks from steps that repeat across and down at one
distance; light and colour from a picture small enough to have neither noise nor blocks.
"""

from typing import NamedTuple

import numpy as np

_FINE, _COARSE = 1.0, 2.0  # pixels, scales of the two gradients at an edge
_FAINT = 0.5  # grey levels a pixel, below which no gradient is an edge
_TILE = 60  # pixels; a face that is a fifth of a 480p frame's height fills a few
_EDGES = 12  # that a tile needs
_SHARPEST = 90  # percentile over tiles: a sharp face before a blurred wall is a sharp picture
_SMOOTHEST = 25  # percentile over tiles whose noise is the picture's

_FFT = 16_384  # points, of which the spectrum of a picture's columns is made
_FREQUENCIES = np.arange(1 / 48, 1 / 5, 1 / 4096)  # lines of a grid a pixel
_VISIBLE = 2.0  # grey levels that a step is above what is beside it
_FEW = 0.03  # share of the pixels: where steps are fewer, it takes more of them on the grid

_SMALL = 90  # pixels of the short side of the picture that light and colour are measured in


class Light(NamedTuple):
    """Light and colour of a picture.

    brightness: mean luma. shadows, highlights: its 10th and 90th percentile. All in 8-bit levels.
    contrast: from the 1st percentile of luma to the 99th, as a fraction of the whole range.
    clipped: share of the picture at the upper end, luma 250 and more.
    colourfulness: M3 of Hasler and Suesstrunk (Measuring Colourfulness in Natural Images, 2003): 0 is grey, 33
        moderately, 59 quite, 109 extremely colourful.
    """

    brightness: float
    shadows: float
    highlights: float
    contrast: float
    clipped: float
    colourfulness: float


def luma(image: np.ndarray) -> np.ndarray:
    """[height, width, 3] uint8 RGB to [height, width] float32, 0 to 255 (BT.601)."""
    import cv2

    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)


def sharpness(grey: np.ndarray, noise_level: float) -> float:
    """How steep the edges of the sharper parts are, 0 (soft ones only, or none) to 1 (steps).

    The ratio of an edge's gradients at two scales tells its width, whatever its height (Zhuo and Sim, Defocus Map
    Estimation from a Single Image, 2011): 1 for a slope, up to 2 for a step. An edge of 1 pixel's width (sigma)
    has a sharpness of 0.5, one of 2 pixels' 0.25, of 4 pixels' 0.08; a step on the pixels' grid has 0.8.

    grey: [height, width] float32, 0 to 255. noise_level: standard deviation of the noise in it.
    """
    # what is blurred by movement is blurred one way
    found = [value for value in (_steepness(grey, noise_level), _steepness(grey.T, noise_level)) if value is not None]
    return min(found, default=0.0)


def _steepness(grey: np.ndarray, noise_level: float) -> float | None:
    """Of the edges that are crossed from left to right; None where there are too few."""
    fine, coarse, along = _gradient(grey, _FINE), _gradient(grey, _COARSE), _gradient(grey.T, _COARSE).T
    # white noise has the power sigma^2 / (8 pi scale^4) in a gradient
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
    """From left to right, without its sign."""
    import cv2

    smooth = cv2.GaussianBlur(grey, (0, 0), scale)
    return np.abs(cv2.filter2D(smooth, -1, np.array([[-0.5, 0, 0.5]], np.float32)))


def noise(grey: np.ndarray) -> float:
    """Standard deviation of the noise, grey levels, in the smoother parts (Immerkaer, Fast Noise Variance Estimation,
    1996, over tiles). Parts that are black or white hide their noise and do not count; 0 where all are.

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
    """How much of what looks like a step in a picture is the grid of a codec, 0 to 1.

    Blocks are 8 or 16 pixels wide; in a picture that was scaled since, any fraction from 5 to 48. Stripes repeat one
    way only and do not count.

    grey: [height, width] float32, 0 to 255, not scaled up: that makes a grid of its own. 0 for one too small for a
    grid to show.
    """
    if min(grey.shape) < 64:
        return 0.0
    return float(np.minimum(_on_grid(grey), _on_grid(grey.T)).max())


def _on_grid(grey: np.ndarray) -> np.ndarray:
    """Share of the steps between columns that are on a grid, for a grid of each of `_FREQUENCIES`."""
    # a step is often spread over two pixels, by scaling or by a filter against blocks
    pairs = (grey[:, 1:] + grey[:, :-1]) / 2
    steps = np.abs(pairs[:, 2:] - pairs[:, :-2])
    is_step = steps[:, 2:-2] > np.maximum(steps[:, :-4], steps[:, 4:]) + _VISIBLE
    share = is_step.mean(axis=0)
    window = np.hanning(len(share))
    # lines at every p-th column give 1 / p and its multiples the amplitude of the whole; windows and books do not
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
