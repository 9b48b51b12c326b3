"""Mel-frequency cepstral coefficients (MFCC), the audio features that SyncNet takes.

It is a re-implementation of python_speech_features' `mfcc` with its default settings. It uses NumPy without matrix
products, so that the numbers do not depend on the number of threads.
"""

from functools import cache

import numpy as np

from tasks.media.clip import SAMPLE_RATE

WINDOW, HOP = 400, 160  # samples, 25 and 10 ms
COEFFICIENTS = 13
_N_FFT = 512
_FILTERS = 26
_PRE_EMPHASIS = 0.97
_LIFTER = 22
_LEAST = np.finfo(np.float64).eps  # replaces zero before a logarithm


def mfcc(samples: np.ndarray) -> np.ndarray:
    """The coefficients of a stretch of audio. Coefficient 0 is the logarithm of the window's energy.

    samples: [samples] at 16 kHz on the scale of int16 (-32768..32767). SyncNet was trained on this scale.

    Returns: [columns, 13] float64. Column t starts at 10 t milliseconds. There are 1 + ceil((samples - 400) / 160)
    columns, at least one; the last window is padded with zeros.
    """
    from scipy.fft import dct

    signal = np.asarray(samples, np.float64)
    emphasised = np.concatenate([signal[:1], signal[1:] - _PRE_EMPHASIS * signal[:-1]])
    columns = 1 + max(0, -(-(len(signal) - WINDOW) // HOP))
    padded = np.pad(emphasised, (0, (columns - 1) * HOP + WINDOW - len(signal)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(windows, _N_FFT, axis=1)) ** 2 / _N_FFT
    mels = np.einsum("tf,fm->tm", power, _filters())
    found = dct(np.log(np.where(mels == 0, _LEAST, mels)), type=2, axis=1, norm="ortho")[:, :COEFFICIENTS]
    found *= 1 + _LIFTER / 2 * np.sin(np.pi * np.arange(COEFFICIENTS) / _LIFTER)
    energy = power.sum(axis=1)
    found[:, 0] = np.log(np.where(energy == 0, _LEAST, energy))
    return found


@cache
def _filters() -> np.ndarray:
    """The mel filter bank: [257 frequencies, 26]. The filters are triangles on HTK's mel scale from 0 to 8000 Hz with
    their corners on whole bins."""
    mels = np.linspace(0.0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), _FILTERS + 2)
    corners = np.floor((_N_FFT + 1) * 700 * (10 ** (mels / 2595) - 1) / SAMPLE_RATE)
    bins = np.arange(_N_FFT // 2 + 1)[:, None]
    low, top, high = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (bins - low) / (top - low), (high - bins) / (high - top)
    return np.where((bins >= low) & (bins < top), rising, np.where((bins >= top) & (bins < high), falling, 0.0))
