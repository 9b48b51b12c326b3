"""The plan of batches. No shard is read here."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.buckets import (
    LoaderError,
    PlannedBatch,
    PlanState,
    SampleOrder,
    SamplePlace,
    plan_batches,
    uniform_draws,
    worker_share,
)


def finder(shapes: int, unusable: int):
    """A find_buckets callback: samples have one of `shapes` shapes. Some are unusable, about one in `unusable`."""

    def find(places: list[SamplePlace]) -> list[tuple[int, SamplePlace] | None]:
        numbers = [place.shard * 7919 + place.sample * 104729 for place in places]
        return [
            None if unusable and number % unusable == 0 else (number % shapes, place)
            for number, place in zip(numbers, places, strict=True)
        ]

    return find


def usable(counts: list[int], epoch: int, find) -> list[SamplePlace]:
    places = [SamplePlace(epoch, shard, sample) for shard, count in enumerate(counts) for sample in range(count)]
    return [place for place, found in zip(places, find(places), strict=True) if found is not None]


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any),
    shapes=st.integers(1, 4),
    unusable_every=st.sampled_from([0, 2, 3]),
    batch=st.integers(1, 9),
    window=st.integers(1, 20),
    legs=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 9)), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
)
def test_each_sample_of_an_epoch_is_seen_once_after_any_stops_and_on_any_number_of_workers(
    counts: list[int],
    shapes: int,
    unusable_every: int,
    batch: int,
    window: int,
    legs: list[tuple[int, int]],
    seed: int,
) -> None:
    """legs: (batches until the next stop, workers) of each run. The last run goes on until two epochs are complete."""
    find = finder(shapes, unusable_every)
    if not usable(counts, 0, find):
        return
    order = SampleOrder(counts, seed, window)
    state = PlanState()
    given_out: list[list[SamplePlace]] = []
    for number, (stop, workers) in enumerate(legs):
        workers = min(workers, batch)
        last = number == len(legs) - 1
        # each worker plans by itself
        plans = [plan_batches(order, find, batch, state) for _ in range(workers)]
        for _ in range(10_000 if last else stop):
            planned = [next(each) for each in plans]
            assert all(each == planned[0] for each in planned)
            parts = [planned[rank].samples[worker_share(batch, rank, workers)] for rank in range(workers)]
            assert all(parts)
            together = [place for part in parts for place, _ in part]
            assert len(together) == batch
            assert len({find([place])[0][0] for place in together}) == 1, "a batch has one shape"
            given_out.append(together)
            state = PlanState.decode(json.loads(json.dumps(planned[0].state.encode())))
            if last and state.epoch > 1 and not any(place.epoch < 2 for place in state.pending):
                break
    seen = Counter(place for one in given_out for place in one)
    waiting = Counter(state.pending)
    for epoch in (0, 1):
        met = Counter({place: n for place, n in (seen + waiting).items() if place.epoch == epoch})
        if state.epoch > epoch:
            assert met == Counter(usable(counts, epoch, find))
        else:
            assert max(met.values(), default=1) == 1
    uninterrupted = plan_batches(order, find, batch, PlanState())
    assert given_out == [[place for place, _ in p.samples] for p in islice(uninterrupted, len(given_out))]


def test_epochs_and_seeds_differ_and_every_window_mixes() -> None:
    counts = [40, 0, 25, 35]

    def epoch_of(seed: int, epoch: int) -> list[tuple[int, int]]:
        windows = list(SampleOrder(counts, seed, 16).windows(epoch))
        assert [len(window) for window in windows] == [16] * 6 + [4]
        return [(place.shard, place.sample) for window in windows for place in window]

    first = epoch_of(0, 0)
    everything = sorted((shard, sample) for shard, count in enumerate(counts) for sample in range(count))
    for other in (epoch_of(0, 1), epoch_of(1, 0)):
        assert sorted(other) == everything and other != first
    assert first == epoch_of(0, 0)
    # windows of 16: the first samples come from the first shards of the epoch's order
    assert len({shard for shard, _ in first[:16]}) == 1
    assert [sample for _, sample in first[:16]] != sorted(sample for _, sample in first[:16])


def test_an_order_goes_on_from_any_place() -> None:
    order = SampleOrder([7, 11, 5], 3, 4)
    whole = [place for window in order.windows(2) for place in window]
    for at in range(len(whole) + 1):
        assert [place for window in order.windows(2, at) for place in window] == whole[at:]


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    """These numbers must never change, because resumed trainings rely on them."""
    order = SampleOrder([3, 4], 42, 4)
    assert [tuple(place)[1:] for window in order.windows(1) for place in window] == [
        (1, 3),
        (1, 1),
        (1, 0),
        (1, 2),
        (0, 0),
        (0, 1),
        (0, 2),
    ]
    np.testing.assert_allclose(
        uniform_draws(7, 1, "clip", 3), [0.14790797209, 0.446715162434, 0.356641169758], atol=1e-12
    )


def test_shares_are_even_and_make_up_the_batch() -> None:
    for batch in range(1, 20):
        for ranks in range(1, batch + 1):
            parts = [list(range(batch))[worker_share(batch, rank, ranks)] for rank in range(ranks)]
            assert [sample for part in parts for sample in part] == list(range(batch))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_dataset_without_a_usable_sample_is_refused() -> None:
    endless = plan_batches(SampleOrder([3, 3], 0, 4), lambda places: [None] * len(places), 2, PlanState())
    with pytest.raises(LoaderError, match="no sample of the dataset can be used"):
        next(endless)


def test_samples_of_a_rare_shape_wait_for_company() -> None:
    """An epoch has one sample of the rare shape, and a batch takes two. So the batch comes in the second epoch."""

    def find(places: list[SamplePlace]) -> list[tuple[str, SamplePlace] | None]:
        return [("rare" if place.sample == 0 else "usual", place) for place in places]

    batches: list[PlannedBatch[str, SamplePlace]] = list(
        islice(plan_batches(SampleOrder([5], 0, 5), find, 2, PlanState()), 10)
    )
    rare = [planned for planned in batches if planned.bucket == "rare"]
    assert [place.epoch for place, _ in rare[0].samples] == [0, 1]
    assert all(len(planned.samples) == 2 for planned in batches)
