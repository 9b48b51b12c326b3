"""Finds clips that are copies of other clips, by the perceptual hashes that the stage `duplicates` measures."""

from typing import TYPE_CHECKING

import numpy as np

from tasks.policy.rules import NearDuplicates
from tasks.stages.duplicates import PICTURE_BITS, SOUND_BITS

if TYPE_CHECKING:
    import pandas as pd

_WINDOW = 64  # each clip is compared with so many neighbours on either side, within clips that share a band of bits


def originals(frame: "pd.DataFrame", candidates: np.ndarray, bounds: NearDuplicates) -> "pd.Series":
    """The clip that each clip is a copy of.

    frame: one row a clip, as `tasks.policy.decide.join` makes it, with the columns of `duplicates`.
    candidates: [clips] bool, the clips to compare. The others are neither copies nor originals.
    bounds: by how many bits the hashes of two copies may differ.

    Returns: text, indexed like `frame`: the clip_id of the original, "" for a clip that is no copy. Among copies, the
    clip with the lowest clip_id is the original, whatever the order of the rows.
    """
    import pandas as pd

    rows = np.flatnonzero(candidates)
    rows = rows[np.argsort(frame.index[rows], kind="stable")]
    some = frame.iloc[rows]
    clips = pd.DataFrame(
        {
            "picture": some["duplicates.picture"],
            "sound": some["duplicates.sound"],
            "duration_s": some["clips.duration_s"],
            "source_id": some.index.str[:16],
        }
    )
    first = copies(clips, bounds.picture_bits, bounds.sound_bits)
    found = first >= 0
    named = pd.Series("", index=frame.index, dtype="str")
    named.iloc[rows[found]] = frame.index[rows[first[found]]].to_numpy()
    return named


def copies(clips: "pd.DataFrame", picture_bits: int, sound_bits: int, longer_s: float = 0.5) -> np.ndarray:
    """The row of the original of each clip.

    clips: one row a clip, in order of precedence: of two copies, the earlier row is the original. Columns: `picture`
        and `sound` (hashes in hexadecimal, as tasks.stages.duplicates measures them), `duration_s`, `source_id`.
    picture_bits: bits by which the picture hashes of two copies may differ, of 256.
    sound_bits: bits by which the sound hashes of two copies may differ, of 128. Clips without a sound hash are only
        compared with each other, by their picture hashes alone.
    longer_s: seconds by which the durations of two copies may differ.

    Returns: [clips] int64, the first row that the clip is a copy of and that is itself no copy; -1 for no copy.

    Clips of one source are never copies of each other: they show different moments, which picture hashes alone do not
    always tell apart. Only clips that share 16 neighbouring bits of the sound hash (32 of the picture hash for clips
    without sound) are compared, each with at most 64 clips on either side. A million clips so take seconds.
    """
    first = np.full(len(clips), -1, np.int64)
    for original, copy in _alike(clips, picture_bits, sound_bits, longer_s):
        if first[original] < 0 and first[copy] < 0:
            first[copy] = original
    return first


def _alike(clips: "pd.DataFrame", picture_bits: int, sound_bits: int, longer_s: float) -> np.ndarray:
    """[pairs, 2] int64: the rows of two clips within the bounds, the earlier row first, sorted by the later row."""
    pictures, known = _words(clips["picture"], PICTURE_BITS)
    sounds, has_sound = _words(clips["sound"], SOUND_BITS)
    durations = clips["duration_s"].to_numpy(dtype=float)
    sources = clips["source_id"].astype("category").cat.codes.to_numpy()
    pairs = [np.zeros((0, 2), np.int64)]
    for rows, words, dtype in (
        (np.flatnonzero(known & has_sound), sounds, ">u2"),
        (np.flatnonzero(known & ~has_sound), pictures, ">u4"),
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
    return np.unique(np.concatenate(pairs)[:, ::-1], axis=0)[:, ::-1]


def _words(hashes: "pd.Series", bits: int) -> tuple[np.ndarray, np.ndarray]:
    """([clips, bits / 64] uint64, zeros for a clip without a hash; [clips] bool whether the clip has a hash)."""
    digits = bits // 4
    texts = hashes.to_numpy(dtype=object, na_value="")
    known = np.array([len(text) == digits for text in texts], bool)
    data = bytes.fromhex("".join(text if ok else "0" * digits for text, ok in zip(texts, known, strict=True)))
    return np.frombuffer(data, ">u8").reshape(len(texts), bits // 64).astype(np.uint64), known
