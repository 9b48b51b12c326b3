"""Lines of text followed through the samples of a clip, and the kind of each text.

Two lines are the same text if their strokes are the same. Strokes are the frame without its coarse shades. They are
compared by normalised correlation, which works for any script, but takes two lines that differ in a letter or two for
the same. Where a line has moved between two samples, its letters are compared too, if they were read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Literal

import numpy as np

from tasks.stages.subtitles.ocr import TextBox

Kind = Literal["subtitle", "caption", "watermark", "scene"]

_SAME = 0.6  # correlation from which strokes are the same
_LIKE = 0.6  # share of letters in common from which two readings are of one text
_JITTER = 0.008  # of the frame's short side, by which text fixed to the frame seems to move
_ALWAYS = 0.8  # share of the clip that a constant text spans
_STROKES = 0.009  # of the frame's short side; coarser shades are not strokes


@dataclass(frozen=True)
class TextLine:
    """A line of text in one sample."""

    box: TextBox
    letters: str
    """The reading."""
    is_text: bool
    """Whether it counts as text: letters could be read in it, or it stands where subtitles do."""


@dataclass
class TextTrack:
    """One text in one place, over the samples that show it there."""

    strokes: np.ndarray
    """[height, width] float32: the strokes at `place` in the first sample that shows the text."""
    place: TextBox
    """The box in that sample."""
    lines: list[TextLine]
    """The lines that were found in the samples."""
    boxes: dict[int, TextBox] = field(default_factory=dict)
    """The box in each sample that shows the text, by the sample's number."""
    moves: bool = False
    """Whether the text moves through the frame."""

    @property
    def box(self) -> TextBox:
        """The median box."""
        return TextBox(*(float(v) for v in np.median(np.array(list(self.boxes.values())), axis=0)))

    @property
    def is_text(self) -> bool:
        return any(line.is_text for line in self.lines)

    @property
    def letters(self) -> str:
        """The longest reading, without case and spaces."""
        return max((line.letters.casefold().replace(" ", "") for line in self.lines), key=len)

    @property
    def rests(self) -> bool:
        """Whether the text stays in its place for a while."""
        return not self.moves or len(self.boxes) > 1


def strokes(grey: np.ndarray) -> np.ndarray:
    """Remove the coarse shades from a frame.

    grey: [height, width] uint8. Returns: [height, width] float32, whole numbers.
    """
    import cv2

    floats = grey.astype(np.float32)
    # Rounded, so that flat parts have no strokes.
    return np.round(floats - cv2.GaussianBlur(floats, (0, 0), _STROKES * min(grey.shape)))


def follow_lines(lines: Sequence[list[TextLine]], pictures: Sequence[np.ndarray]) -> list[TextTrack]:
    """Join the lines of all samples into texts.

    lines: the lines of each sample. pictures: `strokes` of each sample, [height, width] float32.

    Returns: the texts, without lines that do not count as text. A text that moves becomes several, all marked as
    moving.
    """
    texts: list[TextTrack] = []
    for sample, of_sample in enumerate(lines):
        for line in of_sample:
            known = [t for t in texts if sample not in t.boxes and same_place(t.box, line.box)]
            text = next((t for t in known if is_there(t.strokes, pictures[sample], t.place)), None)
            if text is None:
                text = TextTrack(cut_box(pictures[sample], line.box), line.box, [])
                texts.append(text)
            text.lines.append(line)
            text.boxes[sample] = line.box
    texts = [text for text in texts if text.is_text]
    for text in texts:
        # The detector may have missed the text in other samples.
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


def kinds(texts: list[TextTrack], samples: int, width: int, height: int) -> list[Kind]:
    """The kind of each text.

    subtitle: it is fixed to the frame while it shows, and it appears, disappears or is replaced by another text in its
        place. Captions that roll up from row to row, and rest on each, are subtitles too.
    watermark: it is there all the time, unchanged, in a corner of the frame: a third of its width by a third of its
        height.
    caption: it is there all the time, unchanged, elsewhere. A sign on a wall in a fixed shot cannot be distinguished
        from a watermark or a caption.
    scene: it moves through the frame, with the camera or with a person. Or it shows once only, at half height, where
        subtitles do not stand.

    samples: number of samples. width, height: of the frame in pixels.
    """
    result: list[Kind] = []
    for text in texts:
        replaced = text.rests and any(other.rests and _replaces(text, other) for other in texts)
        shown = sorted(text.boxes)
        spans = (shown[-1] - shown[0] + 1) / samples
        # A text that comes back unchanged was only hidden.
        constant = spans >= _ALWAYS and len(shown) >= spans * samples / 2
        x0, y0, x1, y1 = text.box
        # The detector may have found one line both whole and in pieces.
        others = [other.box for other in texts if other is not text and not other.moves]
        alone = not any(_shared(text.box, box) >= 0.5 * _area(box) for box in others)
        passing = alone and len(shown) == 1 < samples and height / 4 < (y0 + y1) / 2 < height * 3 / 4
        if replaced:
            result.append("subtitle")
        elif text.moves or passing:
            result.append("scene")
        elif not constant:
            result.append("subtitle")
        else:
            corner = (x1 <= width / 3 or x0 >= width * 2 / 3) and (y1 <= height / 3 or y0 >= height * 2 / 3)
            result.append("watermark" if corner else "caption")
    return result


