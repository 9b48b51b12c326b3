"""Sound with known truth: recorded sentences, pauses, music, and beeps that start on an exact sample."""

from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path

import numpy as np

ASSETS = Path(__file__).parent / "assets"
RATE = 16_000  # Hz, of the recorded sentences
VOICES = ("ada", "ben", "cleo", "dan")
BEEP_HZ = 1000
BEEP_S = 0.12
SPEECH_PEAK = 0.28  # far below that of the beep, so that a simple detector tells them apart
BEEP_PEAK = 0.75
PAUSE_S = 0.3  # shorter silences count as speech
BEHIND_S = 0.03  # lips open so much later than the sound rises: median of seven real clips, from -0.10 to 0.09
BEFORE_EVENT_S, AFTER_EVENT_S = 0.2, 0.32  # there is no speech this long before and after the onset of a beep


@cache
def sentence(name: str) -> np.ndarray:
    """One recorded sentence: [samples] float64 in -1..1 at 16 kHz."""
    import soundfile

    samples, rate = soundfile.read(ASSETS / f"{name}.flac")
    assert rate == RATE
    return np.asarray(samples)


@dataclass(frozen=True)
class Utterance:
    """The speech of one voice, with its pauses."""

    samples: np.ndarray
    """[samples] float64 at 16 kHz. Sample 0 is at time zero."""
    spans: tuple[tuple[float, float], ...]
    """Where there is speech, in seconds."""

    def loudness(self, time_s: float, length_s: float) -> float:
        """The root mean square over `length_s` around a time, scaled so that the loudest syllables have 1."""
        middle, half = round(time_s * RATE), max(1, round(length_s * RATE / 2))
        part = self.samples[max(0, middle - half) : max(0, middle + half)]
        return min(1.0, float(np.sqrt(np.mean(part**2))) / (0.28 * SPEECH_PEAK)) if part.size else 0.0

    def part(self, start_s: float, length_s: float) -> "Utterance":
        """The part of `length_s` from `start_s` on, which then begins at time zero. Outside the speech it is silent."""
        first, total = round(start_s * RATE), round(length_s * RATE)
        samples = np.zeros(total)
        kept = self.samples[max(0, first) : max(0, first + total)]
        samples[max(0, -first) : max(0, -first) + len(kept)] = kept
        return Utterance(samples, _spans(samples))

    def mouth(self, time_s: float) -> tuple[float, float]:
        """The lips of the speaker at a time: their opening, 0 to 1, and their spread, -1 (rounded) to 1.

        They open with the loudness of the vowels. They spread with the share of high frequencies, which is high for
        "ee" and low for "oo". They follow the sound after `BEHIND_S`.
        """
        at = round((time_s - BEHIND_S) * 100)
        opening, spread = self._shapes[min(max(at, 0), len(self._shapes) - 1)]
        return float(opening), float(spread)

    @cached_property
    def _shapes(self) -> np.ndarray:
        """[hundredths of a second, 2] float64: opening and spread of the mouth."""
        from scipy.ndimage import gaussian_filter1d

        hop, window = RATE // 100, RATE // 25
        padded = np.pad(self.samples, window // 2)
        pieces = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
        power = np.square(np.abs(np.fft.rfft(pieces * np.hanning(window), axis=1)))
        low, high = (power[:, round(a / 25) : round(b / 25)].sum(axis=1) for a, b in ((200, 1200), (1600, 4000)))
        level = np.sqrt(low / max(np.quantile(low, 0.97), 1e-9))
        opening = gaussian_filter1d(np.clip(level, 0, 1) ** 0.8, 3.0)  # smoothed over 0.03 s, since a jaw is heavy
        tilt = np.log((high + 1e-3) / (low + 1e-3))
        voiced = level > 0.1
        middle = np.median(tilt[voiced]) if voiced.any() else 0.0
        spread = gaussian_filter1d(np.where(voiced, np.tanh((tilt - middle) / 1.5), 0.0), 5.0)
        return np.stack([np.clip(opening * 1.15, 0, 1), np.clip(spread * 1.2, -1, 1)], axis=1)


def say(
    duration_s: float,
    voice: str,
    events_s: tuple[float, ...] = (),
    pause_s: float = 0.45,
    first_sentence: int = 0,
) -> Utterance:
    """Sentences of one voice.

    duration_s: length of the result. events_s: onsets of beeps, around which there is no speech. pause_s: seconds
    between sentences. first_sentence: which of the voice's sentences comes first.
    """
    total = round(duration_s * RATE)
    samples = np.zeros(total)
    quiet = sorted((t - BEFORE_EVENT_S, t + AFTER_EVENT_S) for t in events_s)
    starts = [0.25] + [end for _, end in quiet]
    ends = [start for start, _ in quiet] + [duration_s - 0.2]
    number = first_sentence
    for start, end in zip(starts, ends, strict=True):
        at = start
        while end - at > 0.6:
            words = sentence(f"{voice}_{1 + number % 3}")
            number += 1
            first, length = round(at * RATE), min(len(words), round((end - at) * RATE))
            part = words[:length] * SPEECH_PEAK
            fade = min(480, length)
            part[-fade:] *= np.linspace(1, 0, fade)
            samples[first : first + length] += part
            at += length / RATE + pause_s
    return Utterance(samples, _spans(samples))


def _spans(samples: np.ndarray) -> tuple[tuple[float, float], ...]:
    """The spans of speech in seconds: louder than a whisper, with silences below `PAUSE_S` bridged."""
    hop = RATE // 100
    level = np.sqrt(np.mean(samples[: len(samples) // hop * hop].reshape(-1, hop) ** 2, axis=1))
    loud = np.flatnonzero(level > 0.02 * SPEECH_PEAK)
    if not loud.size:
        return ()
    breaks = np.flatnonzero(np.diff(loud) * hop > PAUSE_S * RATE)
    first, last = loud[np.r_[0, breaks + 1]], loud[np.r_[breaks, loud.size - 1]]
    return tuple((int(a) * hop / RATE, (int(b) + 1) * hop / RATE) for a, b in zip(first, last, strict=True))


def music(duration_s: float, rate: int, seed: int) -> np.ndarray:
    """Chords of plucked strings over a bass, without a voice: [samples] float64 with a peak of 0.25."""
    rng = np.random.default_rng(seed)
    total = round(duration_s * rate)
    samples = np.zeros(total + 2 * rate)
    beat_s, root = rng.uniform(0.36, 0.5), 110 * 2 ** (rng.integers(0, 12) / 12)
    time = np.arange(rate * 3 // 2) / rate
    for beat in range(int(duration_s / beat_s) + 1):
        first = round(beat * beat_s * rate)
        chord = (0, 5, 7, 3)[beat // 4 % 4]
        for note in [chord - 12] if beat % 2 else [chord + n for n in (0, 4, 7, 12)]:
            pitch = root * 2 ** (note / 12)
            string = sum(np.sin(2 * np.pi * pitch * k * time) / k**1.3 * np.exp(-time * (2 + k)) for k in range(1, 9))
            samples[first : first + len(time)] += string * np.minimum(1, time * 300)
    samples = samples[:total]
    return np.asarray(0.25 * samples / np.abs(samples).max())


CHANNELS = {"mono": 1, "stereo": 2, "5.1": 6}


def track(
    speech: Utterance | None,
    events_s: tuple[Fraction, ...],
    rate: int,
    layout: str,
    start_s: Fraction,
    end_s: Fraction,
    music_gain: float = 0.0,
    music_seed: int = 0,
) -> np.ndarray:
    """The sound from `start_s` to `end_s`: speech, very faint room noise, music, and a beep at each event.

    rate: sample rate in Hz. layout: "mono", "stereo" or "5.1".

    Returns: [channels, samples] float32 in -1..1. Sample k is at start_s + k / rate.
    """
    from av import AudioFrame
    from av.audio.resampler import AudioResampler

    total = round((end_s - start_s) * rate)
    mono = np.random.default_rng(7).normal(0, 2e-4, total)
    if speech is not None:
        resampler = AudioResampler(format="fltp", layout="mono", rate=rate)
        frame = AudioFrame.from_ndarray(speech.samples[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        voice = np.concatenate([f.to_ndarray()[0] for f in (*resampler.resample(frame), *resampler.resample(None))])
        offset = round(start_s * rate)
        voice = voice[offset:] if offset >= 0 else np.r_[np.zeros(-offset), voice]
        length = min(total, len(voice))
        mono[:length] += voice[:length]
    if music_gain:
        mono += music_gain * music(total / rate, rate, music_seed)[:total]
    for time in events_s:
        first = round((time - start_s) * rate)
        length = min(round(BEEP_S * rate), total - first)
        if first >= 0 and length > 0:
            # a cosine, so that the first sample has the full amplitude
            mono[first : first + length] = BEEP_PEAK * np.cos(2 * np.pi * BEEP_HZ * np.arange(length) / rate)
    gains = {"mono": [1.0], "stereo": [1.0, 0.8], "5.1": [0.5, 0.5, 1.0, 0.0, 0.25, 0.25]}[layout]
    return (np.array(gains)[:, None] * mono[None]).astype(np.float32)
