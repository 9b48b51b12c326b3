"""How a voice sounds: pitch, loudness and pace over time.

Pitch by autocorrelation over that of the window (Boersma 1993, "Accurate short-term analysis of the fundamental
frequency"); pace by the nuclei of syllables, peaks of intensity above the median between dips of 2 dB, where there is
pitch (de Jong and Wempe 2009, "Praat script to detect syllable nuclei").
"""

from dataclasses import dataclass

import numpy as np

from tasks.clip import SAMPLE_RATE

HOP_S = 0.02
_HOP, _WINDOW = SAMPLE_RATE // 50, 800  # samples; 50 ms hold three and a half periods of the lowest pitch
_LOWEST, _HIGHEST = 70.0, 400.0  # Hz
_VOICED = 0.5  # of the autocorrelation at no lag
_DIP_DB = 2.0
_SILENCE = 1e-12
_BLOCK = 1024  # windows at a time


@dataclass(frozen=True)
class Contours:
    """A sound every 20 ms.

    pitch_hz: [steps] float64, NaN where there is none. loudness_db: [steps] float64, dBFS, -120 and above.
    """

    pitch_hz: np.ndarray
    loudness_db: np.ndarray


@dataclass(frozen=True)
class Voice:
    """How a voice sounds over some time.

    pitch_hz: the median. pitch_range: semitones from the 10th to the 90th percentile of the pitch. dynamics_db: from
    the 10th to the 90th percentile of the loudness while there is pitch. rate_hz: syllables a second of speech.
    """

    pitch_hz: float
    pitch_range: float
    dynamics_db: float
    rate_hz: float


def contours(samples: np.ndarray) -> Contours:
    """Pitch and loudness of a sound. samples: [samples] float32 in -1..1 at 16 kHz."""
    steps = -(-len(samples) // _HOP)
    padded = np.zeros(_WINDOW + steps * _HOP, np.float32)
    padded[_WINDOW // 2 : _WINDOW // 2 + len(samples)] = samples
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP][:steps]
    pitch, power = np.full(steps, np.nan), np.zeros(steps)
    for at in range(0, steps, _BLOCK):
        block = windows[at : at + _BLOCK]
        power[at : at + _BLOCK] = np.square(block, dtype=np.float64).mean(axis=1)
        pitch[at : at + _BLOCK] = _pitch(block)
    return Contours(pitch, 10 * np.log10(np.maximum(power, _SILENCE)))


def _pitch(windows: np.ndarray) -> np.ndarray:
    """Of each window, [windows, samples]: hertz, NaN where there is none."""
    hann = np.hanning(_WINDOW)
    size = 2048  # no lag of interest wraps around
    shaped = (windows - windows.mean(axis=1, keepdims=True)) * hann
    found = np.fft.irfft(np.abs(np.fft.rfft(shaped, size, axis=1)) ** 2, size, axis=1)
    of_window = np.fft.irfft(np.abs(np.fft.rfft(hann, size)) ** 2, size)
    first, last = int(SAMPLE_RATE / _HIGHEST), int(SAMPLE_RATE / _LOWEST)
    lags = np.arange(first - 1, last + 2)
    energy = found[:, :1]
    likeness = found[:, lags] / np.maximum(energy, _SILENCE) * (of_window[0] / of_window[lags])
    # of peaks that are equally good the shortest lag is the pitch, the others are its multiples
    weighted = likeness - 0.02 * np.log2(lags / first)
    inner = weighted[:, 1:-1]
    is_peak = (inner >= weighted[:, :-2]) & (inner > weighted[:, 2:])
    best = np.where(is_peak, inner, -np.inf).argmax(axis=1)
    heard = is_peak.any(axis=1) & (energy[:, 0] > 1e-6) & (likeness[np.arange(len(windows)), best + 1] >= _VOICED)
    return np.where(heard, SAMPLE_RATE / lags[best + 1], np.nan)


def voice(found: Contours, spoken: np.ndarray) -> Voice | None:
    """How the voice sounds over the steps that `spoken`, [steps] bool, marks; None with less than 0.3 s of pitch."""
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
