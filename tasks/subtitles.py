"""Text in a clip: how much of the frame it takes, whether it changes, and where it is.

active-mind (appendix B) drops clips with "intrusive or changing subtitles", told by PaddleOCR, without numbers.
Published bounds on the area of text are 2 % of the frame at 480p (Goku, second hand; VideoX-Fun) and 1 % at 720p
(thresholds.md); they are for boxes as a detector draws them, which is how areas are measured here.
"""

from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import numpy as np
from pydantic import Field, field_validator

from tasks import texts
from tasks.clip import Clip
from tasks.ocr import BACKENDS, Box, Ocr
from tasks.stage import Measurement, Stage, StageSettings, Unmeasurable, known_backend
from tasks.texts import Line, Text

_MAX_ASPECT = 8  # as in tasks.motion
_SEEN = 480  # pixels of the short side at which text is read and compared
_LINES = 8  # looked at in a sample, the largest first: a page of text has shown by then what it is
_STEP = 3  # samples, from one to the next of the first look
_TALLEST = 0.2  # of the frame's height; what is taller is a wall of bricks or a shelf of books
_ROOM = 0.2  # of a line's height, around it when it is read
_LONG = 3.0  # a line of text is longer than it is high
_SURE = 0.6  # of a reading. Readings of shelves and windows reach 0.5 in more than one letter; of print, begin at 0.7
_HARDLY = 0.5  # of the one letter that was read in a line
_REPEAT = 3.0  # mean difference of 8-bit values in every block of 16 x 16 pixels below which a picture repeats


class SubtitlesSettings(StageSettings):
    """How many key frames are looked at, and how.

    max_samples: key frames looked at in a clip with text, spread evenly over it; in one without, every third of them.
    short_side: pixels of the picture in which text is looked for; at 192, lines of 2.5 % of the frame's height are
    found, and one look takes 0.05 CPU seconds, against 0.19 at 352.
    """

    backend: str = "rapidocr"
    max_samples: int = Field(default=20, ge=2, le=1000)
    short_side: int = Field(default=192, ge=96, le=1088)

    @field_validator("backend")
    @classmethod
    def _known(cls, backend: str) -> str:
        return known_backend(backend, BACKENDS)


class Subtitles(Stage[SubtitlesSettings]):
    """The texts of a clip, by kind (`tasks.texts.kinds`).

    Columns; areas as shares of the frame, 0 to 1, medians over the samples that show the kind; 0 where none does:
        text_area: of all text.
        subtitle_area: of text fixed to the frame that comes, goes or is replaced.
        caption_area: of text that stays as it is, all the time, and is no watermark.
        watermark_area: of text that stays as it is, all the time, in a corner.
        scene_text_area: of text that moves through the frame.
        subtitle_share: share of the samples that show subtitles, 0 to 1.
        changing_share: share of the steps from one sample to the next at which a subtitle comes, goes or is replaced,
            0 to 1. Samples are a second apart and more, so that it says how often, but not how often in between.
        left, top, right, bottom: the box around all subtitles and captions, as fractions of the frame's width and
            height; None where there are none.
        samples: key frames looked at.
    """

    name: ClassVar[str] = "subtitles"
    version: ClassVar[int] = 1
    backends: ClassVar = {"backend": BACKENDS}
    columns: ClassVar[dict[str, type]] = {
        "text_area": float,
        "subtitle_area": float,
        "caption_area": float,
        "watermark_area": float,
        "scene_text_area": float,
        "subtitle_share": float,
        "changing_share": float,
        "left": float,
        "top": float,
        "right": float,
        "bottom": float,
        "samples": int,
    }

    def backend_version(self) -> str:
        import cv2

        # texts are followed, and pictures compared, by OpenCV
        return f"{BACKENDS[self.settings.backend].version()}, opencv {cv2.__version__}"

    def check(self) -> None:
        BACKENDS[self.settings.backend].check()

    @cached_property
    def _ocr(self) -> Ocr:
        return BACKENDS[self.settings.backend]()

    def measure(self, clip: Clip) -> Measurement:
        width, height = clip.record.width, clip.record.height
        if max(width, height) > _MAX_ASPECT * min(width, height):
            raise Unmeasurable(f"a picture of {width}x{height} is too narrow to look for text in")
        scale = min(1.0, _SEEN / min(width, height))
        size = (round(width * scale / 2) * 2, round(height * scale / 2) * 2)
        images = [image for _, image in clip.keyframes(size)]
        if not images:
            raise Unmeasurable("the clip has no key frame")
        chosen = np.linspace(0, len(images) - 1, min(len(images), self.settings.max_samples))
        return _measurement(_Look(self._ocr, self.settings.short_side, [images[round(k)] for k in chosen]))


