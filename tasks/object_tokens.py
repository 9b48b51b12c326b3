"""From X-Pose's queries to physical state tokens: which query is the body, the face, the left and the right hand.

physavatar (appendix B) takes the best query for the body, the best for the face and the two best for the hands. What
it leaves open is decided here: a part whose best query scores less than a bound is absent; two queries of nearly the
same box are one hand; and which hand is which, the picture tells.
"""

from typing import NamedTuple

import numpy as np

from tasks.keypoints import PART_SIZE, PARTS

_PERSON, _FACE, _HAND = range(3)  # of tasks.networks.xpose.CLASSES
_SAME = 0.9  # intersection over union from which X-Pose's own demonstration takes two boxes for one


class States(NamedTuple):
    """One frame's parts, in the order of tasks.keypoints.PARTS.

    tokens: [4, 256] float32, zero where absent (a token itself never is: it comes out of a layer norm). scores: [4]
    float32, 0 to 1, and boxes: [4, 4] float32, x0, y0, x1, y1 in fractions of the frame; both NaN where absent.
    """

    tokens: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray


def states(tokens: np.ndarray, logits: np.ndarray, boxes: np.ndarray, min_score: float) -> States:
    """Choose a frame's parts.

    tokens: [queries, 256]. logits: [queries, 3] of person, face and hand. boxes: [queries, 4], centre and size in
    fractions of the frame.

    Each part goes by its own class's scores alone, so that one query may stand for two parts. The hand further to the
    right of the picture is the person's left one, as of somebody who faces the camera; a hand alone is told by the side
    of the person's middle (of the face's, of the picture's, where there is no person) that it is on. Hands of crossed
    arms and of a person seen from behind are told wrongly.
    """
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    # by logit: of scores near 1 many are the same number
    chosen = {part: int(logits[:, column].argmax()) for part, column in (("body", _PERSON), ("face", _FACE))}
    found = {part: k for part, k in chosen.items() if scores[k, column_of(part)] >= min_score}
    hands = [k for k in _hands(logits[:, _HAND], corners) if scores[k, _HAND] >= min_score]
    middle = next((float(boxes[found[part], 0]) for part in ("body", "face") if part in found), 0.5)
    found |= _sides(hands, boxes[:, 0], middle)

    out = States(
        np.zeros((len(PARTS), PART_SIZE), np.float32),
        np.full(len(PARTS), np.nan, np.float32),
        np.full((len(PARTS), 4), np.nan, np.float32),
    )
    for number, part in enumerate(PARTS):
        if part in found:
            query = found[part]
            out.tokens[number], out.boxes[number] = tokens[query], corners[query]
            out.scores[number] = scores[query, column_of(part)]
    return out


def column_of(part: str) -> int:
    """The class by which a part is chosen."""
    return {"body": _PERSON, "face": _FACE}.get(part, _HAND)


def _hands(logits: np.ndarray, corners: np.ndarray) -> list[int]:
    """The best query, and the next best one whose box is another."""
    order = np.argsort(-logits, kind="stable")
    first = int(order[0])
    other = order[1:][_overlap(corners[first], corners[order[1:]]) <= _SAME]
    return [first, *map(int, other[:1])]


def _sides(hands: list[int], x: np.ndarray, middle: float) -> dict[str, int]:
    if len(hands) == 1:
        return {"left_hand" if x[hands[0]] > middle else "right_hand": hands[0]}
    return dict(zip(("right_hand", "left_hand"), sorted(hands, key=lambda k: float(x[k])), strict=False))


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of [4] with each of [n, 4]: [n]."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return shared / np.maximum(areas - shared, 1e-12)
