"""How well a threshold agrees with a person: which clips to ask about, and what their answers say.

A person marks clips near a threshold good (the rule should let them pass) or bad. Pure functions.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Bound = Literal["min", "max"]

_DIGITS = 12  # of a suggested threshold, at most


@dataclass(frozen=True)
class Agreement:
    """A rule's decisions against a person's marks, as counts of clips."""

    threshold: float
    kept_good: int
    kept_bad: int
    dropped_good: int
    dropped_bad: int

    @property
    def clips(self) -> int:
        return self.kept_good + self.kept_bad + self.dropped_good + self.dropped_bad

    @property
    def precision(self) -> float | None:
        """Share of the kept clips that are good; None when nothing is kept."""
        return _ratio(self.kept_good, self.kept_good + self.kept_bad)

    @property
    def recall(self) -> float | None:
        """Share of the good clips that are kept; None when none is good."""
        return _ratio(self.kept_good, self.kept_good + self.dropped_good)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; None without a clip that is good or kept."""
        return _ratio(2 * self.kept_good, 2 * self.kept_good + self.kept_bad + self.dropped_good)

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa: agreement beyond that of chance, 1 at best; None where chance alone agrees on every clip."""
        n = self.clips
        if not n:
            return None
        kept, good = self.kept_good + self.kept_bad, self.kept_good + self.dropped_good
        observed = (self.kept_good + self.dropped_bad) / n
        by_chance = (kept * good + (n - kept) * (n - good)) / n**2
        return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def agreement(values: np.ndarray, good: np.ndarray, bound: Bound, threshold: float) -> Agreement:
    """values: [clips] float. good: [clips] bool, the person's marks. bound: which side of the threshold passes; a
    value on it does."""
    kept = values >= threshold if bound == "min" else values <= threshold
    counts = [int((a & b).sum()) for a in (kept, ~kept) for b in (good, ~good)]
    return Agreement(threshold, *counts)


def candidates(values: np.ndarray) -> list[float]:
    """A threshold between every two neighbouring values, and one on each side of all of them, ascending; each the
    number with the fewest digits that lies there."""
    known = np.unique(values[np.isfinite(values)])
    if not len(known):
        return []
    step = float(np.diff(known).max()) if len(known) > 1 else abs(float(known[0])) or 1.0
    edges = [float(known[0]) - step, *map(float, known), float(known[-1]) + step]
    return [between(low, high) for low, high in itertools.pairwise(edges)]


def between(low: float, high: float) -> float:
    """The number with the fewest decimals that lies between two others, near their middle."""
    middle = low + (high - low) / 2
    for digits in range(_DIGITS + 1):
        rounded = round(middle, digits)
        if low < rounded < high:
            return rounded + 0.0  # never -0.0
    return middle


def best(table: Sequence[Agreement], present: float) -> Agreement:
    """The threshold of the highest kappa; of equals, of the highest F1, then the one nearest to the `present` one."""
    return max(table, key=lambda row: (_or_least(row.kappa), _or_least(row.f1), -abs(row.threshold - present)))


def _or_least(figure: float | None) -> float:
    # rounded, since equals must not differ in the last bit of a division
    return -math.inf if figure is None else round(figure, 12)


def borderline(clip_ids: Sequence[str], values: np.ndarray, bound: Bound, threshold: float, count: int) -> list[str]:
    """Clips to ask a person about: as many that pass as that do not, as far as there are, the nearest half of each side
    of the threshold in equal parts by distance, one clip of each part.

    values: [clips] float, NaN where there is none. Which clip of a part, and the order in which they come, goes by a
    hash of the clip_id: no order by value that would tell the person what to answer, and the same clips each time.
    """
    known = np.flatnonzero(np.isfinite(values))
    passes = values >= threshold if bound == "min" else values <= threshold
    sides = [known[passes[known]], known[~passes[known]]]
    smaller = min(sides, key=len)
    shares = [min(len(side), count // 2) for side in sides]
    for i, side in enumerate(sides):
        if side is not smaller:
            shares[i] = min(len(side), count - min(len(smaller), count // 2))
    chosen: list[str] = []
    for side, share in zip(sides, shares, strict=True):
        if share:
            by_distance = sorted(side, key=lambda at: (abs(values[at] - threshold), clip_ids[at]))
            nearest = by_distance[: max(share, math.ceil(len(side) / 2))]
            parts = np.array_split(np.array(nearest), share)
            chosen += [min((clip_ids[at] for at in part), key=_shuffled) for part in parts]
    return sorted(chosen, key=_shuffled)


def _shuffled(clip_id: str) -> str:
    return hashlib.sha256(clip_id.encode()).hexdigest()
