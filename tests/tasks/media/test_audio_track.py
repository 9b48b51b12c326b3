"""Audio chunks are joined by their time stamps: jitter makes no gaps, gaps stay, drift is corrected."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.media.audio_track import _Chunk, _fit, _runs


def _chunks(
    deviations_ms: list[float], rate: int = 48000, length: int = 1024, true_rate: float = 48000
) -> list[_Chunk]:
    silence = np.zeros((1, length), np.float32)
    times = [5 + k * length / true_rate + deviation / 1000 for k, deviation in enumerate(deviations_ms)]
    return [_Chunk(time, rate, "fltp", "mono", silence, length, 0.0, 0.0) for time in times]


@given(st.lists(st.floats(-4.5, 4.5), min_size=50, max_size=400))
@settings(deadline=None)
def test_jitter_of_time_stamps_makes_no_gaps_in_the_audio(deviations_ms: list[float]) -> None:
    (run,) = _runs(_chunks(deviations_ms))
    start, rate = _fit(run)
    assert start == pytest.approx(5, abs=0.0046)
    assert rate == pytest.approx(48000, rel=0.01)


def test_a_gap_splits_the_audio_and_drift_changes_its_rate() -> None:
    gap = _chunks([0.0] * 20 + [21.0] * 20)
    assert [len(run) for run in _runs(gap)] == [20, 20]
    (drifting,) = _runs(_chunks([0.0] * 400, true_rate=47900))
    start, rate = _fit(drifting)
    assert (start, rate) == (pytest.approx(5, abs=1e-4), pytest.approx(47900, abs=2))
    steady = _fit(_runs(_chunks([0.0] * 400))[0])
    assert steady == (5.0, 48000)
