"""Key points of body, face and hands: names and orders, the lines between them, and their layout as state tokens.

The orders are those of "Physically Grounded Avatar Generation", figure S2: COCO's 17 points of the body, iBUG's 68 of
the face and COCO-WholeBody's 21 of a hand. Left and right are the person's own. A finger's first knuckle is its tip.
"""

from collections.abc import Mapping

import numpy as np

_SIDES = ("left", "right")
_LIMBS = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
_EYE = ("eye corner 1", "upper eyelid 1", "upper eyelid 2", "eye corner 2", "lower eyelid 2", "lower eyelid 1")
_NOSE = ("right nasal wing 1", "right nasal wing 2", "nasal wing center", "left nasal wing 1", "left nasal wing 2")
_FINGERS = ("forefinger", "middle finger", "ring finger", "pinky finger")
_KNUCKLES = ("third knuckle", "second knuckle", "first knuckle")

BODY = ("nose", *(f"{side} {limb}" for limb in _LIMBS for side in _SIDES))
FACE = (
    *("right cheekbone 1", "right cheekbone 2", *(f"right cheek {k}" for k in range(1, 6)), "right chin"),
    "chin center",
    *("left chin", *(f"left cheek {k}" for k in range(5, 0, -1)), "left cheekbone 2", "left cheekbone 1"),
    *(f"{side} eyebrow {k}" for side in reversed(_SIDES) for k in range(1, 6)),
    *(f"nasal bridge {k}" for k in range(1, 5)),
    *_NOSE,
    *(f"{side} eye {point}" for side in reversed(_SIDES) for point in _EYE),
    *("right mouth corner", *(f"upper lip outer edge {k}" for k in range(1, 6)), "left mouth corner"),
    *(f"lower lip outer edge {k}" for k in range(5, 0, -1)),
    *(f"upper lip inter edge {k}" for k in range(1, 6)),
    *(f"lower lip inter edge {k}" for k in range(3, 0, -1)),
)
HAND = (
    *("wrist", "thumb root", *(f"thumb's {knuckle}" for knuckle in _KNUCKLES)),
    *(f"{finger}'s {joint}" for finger in _FINGERS for joint in ("root", *_KNUCKLES)),
)
PARTS = {"body": BODY, "face": FACE, "left_hand": HAND, "right_hand": HAND}

# The indices of these points in MediaPipe: among BlazePose's 33, the face mesh's 478 and a hand's 21. The points of the
# jaw lie at about even distances along the mesh's outline, from the height of the eyes to the chin.
MEDIAPIPE_BODY = (0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28)
MEDIAPIPE_FACE = (
    *(127, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 356),
    *(70, 63, 105, 66, 107, 336, 296, 334, 293, 300),
    *(168, 197, 5, 4, 98, 97, 2, 326, 327),
    *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),
    *(61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181),
    *(78, 81, 13, 311, 308, 402, 14, 178),
)
MEDIAPIPE_HAND = tuple(range(21))

# Lines for drawing. Each is a sequence of points that are joined.
BODY_LINES = ((5, 7, 9), (6, 8, 10), (5, 6, 12, 11, 5), (11, 13, 15), (12, 14, 16), (3, 1, 0, 2, 4))
FACE_LINES = (
    *(tuple(range(17)), tuple(range(17, 22)), tuple(range(22, 27)), tuple(range(27, 31)), tuple(range(31, 36))),
    *((*range(36, 42), 36), (*range(42, 48), 42), (*range(48, 60), 48), (*range(60, 68), 60)),
)
HAND_LINES = tuple((0, *range(4 * finger + 1, 4 * finger + 5)) for finger in range(5))
LINES = {"body": BODY_LINES, "face": FACE_LINES, "left_hand": HAND_LINES, "right_hand": HAND_LINES}

PART_SIZE = 256  # numbers of one part's token (physavatar, appendix B)
SIZE = PART_SIZE * len(PARTS)  # numbers of one frame
_LOW, _HIGH = -1.0, 2.0  # bounds of x and y in fractions of the frame: one frame beyond either edge


def encode(points: Mapping[str, np.ndarray]) -> np.ndarray:
    """Put key points into the layout of physavatar's physical state tokens.

    points: for each of PARTS, [frames, points, 3] float: x and y in fractions of the frame's width and height, and the
        confidence, 0 to 1. All are NaN in frames where the part is not seen. x and y are clipped to one frame beyond
        the edges.

    Returns: [frames, 1024] float16, 256 numbers for each of body, face, left hand and right hand. They are x, y and
        confidence of each point in the order of PARTS, then zeros, and 1 as the last number. In frames where the part
        is not seen, all 256 are zero. Raises ValueError for another shape, and for a frame that has some of a part's
        points.
    """
    frames = len(points["body"])
    tokens = np.zeros((frames, len(PARTS), PART_SIZE), np.float16)
    for number, (part, names) in enumerate(PARTS.items()):
        values = points[part]
        if values.shape != (frames, len(names), 3):
            raise ValueError(f"{part}: key points of shape {values.shape}, not {(frames, len(names), 3)}")
        absent = np.isnan(values)
        seen = ~absent.any(axis=(1, 2))
        if (absent.all(axis=(1, 2)) == seen).any():
            raise ValueError(f"{part}: a frame has some of its key points and lacks others")
        low, high = (_LOW, _LOW, 0.0), (_HIGH, _HIGH, 1.0)
        tokens[seen, number, : len(names) * 3] = np.clip(values[seen], low, high).reshape(-1, len(names) * 3)
        tokens[seen, number, -1] = 1
    return tokens.reshape(frames, SIZE)


def decode(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The key points that `encode` stored.

    tokens: [frames, 1024].

    Returns: for each of PARTS, [frames, points, 3] float32, NaN where the part is not seen. Raises ValueError for
        another shape.
    """
    if tokens.ndim != 2 or tokens.shape[1] != SIZE:
        raise ValueError(f"key points are stored as [frames, {SIZE}], not as {list(tokens.shape)}")
    parts = tokens.astype(np.float32).reshape(len(tokens), len(PARTS), PART_SIZE)
    points = {}
    for number, (part, names) in enumerate(PARTS.items()):
        values = parts[:, number, : len(names) * 3].reshape(len(tokens), len(names), 3)
        points[part] = np.where((parts[:, number, -1] > 0.5)[:, None, None], values, np.float32(np.nan))
    return points
