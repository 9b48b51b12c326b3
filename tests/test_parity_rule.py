"""The fill rule for weights gives the numbers of the parity fixtures."""

import json

import numpy as np

from tests.parity import PARITY, needs_parity, number


@needs_parity
def test_weights_follow_the_fill_rule() -> None:
    for example in json.loads((PARITY / "fill_rule_examples.json").read_text())["examples"]:
        value = number(example["key"], tuple(example["shape"]))
        first = example["first"]
        np.testing.assert_allclose(value.ravel()[: len(first)], first, rtol=1e-6, atol=1e-9, err_msg=example["key"])
