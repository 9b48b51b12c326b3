"""The choice of physical state tokens among X-Pose's queries: one each for body, face, left and right hand.

physavatar (appendix B) takes the best query for the body, the best for the face and the two best for the hands. The
paper leaves three things open, which are decided here: a part whose best query scores below a bound is absent; two
queries with nearly the same box are one hand; positions in the image decide which hand is the left one.
"""

from typing import NamedTuple

import numpy as np

from tasks.stages.pose.keypoints import PART_SIZE, PARTS

_PERSON, _FACE, _HAND = range(3)  # indices into tasks.networks.xpose.CLASSES
_MAX_IOU = 0.9  # boxes that overlap more are of one hand; the bound of X-Pose's own demonstration


class States(NamedTuple):
    """The parts of one frame, in the order of tasks.stages.pose.keypoints.PARTS."""

    tokens: np.ndarray
    """[4, 256] float32, zero where the part is absent. X-Pose's own tokens, outputs of a layer norm, are never zero."""
    scores: np.ndarray
    """[4] float32, 0 to 1, NaN where the part is absent."""
    boxes: np.ndarray
    """[4, 4] float32, x0, y0, x1, y1 in fractions of the frame, NaN where the part is absent."""


def choose_states(tokens: np.ndarray, logits: np.ndarray, boxes: np.ndarray, min_score: float) -> States:
    """Choose a frame's parts.

    Each part is chosen by the scores of its own class, so one query may serve two parts. Of two hands, the one further
    to the right of the image is the person's left hand, as for a person who faces the camera. A single hand is the left
    one where it is to the right of the person's centre. Without a person the face's centre counts, and without a face
    that of the image. Crossed arms and a person seen from behind get their hands exchanged.

    tokens: [queries, 256].
    logits: [queries, 3] of person, face and hand.
    boxes: [queries, 4], centre and size in fractions of the frame.
    min_score: the lowest score, 0 to 1, of a part that is there.
    """
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    # by logit, because many scores near 1 are the same float
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
    """The column of the logits by which a part is chosen."""
    return {"body": _PERSON, "face": _FACE}.get(part, _HAND)


def _hands(logits: np.ndarray, corners: np.ndarray) -> list[int]:
    """The best query, and the next best one whose box is of another hand."""
    order = np.argsort(-logits, kind="stable")
    first = int(order[0])
    other = order[1:][_iou(corners[first], corners[order[1:]]) <= _MAX_IOU]
    return [first, *map(int, other[:1])]


def _sides(hands: list[int], x: np.ndarray, middle: float) -> dict[str, int]:
    if len(hands) == 1:
        return {"left_hand" if x[hands[0]] > middle else "right_hand": hands[0]}
    return dict(zip(("right_hand", "left_hand"), sorted(hands, key=lambda k: float(x[k])), strict=False))


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of one box, [4], with each of others, [n, 4]: [n]."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return shared / np.maximum(areas - shared, 1e-12)
