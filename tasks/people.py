"""Is there anybody in a clip, and how is the person framed.

Measured on the clip's key frames, one a second. Framing follows active-mind, appendix B: "upper body" (from the chest
up), "medium" (from the hips up), "full", "long" (the figure is small in the frame). The caption's word counts where it
names a framing; landmarks tell otherwise.
"""

from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from tasks import landmarks
from tasks.captions import framing_in, names_a_person, scene_in
from tasks.clip import Clip
from tasks.stage import Measurement, Stage, StageSettings, Unmeasurable

if TYPE_CHECKING:
    from tasks.landmarks import Face, Landmarks

FRAMINGS = ("upper body", "medium", "full", "long")  # nearest first

# BlazePose's numbering of landmarks
_NOSE, _HIPS, _ANKLES = 0, [23, 24], [27, 28]
# visibilities from which a joint in the frame counts as seen; hips in loose clothes or at the lower edge get little
_HIPS_SEEN, _ANKLES_SEEN = 0.3, 0.5
# A standing figure is about 10 of MediaPipe's face boxes (brow to chin) tall: a face of 0.05 goes with a figure of half
# the frame's height, below which a shot is long; one of 0.095 with a figure that just fits.
_FULL_FIGURE = 0.45  # nose to ankles, fraction of the frame's height
_FACE_HEIGHTS = ((0.19, "upper body"), (0.095, "medium"), (0.05, "full"), (-1.0, "long"))


class PeopleSettings(StageSettings):
    """min_confidence: of a face or body to be counted, 0 to 1 (MediaPipe's default 0.5)."""

    backend: Literal["mediapipe"] = "mediapipe"
    min_confidence: float = Field(default=0.5, ge=0.0, le=1.0)


class People(Stage[PeopleSettings]):
    """Somebody in view, and their framing.

    Columns:
        person_share: share of the key frames with a face or a body, 0 to 1.
        face_share: share of the key frames with a face, 0 to 1.
        face_height: height of the largest face, brow to chin, as a fraction of the frame's; the median over the key
            frames with a face; None when there is none.
        framing: one of FRAMINGS; "" when neither the caption nor the landmarks tell.
        framing_source: "caption", "landmarks" or "".
        scene: "indoor" or "outdoor" by the caption, "" when it does not say.
        caption_person: whether the caption speaks of anybody; None without a caption, or with one not in English.
    """

    name: ClassVar[str] = "people"
    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, type]] = {
        "person_share": float,
        "face_share": float,
        "face_height": float,
        "framing": str,
        "framing_source": str,
        "scene": str,
        "caption_person": bool,
    }
    reads: ClassVar[tuple[str, ...]] = ("caption",)

    def backend_version(self) -> str:
        return f"mediapipe {landmarks.version()}"

    def check(self) -> None:
        landmarks.check()

    @cached_property
    def _landmarks(self) -> "Landmarks":
        return landmarks.Landmarks(self.settings.min_confidence)

    def measure(self, clip: Clip) -> Measurement:
        frames = persons = 0
        face_heights: list[float] = []
        framings: list[str] = []
        for _, image in clip.keyframes():
            frames += 1
            faces, body = self._landmarks.faces(image), self._landmarks.body(image)
            persons += bool(faces) or body is not None
            if faces:
                face_heights.append(faces[0].height)
            framing = frame_framing(faces, body)
            if framing:
                framings.append(framing)
        if not frames:
            raise Unmeasurable("the clip has no key frame")
        caption = str(clip.record.metadata.get("caption") or "")
        framing, source = framing_in(caption), "caption"
        if not framing:
            framing, source = _most_common(framings), "landmarks" if framings else ""
        return Measurement(
            {
                "person_share": persons / frames,
                "face_share": len(face_heights) / frames,
                "face_height": float(np.median(face_heights)) if face_heights else None,
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
