"""Is there anybody in a clip, and how is the person framed.

Measured on the clip's key frames, one a second. Framing follows active-mind, appendix B: "upper body" (from the chest
up), "medium" (from the hips up), "full", "long" (the figure is small in the frame). The caption's word counts where it
names a framing; landmarks tell otherwise.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import numpy as np
from pydantic import Field, field_validator

from tasks import landmarks, weights
from tasks.captions import framing_in, names_a_person, scene_in
from tasks.clip import Clip
from tasks.stage import Measurement, Stage, StageSettings, Unmeasurable, known_backend

if TYPE_CHECKING:
    from tasks.landmarks import Face

FRAMINGS = ("upper body", "medium", "full", "long")  # nearest first

# BlazePose's numbering of landmarks
_NOSE, _HIPS, _ANKLES = 0, [23, 24], [27, 28]
# visibilities from which a joint in the frame counts as seen; hips in loose clothes or at the lower edge get little
_HIPS_SEEN, _ANKLES_SEEN = 0.3, 0.5
# A standing figure is about 10 of MediaPipe's face boxes (brow to chin) tall: a face of 0.05 goes with a figure of half
# the frame's height, below which a shot is long; one of 0.095 with a figure that just fits.
_FULL_FIGURE = 0.45  # nose to ankles, fraction of the frame's height
_FACE_HEIGHTS = ((0.19, "upper body"), (0.095, "medium"), (0.05, "full"), (-1.0, "long"))
# COCO's numbering, and the confidence from which ultralytics shows a joint
_COCO_HIPS, _COCO_ANKLES, _JOINT_SEEN = [11, 12], [15, 16], 0.5
_HALF = 0.5  # of the frame's height, crown to soles: the same figure as _FULL_FIGURE
_PICTURES = 8  # that YOLO is given at a time


class Look(NamedTuple):
    """What a backend sees in one picture.

    anybody: whether a face or a body is in view. framing: one of FRAMINGS, "" where it cannot tell.
    people: how many; None by a backend that does not count. face_heights: brow to chin, as fractions of the picture's
        height, the largest first; None by a backend that does not look for faces.
    """

    anybody: bool
    framing: str
    people: int | None = None
    face_heights: list[float] | None = None


class Finder(Protocol):
    """A backend: finds people in pictures. No picture changes what is seen in the next one."""

    def __init__(self, min_confidence: float) -> None:
        """min_confidence: of a face or body to be counted, 0 to 1."""

    @staticmethod
    def version() -> str:
        """Library and weights, as far as they can change a number."""

    @staticmethod
    def check() -> None:
        """Raises tasks.stage.MissingBackend when the backend cannot run."""

    def looks(self, images: Iterable[np.ndarray]) -> Iterator[Look]:
        """One look a picture. images: [height, width, 3] uint8 RGB each, all of one size."""


class MediaPipePeople:
    """MediaPipe's faces, and the landmarks of the most prominent body; it does not count people."""

    def __init__(self, min_confidence: float) -> None:
        self._landmarks = landmarks.Landmarks(min_confidence)

    @staticmethod
    def version() -> str:
        return f"mediapipe {landmarks.version()}"

    @staticmethod
    def check() -> None:
        landmarks.check()

    def looks(self, images: Iterable[np.ndarray]) -> Iterator[Look]:
        for image in images:
            faces, body = self._landmarks.faces(image), self._landmarks.body(image)
            heights = [face.height for face in faces]
            yield Look(bool(faces) or body is not None, frame_framing(faces, body), face_heights=heights)


class YoloPeople:
    """Ultralytics' YOLO (tasks.networks.yolo). The framing is the largest person's, by its joints; a checkpoint that
    detects and has no joints tells none. Faces are not looked for."""

    networks: ClassVar[tuple[str, ...]] = ("yolo",)

    def __init__(self, min_confidence: float) -> None:
        from tasks.networks import yolo
        from tasks.networks.device import device

        self._least, self._network = min_confidence, yolo.load(device())

    @staticmethod
    def version() -> str:
        from tasks.networks import yolo

        return f"yolo {weights.digest('yolo')}, ultralytics {yolo.check()}, torch {version('torch')}"

    @staticmethod
    def check() -> None:
        import torch

        from tasks.networks import yolo

        yolo.check()
        weights.check("yolo")
        yolo.load(torch.device("cpu"))  # some tenths of a second; what does not fit would fail every clip

    def looks(self, images: Iterable[np.ndarray]) -> Iterator[Look]:
        coming = iter(images)
        while group := list(islice(coming, _PICTURES)):
            height, width = group[0].shape[:2]
            for boxes, joints in self._network(group, self._least):
                framing = ""
                if len(boxes) and joints is not None:
                    tall = float(boxes[0, 3] - boxes[0, 1]) / height
                    framing = person_framing(tall, joints[0] / (width, height, 1))
                yield Look(len(boxes) > 0, framing, people=len(boxes))


BACKENDS: dict[str, type[Finder]] = {"mediapipe": MediaPipePeople, "yolo": YoloPeople}


