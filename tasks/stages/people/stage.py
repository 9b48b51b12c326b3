"""Whether anybody is in a clip, and how the person is framed.

Measured on the clip's key frames, one a second. Framing follows active-mind, appendix B: "upper body" (from the chest
up), "medium" (from the hips up), "full", "long" (the figure is small in the frame). If the caption names a framing, it
decides. Otherwise the backend's landmarks do.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from tasks.media.clip import Clip, Measurement, Unmeasurable
from tasks.stages import mediapipe
from tasks.stages.backend import Backend, Resources
from tasks.stages.base import Stage, StageSettings
from tasks.stages.people.captions import framing_in, names_a_person, scene_in
from tasks.weights import store as weights

FRAMINGS = ("upper body", "medium", "full", "long")  # nearest first

# Indices of BlazePose's landmarks.
_NOSE, _HIPS, _ANKLES = 0, [23, 24], [27, 28]
# Visibility from which a joint in the frame counts as seen. Hips in loose clothes or at the lower edge get little.
_HIPS_SEEN, _ANKLES_SEEN = 0.3, 0.5
# A standing figure is about 10 of MediaPipe's face boxes (brow to chin) tall. A face of 0.05 belongs to a figure of
# half the frame's height, below which a shot is long. A face of 0.095 belongs to a figure that just fits.
_FULL_FIGURE = 0.45  # nose to ankles, fraction of the frame's height
_FACE_HEIGHTS = ((0.19, "upper body"), (0.095, "medium"), (0.05, "full"), (-1.0, "long"))
# Indices of COCO's joints, and the confidence from which ultralytics draws a joint.
_COCO_HIPS, _COCO_ANKLES, _JOINT_SEEN = [11, 12], [15, 16], 0.5
_HALF = 0.5  # crown to soles, fraction of the frame's height: the same figure as _FULL_FIGURE


class PeopleInFrame(NamedTuple):
    """What a backend finds in one frame."""

    anybody: bool
    """Whether a face or a body is in the frame."""
    framing: str
    """One of FRAMINGS, "" where it cannot be told."""
    people: int | None = None
    """The number of people; None from a backend that does not count them."""
    face_heights: list[float] | None = None
    """Heights of the faces, brow to chin, in fractions of the frame's height, largest first; None from a backend that
    does not look for faces."""


class PeopleBackend(Backend, ABC):
    """A backend of the stage: finds people in frames."""

    @abstractmethod
    def __init__(self, min_confidence: float) -> None:
        """min_confidence: of a face or body to be counted, 0 to 1."""

    @abstractmethod
    def find(self, images: Iterable[np.ndarray]) -> Iterator[PeopleInFrame]:
        """Find the people in each frame. images: [height, width, 3] uint8 RGB each, all of one size."""


class MediaPipePeople(PeopleBackend):
    """MediaPipe's faces, and the landmarks of the most prominent body. It does not count people."""

    # measured: peak growth over one clip of 5 s (benchmarks/backends.py)
    resources: ClassVar[Resources] = Resources(memory_gb=0.3)

    def __init__(self, min_confidence: float) -> None:
        self._landmarks = mediapipe.Landmarks(min_confidence)

    @classmethod
    def version(cls) -> str:
        return f"mediapipe {mediapipe.version()}"

    @classmethod
    def check(cls, settings: Any) -> None:
        mediapipe.check()

    def find(self, images: Iterable[np.ndarray]) -> Iterator[PeopleInFrame]:
        for image in images:
            faces, body = self._landmarks.faces(image), self._landmarks.body(image)
            heights = [face.height for face in faces]
            yield PeopleInFrame(bool(faces) or body is not None, frame_framing(faces, body), face_heights=heights)


class YoloPeople(PeopleBackend):
    """Ultralytics' YOLO (tasks.networks.yolo).

    The framing is that of the largest person, by its joints. A checkpoint that detects people without joints tells no
    framing. It does not look for faces.
    """

    networks: ClassVar[tuple[str, ...]] = ("yolo",)
    resources: ClassVar[Resources] = Resources(gpu=0.1, memory_gb=1.1, batch=8)
    """Memory by the size of its weights, not measured: the catalogue's 0.01 GB in float32, in which it computes, and an
    allowance of 1 GB for libraries and activations."""

    def __init__(self, min_confidence: float) -> None:
        from tasks.networks import yolo
        from tasks.networks.device import device

        self._min_confidence, self._network = min_confidence, yolo.load(device())

    @classmethod
    def version(cls) -> str:
        from tasks.networks import yolo

        return f"yolo {weights.digest('yolo')}, ultralytics {yolo.check()}, torch {version('torch')}"

    @classmethod
    def check(cls, settings: Any) -> None:
        import torch

        from tasks.networks import yolo

        yolo.check()
        super().check(settings)
        # Takes some tenths of a second. A checkpoint that does not fit would fail every clip.
        yolo.load(torch.device("cpu"))

    def find(self, images: Iterable[np.ndarray]) -> Iterator[PeopleInFrame]:
        rest = iter(images)
        while batch := list(islice(rest, self.resources.batch)):
            height, width = batch[0].shape[:2]
            for boxes, joints in self._network(batch, self._min_confidence):
                framing = ""
                if len(boxes) and joints is not None:
                    box_height = float(boxes[0, 3] - boxes[0, 1]) / height
                    framing = person_framing(box_height, joints[0] / (width, height, 1))
                yield PeopleInFrame(len(boxes) > 0, framing, people=len(boxes))


