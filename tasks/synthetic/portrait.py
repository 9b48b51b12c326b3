"""A person who talks: a photograph whose mouth can be opened and spread, and a drawn body below it."""

from functools import cache
from pathlib import Path

import numpy as np

ASSETS = Path(__file__).parent / "assets"
LEVELS = 9  # number of openings of the mouth, from closed (0) to wide open
SPREADS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # widths of the mouth, from rounded to spread
HEAD_TOP, NECK, CHEST, HIPS, SOLES = 14, 190, 400, 600, 1240  # pixels from the top of the figure
WIDTH, HEIGHT = 512, 1250  # pixels of the whole figure; the photograph is its upper 512 rows
MIDDLE = 223  # the column of the nose

# The line between the upper teeth and the lower lip in the photograph, left corner to right corner.
LIP_X = (203, 206, 209, 213, 217, 223, 229, 233, 237, 240, 244)
LIP_Y = (140.0, 143.2, 145.5, 147.7, 149.3, 150.1, 149.7, 148.5, 146.6, 144.6, 141.2)
JAW_DROP = 15.0  # pixels that the lower lip travels when the mouth is wide open
STRETCH = 0.16  # a spread mouth is wider by this share of its width
MOVING = slice(110, 240), slice(130, 320)  # rows and columns of the photograph outside which nothing moves


def _smooth(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """The smoothstep function: 0 below `low`, 1 above `high`."""
    s = np.clip((x - low) / (high - low), 0, 1)
    return s * s * (3 - 2 * s)


@cache
def _photograph() -> tuple[np.ndarray, np.ndarray]:
    """[512, 512, 3] uint8 RGB, and the [512, 512] uint8 mask of the person."""
    import cv2

    picture = cv2.imread(str(ASSETS / "portrait.jpg"), cv2.IMREAD_COLOR)
    mask = cv2.imread(str(ASSETS / "portrait_mask.png"), cv2.IMREAD_GRAYSCALE)
    assert picture is not None and mask is not None
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), mask


def _open_mouth(picture: np.ndarray, opening: float) -> np.ndarray:
    """The photograph with the jaw moved down and the inside of the mouth in the gap. opening: 0 (closed) to 1."""
    import cv2

    if not opening:
        return picture
    rows, columns = MOVING
    y, x = np.mgrid[rows, columns].astype(np.float32)
    lip = np.interp(x, LIP_X, LIP_Y).astype(np.float32)
    drop = JAW_DROP * opening
    half = (LIP_X[-1] - LIP_X[0]) / 2
    away = np.abs(x - MIDDLE - 0.5) / half
    gap = drop * np.sqrt(np.clip(1 - away**2, 0, 1))  # how far the lower lip has moved at this column
    jaw = 0.85 * drop * (1 - _smooth(away, 0.6, 2.6))  # the chin and the cheeks follow more softly
    source = y
    for _ in range(6):  # solve y = source + shift(source) for the row that each pixel came from
        depth = source - lip
        blend = _smooth(depth, 0, 18)
        shift = ((1 - blend) * gap + blend * jaw) * (1 - _smooth(depth, 22, 52))
        source = y - shift
    below = y - lip > gap
    moved = cv2.remap(picture, x, np.where(below, source, y).astype(np.float32), cv2.INTER_LINEAR)
    inside = np.clip(np.minimum(y - lip, lip + gap - y) + 0.5, 0, 1) * (gap > 0.3)
    inside = cv2.GaussianBlur(inside.astype(np.float32), (0, 0), 0.7)[..., None]
    tongue = _smooth(y - lip, 0.45 * drop, drop + 1.0)[..., None]
    colour = (1 - tongue) * np.array([48, 16, 18]) + tongue * np.array([150, 66, 66])
    talking = picture.copy()
    talking[rows, columns] = (moved * (1 - inside) + colour * inside + 0.5).astype(np.uint8)
    return talking


def _spread_mouth(picture: np.ndarray, spread: float) -> np.ndarray:
    """The photograph with the mouth made wider (spread above 0) or rounder (below 0)."""
    import cv2

    if not spread:
        return picture
    rows, columns = MOVING
    y, x = np.mgrid[rows, columns].astype(np.float32)
    near = np.exp(-(((x - MIDDLE) / 34) ** 2) - ((y - LIP_Y[5]) / 22) ** 2)
    source = MIDDLE + (x - MIDDLE) * (1 - STRETCH * spread * near)
    changed = picture.copy()
    changed[rows, columns] = cv2.remap(picture, source.astype(np.float32), y, cv2.INTER_LINEAR)
    return changed


