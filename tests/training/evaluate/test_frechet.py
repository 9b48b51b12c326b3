import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parity import arrays, needs_parity
from training.evaluate.frechet import frechet_distance


@needs_parity
def test_the_distance_is_the_references_by_either_divisor() -> None:
    known = arrays("metrics/frechet.npz")
    assert frechet_distance(known["feats_a"], known["feats_b"]) == pytest.approx(known["fid_pytorch_fid"], rel=1e-9)
    assert frechet_distance(known["feats_a"], known["feats_b"], 0) == pytest.approx(known["fvd_styleganv"], rel=1e-9)
    few = frechet_distance(known["rank_deficient_a"], known["rank_deficient_b"])
    assert few == pytest.approx(known["rank_deficient_fid_eigen"], rel=1e-8)


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(-5, 5))
def test_the_distance_of_normal_samples_has_a_closed_form(one: float, other: float, apart: float) -> None:
    grid = np.array([[-1.0], [0.0], [1.0]])  # of variance 1 with ddof 1
    found = frechet_distance(one * grid, other * grid + apart)
    assert found == pytest.approx((one - other) ** 2 + apart**2, abs=1e-9)


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(np.array([[1.0], [np.nan]]), np.ones((2, 1)))
