"""Drawing on images that people look at: one palette, text that fits its place, and stages' results over a frame.

Images are [height, width, 3] uint8 RGB and are changed in place.
"""

import math
from bisect import bisect_right
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from tasks.stages.pose.keypoints import LINES, PARTS

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

Colour = tuple[int, int, int]

GROUND: Colour = (14, 18, 24)
PANEL: Colour = (24, 30, 39)
GRID: Colour = (52, 62, 76)
TEXT: Colour = (232, 238, 244)
MUTED: Colour = (148, 161, 178)
GOOD: Colour = (63, 185, 120)
BAD: Colour = (226, 84, 84)
DOUBT: Colour = (222, 165, 60)
FACE_BOX: Colour = (92, 200, 240)
WINDOW: Colour = (255, 209, 102)
ARROW: Colour = (255, 255, 255)
LIPS: Colour = (247, 100, 160)
SOUND: Colour = (110, 130, 158)
SPEECH: Colour = (30, 62, 80)
PART_COLOURS: dict[str, Colour] = {
    "body": (128, 226, 153),
    "face": (240, 240, 240),
    "left_hand": (100, 160, 255),
    "right_hand": (255, 159, 64),
}

_FIRST_LIP_LINE = 7  # index among the face's lines; this line and those after it go around the lips
_FIRST_LIMB_POINT = 5  # index among the body's points; those before it are on the head
_MAX_TEXT = 500  # characters of a text; the rest is not looked at
_MIN_CONFIDENCE = 0.3  # from which a point of the body is drawn
_ARROW_GRID = 14  # pixels of the flow between arrows
_ARROW_S = 0.2  # an arrow is as long as the movement in this time
_MIN_ARROW = 4.0  # pixels of the image; shorter arrows are not drawn


@cache
def font(size: int) -> "FreeTypeFont | ImageFont":
    """The font that Pillow brings along."""
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def fitted(draw: "ImageDraw", text: str, size: int, width: int) -> tuple[str, int]:
    """The text as one line that is at most `width` pixels wide, cut with an ellipsis if need be; and its width."""
    # texts are names from files and manifests, which may hold line breaks and control characters
    text = " ".join("".join(c if c.isprintable() else " " for c in text[:_MAX_TEXT]).split())
    kind = font(size)
    if draw.textlength(text, font=kind) > width:
        kept = bisect_right(
            range(len(text)), width, key=lambda end: math.ceil(draw.textlength(text[:end] + "…", font=kind))
        )
        text = text[: max(0, kept - 1)] + "…"
    return text, round(draw.textlength(text, font=kind))


def write(draw: "ImageDraw", at: tuple[int, int], text: str, size: int, colour: Colour, width: int = 10_000) -> int:
    """Write one line of text, at most `width` pixels wide. Returns its width."""
    text, wide = fitted(draw, text, size, width)
    draw.text(at, text, fill=colour, font=font(size))
    return wide


def box(image: np.ndarray, corners: np.ndarray, colour: Colour) -> None:
    """Draw a rectangle. corners: [4] x0, y0, x1, y1 in pixels. Nothing is drawn when one of them is not finite."""
    import cv2

    if not np.isfinite(corners).all():
        return
    x0, y0, x1, y1 = (round(float(v)) for v in corners)
    cv2.rectangle(image, (x0, y0), (x1, y1), colour, 2, cv2.LINE_AA)


def arrows(image: np.ndarray, flow: np.ndarray, fps: float) -> None:
    """Draw the optical flow over an image as arrows.

    flow: [rows, columns, 2] float32, the movement x, y from one frame to the next, in pixels of the flow's own grid.
    fps: frames a second.
    """
    import cv2

    scale = image.shape[0] / flow.shape[0]
    half = _ARROW_GRID // 2
    for y in range(half, flow.shape[0], _ARROW_GRID):
        for x in range(half, flow.shape[1], _ARROW_GRID):
            across, down = flow[y, x] * fps * _ARROW_S * scale
            if np.hypot(across, down) >= _MIN_ARROW:
                tail, head = (round(x * scale), round(y * scale)), (round(x * scale + across), round(y * scale + down))
                cv2.arrowedLine(image, tail, head, ARROW, 1, cv2.LINE_AA, tipLength=0.35)


def key_points(image: np.ndarray, points: dict[str, np.ndarray]) -> None:
    """Draw the key points of one frame.

    points: [points, 3] for each of tasks.stages.pose.keypoints.PARTS: x and y in fractions of the image, and
        confidence. NaN where the part is not seen. Points of the body with a confidence below 0.3 are left out, and so
        are those of the head when the face has points of its own.
    """
    import cv2

    size = (image.shape[1], image.shape[0])
    shift = 4  # fractional bits of the coordinates that OpenCV takes
    for part in PARTS:
        values, colour = points[part], PART_COLOURS[part]
        if np.isnan(values[0, 0]):
            continue
        drawn = values[:, 2] >= (_MIN_CONFIDENCE if part == "body" else 0.0)
        if part == "body" and not np.isnan(points["face"][0, 0]):
            drawn[:_FIRST_LIMB_POINT] = False  # the face's own points show more
        places = np.round(values[:, :2] * size * 2**shift).astype(np.int32)
        thick = 1 if part == "face" else 2
        for number, line in enumerate(LINES[part]):
            is_lips = part == "face" and number >= _FIRST_LIP_LINE
            for a, b in pairwise(line):
                if drawn[a] and drawn[b]:
                    ends = tuple(map(int, places[a])), tuple(map(int, places[b]))
                    cv2.line(image, *ends, LIPS if is_lips else colour, thick, cv2.LINE_AA, shift)
        if part != "face":
            for place in places[drawn]:
                cv2.circle(image, tuple(map(int, place)), 3 << shift, colour, -1, cv2.LINE_AA, shift)


def curve(image: np.ndarray, values: np.ndarray, colour: Colour) -> None:
    """Draw a curve over the whole width of an image. values: [n], 0 at the bottom to 1 at the top; NaN leaves a gap."""
    import cv2

    height, width = image.shape[:2]
    x = (np.arange(len(values)) + 0.5) * width / len(values)
    y = (1 - np.clip(values, 0, 1)) * (height - 3) + 1
    for run in np.ma.clump_unmasked(np.ma.masked_invalid(values)):
        line = np.stack([x[run], y[run]], axis=1).round().astype(np.int32)
        cv2.polylines(image, [line], False, colour, 1, cv2.LINE_AA)


def waveform(image: np.ndarray, samples: np.ndarray, colour: Colour) -> None:
    """Draw a waveform over a whole image: in each column, the range of its samples.

    samples: [samples] float32 in -1..1.
    """
    height, width = image.shape[:2]
    top = max(float(np.abs(samples).max(initial=0.0)), 0.02)
    edges = np.linspace(0, len(samples), width + 1).astype(int)
    for column in range(width):
        part = samples[edges[column] : max(edges[column + 1], edges[column] + 1)]
        if len(part):
            high, low = ((1 - float(v) / top) * (height - 1) / 2 for v in (part.max(), part.min()))
            image[round(high) : round(low) + 1, column] = colour