def _body() -> tuple[np.ndarray, np.ndarray]:
    """A drawn suit from the shoulders down: [height, width, 3] uint8 RGB and [height, width] uint8 mask."""
    import cv2

    suit, boots, skin = (222, 88, 50), (45, 42, 44), (224, 172, 148)
    parts = [  # outlines from back to front
        (boots, [(112, 1165), (186, 1165), (188, 1225), (180, 1242), (92, 1242), (94, 1222)]),
        (boots, [(232, 1165), (306, 1165), (322, 1222), (324, 1242), (236, 1242), (228, 1225)]),
        (suit, [(98, 560), (212, 560), (200, 780), (192, 1000), (192, 1185), (108, 1185), (106, 1000), (96, 780)]),
        (suit, [(206, 560), (312, 560), (318, 780), (312, 1000), (310, 1185), (226, 1185), (222, 1000), (212, 780)]),
        (skin, [(36, 600), (74, 600), (78, 640), (62, 676), (44, 676), (34, 640)]),
        (skin, [(336, 600), (374, 600), (378, 640), (366, 676), (348, 676), (334, 640)]),
        (suit, [(62, 250), (118, 300), (108, 430), (84, 612), (26, 612), (24, 430), (32, 310)]),
        (suit, [(312, 240), (346, 300), (372, 430), (384, 612), (326, 612), (302, 430), (288, 300)]),
        (suit, [(60, 240), (320, 240), (330, 330), (308, 470), (316, 585), (94, 585), (106, 470), (84, 330)]),
    ]
    picture = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    picture[:] = suit
    mask = np.zeros((HEIGHT, WIDTH), np.float32)
    folds = cv2.GaussianBlur(np.random.default_rng(3).normal(0, 1, (HEIGHT, WIDTH)).astype(np.float32), (0, 0), 7)
    for colour, outline in parts:
        shape = np.zeros((HEIGHT, WIDTH), np.uint8)
        cv2.fillPoly(shape, [np.array(outline, np.int32)], 255)
        shape = ((cv2.GaussianBlur(shape, (0, 0), 7) > 127) * 255).astype(np.uint8)  # round the corners
        depth = cv2.distanceTransform(shape, cv2.DIST_L2, 5)
        light = 0.62 + 0.38 * _smooth(depth, 0, 34) + folds * 0.7
        inside = cv2.GaussianBlur(shape, (0, 0), 1.0).astype(np.float32)[..., None] / 255
        picture = picture * (1 - inside) + np.clip(light[..., None] * np.array(colour), 0, 255) * inside
        mask = np.maximum(mask, inside[..., 0])
    return picture.astype(np.uint8), (mask * 255).astype(np.uint8)


def _tint(picture: np.ndarray, hue: int, top: int) -> np.ndarray:
    """Turn the hue of saturated colours (the suit, not the skin) by degrees. top: the figure's row of the first row."""
    import cv2

    if not hue:
        return picture
    hsv = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)
    saturated = (hsv[..., 1] > 105)[..., None]
    saturated[: max(0, NECK + 20 - top), 140:310] = False  # leave the face alone
    hsv[..., 0] = (hsv[..., 0].astype(np.int32) + hue // 2) % 180
    return np.where(saturated, cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), picture)


@cache
def figure(
    whole: bool, hue: int = 0, mirror: bool = False, spreads: tuple[float, ...] = (0.0,)
) -> tuple[np.ndarray, np.ndarray]:
    """A person with every opening and spread of the mouth.

    whole: the figure down to the boots; otherwise only the photograph. hue: degrees by which the suit's colour turns.
    spreads: the spreads of the mouth to draw, -1 (rounded) to 1 (spread).

    Returns:
        [spreads x levels, height, width, 3] uint8 RGB, levels changing fastest, and [height, width] uint8 opacity.
    """
    photograph, mask = _photograph()
    if whole:
        body, opacity = _body()
        # the photograph down to the chest, without the object in the person's hands
        row, column = np.mgrid[0:512, 0:512]
        share = (1 - _smooth(row, 300, 350)) * (1 - _smooth(column, 352, 362)) * (mask / 255)

    def dressed(talking: np.ndarray, rows: slice) -> np.ndarray:
        """Rows of the figure: those rows of the photograph, blended into the body."""
        part = talking[rows]
        if whole:
            cover = share[rows, :, None]
            part = (part * cover + body[rows] * (1 - cover) + 0.5).astype(np.uint8)
        return _tint(part, hue, rows.start)

    whole_picture = dressed(photograph, slice(0, 512))
    if whole:
        whole_picture = np.concatenate([whole_picture, _tint(body[512:], hue, 512)])
    pictures = []
    for spread in spreads:
        wide = _spread_mouth(photograph, spread)
        for level in range(LEVELS):
            picture = whole_picture.copy()
            picture[MOVING[0]] = dressed(_open_mouth(wide, level / (LEVELS - 1)), MOVING[0])
            pictures.append(picture)
    if whole:
        mask = np.concatenate([np.maximum(opacity[:512], (share * 255).astype(np.uint8)), opacity[512:]])
    stack = np.stack(pictures)
    return (stack[:, :, ::-1].copy(), mask[:, ::-1].copy()) if mirror else (stack, mask)
