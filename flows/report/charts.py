"""The data of the report's charts: histograms with their thresholds, and bars. Positions are in percent of a chart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from tasks.policy.rules import Rule

_BINS = 40
_OUTER = 0.005  # share of the values at each end that may lie beyond the axis
_MARGIN = 0.03  # share of the axis that is added beyond a threshold at its edge
MOST_CATEGORIES = 12
"""Categories of a chart; less frequent ones are left out."""


@dataclass(frozen=True)
class Bin:
    """One bar of a histogram. Positions are in percent of the chart."""

    x: float
    """Left edge."""
    width: float
    height: float
    count: int
    """Number of values."""


@dataclass(frozen=True)
class Mark:
    """A threshold in a histogram. Positions are in percent of the chart's width."""

    x: float
    """Where the threshold lies."""
    to: float
    """The values from the threshold to here are rejected: 0 or 100."""
    label: str
    """The rule's name and its threshold."""


@dataclass(frozen=True)
class Histogram:
    """The distribution of a score. Values beyond the axis are counted in the outermost bins."""

    bins: list[Bin]
    marks: list[Mark]
    low: str
    """Lower end of the axis."""
    high: str
    """Upper end of the axis."""
    count: int
    """Number of values."""


@dataclass(frozen=True)
class Category:
    """A value of a score that is text, or yes and no."""

    name: str
    count: int
    """Number of clips."""
    share: float
    """Count in percent of the most frequent category's."""
    rejected: bool
    """Whether at least one rule rejects it."""


def histogram(values: "pd.Series", rules: Sequence[tuple[str, "Rule"]]) -> Histogram | None:
    """The distribution of a score, with thresholds; None when no clip has a value.

    rules: the rules on this score, each with its name.
    """
    numbers = values.dropna().astype(float).to_numpy()
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return None
    bounds = [b for _, rule in rules for b in (rule.min, rule.max) if b is not None]
    low, high = (float(q) for q in np.quantile(numbers, [_OUTER, 1 - _OUTER], method="closest_observation"))
    low, high = min([low, *bounds]), max([high, *bounds])
    pad = (high - low) * _MARGIN or abs(high) * 0.1 or 1.0
    # beyond a threshold at the edge of the axis there must be room to shade what it rejects
    low, high = (low - pad if low in bounds or low == high else low), (high + pad if high in bounds else high)
    is_integer = values.dtype.kind == "i"
    edges = np.linspace(low, high, _BINS + 1)
    if is_integer and high - low < _BINS:  # one bin for each integer
        edges = np.arange(math.floor(low) - 0.5, math.ceil(high) + 1)
        low, high = float(edges[0]), float(edges[-1])
    counts, _ = np.histogram(np.clip(numbers, low, high), edges)

    def x(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    width = round(100 / len(counts), 3)
    bins = [
        Bin(round(i * 100 / len(counts), 3), width, _height(int(count), int(counts.max())), int(count))
        for i, count in enumerate(counts)
        if count
    ]
    marks = [
        Mark(x(bound), to, f"{name} {sign} {bound:g}")
        for name, rule in rules
        for bound, sign, to in ((rule.min, "≥", 0.0), (rule.max, "≤", 100.0))
        if bound is not None
    ]
    return Histogram(bins, marks, f"{low:.3g}", f"{high:.3g}", len(numbers))


def _height(count: int, most: int) -> float:
    # at least so high that one clip among thousands can be seen
    return round(max(1.5, 94 * count / most), 2)


def categories(values: "pd.Series", rules: Sequence[tuple[str, "Rule"]]) -> list[Category]:
    """The values of a score that is not a number, the most frequent first.

    rules: the rules on this score, each with its name.
    """
    counts = values.dropna().value_counts()
    found = sorted(((_plain(value), int(count)) for value, count in counts.items()), key=lambda v: (-v[1], str(v[0])))
    most = found[0][1] if found else 1
    return [
        Category(
            _word(value),
            count,
            round(100 * count / most, 2),
            any(rule.one_of is not None and value not in rule.one_of for _, rule in rules),
        )
        for value, count in found[:MOST_CATEGORIES]
    ]


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) or "not known"


def percent(part: float, whole: float) -> float:
    """A share in percent, with two decimals."""
    return round(100 * part / whole, 2)
