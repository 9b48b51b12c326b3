"""Prosody of speech: pitch, loudness and speaking rate.

Pitch is the highest peak of the audio's autocorrelation divided by that of the window (Boersma 1993, "Accurate
short-term analysis of the fundamental frequency"). The speaking rate counts syllable nuclei: peaks of intensity above
the median, between dips of 2 dB, at which there is pitch (de Jong and Wempe 2009, "Praat script to detect syllable
nuclei").
"""

from dataclasses import dataclass

import numpy as np

from tasks.media.clip import SAMPLE_RATE

HOP_S = 0.02  # seconds from one step to the next
_HOP, _WINDOW = SAMPLE_RATE // 50, 800  # samples; the window's 50 ms hold three and a half periods of the lowest pitch
_LOWEST, _HIGHEST = 70.0, 400.0  # Hz, the range of the pitch
_VOICED = 0.5  # lowest autocorrelation of a pitch, as a share of that at lag zero
_DIP_DB = 2.0
_SILENCE = 1e-12  # lowest power, and lowest divisor
_BLOCK = 1024  # windows that are transformed at a time


@dataclass(frozen=True)
class Contours:
    """Pitch and loudness of audio, in steps of 20 ms."""

    pitch_hz: np.ndarray
    """[steps] float64 Hz, NaN where there is no pitch."""
    loudness_db: np.ndarray
    """[steps] float64 dBFS, at least -120."""


@dataclass(frozen=True)
class Voice:
    """The prosody of a stretch of speech."""

    pitch_hz: float
    """Median pitch in Hz."""
    pitch_range: float
    """Semitones from the 10th to the 90th percentile of the pitch."""
    dynamics_db: float
    """dB from the 10th to the 90th percentile of the loudness, over steps with pitch."""
    rate_hz: float
    """Syllables a second of speech."""


def contours(samples: np.ndarray) -> Contours:
    """Pitch and loudness of audio. samples: [samples] float32 in -1..1 at 16 kHz."""
    steps = -(-len(samples) // _HOP)
    padded = np.zeros(_WINDOW + steps * _HOP, np.float32)
    padded[_WINDOW // 2 : _WINDOW // 2 + len(samples)] = samples
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP][:steps]
    pitch, power = np.full(steps, np.nan), np.zeros(steps)
    for first in range(0, steps, _BLOCK):
        block = windows[first : first + _BLOCK]
        power[first : first + _BLOCK] = np.square(block, dtype=np.float64).mean(axis=1)
        pitch[first : first + _BLOCK] = _pitch(block)
    return Contours(pitch, 10 * np.log10(np.maximum(power, _SILENCE)))


def _pitch(windows: np.ndarray) -> np.ndarray:
    """The pitch of each window in Hz, NaN where there is none. windows: [windows, samples]."""
    hann = np.hanning(_WINDOW)
    size = 2048  # so long that no lag of interest wraps around
    shaped = (windows - windows.mean(axis=1, keepdims=True)) * hann
    autocorrelation = np.fft.irfft(np.abs(np.fft.rfft(shaped, size, axis=1)) ** 2, size, axis=1)
    of_window = np.fft.irfft(np.abs(np.fft.rfft(hann, size)) ** 2, size)
    first, last = int(SAMPLE_RATE / _HIGHEST), int(SAMPLE_RATE / _LOWEST)
    lags = np.arange(first - 1, last + 2)
    energy = autocorrelation[:, :1]
    normalised = autocorrelation[:, lags] / np.maximum(energy, _SILENCE) * (of_window[0] / of_window[lags])
    # multiples of the period have peaks of nearly the same height; the pitch is the shortest lag
    weighted = normalised - 0.02 * np.log2(lags / first)
    inner = weighted[:, 1:-1]
    is_peak = (inner >= weighted[:, :-2]) & (inner > weighted[:, 2:])
    best = np.where(is_peak, inner, -np.inf).argmax(axis=1)
    voiced = is_peak.any(axis=1) & (energy[:, 0] > 1e-6) & (normalised[np.arange(len(windows)), best + 1] >= _VOICED)
    return np.where(voiced, SAMPLE_RATE / lags[best + 1], np.nan)


def voice(found: Contours, spoken: np.ndarray) -> Voice | None:
    """The prosody of the steps with speech; None where they have less than 0.3 s of pitch.

    found: of the whole audio. spoken: [steps] bool, the steps with speech.
    """
    from scipy.signal import find_peaks

    voiced = spoken & ~np.isnan(found.pitch_hz)
    if voiced.sum() * HOP_S < 0.3:
        return None
    pitch, loudness = found.pitch_hz[voiced], found.loudness_db[voiced]
    low, middle, high = np.percentile(pitch, [10, 50, 90])
    peaks, _ = find_peaks(found.loudness_db, height=float(np.median(found.loudness_db[spoken])), prominence=_DIP_DB)
    return Voice(
        pitch_hz=float(middle),
        pitch_range=float(12 * np.log2(high / low)),
        dynamics_db=float(np.diff(np.percentile(loudness, [10, 90]))[0]),
        rate_hz=float(voiced[peaks].sum() / (spoken.sum() * HOP_S)),
    )