class PeopleSettings(StageSettings):
    """min_confidence: of a face or body to be counted, 0 to 1, on the backend's own scale (MediaPipe's default 0.5)."""

    backend: str = "mediapipe"
    min_confidence: float = Field(default=0.5, ge=0.0, le=1.0)

    @field_validator("backend")
    @classmethod
    def _known(cls, backend: str) -> str:
        return known_backend(backend, BACKENDS)


class People(Stage[PeopleSettings]):
    """Somebody in view, and their framing.

    Columns:
        person_share: share of the key frames with a face or a body, 0 to 1.
        persons: the most people seen together; single_share: share of the key frames with exactly one, 0 to 1. Both
            None by `mediapipe`, which does not count.
        face_share: share of the key frames with a face, 0 to 1; None by `yolo`, which does not look for faces.
        face_height: height of the largest face, brow to chin, as a fraction of the frame's; the median over the key
            frames with a face; None when there is none.
        framing: one of FRAMINGS; "" when neither the caption nor the landmarks tell.
        framing_source: "caption", "landmarks" or "".
        scene: "indoor" or "outdoor" by the caption, "" when it does not say.
        caption_person: whether the caption speaks of anybody; None where that is not sure: without a caption, with one
            not in English, or one that may only give a name.
    """

    name: ClassVar[str] = "people"
    version: ClassVar[int] = 3
    backends: ClassVar = {"backend": BACKENDS}
    columns: ClassVar[dict[str, type]] = {
        "person_share": float,
        "persons": int,
        "single_share": float,
        "face_share": float,
        "face_height": float,
        "framing": str,
        "framing_source": str,
        "scene": str,
        "caption_person": bool,
    }
    reads: ClassVar[tuple[str, ...]] = ("caption",)

    def backend_version(self) -> str:
        return BACKENDS[self.settings.backend].version()

    def check(self) -> None:
        BACKENDS[self.settings.backend].check()

    @cached_property
    def _finder(self) -> Finder:
        return BACKENDS[self.settings.backend](self.settings.min_confidence)

    def measure(self, clip: Clip) -> Measurement:
        looks = list(self._finder.looks(image for _, image in clip.keyframes()))
        if not looks:
            raise Unmeasurable("the clip has no key frame")
        framings = [look.framing for look in looks if look.framing]
        people = [look.people for look in looks if look.people is not None]
        faces = [look.face_heights for look in looks if look.face_heights is not None]
        heights = [found[0] for found in faces if found]
        caption = str(clip.record.metadata.get("caption") or "")
        framing, source = framing_in(caption), "caption"
        if not framing:
            framing, source = _most_common(framings), "landmarks" if framings else ""
        return Measurement(
            {
                "person_share": sum(look.anybody for look in looks) / len(looks),
                "persons": max(people) if people else None,
                "single_share": people.count(1) / len(people) if people else None,
                "face_share": len(heights) / len(faces) if faces else None,
                "face_height": float(np.median(heights)) if heights else None,
                "framing": framing,
                "framing_source": source,
                "scene": scene_in(caption),
                "caption_person": names_a_person(caption),
            }
        )


def frame_framing(faces: "list[Face]", body: np.ndarray | None) -> str:
    """The framing of one frame.

    faces: largest first. body: [33, 3] x, y, visibility (tasks.landmarks.Landmarks.body), or None.

    Returns: by the lowest joint in the frame; by the face's height where only a face is found; "" without either.
    """
    if body is None:
        return face_framing(faces[0].height) if faces else ""
    if _in_frame(body[_ANKLES], _ANKLES_SEEN):
        return "full" if body[_ANKLES, 1].max() - body[_NOSE, 1] >= _FULL_FIGURE else "long"
    return "medium" if _in_frame(body[_HIPS], _HIPS_SEEN) else "upper body"


def person_framing(tall: float, joints: np.ndarray) -> str:
    """The framing of one person, by the lowest joint in the frame.

    tall: the person's box, as a fraction of the frame's height. joints: [17, 3] x, y as fractions of the frame's width
        and height, and confidence 0..1; in COCO's order.
    """
    if _in_frame(joints[_COCO_ANKLES], _JOINT_SEEN):
        return "full" if tall >= _HALF else "long"
    return "medium" if _in_frame(joints[_COCO_HIPS], _JOINT_SEEN) else "upper body"


def face_framing(face_height: float) -> str:
    """The framing that goes with a face's height, brow to chin, as a fraction of the frame's."""
    return next(framing for height, framing in _FACE_HEIGHTS if face_height >= height)


def _in_frame(joints: np.ndarray, min_visibility: float) -> bool:
    """Whether any of some joints, [joints, 3] x, y, visibility, is seen inside the frame."""
    x, y, visibility = joints.T
    return bool(((visibility >= min_visibility) & (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)).any())


def _most_common(framings: list[str]) -> str:
    """The framing of most frames, the nearer one of equals; "" for none."""
    counts = Counter(framings)
    return max(counts, key=lambda f: (counts[f], -FRAMINGS.index(f))) if counts else ""
