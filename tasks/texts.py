"""Lines of text followed through the samples of a clip, and what each of them is.

Two lines are the same text when their strokes are: the picture without its coarse shades, compared by normalised
correlation, which knows no script; of two lines that differ in a letter or two it says the same. Where a line has moved
in between, its letters count too, as far as they were read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Literal

import numpy as np

from tasks.ocr import Box

Kind = Literal["subtitle", "caption", "watermark", "scene"]

_SAME = 0.6  # correlation of strokes from which they are the same
_LIKE = 0.6  # share of letters in common from which two readings are of one text
_JITTER = 0.008  # of the picture's short side, that text fixed to the frame seems to move
_ALWAYS = 0.8  # share of the clip that a constant text spans
_STROKES = 0.009  # of the picture's short side: what is coarser is not a stroke


@dataclass(frozen=True)
class Line:
    """A line of text in one sample. is_text: whether letters, or what stands for them, could be read in it."""

    box: Box
    letters: str
    is_text: bool


@dataclass
class Text:
    """One text in one place, over the samples that show it there.

    strokes: [height, width] float32, cut at `place`, where it was seen first. boxes: by sample.
    """

    strokes: np.ndarray
    place: Box
    lines: list[Line]
    boxes: dict[int, Box] = field(default_factory=dict)
    moves: bool = False

    @property
    def box(self) -> Box:
        return Box(*(float(v) for v in np.median(np.array(list(self.boxes.values())), axis=0)))

    @property
    def is_text(self) -> bool:
        return any(line.is_text for line in self.lines)

    @property
    def letters(self) -> str:
        """As many as were read at once, without case and spaces."""
        return max((line.letters.casefold().replace(" ", "") for line in self.lines), key=len)

    @property
    def rests(self) -> bool:
        return not self.moves or len(self.boxes) > 1


def strokes(grey: np.ndarray) -> np.ndarray:
    """A picture [height, width] uint8 without its coarse shades, whole numbers in float32 of the same shape."""
    import cv2

    picture = grey.astype(np.float32)
    # whole, so that nothing is found in what is flat
    return np.round(picture - cv2.GaussianBlur(picture, (0, 0), _STROKES * min(grey.shape)))


def follow(lines: Sequence[list[Line]], pictures: Sequence[np.ndarray]) -> list[Text]:
    """Put the lines of all samples together into texts.

    lines: by sample. pictures: `strokes` of every sample, [height, width] float32.

    Returns: what reads as text. A text that moves is several, each marked as moving.
    """
    texts: list[Text] = []
    for sample, found in enumerate(lines):
        for line in found:
            known = [t for t in texts if sample not in t.boxes and same_place(t.box, line.box)]
            text = next((t for t in known if is_there(t.strokes, pictures[sample], t.place)), None)
            if text is None:
                text = Text(cut(pictures[sample], line.box), line.box, [])
                texts.append(text)
            text.lines.append(line)
            text.boxes[sample] = line.box
    texts = [text for text in texts if text.is_text]
    for text in texts:
        # the detector may have missed it
        box = text.box
        for sample, picture in enumerate(pictures):
            if sample not in text.boxes and is_there(text.strokes, picture, text.place):
                text.boxes[sample] = box
    for k, text in enumerate(texts):
        text.moves = text.moves or _drifts(text, pictures)
        for other in texts[:k]:
            if _has_moved(other, text):
                other.moves = text.moves = True
    return texts


def kinds(texts: list[Text], samples: int, width: int, height: int) -> list[Kind]:
    """What each text is.

    subtitle: fixed to the frame while it is there, and comes, goes, or is replaced by another in its place; also
        where captions roll up from row to row, resting on each.
    watermark, caption: there all the time, unchanged; a watermark where it keeps to a corner of the frame, a third of
        its width by a third of its height. A sign on a wall in a fixed shot is one of the two: nothing tells it apart.
    scene: it moves through the frame, with the camera or with somebody; or it was seen but once, half-way up the frame
        where no subtitle stands.
    """
    found: list[Kind] = []
    for text in texts:
        replaced = text.rests and any(other.rests and _replaces(text, other) for other in texts)
        shown = sorted(text.boxes)
        spans = (shown[-1] - shown[0] + 1) / samples
        # what comes back unchanged was only hidden
        constant = spans >= _ALWAYS and len(shown) >= spans * samples / 2
        x0, y0, x1, y1 = text.box
        # the detector may have found one line whole and in pieces
        others = [other.box for other in texts if other is not text and not other.moves]
        alone = not any(_shared(text.box, box) >= 0.5 * _area(box) for box in others)
        passing = alone and len(shown) == 1 < samples and height / 4 < (y0 + y1) / 2 < height * 3 / 4
        if replaced:
            found.append("subtitle")
        elif text.moves or passing:
            found.append("scene")
        elif not constant:
            found.append("subtitle")
        else:
            corner = (x1 <= width / 3 or x0 >= width * 2 / 3) and (y1 <= height / 3 or y0 >= height * 2 / 3)
            found.append("watermark" if corner else "caption")
    return found


def cut(picture: np.ndarray, box: Box) -> np.ndarray:
    """The part of a picture [height, width, ...] within a box."""
    height, width = picture.shape[:2]
    x0, y0 = min(max(0, int(box.x0)), width - 1), min(max(0, int(box.y0)), height - 1)
    return picture[y0 : max(y0 + 1, round(box.y1)), x0 : max(x0 + 1, round(box.x1))]


def same_place(first: Box, second: Box) -> bool:
    """Whether two boxes cover much the same part of the frame."""
    return _shared(first, second) >= 0.5 * max(_area(first), _area(second))


def is_there(pattern: np.ndarray, picture: np.ndarray, box: Box) -> bool:
    """Whether a pattern is in a picture, at a box's place give or take what a compressed picture trembles."""
    jitter = max(2, round(_JITTER * min(picture.shape)))
    score, _, _ = _search(pattern, picture, box, jitter, jitter)
    return score >= _SAME


