"""The stage `duplicates`: hashes of a clip's picture and sound, from which copies of the clip are found.

The hashes survive another encoding. Two clips are copies when their frames look alike at the same moments and their
sounds are alike. The picture alone is not enough: all clips of one speaker in front of one wall look alike.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import ClassVar

import numpy as np

from tasks.media.clip import SAMPLE_RATE, Clip, Measurement, Unmeasurable
from tasks.stages.backend import Backend, Resources
from tasks.stages.base import Stage, StageSettings

PICTURE_BITS, SOUND_BITS = 256, 128

_FRAMES = 4  # hashed in a clip, each gives 64 bits
_FRAME_SIDE = 32  # pixels
_SEGMENTS, _BANDS = SOUND_BITS // 8 + 1, 9
_LOWEST_HZ, _HIGHEST_HZ = 300.0, 3400.0  # the part of speech that every codec keeps
_QUIET = 1e-6  # mean square, -60 dBFS: below it noise decides the bits


class DuplicatesBackend(Backend, ABC):
    """A backend of the stage: hashes in which copies of a clip differ by a few bits."""

    @abstractmethod
    def hash_frame(self, image: np.ndarray) -> str:
        """16 hex digits of a frame. image: [32, 32, 3] uint8 RGB."""

    @abstractmethod
    def hash_sound(self, samples: np.ndarray) -> str:
        """32 hex digits of a sound, "" if it is empty or too quiet. samples: [samples] float32 at 16 kHz."""


class PerceptualHash(DuplicatesBackend):
    """The signs of the picture's low frequencies, and of changes in the balance of the sound's bands."""

    # measured: peak growth over one clip of 5 s (benchmarks/backends.py)
    resources: ClassVar[Resources] = Resources(memory_gb=0.1)

    @classmethod
    def version(cls) -> str:
        import cv2

        return f"opencv {cv2.__version__}"

    def hash_frame(self, image: np.ndarray) -> str:
        """The signs of the 8x8 lowest frequencies of the brightness, against their median (pHash)."""
        import cv2

        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
        low = cv2.dct(grey)[:8, :8].ravel()
        return np.packbits(low > np.median(low[1:])).tobytes().hex()

    def hash_sound(self, samples: np.ndarray) -> str:
        """Whether the difference between neighbouring bands rises from each segment of the sound to the next.

        The bits are those of Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System" (2002), from 17 long
        segments in place of many short ones.
        """
        length = len(samples) // _SEGMENTS
        if length < SAMPLE_RATE // 50 or float(np.mean(np.square(samples, dtype=np.float64))) < _QUIET:
            return ""
        spectra = np.fft.rfft(samples[: length * _SEGMENTS].reshape(_SEGMENTS, length).astype(np.float64), axis=1)
        power = np.square(np.abs(spectra))
        edges = np.geomspace(_LOWEST_HZ, _HIGHEST_HZ, _BANDS + 1) * length / SAMPLE_RATE
        energy = np.log(np.add.reduceat(power, edges.astype(int), axis=1)[:, :_BANDS] + 1e-9)
        balance = np.diff(energy, axis=1)
        return np.packbits(np.diff(balance, axis=0) > 0).tobytes().hex()


BACKENDS: dict[str, type[DuplicatesBackend]] = {"phash": PerceptualHash}


class DuplicatesSettings(StageSettings):
    """Which hashes are computed."""

    choices: ClassVar = {"backend": BACKENDS}

    backend: str = "phash"
    """The kind of hash: "phash", perceptual hashes."""


class Duplicates(Stage[DuplicatesSettings]):
    """Hashes of a clip, to be compared bit by bit.

    Columns:
        picture: 64 hex digits, the hashes of four key frames, at 1/8, 3/8, 5/8 and 7/8 of the clip.
        sound: 32 hex digits, the changes in the balance of 9 bands of the sound over 17 segments of the clip. "" for a
            clip without sound, or with sound at -60 dBFS or below.
    """

    name: ClassVar[str] = "duplicates"
    version: ClassVar[int] = 1
    backends: ClassVar = {"backend": BACKENDS}
    columns: ClassVar[dict[str, type]] = {"picture": str, "sound": str}

    @cached_property
    def _backend(self) -> DuplicatesBackend:
        return BACKENDS[self.settings.backend]()

    def measure(self, clip: Clip) -> Measurement:
        images = dict(clip.keyframes((_FRAME_SIDE, _FRAME_SIDE)))
        if not images:
            raise Unmeasurable("the clip has no key frame")
        wanted = [(2 * k + 1) / (2 * _FRAMES) * clip.record.frames for k in range(_FRAMES)]
        chosen = [images[_nearest(images, at)] for at in wanted]
        samples = clip.samples()
        return Measurement(
            {
                "picture": "".join(self._backend.hash_frame(image) for image in chosen),
                "sound": "" if samples is None else self._backend.hash_sound(samples),
            }
        )


def _nearest(indices: Iterable[int], at: float) -> int:
    return min(indices, key=lambda index: abs(index - at))
