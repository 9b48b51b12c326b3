"""Whisper's front end: the log-mel spectrogram that its encoder takes (Radford et al. 2022; openai/whisper, audio.py).

It is a re-implementation in NumPy without matrix products, so that the numbers do not depend on the number of threads.
"""

from functools import cache

import numpy as np

from tasks.media.clip import SAMPLE_RATE

N_FFT = 400  # samples of one window, 25 ms
HOP = 160  # samples from one column to the next, 10 ms
COLUMNS_PER_S = SAMPLE_RATE // HOP
CHUNK_S = 30  # seconds, the length that the encoder takes
CHUNK = CHUNK_S * SAMPLE_RATE
COLUMNS = CHUNK // HOP


def log_mel(samples: np.ndarray, num_mels: int = 80) -> np.ndarray:
    """The log-mel spectrogram of up to 30 s of audio, padded with zeros to 30 s as Whisper does.

    samples: [samples] float in -1..1 at 16 kHz, 30 s at most.
    num_mels: mel bands; 80, or 128 for large-v3.

    Returns: [3000, num_mels] float32. Column t is centred on 10 t milliseconds. Values more than 8 (80 dB) below the
    loudest one are raised to that bound. Then all are shifted and scaled to about -1..1.
    """
    assert len(samples) <= CHUNK
    padded = np.zeros(CHUNK)
    padded[: len(samples)] = samples
    padded = np.pad(padded, N_FFT // 2, mode="reflect")
    # only columns that reach into the samples are transformed
    num_columns = min(COLUMNS, (len(samples) + N_FFT // 2) // HOP + 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP][:num_columns]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
    power = np.abs(np.fft.rfft(windows * hann, axis=1)) ** 2
    mels = np.full((COLUMNS, num_mels), 1e-10)
    mels[:num_columns] = np.maximum(np.einsum("tf,fm->tm", power, mel_filters(num_mels)), 1e-10)
    logs = np.log10(mels)
    return ((np.maximum(logs, logs.max() - 8.0) + 4.0) / 4.0).astype(np.float32)


@cache
def mel_filters(num_mels: int) -> np.ndarray:
    """The mel filter bank: [201 frequencies, num_mels]. The filters are triangles of equal area on Slaney's mel scale
    from 0 to 8000 Hz."""
    top = _mel_of(SAMPLE_RATE / 2)
    edges = _hertz_of(np.linspace(0.0, top, num_mels + 2))
    frequencies = np.linspace(0.0, SAMPLE_RATE / 2, N_FFT // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - frequencies) / np.diff(edges)[1:]
    return np.maximum(0.0, np.minimum(rising, falling)) * 2.0 / (edges[2:] - edges[:-2])


# Slaney's scale: linear below 1000 Hz (15 mels), then logarithmic with 27 mels to a factor of 6.4
_LINEAR = 200.0 / 3.0
_LOG_STEP = np.log(6.4) / 27.0


def _mel_of(hertz: float) -> float:
    return float(15.0 + np.log(hertz / 1000.0) / _LOG_STEP) if hertz >= 1000.0 else hertz / _LINEAR


def _hertz_of(mels: np.ndarray) -> np.ndarray:
    return np.where(mels >= 15.0, 1000.0 * np.exp(_LOG_STEP * (mels - 15.0)), mels * _LINEAR)


def frame_windows(samples: np.ndarray, frames: int, fps: int, num_mels: int = 80) -> np.ndarray:
    """The spectrogram's columns for each video frame.

    samples: [samples] float in -1..1 at 16 kHz. Audio longer than 30 s is split into chunks of 30 s, each with a
        spectrogram and a clamp of its own, as Whisper does.
    frames, fps: number and rate of the video's frames.
    num_mels: mel bands.

    Returns: [frames, window, num_mels] float16. Each frame has window = ceil(100 / fps) columns of 10 ms from the one
    nearest its start. At 25 frames a second each column belongs to one frame; at a rate that does not divide 100,
    neighbouring frames share a column.
    """
    chunks = [samples[at : at + CHUNK] for at in range(0, len(samples), CHUNK)] or [samples]
    columns = np.concatenate([log_mel(chunk, num_mels) for chunk in chunks])
    return windows(columns, frames, fps, COLUMNS_PER_S).astype(np.float16)


def windows(columns: np.ndarray, frames: int, fps: int, per_s: int) -> np.ndarray:
    """The audio features for each video frame.

    columns: [columns, dim], `per_s` of them a second.
    frames, fps: number and rate of the video's frames.

    Returns: [frames, window, dim]. Each frame has window = ceil(per_s / fps) columns from the one nearest its start.
    Beyond the end the last column is repeated.
    """
    # frame k starts at column per_s k / fps, here rounded half up in whole numbers
    first = (2 * per_s * np.arange(frames) + fps) // (2 * fps)
    indices = first[:, None] + np.arange(-(-per_s // fps))
    return columns[np.minimum(indices, len(columns) - 1)]
