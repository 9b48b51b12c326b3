"""The choice of queries for body, face and hands: by score, by box and by side."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tasks.stages.pose.state_tokens import choose_states

NONE = -9.0  # logit of a query that is not of the class
PERSON, FACE, HAND = np.eye(3) * 12 + NONE  # logits of 3 and -9


def chosen(queries: list[tuple[np.ndarray, tuple[float, float, float, float]]], min_score: float = 0.1) -> list[int]:
    """The number of the query of each of body, face, left and right hand, -1 where absent."""
    logits = np.array([logit for logit, _ in queries], np.float32)
    boxes = np.array([box for _, box in queries], np.float32)
    tokens = np.arange(1, len(queries) + 1, dtype=np.float32)[:, None].repeat(256, 1)
    found = choose_states(tokens, logits, boxes, min_score)
    numbers = found.tokens[:, 0].astype(int) - 1
    absent = numbers < 0
    assert (np.isnan(found.scores) == absent).all()
    assert (np.isnan(found.boxes).all(axis=1) == absent).all()
    assert (found.scores[~absent] >= min_score).all()
    centres = (found.boxes[~absent, :2] + found.boxes[~absent, 2:]) / 2
    np.testing.assert_allclose(centres, boxes[numbers[~absent], :2], atol=1e-6)
    return list(numbers)


A_PERSON, A_FACE = (PERSON, (0.6, 0.6, 0.5, 0.8)), (FACE, (0.6, 0.3, 0.1, 0.2))


def test_the_left_hand_is_the_one_further_to_the_right_of_the_image() -> None:
    left, right = (HAND, (0.8, 0.7, 0.1, 0.1)), (HAND + 1, (0.7, 0.7, 0.1, 0.1))
    assert chosen([A_PERSON, A_FACE, left, right]) == [0, 1, 2, 3]
    assert chosen([A_PERSON, A_FACE, right, left]) == [0, 1, 3, 2]


def test_a_single_hand_is_named_by_its_side_of_the_person() -> None:
    hand = (HAND, (0.55, 0.7, 0.1, 0.1))
    assert chosen([A_PERSON, hand]) == [0, -1, -1, 1]  # left of the person's centre at 0.6
    assert chosen([A_FACE, hand]) == [-1, 0, -1, 1]
    assert chosen([hand]) == [-1, -1, 0, -1]  # right of the image's centre


def test_two_queries_with_one_box_are_one_hand() -> None:
    hand, again = (HAND + 2, (0.7, 0.7, 0.1, 0.1)), (HAND + 1, (0.702, 0.7, 0.1, 0.1))
    third = (HAND, (0.5, 0.7, 0.1, 0.1))
    assert chosen([A_PERSON, hand, again]) == [0, -1, 1, -1]
    assert chosen([A_PERSON, hand, again, third]) == [0, -1, 1, 3]


def test_a_part_that_scores_below_the_bound_is_absent() -> None:
    faint = (HAND - 5, (0.7, 0.7, 0.1, 0.1))  # a logit of -2, a score of 0.12
    assert chosen([A_PERSON, faint], min_score=0.1) == [0, -1, 1, -1]
    assert chosen([A_PERSON, faint], min_score=0.15) == [0, -1, -1, -1]
    assert chosen([(np.full(3, NONE), (0.5, 0.5, 1.0, 1.0))]) == [-1, -1, -1, -1]


def test_one_query_may_serve_two_parts() -> None:
    assert chosen([(np.array([3.0, 2.0, NONE]), (0.5, 0.5, 0.9, 0.9))]) == [0, 0, -1, -1]


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            hnp.arrays(np.float32, (n, 3), elements=st.floats(-50, 50, width=32)),
            hnp.arrays(np.float32, (n, 4), elements=st.floats(0, 1, width=32)),
        )
    )
)
def test_any_queries_give_states(given_: tuple[np.ndarray, np.ndarray]) -> None:
    logits, boxes = given_
    numbers = chosen([(logit, tuple(box)) for logit, box in zip(logits, boxes, strict=True)], min_score=0.0)
    assert numbers[:2] == [int(logits[:, 0].argmax()), int(logits[:, 1].argmax())]
    assert int(logits[:, 2].argmax()) in numbers[2:]
    assert numbers[2] != numbers[3]
