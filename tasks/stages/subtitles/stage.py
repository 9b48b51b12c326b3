"""Text in a clip: how much of the frame it takes, whether it changes, and where it is.

active-mind (appendix B) drops clips with "intrusive or changing subtitles", found by PaddleOCR, without numbers.
Published bounds on the area of text are 2 % of the frame at 480p (Goku, second hand; VideoX-Fun) and 1 % at 720p
(docs/thresholds.md). They are for the boxes that a detector draws, and so are the areas here.
"""

from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import numpy as np
from pydantic import Field

from tasks.media.clip import Clip, Measurement, Unmeasurable
from tasks.stages.base import MAX_ASPECT, Stage, StageSettings
from tasks.stages.subtitles import text_tracks
from tasks.stages.subtitles.ocr import BACKENDS, OcrBackend, TextBox
from tasks.stages.subtitles.text_tracks import TextLine, TextTrack

_SHORT_SIDE = 480  # pixels at which text is read and compared
_MAX_LINES = 8  # of a sample, the largest first: enough to tell what a page of text is
_STEP = 3  # samples from one to the next in the first search
_TALLEST = 0.2  # of the frame's height; taller boxes are brick walls or book shelves
_MARGIN = 0.2  # of a line's height, around a line that is read
_LONG = 3.0  # width over height from which a box is as long as a line of text
_SURE = 0.6  # confidence of a reading. Several letters read in shelves and windows reach 0.5; print begins at 0.7
_SURE_OF_LETTER = 0.5  # confidence of the only letter that was read in a line
_REPEAT = 3.0  # mean difference of 8-bit values; a frame repeats another if all blocks of 16 x 16 pixels stay below


class SubtitlesSettings(StageSettings):
    """What finds text, and in which frames."""

    choices: ClassVar = {"backend": BACKENDS}

    backend: str = "rapidocr"
    """The OCR library: "rapidocr", or "paddleocr" with larger networks."""
    max_samples: int = Field(default=20, ge=2, le=1000)
    """The most key frames that are searched in a clip with text, spread evenly over it. In a clip without text, every
    third of them is searched."""
    short_side: int = Field(default=192, ge=96, le=1088)
    """Pixels of the frame's short side during the search. 192 finds lines of 2.5 % of the frame's height and takes 0.05
    CPU seconds a frame; 352 takes 0.19."""


