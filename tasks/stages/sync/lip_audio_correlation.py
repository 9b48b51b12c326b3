"""Whether a sound belongs to these lips, and by how much it is late: the maths, without images and files.

Lips and sound become slow curves, 50 numbers a second. At each lag, the canonical correlations between the two sets of
curves tell how much they have in common. The sound is shifted in a circle, so every lag compares the same number of
steps. The lags that cannot be right then show how well chance fits in this clip.
"""

from typing import NamedTuple

import numpy as np

from tasks.media.clip import SAMPLE_RATE

RATE = 50  # Hz, of the curves
BANDS_HZ = (100, 400, 900, 1800, 3500, 7500)  # edges of the five bands of the sound
_BAND_PASS_HZ = (0.7, 8.0)  # syllables; the head's pose and the loudness of phrases are slower, noise is faster
_WINDOW = 640  # samples, 40 ms
_RANGE_DB = 30.0  # sound fainter than this below a band's loudest moments counts as silence
_RIDGE = 0.3  # share of the identity in the covariances; without it, a few seconds of curves are overfitted
_PEAK_S = 0.25  # lags this near to the best one belong to its peak


class Match(NamedTuple):
    """The best fit of sound and lips."""

    offset_s: float
    """Seconds by which the sound is later than the lips."""
    confidence: float
    """By how many standard deviations of the other lags the best lag stands out."""
    correlation: float
    """The first canonical correlation at the best lag, 0 to 1."""


def lip_curves(lips: np.ndarray, fps: float) -> np.ndarray:
    """Compute the movements of the lips at 50 Hz.

    lips: [frames, features], NaN in frames without the face. The curves are zero there, and time goes on.

    Returns: [steps, features] float64, band-passed. Step k is at (k + 0.5) / 50 s, as frame k stands for the middle of
    its time on display. All zero without a face.
    """
    frames = len(lips)
    seen = ~np.isnan(lips).any(axis=1)
    steps = int(frames * RATE / fps)
    if not seen.any():
        return np.zeros((steps, lips.shape[1]))
    shown_s = (np.arange(frames) + 0.5) / fps
    step_s = (np.arange(steps) + 0.5) / RATE
    values = [np.interp(step_s, shown_s[seen], column) for column in lips[seen].astype(np.float64).T]
    curves = _syllables(np.stack(values, axis=1))
    curves[~seen[np.minimum((step_s * fps).astype(int), frames - 1)]] = 0
    return curves


def sound_curves(samples: np.ndarray) -> np.ndarray:
    """Compute the log energy of a sound in five bands at 50 Hz.

    samples: [samples] float32 at 16 kHz. Returns: [steps, 5] float64, band-passed. Step k is at (k + 0.5) / 50 s.
    """
    hop = SAMPLE_RATE // RATE
    steps = len(samples) // hop
    if not steps:
        return np.zeros((0, len(BANDS_HZ) - 1))
    before = (_WINDOW - hop) // 2
    padded = np.pad(samples.astype(np.float64), (before, _WINDOW))
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[: steps * hop : hop]
    power = np.abs(np.fft.rfft(windows * np.hanning(_WINDOW), axis=1)) ** 2
    edges = np.searchsorted(np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE), BANDS_HZ)
    energy = np.add.reduceat(power, edges, axis=1)[:, :-1]
    level = 10 * np.log10(energy + 1e-9)
    return _syllables(np.maximum(level, np.percentile(level, 99, axis=0) - _RANGE_DB))


def match(lips: np.ndarray, sound: np.ndarray, max_offset_s: float) -> Match | None:
    """Find the lag at which two sets of curves, [steps, features] each, fit best.

    max_offset_s: the largest offset to find. Returns: the fit there; None if one of the sets does not move at all.
    """
    steps = min(len(lips), len(sound))
    one, other = _white(lips[:steps]), _white(sound[:steps])
    if one is None or other is None:
        return None
    spectrum = np.fft.rfft(one, axis=0).conj()[:, :, None] * np.fft.rfft(other, axis=0)[:, None, :]
    # [lags, lips, sound], the sound turned back by the lag, from the most negative lag to the most positive
    half = steps // 2
    lags = np.arange(steps) - half
    together = np.roll(np.fft.irfft(spectrum, n=steps, axis=0) / steps, half, axis=0)
    # The sum of the squares of all canonical correlations (Pillai's trace) rises less by chance than the first alone.
    # The sets are white, so it is the sum of the squares of the entries.
    fit = np.sqrt(np.square(together).sum(axis=(1, 2)))
    best = int(np.argmax(np.where(np.abs(lags) <= max_offset_s * RATE, fit, -1)))
    away = np.abs(lags - lags[best])
    others = fit[np.minimum(away, steps - away) > _PEAK_S * RATE]
    spread = float(others.std()) if len(others) else 0.0
    if spread == 0:
        return None
    return Match(
        offset_s=float(lags[best] + _vertex(*(fit[(best + step) % steps] for step in (-1, 0, 1)))) / RATE,
        confidence=float(fit[best] - others.mean()) / spread,
        correlation=_first_correlation(one, np.roll(other, -lags[best], axis=0), together[best]),
    )


def _first_correlation(one: np.ndarray, other: np.ndarray, together: np.ndarray) -> float:
    """Pearson's correlation, 0 to 1, of the first canonical variables of two sets [steps, features]."""
    left, _, right = np.linalg.svd(together)
    a, b = np.einsum("tf,f->t", one, left[:, 0]), np.einsum("tf,f->t", other, right[0])
    return float(np.clip((a * b).mean() / max(float(a.std() * b.std()), 1e-12), 0, 1))


def _vertex(before: float, at: float, after: float) -> float:
    """The top of the parabola through three neighbours, in steps from the middle one, -0.5 to 0.5."""
    bend = before - 2 * at + after
    return 0.0 if bend >= 0 else float(np.clip((before - after) / (2 * bend), -0.5, 0.5))


def _syllables(curves: np.ndarray) -> np.ndarray:
    """Band-pass curves, [steps, features] at 50 Hz, without delay."""
    from scipy.signal import butter, sosfiltfilt

    if len(curves) < RATE // 2:
        return np.zeros_like(curves)
    return sosfiltfilt(butter(2, _BAND_PASS_HZ, "bandpass", fs=RATE, output="sos"), curves, axis=0)


def _white(curves: np.ndarray) -> np.ndarray | None:
    """Whiten curves, [steps, features]: about unit covariance. None if nothing moves."""
    centred = curves - curves.mean(axis=0)
    spread = centred.std(axis=0)
    if not (spread > 1e-12).any():
        return None
    scaled = centred / np.maximum(spread, 1e-12)
    covariance = (1 - _RIDGE) * np.einsum("ti,tj->ij", scaled, scaled) / len(scaled) + _RIDGE * np.eye(scaled.shape[1])
    values, vectors = np.linalg.eigh(covariance)
    return np.einsum("ti,ij->tj", scaled, np.einsum("ik,jk->ij", vectors / np.sqrt(values), vectors))
