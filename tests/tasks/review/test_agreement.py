"""Which clips a person is asked about, and how marks are compared with thresholds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.review.agreement import Agreement, Bound, agreement, best, between, borderline, candidates

numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 4))
bounds = st.sampled_from(["min", "max"])


@pytest.mark.parametrize(
    ("counts", "precision", "recall", "f1", "kappa"),
    [
        # of 50 clips the two agree on 20 + 15 and differ on 5 + 10; chance agrees on 0.5, so (0.7 - 0.5) / 0.5
        ((20, 5, 10, 15), 0.8, 2 / 3, 8 / 11, 0.4),
        # of 100 clips they agree on 45 + 15 and differ on 25 + 15; chance agrees on 0.7 * 0.6 + 0.3 * 0.4 = 0.54
        ((45, 25, 15, 15), 45 / 70, 0.75, 9 / 13, 0.06 / 0.46),
        ((3, 0, 0, 7), 1.0, 1.0, 1.0, 1.0),
        ((0, 5, 5, 0), 0.0, 0.0, 0.0, -1.0),
        ((0, 0, 4, 6), None, 0.0, 0.0, 0.0),
        ((0, 4, 0, 6), 0.0, None, 0.0, 0.0),
        ((0, 0, 0, 6), None, None, None, None),
        ((6, 0, 0, 0), 1.0, 1.0, 1.0, None),
        ((0, 0, 0, 0), None, None, None, None),
    ],
)
def test_precision_recall_f1_and_kappa_equal_the_textbook_values(
    counts: tuple[int, int, int, int],
    precision: float | None,
    recall: float | None,
    f1: float | None,
    kappa: float | None,
) -> None:
    row = Agreement(0.0, *counts)
    for found, expected in ((row.precision, precision), (row.recall, recall), (row.f1, f1), (row.kappa, kappa)):
        assert found == (None if expected is None else pytest.approx(expected))


def test_a_value_on_the_threshold_is_kept() -> None:
    values, good = np.array([1.0, 2.0, 3.0]), np.array([True, True, False])
    assert agreement(values, good, "max", 2.0) == Agreement(2.0, 2, 0, 0, 1)
    assert agreement(values, good, "min", 2.0) == Agreement(2.0, 1, 1, 1, 0)


@given(st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=30), bounds, numbers)
def test_no_threshold_agrees_better_than_the_best_one(
    marked: list[tuple[float, bool]], bound: Bound, present: float
) -> None:
    values, good = np.array([v for v, _ in marked]), np.array([g for _, g in marked])
    table = [agreement(values, good, bound, threshold) for threshold in candidates(values)]
    assert all(row.clips == len(marked) for row in table)
    assert all(row.kappa is None or -1 <= row.kappa <= 1 for row in table)
    kappas = [-math.inf if row.kappa is None else row.kappa for row in table]
    found = best(table, present)
    assert (found.kappa if found.kappa is not None else -math.inf) == pytest.approx(max(kappas))
    # any other threshold keeps the same clips as one of the candidates
    other = agreement(values, good, bound, present)
    if present not in values:
        assert any((row.kept_good, row.kept_bad) == (other.kept_good, other.kept_bad) for row in table)


@given(st.lists(numbers, min_size=2, max_size=20, unique=True), st.data(), bounds)
def test_marks_that_a_threshold_can_separate_are_separated(
    values: list[float], data: st.DataObject, bound: Bound
) -> None:
    values = sorted(values)
    cut = data.draw(st.integers(1, len(values) - 1))
    good = np.array([(i < cut) == (bound == "max") for i in range(len(values))])
    table = [agreement(np.array(values), good, bound, threshold) for threshold in candidates(np.array(values))]
    found = best(table, values[0])
    assert found.kappa == found.precision == found.recall == 1.0
    assert values[cut - 1] < found.threshold < values[cut]


@given(numbers, numbers)
def test_a_suggested_threshold_lies_between_two_values_and_has_few_digits(one: float, other: float) -> None:
    low, high = sorted((one, other))
    if low < high:
        found = between(low, high)
        assert low < found < high
        digits = max(0, math.ceil(-math.log10(high - low)) + 1)
        assert found == round(found, digits)


values_of_clips = st.dictionaries(
    st.integers(0, 10_000).map("clip-{:05d}".format), numbers | st.just(math.nan), max_size=60
)


@given(values_of_clips, bounds, numbers, st.integers(2, 20))
def test_both_sides_of_a_threshold_are_asked_about(
    clips: dict[str, float], bound: Bound, threshold: float, count: int
) -> None:
    ids, values = list(clips), np.array(list(clips.values()), dtype=float)
    chosen = borderline(ids, values, bound, threshold, count)
    known = [clip_id for clip_id, value in clips.items() if not math.isnan(value)]
    assert len(chosen) == len(set(chosen)) == min(count, len(known))
    assert set(chosen) <= set(known)
    passing = {c for c in known if (clips[c] >= threshold if bound == "min" else clips[c] <= threshold)}
    num_chosen = [len(passing & set(chosen)), len(set(chosen) - passing)]
    num_known = [len(passing), len(known) - len(passing)]
    assert all(n >= min(count // 2, total) for n, total in zip(num_chosen, num_known, strict=True))
    # the order of the given clips makes no difference
    assert borderline(ids[::-1], values[::-1], bound, threshold, count) == chosen


def test_clips_near_the_threshold_are_asked_about_in_an_order_unrelated_to_their_values() -> None:
    ids = [f"clip-{i:03d}" for i in range(200)]
    values = np.linspace(0, 2, 200)
    chosen = [values[ids.index(clip_id)] for clip_id in borderline(ids, values, "max", 1.0, 20)]
    assert sum(value <= 1 for value in chosen) == 10
    assert max(abs(value - 1) for value in chosen) <= 0.51
    assert np.histogram(chosen, bins=4, range=(0.5, 1.5))[0].min() >= 4  # spread over the clips near the threshold
    assert chosen != sorted(chosen) and chosen != sorted(chosen, reverse=True)