class Subtitles(Stage[SubtitlesSettings]):
    """The texts of a clip, by kind (`tasks.stages.subtitles.text_tracks.kinds`).

    Columns. A sample is a key frame that is searched. Areas are shares of the frame, 0 to 1: medians over the samples
    that show the kind of text, 0 where none does.
        text_area: all text.
        subtitle_area: text fixed to the frame that appears, disappears or is replaced.
        caption_area: text that stays unchanged all the time and is no watermark.
        watermark_area: text that stays unchanged all the time in a corner.
        scene_text_area: text that moves through the frame.
        subtitle_share: share of the samples that show subtitles, 0 to 1.
        changing_share: share of the steps from one sample to the next at which a subtitle appears, disappears or is
            replaced, 0 to 1. Samples are a second or more apart; changes between them are not seen.
        left, top, right, bottom: the box around all subtitles and captions, as fractions of the frame's width and
            height; None without any.
        samples: the number of samples.
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

    def library_version(self) -> str:
        import cv2  # follows texts and compares frames

        return f"opencv {cv2.__version__}"

    @cached_property
    def _backend(self) -> OcrBackend:
        return BACKENDS[self.settings.backend]()

    def measure(self, clip: Clip) -> Measurement:
        width, height = clip.record.width, clip.record.height
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise Unmeasurable(f"a frame of {width}x{height} is too narrow to search it for text")
        scale = min(1.0, _SHORT_SIDE / min(width, height))
        size = (round(width * scale / 2) * 2, round(height * scale / 2) * 2)
        images = [image for _, image in clip.keyframes(size)]
        if not images:
            raise Unmeasurable("the clip has no key frame")
        chosen = np.linspace(0, len(images) - 1, min(len(images), self.settings.max_samples))
        return _measurement(_TextSearch(self._backend, self.settings.short_side, [images[round(k)] for k in chosen]))


class _TextSearch:
    """The lines of text in the samples of one clip."""

    def __init__(self, ocr: OcrBackend, short_side: int, images: list[np.ndarray]) -> None:
        """images: the samples, [height, width, 3] uint8 RGB each."""
        self._ocr, self._short_side, self._images = ocr, short_side, images
        self.height, self.width = images[0].shape[:2]
        self.lines: dict[int, list[TextLine]] = {}
        """The lines found, by the number of a searched sample."""
        self.strokes: dict[int, np.ndarray] = {}
        """The strokes of the frame (text_tracks.strokes), by the number of a searched sample."""
        for sample in range(min(1, len(images) - 1), len(images), _STEP):
            self._search(sample)
        # Where people speak, subtitles follow each other closely. If every third sample has no text, the others have
        # none either. This misses a text that shows once, for 2 s.
        if any(line.is_text for lines in self.lines.values() for line in lines):
            for sample in range(len(images)):
                if sample not in self.lines:
                    self._search(sample)

    def _search(self, sample: int) -> None:
        import cv2

        image = self._images[sample]
        same = next((k for k in self.lines if _repeats(self._images[k], image)), None)
        if same is not None:
            self.lines[sample], self.strokes[sample] = self.lines[same], self.strokes[same]
            return
        self.strokes[sample] = text_tracks.strokes(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
        boxes = [self._clip_to_frame(box) for box in self._ocr.find(image, self._short_side)]
        boxes = [box for box in boxes if self._is_line(box)]
        boxes = sorted(boxes, key=lambda b: ((b.x0 - b.x1) * (b.y1 - b.y0), b))[:_MAX_LINES]
        self.lines[sample] = [self._read_before(sample, box) or self._read(image, box) for box in boxes]

    def _clip_to_frame(self, box: TextBox) -> TextBox:
        return TextBox(max(0.0, box.x0), max(0.0, box.y0), min(self.width, box.x1), min(self.height, box.y1))

    def _is_line(self, box: TextBox) -> bool:
        width, height = box.x1 - box.x0, box.y1 - box.y0
        return min(width, height) >= 2 and height <= _TALLEST * self.height

    def _read_before(self, sample: int, box: TextBox) -> TextLine | None:
        """The line with the same strokes that was read before in the same place, None if there is none."""
        for before, lines in self.lines.items():
            for line in lines:
                if text_tracks.same_place(line.box, box) and text_tracks.is_there(
                    text_tracks.cut_box(self.strokes[before], line.box), self.strokes[sample], line.box
                ):
                    return TextLine(box, line.letters, line.is_text)
        return None

    def _read(self, image: np.ndarray, box: TextBox) -> TextLine:
        width, height = box.x1 - box.x0, box.y1 - box.y0
        margin = _MARGIN * height
        wider = self._clip_to_frame(TextBox(box.x0 - margin, box.y0 - margin, box.x1 + margin, box.y1 + margin))
        ((letters, confidence),) = self._ocr.read([text_tracks.cut_box(image, wider)])
        characters = [letter for letter in letters if letter.isalnum()]
        if width < _LONG * height:
            is_text = confidence >= _SURE and len(set(characters)) >= 2
        else:
            # In a script that it cannot read, the recogniser sees one sign that it knows, the gaps between words, or
            # nothing. In the last case only the place counts. A row of windows reads as one letter many times.
            is_text = (
                (confidence >= _SURE and len(set(characters)) >= 2)
                or (confidence >= _SURE and letters.count(" ") >= 2)
                or (confidence >= _SURE_OF_LETTER and len(characters) == 1)
                or self._is_where_subtitles_are(box)
            )
        return TextLine(box, letters, is_text)

    def _is_where_subtitles_are(self, box: TextBox) -> bool:
        centre = (box.x0 + box.x1) / 2 / self.width
        return abs(centre - 0.5) <= 0.1 and box.y0 >= self.height * 2 / 3 and box.y1 - box.y0 <= 0.15 * self.height


def _repeats(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two frames, [height, width, 3] uint8, are the same in each of their blocks, not only on average."""
    import cv2

    height, width = first.shape[:2]
    # [height / 16, width / 16, 3], means over blocks
    blocks = cv2.resize(
        cv2.absdiff(first, second), (max(1, width // 16), max(1, height // 16)), interpolation=cv2.INTER_AREA
    )
    return float(blocks.max()) < _REPEAT


def _measurement(search: _TextSearch) -> Measurement:
    # The searched samples are numbered in their order, whether they are all key frames or every third.
    samples = range(len(search.lines))
    order = sorted(search.lines)
    texts = text_tracks.follow_lines([search.lines[k] for k in order], [search.strokes[k] for k in order])
    kinds = text_tracks.kinds(texts, len(order), search.width, search.height)

    def of_kind(*wanted: str) -> list[TextTrack]:
        return [text for text, kind in zip(texts, kinds, strict=True) if kind in wanted]

    def area(group: list[TextTrack]) -> float:
        boxes = [[text.boxes[k] for text in group if k in text.boxes] for k in samples]
        # The median, because the detector sometimes takes a piece of the scene for the end of a line.
        areas = [_covered_share(shown, search.width, search.height) for shown in boxes if shown]
        return float(np.median(areas)) if areas else 0.0

    subtitles = [{n for n, text in enumerate(of_kind("subtitle")) if k in text.boxes} for k in samples]
    changes = [before != after for before, after in pairwise(subtitles)]
    boxes = np.array([text.box for text in of_kind("subtitle", "caption")]).reshape(-1, 4)
    around: list[float | None] = [None] * 4
    if len(boxes):
        edges = [*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0)]
        around = [float(v / side) for v, side in zip(edges, 2 * (search.width, search.height), strict=True)]
    return Measurement(
        {
            "text_area": area(texts),
            "subtitle_area": area(of_kind("subtitle")),
            "caption_area": area(of_kind("caption")),
            "watermark_area": area(of_kind("watermark")),
            "scene_text_area": area(of_kind("scene")),
            "subtitle_share": float(np.mean([bool(shown) for shown in subtitles])),
            "changing_share": float(np.mean(changes)) if changes else 0.0,
            **dict(zip(("left", "top", "right", "bottom"), around, strict=True)),
            "samples": len(order),
        }
    )


def _covered_share(boxes: list[TextBox], width: int, height: int) -> float:
    """The share of a frame that the boxes cover. Where boxes overlap, the area counts once."""
    covered = np.zeros((height, width), bool)
    for box in boxes:
        text_tracks.cut_box(covered, box)[:] = True
    return float(covered.mean())
