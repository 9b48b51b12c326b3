"""Near-duplicates: hashes of a clip's picture and sound that survive another encoding, and who is a copy of whom.

Two clips are copies when their pictures look alike at the same moments and they sound alike. Picture alone would not
do: all clips of one speaker before one wall look alike.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from tasks.clip import SAMPLE_RATE, Clip
from tasks.stage import Measurement, Stage, StageSettings, Unmeasurable

if TYPE_CHECKING:
    import pandas as pd

PICTURE_BITS, SOUND_BITS = 256, 128

_PICTURES = 4  # each gives 64 bits
_SEGMENTS, _BANDS = SOUND_BITS // 8 + 1, 9
_LOWEST_HZ, _HIGHEST_HZ = 300.0, 3400.0  # what every codec keeps of speech
_QUIET = 1e-6  # mean square, -60 dBFS: below it noise decides the bits
_WINDOW = 64  # neighbours in a bucket that each clip is held against


class DuplicatesSettings(StageSettings):
    """backend: "phash", the signs of low frequencies."""

    backend: Literal["phash"] = "phash"


class Duplicates(Stage[DuplicatesSettings]):
    """Hashes by which copies of a clip are found; to be compared bit by bit.

    Columns:
        picture: 64 hex digits, the perceptual hashes of four key frames, at 1/8, 3/8, 5/8 and 7/8 of the clip.
        sound: 32 hex digits, how the balance of 9 bands of the sound changes over 17 parts of the clip; "" where there
            is nothing to hear, at -60 dBFS or below.
    """

    name: ClassVar[str] = "duplicates"
    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, type]] = {"picture": str, "sound": str}

    def backend_version(self) -> str:
        import cv2

        return f"opencv {cv2.__version__}"

    def measure(self, clip: Clip) -> Measurement:
        pictures = dict(clip.keyframes((32, 32)))
        if not pictures:
            raise Unmeasurable("the clip has no key frame")
        wanted = [(2 * k + 1) / (2 * _PICTURES) * clip.record.frames for k in range(_PICTURES)]
        hashes = [picture_hash(pictures[min(pictures, key=lambda at, w=w: abs(at - w))]) for w in wanted]  # type: ignore[misc]
        samples = clip.samples()
        return Measurement({"picture": "".join(hashes), "sound": "" if samples is None else sound_hash(samples)})


def picture_hash(image: np.ndarray) -> str:
    """16 hex digits: the signs of the 8x8 lowest frequencies of the brightness, against their median (pHash).

    image: [32, 32, 3] uint8 RGB.
    """
    import cv2

    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    low = cv2.dct(grey)[:8, :8].ravel()
    return np.packbits(low > np.median(low[1:])).tobytes().hex()


def sound_hash(samples: np.ndarray) -> str:
    """32 hex digits: whether the difference between neighbouring bands rises from each part of the sound to the next.

    The bits of Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System" (2002), with few long parts in place
    of many short ones. samples: [samples] float32 at 16 kHz. Returns "" for sound that is too quiet to tell, or empty.
    """
    part = len(samples) // _SEGMENTS
    if part < SAMPLE_RATE // 50 or float(np.mean(np.square(samples, dtype=np.float64))) < _QUIET:
        return ""
    spectra = np.fft.rfft(samples[: part * _SEGMENTS].reshape(_SEGMENTS, part).astype(np.float64), axis=1)
    power = np.square(np.abs(spectra))
    edges = np.geomspace(_LOWEST_HZ, _HIGHEST_HZ, _BANDS + 1) * part / SAMPLE_RATE
    energy = np.log(np.add.reduceat(power, edges.astype(int), axis=1)[:, :_BANDS] + 1e-9)
    balance = np.diff(energy, axis=1)
    return np.packbits(np.diff(balance, axis=0) > 0).tobytes().hex()


def copies(clips: "pd.DataFrame", picture_bits: int, sound_bits: int, longer_s: float = 0.5) -> np.ndarray:
    """Which clip each clip is a copy of.

    clips: columns `picture` and `sound` (hashes, as Duplicates measures them), `duration_s` and `source_id`, in the
        order in which clips take precedence. Clips of one source show different moments and are never copies of each
        other, which without sound their pictures would not always tell.
    picture_bits, sound_bits: bits that may differ, of 256 and 128; a clip without a sound hash is a copy of one
        without, by its picture alone. longer_s: by how many seconds the durations may differ.

    Returns: [clips] int64, the row of the first clip that it is a copy of and that is no copy itself; -1 for none.
    Copies are looked for among clips that share 16 neighbouring bits of the sound's hash (32 of the picture's without
    sound), at most 64 to each side, so that a million clips take seconds.
    """
    first = np.full(len(clips), -1, np.int64)
    pictures, known = _words(clips["picture"], PICTURE_BITS)
    sounds, heard = _words(clips["sound"], SOUND_BITS)
    durations = clips["duration_s"].to_numpy(dtype=float)
    sources = clips["source_id"].astype("category").cat.codes.to_numpy()
    pairs = [np.zeros((0, 2), np.int64)]
    for rows, words, dtype in (
        (np.flatnonzero(known & heard), sounds, ">u2"),
        (np.flatnonzero(known & ~heard), pictures, ">u4"),
    ):
        bands = np.ascontiguousarray(words[rows].astype(">u8")).view(dtype)
        for band in bands.T:
            order = np.lexsort((durations[rows], band))
            at, value = rows[order], band[order]
            for step in range(1, min(_WINDOW, len(at) - 1) + 1):
                near = np.flatnonzero(value[step:] == value[:-step])
                if not len(near):
                    break
                a, b = at[near], at[near + step]
                same = (np.abs(durations[a] - durations[b]) <= longer_s) & (sources[a] != sources[b])
                same &= np.bitwise_count(pictures[a] ^ pictures[b]).sum(axis=1) <= picture_bits
                same &= np.bitwise_count(sounds[a] ^ sounds[b]).sum(axis=1) <= sound_bits
                pairs.append(np.sort(np.stack([a[same], b[same]], axis=1), axis=1))
    for earlier, later in np.unique(np.concatenate(pairs)[:, ::-1], axis=0)[:, ::-1]:
        if first[earlier] < 0 and first[later] < 0:
            first[later] = earlier
    return first


def _words(hashes: "pd.Series", bits: int) -> tuple[np.ndarray, np.ndarray]:
    """([clips, bits / 64] uint64, zeros where there is no hash; [clips] bool whether there is one)."""
    digits = bits // 4
    texts = hashes.to_numpy(dtype=object, na_value="")
    known = np.array([len(text) == digits for text in texts], bool)
    data = bytes.fromhex("".join(text if ok else "0" * digits for text, ok in zip(texts, known, strict=True)))
    return np.frombuffer(data, ">u8").reshape(len(texts), bits // 64).astype(np.uint64), known