def _search(pattern: np.ndarray, picture: np.ndarray, box: Box, reach_x: int, reach_y: int) -> tuple[float, int, int]:
    """Where a pattern cut at `box` fits best within a reach: correlation, and pixels right and down of the box."""
    import cv2

    x0, y0 = max(0, int(box.x0)), max(0, int(box.y0))
    left, top = max(0, x0 - reach_x), max(0, y0 - reach_y)
    window = picture[top : y0 + pattern.shape[0] + reach_y, left : x0 + pattern.shape[1] + reach_x]
    if window.shape[0] < pattern.shape[0] or window.shape[1] < pattern.shape[1]:
        return 0.0, 0, 0
    _, score, _, (x, y) = cv2.minMaxLoc(cv2.matchTemplate(window, pattern, cv2.TM_CCOEFF_NORMED))
    return float(score), left + x - x0, top + y - y0


def _drifts(text: Text, pictures: Sequence[np.ndarray]) -> bool:
    """Whether a text is found beside its place in the sample before or after it."""
    tall = text.strokes.shape[0]
    for sample in (min(text.boxes) - 1, max(text.boxes) + 1):
        if not 0 <= sample < len(pictures):
            continue
        picture = pictures[sample]
        score, right, down = _search(text.strokes, picture, text.place, picture.shape[1], 3 * tall)
        if score >= _SAME and max(abs(right), abs(down)) > _JITTER * min(picture.shape):
            return True
    return False


def _has_moved(first: Text, second: Text) -> bool:
    """Whether two texts are one, seen at different times in different places."""
    if set(first.boxes) & set(second.boxes):
        return False
    a, b = first.box, second.box
    tall, wide = min(a.y1 - a.y0, b.y1 - b.y0), min(a.x1 - a.x0, b.x1 - b.x0)
    down, right = abs(a.y0 + a.y1 - b.y0 - b.y1) / 2, abs(a.x0 + a.x1 - b.x0 - b.x1) / 2
    # the next subtitle may repeat words of the last one: on the same row, what moves keeps its length
    as_long = max(a.x1 - a.x0, b.x1 - b.x0) <= 1.15 * wide
    if down <= 0.25 * tall and (right <= 0.25 * tall or not as_long):
        return False
    return _alike(first, second)


def _alike(first: Text, second: Text) -> bool:
    """Whether most letters of two texts are the same; not where too few were read."""
    if min(len(first.letters), len(second.letters)) < 3:
        return False
    return SequenceMatcher(None, first.letters, second.letters, autojunk=False).ratio() >= _LIKE


def _replaces(first: Text, second: Text) -> bool:
    """Whether two texts stand on one row, at different times, and share most of the narrower one's width."""
    if set(first.boxes) & set(second.boxes) or _alike(first, second):
        return False
    a, b = first.box, second.box
    down = min(a.y1, b.y1) - max(a.y0, b.y0)
    across = min(a.x1, b.x1) - max(a.x0, b.x0)
    return down >= 0.5 * min(a.y1 - a.y0, b.y1 - b.y0) and across >= 0.5 * min(a.x1 - a.x0, b.x1 - b.x0)


def _area(box: Box) -> float:
    return (box.x1 - box.x0) * (box.y1 - box.y0)


def _shared(first: Box, second: Box) -> float:
    across = min(first.x1, second.x1) - max(first.x0, second.x0)
    down = min(first.y1, second.y1) - max(first.y0, second.y0)
    return max(0.0, across) * max(0.0, down)