def cut_box(picture: np.ndarray, box: TextBox) -> np.ndarray:
    """The part of an array [height, width, ...] inside a box, at least one pixel."""
    height, width = picture.shape[:2]
    x0, y0 = min(max(0, int(box.x0)), width - 1), min(max(0, int(box.y0)), height - 1)
    return picture[y0 : max(y0 + 1, round(box.y1)), x0 : max(x0 + 1, round(box.x1))]


def same_place(first: TextBox, second: TextBox) -> bool:
    """Whether two boxes cover mostly the same part of the frame."""
    return _shared(first, second) >= 0.5 * max(_area(first), _area(second))


def is_there(pattern: np.ndarray, picture: np.ndarray, box: TextBox) -> bool:
    """Whether a pattern is in a picture at a box's place. Compression moves it by a few pixels at most."""
    jitter = max(2, round(_JITTER * min(picture.shape)))
    score, _, _ = _search(pattern, picture, box, jitter, jitter)
    return score >= _SAME


def _search(
    pattern: np.ndarray, picture: np.ndarray, box: TextBox, reach_x: int, reach_y: int
) -> tuple[float, int, int]:
    """Find where a pattern that was cut at `box` fits best, within a reach in pixels.

    Returns: the correlation there, and how many pixels right of and below the box that is.
    """
    import cv2

    x0, y0 = max(0, int(box.x0)), max(0, int(box.y0))
    left, top = max(0, x0 - reach_x), max(0, y0 - reach_y)
    window = picture[top : y0 + pattern.shape[0] + reach_y, left : x0 + pattern.shape[1] + reach_x]
    if window.shape[0] < pattern.shape[0] or window.shape[1] < pattern.shape[1]:
        return 0.0, 0, 0
    _, score, _, (x, y) = cv2.minMaxLoc(cv2.matchTemplate(window, pattern, cv2.TM_CCOEFF_NORMED))
    return float(score), left + x - x0, top + y - y0


def _drifts(text: TextTrack, pictures: Sequence[np.ndarray]) -> bool:
    """Whether the text is found away from its place in the sample before its first or after its last one."""
    height = text.strokes.shape[0]
    for sample in (min(text.boxes) - 1, max(text.boxes) + 1):
        if not 0 <= sample < len(pictures):
            continue
        picture = pictures[sample]
        score, right, down = _search(text.strokes, picture, text.place, picture.shape[1], 3 * height)
        if score >= _SAME and max(abs(right), abs(down)) > _JITTER * min(picture.shape):
            return True
    return False


def _has_moved(first: TextTrack, second: TextTrack) -> bool:
    """Whether two texts are one text that shows at different times in different places."""
    if set(first.boxes) & set(second.boxes):
        return False
    a, b = first.box, second.box
    height, width = min(a.y1 - a.y0, b.y1 - b.y0), min(a.x1 - a.x0, b.x1 - b.x0)
    down, right = abs(a.y0 + a.y1 - b.y0 - b.y1) / 2, abs(a.x0 + a.x1 - b.x0 - b.x1) / 2
    # A subtitle may repeat words of the one before it. On the same row, only a text of the same length has moved.
    same_length = max(a.x1 - a.x0, b.x1 - b.x0) <= 1.15 * width
    if down <= 0.25 * height and (right <= 0.25 * height or not same_length):
        return False
    return _alike(first, second)


def _alike(first: TextTrack, second: TextTrack) -> bool:
    """Whether most letters of two texts are the same. False if fewer than three letters of one were read."""
    if min(len(first.letters), len(second.letters)) < 3:
        return False
    return SequenceMatcher(None, first.letters, second.letters, autojunk=False).ratio() >= _LIKE


def _replaces(first: TextTrack, second: TextTrack) -> bool:
    """Whether two different texts stand on one row at different times, and overlap by half of the narrower one."""
    if set(first.boxes) & set(second.boxes) or _alike(first, second):
        return False
    a, b = first.box, second.box
    down = min(a.y1, b.y1) - max(a.y0, b.y0)
    across = min(a.x1, b.x1) - max(a.x0, b.x0)
    return down >= 0.5 * min(a.y1 - a.y0, b.y1 - b.y0) and across >= 0.5 * min(a.x1 - a.x0, b.x1 - b.x0)


def _area(box: TextBox) -> float:
    return (box.x1 - box.x0) * (box.y1 - box.y0)


def _shared(first: TextBox, second: TextBox) -> float:
    """The area that two boxes have in common, in pixels."""
    across = min(first.x1, second.x1) - max(first.x0, second.x0)
    down = min(first.y1, second.y1) - max(first.y0, second.y0)
    return max(0.0, across) * max(0.0, down)
