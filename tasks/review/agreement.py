"""How well a rule's threshold agrees with a person's judgement.

A person marks clips near the threshold as good (the rule should let them pass) or bad. `borderline` chooses the clips.
`agreement` compares one threshold with the marks, and `best` chooses the threshold that agrees best.

All functions here are pure.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tasks.policy.rules import within

Bound = Literal["min", "max"]
"""Which threshold of a rule: with "min" a value passes at or above it, with "max" at or below it."""

_MAX_DECIMALS = 12  # of a suggested threshold


@dataclass(frozen=True)
class Agreement:
    """What a threshold decides, compared with a person's marks: four counts of clips."""

    threshold: float
    kept_good: int
    """Clips that the threshold keeps and the person marked good."""
    kept_bad: int
    """Clips that the threshold keeps and the person marked bad."""
    dropped_good: int
    """Clips that the threshold drops and the person marked good."""
    dropped_bad: int
    """Clips that the threshold drops and the person marked bad."""

    @property
    def clips(self) -> int:
        return self.kept_good + self.kept_bad + self.dropped_good + self.dropped_bad

    @property
    def precision(self) -> float | None:
        """Share of the kept clips that are good. None when no clip is kept."""
        return _ratio(self.kept_good, self.kept_good + self.kept_bad)

    @property
    def recall(self) -> float | None:
        """Share of the good clips that are kept. None when no clip is good."""
        return _ratio(self.kept_good, self.kept_good + self.dropped_good)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall. None when no clip is good or kept."""
        return _ratio(2 * self.kept_good, 2 * self.kept_good + self.kept_bad + self.dropped_good)

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa: agreement beyond chance, at most 1. None when chance alone agrees on every clip."""
        n = self.clips
        if not n:
            return None
        kept, good = self.kept_good + self.kept_bad, self.kept_good + self.dropped_good
        observed = (self.kept_good + self.dropped_bad) / n
        by_chance = (kept * good + (n - kept) * (n - good)) / n**2
        return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def passing(values: np.ndarray, bound: Bound, threshold: float) -> np.ndarray:
    """Which values pass a threshold, as in a rule of the policy: [clips] bool."""
    passes: np.ndarray = within(values, **{bound: threshold})
    return passes


def agreement(values: np.ndarray, good: np.ndarray, bound: Bound, threshold: float) -> Agreement:
    """Compare one threshold with a person's marks.

    values: [clips] float, the scores. good: [clips] bool, the marks. bound: which side of the threshold passes. A value
        equal to the threshold passes.
    """
    kept = passing(values, bound, threshold)
    counts = [int((a & b).sum()) for a in (kept, ~kept) for b in (good, ~good)]
    return Agreement(threshold, *counts)


def candidates(values: np.ndarray) -> list[float]:
    """The thresholds worth comparing, in ascending order: one between every two neighbouring values, one below all of
    them and one above all of them. Each is the number with the fewest decimals that lies there.

    values: [clips] float. Values that are not finite are left out.
    """
    known = np.unique(values[np.isfinite(values)])
    if not len(known):
        return []
    step = float(np.diff(known).max()) if len(known) > 1 else abs(float(known[0])) or 1.0
    edges = [float(known[0]) - step, *map(float, known), float(known[-1]) + step]
    return [between(low, high) for low, high in itertools.pairwise(edges)]


def between(low: float, high: float) -> float:
    """The number with the fewest decimals that lies between two numbers, near their middle."""
    middle = low + (high - low) / 2
    for decimals in range(_MAX_DECIMALS + 1):
        rounded = round(middle, decimals)
        if low < rounded < high:
            return rounded + 0.0  # never -0.0
    return middle


def best(table: Sequence[Agreement], present: float) -> Agreement:
    """The threshold with the highest kappa. Ties go to the higher F1, then to the threshold nearest to `present`."""
    return max(table, key=lambda row: (_rank(row.kappa), _rank(row.f1), -abs(row.threshold - present)))


def _rank(figure: float | None) -> float:
    # rounded, so that equal figures tie in spite of the last bit of a division
    return -math.inf if figure is None else round(figure, 12)


def borderline(clip_ids: Sequence[str], values: np.ndarray, bound: Bound, threshold: float, count: int) -> list[str]:
    """Choose the clips that a person is asked about.

    Half of them pass the threshold and half do not. When one side has too few clips, the other side gives more. On each
    side, the half of the clips nearest to the threshold is cut into equal parts by distance, and one clip of each part
    is chosen.

    A hash of the clip_id says which clip of a part is chosen and in which order the clips come. The same clips are
    chosen each time, and the order does not tell the person which mark the rule would give.

    values: [clips] float, NaN where a clip has none. count: how many clips to choose, if there are as many.
    """
    known = np.flatnonzero(np.isfinite(values))
    passes = passing(values, bound, threshold)
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
            chosen += [min((clip_ids[at] for at in part), key=_hash) for part in parts]
    return sorted(chosen, key=_hash)


def _hash(clip_id: str) -> str:
    return hashlib.sha256(clip_id.encode()).hexdigest()
