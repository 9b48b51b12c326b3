"""What a policy refuses, and that a rule compares one value and a column of values alike."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from data_manifests.strict import RecipeError, validate
from tasks.policy.rules import Policy, Rule


def rule(score: str, **demand: Any) -> dict[str, Any]:
    return {"score": score, "backend": "b", **demand}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rules": {"r": rule("motion.speed")}}, "policy: rules.r: the rule on motion.speed demands nothing"),
        ({"rules": {"r": rule("motion.speed", min=2, max=1)}}, "no clip can pass"),
        ({"rules": {"r": rule("motion.speed", mim=2)}}, "did you mean 'min'?"),
        ({"rules": {"r": rule("speed", min=2)}}, "'speed' is not of the form stage.column"),
        ({"rules": {"r": rule("motion.speed", min=float("nan"))}}, "finite number"),
        ({"tiers": {"main": {"hours": 3, "rank": {"motion.speed": 1}}}}, "add a narrower tier after it"),
        ({"tiers": {"main": {}, "hq": {"hours": 3}}}, "by what? give rank"),
        ({"tiers": {}}, "at least 1 item"),
        ({"audio": {"sound": rule("speech.fraction", min=0)}}, "'sound' is reserved for clips without sound"),
        (
            {"rules": {"r": rule("a.b", min=0)}, "audio": {"r": rule("a.b", min=0)}},
            "r names a rule under rules and one under audio",
        ),
    ],
)
def test_a_contradictory_policy_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        validate(Policy, sections, "policy")
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("demand", "values", "dtype"),
    [
        ({"min": 0.5}, [0.25, 0.5, 0.75, None], "float64"),
        ({"max": 0.5}, [0.25, 0.5, 0.75, None], "float64"),
        ({"min": 1, "max": 2}, [0, 1, 2, 3, None], "Int64"),
        ({"one_of": ["full", "medium"]}, ["full", "long", "", None], "str"),
        ({"one_of": [True]}, [True, False, None], "boolean"),
        ({"one_of": [0, 2]}, [0, 1, 2, None], "Int64"),
    ],
)
def test_one_value_and_a_column_of_values_are_compared_alike(
    demand: dict[str, Any], values: list[Any], dtype: str
) -> None:
    demanded = Rule(score="a.b", backend="b", **demand)
    expected = [value is not None and demanded.passes(value) for value in values]
    passing = demanded.passing(pd.Series(values, dtype=dtype))
    assert passing.dtype == np.bool_ and passing.tolist() == expected
    assert {True, False} <= set(expected)
