"""Reads from pixels what puppets do. The rules are fixed: they know where things are drawn, not how a video was made.

All functions take [frames, size, size, 3] uint8 RGB of one puppet. Read the two halves of a frame with two puppets one
by one.
"""

from functools import cache

import numpy as np

from tasks.synthetic.puppets import (
    DARK,
    GESTURES,
    HEAD,
    MOUTH,
    MOUTH_HEIGHT,
    MOUTH_WIDTH,
    PAN,
    SHOULDER,
    THERE,
    arm_cover,
)

_STEP = 2.0  # degrees between the drawn arms that frames are compared with


def read_mouth(frames: np.ndarray) -> np.ndarray:
    """How far the mouth is open: [frames] float64, 0 to 1.

    It is the area that is darker than the forehead: a pixel as dark as the mouth's inside counts 1, a pixel half as
    dark counts half.
    """
    forehead = _box(frames, HEAD[0] - 0.05, HEAD[0] + 0.05, 0.14, 0.20).mean(axis=(1, 2))
    to_dark = (DARK - forehead)[:, None, None]
    mouth = _box(frames, MOUTH[0] - 0.14, MOUTH[0] + 0.14, MOUTH[1] - 0.10, MOUTH[1] + 0.10)
    dark = ((mouth - forehead[:, None, None]) * to_dark).sum(-1) / np.square(to_dark).sum(-1)
    area = dark.sum(axis=(1, 2)) / frames.shape[1] ** 2
    opening: np.ndarray = area / (MOUTH_WIDTH * MOUTH_HEIGHT)
    return opening


def read_arm(frames: np.ndarray) -> np.ndarray:
    """The arm's angle: [frames] float64 degrees, 0 (hanging down) to 180.

    It is the angle whose drawn arm fits best, by least squares, to the pixels that have the skin's colour rather than
    the wall's.
    """
    angles, drawn = _arms(frames.shape[1])
    there = _arm_seen(frames).reshape(len(frames), -1)
    squares = (np.square(drawn).sum(axis=-1) - 2 * np.einsum("fp,sap->fsa", there, drawn)).min(axis=1)
    best = np.clip(squares.argmin(axis=1), 1, len(angles) - 2)
    before, at, after = (squares[np.arange(len(frames)), best + k] for k in (-1, 0, 1))
    # the lowest point of the parabola through three neighbours
    bend = np.maximum(before - 2 * at + after, 1e-9)
    found: np.ndarray = angles[best] + _STEP * np.clip((before - after) / (2 * bend), -1, 1)
    return found


def read_gesture(frames: np.ndarray) -> str:
    """The name of the gesture whose angles are nearest to the angles read, on average over the frames."""
    angles = read_arm(frames)
    return min(GESTURES, key=lambda name: float(np.abs(GESTURES[name].angles(len(frames)) - angles).mean()))


def swing(arms: np.ndarray, truth: np.ndarray) -> float:
    """How far arms swing, relative to the true swing: 1 as far and in the same phase, 0 not at all.

    arms, truth: [puppets, frames] degrees, of gestures that swing.

    The result is a least squares fit over the frames after the ramp, of each puppet's angles about their own mean. So
    three things do not count: the way from rest into the gesture, an arm that swings around another angle, and an arm
    that trembles.
    """
    moved, true = (angles[:, THERE:] - angles[:, THERE:].mean(axis=1, keepdims=True) for angles in (arms, truth))
    return float((moved * true).sum() / np.square(true).sum())


def read_colours(frames: np.ndarray) -> np.ndarray:
    """The colours of skin, shirt and wall: [frames, 3 parts, 3] float64 RGB."""
    skin = _box(frames, HEAD[0] - 0.05, HEAD[0] + 0.05, 0.14, 0.20)
    shirt = _box(frames, HEAD[0] - 0.06, HEAD[0] + 0.12, 0.72, 0.95)
    wall = _box(frames, 0.75, 0.97, 0.04, 0.24)
    return np.stack([part.mean(axis=(1, 2)) for part in (skin, shirt, wall)], axis=1)


def colour_error(frames: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The mean difference in the colours of skin, shirt and wall from a reference image: [frames] float64.

    The difference is a share of the whole range of values, 0 to 1.

    reference: [size, size, 3] uint8 RGB.
    """
    error: np.ndarray = np.abs(read_colours(frames) - read_colours(reference[None])).mean(axis=(1, 2)) / 255
    return error


def arm_error(frames: np.ndarray, truth: np.ndarray) -> float:
    """The root mean square difference from the true frames in the region where the arm can be, 0 to 1."""
    difference = _arm_box(frames) - _arm_box(truth)
    return float(np.sqrt(np.square(difference).mean())) / 255


def _arm_seen(frames: np.ndarray) -> np.ndarray:
    """[frames, rows, columns] float64 in 0..1: how much of each pixel is arm rather than wall."""
    skin, _, wall = read_colours(frames).swapaxes(0, 1)
    to_skin = (skin - wall)[:, None, None]
    share = ((_arm_box(frames) - wall[:, None, None]) * to_skin).sum(-1) / np.maximum(np.square(to_skin).sum(-1), 1.0)
    return np.clip(share, 0, 1)


@cache
def _arms(size: int) -> tuple[np.ndarray, np.ndarray]:
    """[angles] degrees, and the arm drawn at each angle and for each turn of the camera: [shifts, angles, pixels]."""
    angles = np.arange(-_STEP, 180 + 2 * _STEP, _STEP)
    middles = (np.arange(size) + 0.5) / size
    shifts = np.linspace(-PAN, PAN, 5)
    arms = (arm_cover(angles, size, np.tile(middles - shift, (len(angles), 1))) for shift in shifts)
    return angles, np.stack([_arm_box(arm[..., None])[..., 0].reshape(len(angles), -1) for arm in arms])


def _arm_box(frames: np.ndarray) -> np.ndarray:
    """The region that shows only arm and wall."""
    return _box(frames, SHOULDER[0] + PAN, 1.0, 0.3, 1.0)


def _box(frames: np.ndarray, left: float, right: float, top: float, bottom: float) -> np.ndarray:
    """A region of whole pixels: [frames, rows, columns, channels] float64. The edges are fractions of the frame."""
    size = frames.shape[1]
    rows, columns = slice(round(top * size), round(bottom * size)), slice(round(left * size), round(right * size))
    return frames[:, rows, columns].astype(np.float64)
