"""Finds the flashes and the beeps in any file, to measure whether sound and picture stay in sync."""

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tasks.synthetic.scene import EVENT_BOX
from tasks.synthetic.speech import BEEP_HZ
from tasks.synthetic.truth import Box


def measure_events(video: Path, audio: Path | None = None, box: Box = EVENT_BOX) -> tuple[np.ndarray, np.ndarray]:
    """The onsets of flashes and of beeps.

    video: the file with the video stream, and with the sound unless `audio` is another file.
    box: x0, y0, x1, y1 of the flash, as fractions of the upright frame.

    Returns:
        [flashes] float64: the time of the first lit frame of each flash.
        [beeps] float64: the onset of each beep, exact to the sample.
        Both in seconds from the start of the file in which they were found. A flash or beep that is on when the file
        begins has no onset.
    """
    return flash_onsets(video, box), beep_onsets(audio or video)


def _decode(container: Any, stream: Any) -> Iterator[Any]:
    """Yield every frame that can be decoded; packets that cannot be decoded are skipped."""
    import av

    for packet in container.demux(stream):
        with contextlib.suppress(av.error.InvalidDataError):
            yield from packet.decode()


def flash_onsets(path: Path, box: Box = EVENT_BOX) -> np.ndarray:
    """The times of the frames on which the box turns white: [flashes] float64 seconds."""
    import av

    times, levels = [], []
    with av.open(str(path)) as container:
        start = Fraction(container.start_time or 0, 1_000_000)
        for frame in _decode(container, container.streams.video[0]):
            assert frame.pts is not None and frame.time_base is not None
            picture = np.rot90(frame.to_ndarray(format="gray"), round(frame.rotation / 90))
            height, width = picture.shape
            x0, y0, x1, y1 = box
            dx, dy = (x1 - x0) / 4, (y1 - y0) / 4  # the inner half of the box, away from blurred edges
            rows = slice(round((y0 + dy) * height), max(1, round((y1 - dy) * height)))
            columns = slice(round((x0 + dx) * width), max(1, round((x1 - dx) * width)))
            times.append(float(frame.pts * frame.time_base - start))
            levels.append(float(picture[rows, columns].mean()))
    lit = np.array(levels) > 128
    return np.array(times)[1:][lit[1:] & ~lit[:-1]] if len(times) else np.zeros(0)


def beep_onsets(path: Path) -> np.ndarray:
    """The times of the first loud sample of each 1 kHz tone: [beeps] float64 seconds; empty without a sound stream."""
    import av

    pieces, times = [], []
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return np.zeros(0)
        start = Fraction(container.start_time or 0, 1_000_000)
        for frame in _decode(container, container.streams.audio[0]):
            assert frame.pts is not None and frame.time_base is not None
            rate, channels = frame.sample_rate, len(frame.layout.channels)
            samples = frame.to_ndarray()
            if samples.dtype.kind == "i":
                samples = samples / np.iinfo(samples.dtype).max
            if not frame.format.is_planar:
                samples = samples.reshape(-1, channels).T
            pieces.append(samples[np.abs(samples).max(axis=1).argmax()])
            times.append(float(frame.pts * frame.time_base - start) + np.arange(frame.samples) / rate)
    if not pieces:
        return np.zeros(0)
    sound, time = np.concatenate(pieces), np.concatenate(times)
    loud = np.flatnonzero(np.abs(sound) > 0.5 * np.abs(sound).max())
    before, after = round(0.03 * rate), round(0.06 * rate)
    first = loud[np.diff(loud, prepend=-before) > before]  # nothing loud just before
    onsets = []
    for at in first[first >= rate // 100]:
        part = sound[at : at + after]
        wave = np.exp(2j * np.pi * BEEP_HZ / rate * np.arange(len(part)))
        tone = 2 * abs(np.vdot(wave, part)) ** 2 / len(part)
        if len(part) == after and tone > 0.7 * np.sum(part**2):
            onsets.append(time[at])
    return np.array(onsets)
