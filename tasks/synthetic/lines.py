"""Lines of text in several scripts, as opacity masks: for subtitles, watermarks and signs.

They are stored as an image. So no font has to be installed, and the same bytes come out on every machine.
"""

from functools import cache
from pathlib import Path

import numpy as np

ASSETS = Path(__file__).parent / "assets"
ROW = 56  # pixels: height of a line's row in the image

LINES = {  # in the order of the rows in the image
    "latin_1": "Good morning, and welcome",
    "latin_2": "We water the beans early",
    "latin_3": "Where are the tulips now?",
    "cyrillic_1": "Доброе утро, друзья",
    "cyrillic_2": "Паром уходит в девять",
    "cyrillic_3": "До встречи на крыше",
    "greek_1": "Καλημέρα σε όλους σας",
    "greek_2": "Σήμερα φυσάει πολύ",
    "greek_3": "Τα λέμε πάλι αύριο",
    "han_1": "日本大山三木十人",
    "han_2": "中田王口土工下上",
    "han_3": "山木三十日中大人",
    "rooftop": "ROOFTOP TV",
    "pier": "PIER 9 NEWS",
    "kanal": "КАНАЛ 5",
    "library": "LIBRARY",
    "bakery": "BAKERY",
    "platform": "PLATFORM 4",
}


@cache
def _sheet() -> np.ndarray:
    """The image of all lines, one under the other: [rows, width] uint8."""
    import cv2

    sheet = cv2.imread(str(ASSETS / "lines.png"), cv2.IMREAD_GRAYSCALE)
    assert sheet is not None and sheet.shape[0] == ROW * len(LINES)
    return sheet


@cache
def mask(name: str, height: int) -> np.ndarray:
    """The opacity of one line, cropped to its ink: [rows, columns] uint8. height: pixels of the row, with its space."""
    import cv2

    number = list(LINES).index(name)
    row = _sheet()[number * ROW : (number + 1) * ROW]
    row = row[:, : int(np.flatnonzero(row.max(axis=0))[-1]) + 2]
    size = (round(row.shape[1] * height / ROW), height)
    row = cv2.resize(row, size, interpolation=cv2.INTER_AREA if height < ROW else cv2.INTER_CUBIC)
    ink = np.flatnonzero(row.max(axis=1) > 24)
    return row[ink[0] : ink[-1] + 1]


def burn_in(picture: np.ndarray, name: str, at: tuple[float, float], height: float, opacity: float = 1.0) -> None:
    """Draw a line in white with a dark edge into an image.

    picture: [height, width, 3] uint8, changed in place. at: x and y of the line's middle, as fractions of the image.
    height: of the line's row, as a fraction of the image's height. opacity: 0 to 1.
    """
    import cv2

    x0, y0, x1, y1 = box(name, at, height, picture.shape[1], picture.shape[0])
    letters = mask(name, round(height * picture.shape[0]))
    edge = 2
    letters = cv2.copyMakeBorder(letters, edge, edge, edge, edge, cv2.BORDER_CONSTANT, value=0)
    around = cv2.dilate(letters, np.ones((2 * edge + 1, 2 * edge + 1), np.uint8))
    part = picture[y0 - edge : y1 + edge, x0 - edge : x1 + edge]
    dark, light = (m[..., None] * np.float32(opacity / 255) for m in (around, letters))
    part[:] = ((part * (1 - dark) + 20 * dark) * (1 - light) + 240 * light).astype(np.uint8)


def box(name: str, at: tuple[float, float], height: float, width_px: int, height_px: int) -> tuple[int, int, int, int]:
    """The box around a line's letters: x0, y0, x1, y1 in pixels of an image of `width_px` x `height_px`. at, height: as
    for `burn_in`."""
    rows, columns = mask(name, round(height * height_px)).shape
    x, y = round(at[0] * width_px - columns / 2), round(at[1] * height_px - rows / 2)
    return x, y, x + columns, y + rows