class _Look:
    """What is to be seen in the samples of one clip.

    images: [height, width, 3] uint8 RGB each. lines, pictures: by sample, of those looked at.
    """

    def __init__(self, ocr: Ocr, short_side: int, images: list[np.ndarray]) -> None:
        self._ocr, self._short_side, self._images = ocr, short_side, images
        self.height, self.width = images[0].shape[:2]
        self.lines: dict[int, list[Line]] = {}
        self.pictures: dict[int, np.ndarray] = {}
        for sample in range(min(1, len(images) - 1), len(images), _STEP):
            self._look(sample)
        # Where somebody speaks, one subtitle follows the other: where every third sample has no text, the others have
        # none. What is missed is a text that shows once, for 2 s.
        if any(line.is_text for lines in self.lines.values() for line in lines):
            for sample in range(len(images)):
                if sample not in self.lines:
                    self._look(sample)

    def _look(self, sample: int) -> None:
        import cv2

        image = self._images[sample]
        same = next((k for k in self.lines if _repeats(self._images[k], image)), None)
        if same is not None:
            self.lines[sample], self.pictures[sample] = self.lines[same], self.pictures[same]
            return
        self.pictures[sample] = texts.strokes(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
        boxes = [self._inside(box) for box in self._ocr.find(image, self._short_side)]
        boxes = [box for box in boxes if self._is_line(box)]
        boxes = sorted(boxes, key=lambda b: ((b.x0 - b.x1) * (b.y1 - b.y0), b))[:_LINES]
        self.lines[sample] = [self._known(sample, box) or self._read(image, box) for box in boxes]

    def _inside(self, box: Box) -> Box:
        return Box(max(0.0, box.x0), max(0.0, box.y0), min(self.width, box.x1), min(self.height, box.y1))

    def _is_line(self, box: Box) -> bool:
        wide, tall = box.x1 - box.x0, box.y1 - box.y0
        return min(wide, tall) >= 2 and tall <= _TALLEST * self.height

    def _known(self, sample: int, box: Box) -> Line | None:
        """What was read before in the same place, where the strokes are the same."""
        for before, lines in self.lines.items():
            for line in lines:
                if texts.same_place(line.box, box) and texts.is_there(
                    texts.cut(self.pictures[before], line.box), self.pictures[sample], line.box
                ):
                    return Line(box, line.letters, line.is_text)
        return None

    def _read(self, image: np.ndarray, box: Box) -> Line:
        wide, tall = box.x1 - box.x0, box.y1 - box.y0
        room = _ROOM * tall
        roomy = self._inside(Box(box.x0 - room, box.y0 - room, box.x1 + room, box.y1 + room))
        ((letters, sure),) = self._ocr.read([texts.cut(image, roomy)])
        found = [letter for letter in letters if letter.isalnum()]
        if wide < _LONG * tall:
            is_text = sure >= _SURE and len(set(found)) >= 2
        else:
            # Of a script that it cannot read, the recogniser sees a sign that it knows, or the gaps between words, or
            # nothing; then only the place speaks. Windows in a row read as one letter many times.
            is_text = (
                (sure >= _SURE and len(set(found)) >= 2)
                or (sure >= _SURE and letters.count(" ") >= 2)
                or (sure >= _HARDLY and len(found) == 1)
                or self._is_where_subtitles_are(box)
            )
        return Line(box, letters, is_text)

    def _is_where_subtitles_are(self, box: Box) -> bool:
        centre = (box.x0 + box.x1) / 2 / self.width
        return abs(centre - 0.5) <= 0.1 and box.y0 >= self.height * 2 / 3 and box.y1 - box.y0 <= 0.15 * self.height


def _repeats(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two pictures, [height, width, 3] uint8, are the same in each of their blocks, not only on average."""
    import cv2

    height, width = first.shape[:2]
    # [height, width, 3] averaged over blocks
    blocks = cv2.resize(
        cv2.absdiff(first, second), (max(1, width // 16), max(1, height // 16)), interpolation=cv2.INTER_AREA
    )
    return float(blocks.max()) < _REPEAT


def _measurement(look: _Look) -> Measurement:
    # numbered as they follow each other, whether every key frame was looked at or every third
    samples = range(len(look.lines))
    order = sorted(look.lines)
    found = texts.follow([look.lines[k] for k in order], [look.pictures[k] for k in order])
    kinds = texts.kinds(found, len(order), look.width, look.height)

    def of(*wanted: str) -> list[Text]:
        return [text for text, kind in zip(found, kinds, strict=True) if kind in wanted]

    def area(group: list[Text]) -> float:
        boxes = [[text.boxes[k] for text in group if k in text.boxes] for k in samples]
        # the median, because now and then the detector takes a piece of the scene for the end of a line
        areas = [_covered(some, look.width, look.height) for some in boxes if some]
        return float(np.median(areas)) if areas else 0.0

    shown = [{n for n, text in enumerate(of("subtitle")) if k in text.boxes} for k in samples]
    changes = [before != after for before, after in pairwise(shown)]
    boxes = np.array([text.box for text in of("subtitle", "caption")]).reshape(-1, 4)
    around: list[float | None] = [None] * 4
    if len(boxes):
        edges = [*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0)]
        around = [float(v / side) for v, side in zip(edges, 2 * (look.width, look.height), strict=True)]
    return Measurement(
        {
            "text_area": area(found),
            "subtitle_area": area(of("subtitle")),
            "caption_area": area(of("caption")),
            "watermark_area": area(of("watermark")),
            "scene_text_area": area(of("scene")),
            "subtitle_share": float(np.mean([bool(ones) for ones in shown])),
            "changing_share": float(np.mean(changes)) if changes else 0.0,
            **dict(zip(("left", "top", "right", "bottom"), around, strict=True)),
            "samples": len(order),
        }
    )


def _covered(boxes: list[Box], width: int, height: int) -> float:
    """The share of a picture that boxes cover, those that overlap counted once."""
    covered = np.zeros((height, width), bool)
    for box in boxes:
        texts.cut(covered, box)[:] = True
    return float(covered.mean())