BACKENDS: dict[str, type[PeopleBackend]] = {"mediapipe": MediaPipePeople, "yolo": YoloPeople}


class PeopleSettings(StageSettings):
    """What finds people, and what counts as one."""

    choices: ClassVar = {"backend": BACKENDS}

    backend: str = "mediapipe"
    """What finds people: "mediapipe", faces and one body; "yolo", bodies, which it counts."""
    min_confidence: float = Field(default=0.5, ge=0.0, le=1.0)
    """Confidence of a face or body to be counted, 0 to 1, on the backend's own scale. 0.5 is MediaPipe's default."""


class People(Stage[PeopleSettings]):
    """People in the frame, and their framing.

    Columns:
        person_share: share of the key frames with a face or a body, 0 to 1.
        persons: the most people in one key frame; None from `mediapipe`, which does not count.
        single_share: share of the key frames with exactly one person, 0 to 1; None from `mediapipe`.
        face_share: share of the key frames with a face, 0 to 1; None from `yolo`, which does not look for faces.
        face_height: height of the largest face, brow to chin, as a fraction of the frame's height: the median over the
            key frames with a face. None without a face.
        framing: one of FRAMINGS; "" when neither the caption nor the landmarks tell.
        framing_source: "caption", "landmarks" or "".
        scene: "indoor" or "outdoor" by the caption, "" when it does not say.
        caption_person: whether the caption speaks of anybody. None where that is not sure: without a caption, with one
            that is not in English, or with one that may only give a name.
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

    @cached_property
    def _backend(self) -> PeopleBackend:
        return BACKENDS[self.settings.backend](self.settings.min_confidence)

    def measure(self, clip: Clip) -> Measurement:
        frames = list(self._backend.find(image for _, image in clip.keyframes()))
        if not frames:
            raise Unmeasurable("the clip has no key frame")
        framings = [frame.framing for frame in frames if frame.framing]
        people = [frame.people for frame in frames if frame.people is not None]
        faces = [frame.face_heights for frame in frames if frame.face_heights is not None]
        heights = [of_frame[0] for of_frame in faces if of_frame]
        caption = str(clip.record.metadata.get("caption") or "")
        framing, source = framing_in(caption), "caption"
        if not framing:
            framing, source = _most_common(framings), "landmarks" if framings else ""
        return Measurement(
            {
                "person_share": sum(frame.anybody for frame in frames) / len(frames),
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


def frame_framing(faces: list[mediapipe.Face], body: np.ndarray | None) -> str:
    """The framing of one frame by MediaPipe's faces and landmarks.

    faces: largest first. body: [33, 3] x, y, visibility (tasks.stages.mediapipe.Landmarks.body), or None.

    Returns: the framing by the lowest joint in the frame, or by the face's height where only a face is found; ""
    without either.
    """
    if body is None:
        return face_framing(faces[0].height) if faces else ""
    if _in_frame(body[_ANKLES], _ANKLES_SEEN):
        return "full" if body[_ANKLES, 1].max() - body[_NOSE, 1] >= _FULL_FIGURE else "long"
    return "medium" if _in_frame(body[_HIPS], _HIPS_SEEN) else "upper body"


def person_framing(box_height: float, joints: np.ndarray) -> str:
    """The framing of one person by the lowest joint in the frame.

    box_height: of the person's box, as a fraction of the frame's height. joints: [17, 3] x, y as fractions of the
        frame's width and height, and confidence 0..1, in COCO's order.
    """
    if _in_frame(joints[_COCO_ANKLES], _JOINT_SEEN):
        return "full" if box_height >= _HALF else "long"
    return "medium" if _in_frame(joints[_COCO_HIPS], _JOINT_SEEN) else "upper body"


def face_framing(face_height: float) -> str:
    """The framing that belongs to a face's height, brow to chin, as a fraction of the frame's height."""
    return next(framing for height, framing in _FACE_HEIGHTS if face_height >= height)


def _in_frame(joints: np.ndarray, min_visibility: float) -> bool:
    """Whether any of [joints, 3] x, y, visibility is seen inside the frame."""
    x, y, visibility = joints.T
    return bool(((visibility >= min_visibility) & (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)).any())


def _most_common(framings: list[str]) -> str:
    """The framing of most frames. Ties go to the nearer framing. "" without any."""
    counts = Counter(framings)
    return max(counts, key=lambda f: (counts[f], -FRAMINGS.index(f))) if counts else ""
