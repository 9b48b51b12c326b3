"""Who is in a clip: how many, whose face is the main one, where it is in each frame, and whether it stays the same.

physavatar (appendix A) verifies the speaker's identity with InsightFace and keeps clips of a single speaker; the
embedded backend follows faces with MediaPipe and compares them by tasks.face_looks, which is weaker than ArcFace.
"""

from functools import cached_property
from importlib.metadata import version
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import numpy as np
from pydantic import Field, field_validator, model_validator

from tasks import landmarks, weights
from tasks.clip import Clip
from tasks.face_looks import SIDE, description, sharpness, unit
from tasks.face_mesh import FIVE, MODEL, FaceMesh, aligned, box_of, lips_of, pose_of
from tasks.face_tracks import Look, Track, Tracker, people_of
from tasks.stage import Measurement, Stage, StageSettings, Unmeasurable, Value, known_backend, with_own_defaults

_SHORT_SIDE = 480  # pixels; the mesh network itself sees 192


class Faces(Protocol):
    """A backend: finds faces in a picture and describes them. The mesh is MediaPipe's with any of them."""

    def __init__(self, min_confidence: float) -> None:
        """min_confidence: of a face to be found, 0 to 1."""

    @staticmethod
    def version() -> str:
        """Library and weights, as far as they can change a number."""

    @staticmethod
    def check() -> None:
        """Raises tasks.stage.MissingBackend when the backend cannot run."""

    def faces(self, image: np.ndarray) -> list[landmarks.Face]:
        """Faces in an image, [height, width, 3] uint8 RGB, largest first."""

    def description(self, image: np.ndarray, points: np.ndarray) -> np.ndarray:
        """The face whose mesh is `points`, [478, 3], as a unit vector; one person's have a high cosine."""


class MediaPipeFaces:
    """MediaPipe's full-range detector, and oriented gradients and colours (tasks.face_looks)."""

    def __init__(self, min_confidence: float) -> None:
        self._landmarks = landmarks.Landmarks(min_confidence)

    @staticmethod
    def version() -> str:
        import cv2

        return f"opencv {cv2.__version__}"

    @staticmethod
    def check() -> None:
        landmarks.check()

    def faces(self, image: np.ndarray) -> list[landmarks.Face]:
        return self._landmarks.faces(image)

    def description(self, image: np.ndarray, points: np.ndarray) -> np.ndarray:
        return description(aligned(image, points, SIDE))


class InsightFaces:
    """A pack of InsightFace (tasks.networks.insightface): SCRFD, and ArcFace on the mesh's eyes, nose and mouth.

    Two pictures of one person have a cosine of 0.4 and more as a rule, of two people 0.2 and less."""

    networks: ClassVar[tuple[str, ...]] = ("insightface",)

    def __init__(self, min_confidence: float) -> None:
        from tasks.networks import insightface

        self._least = min_confidence
        self._detector, self._recogniser = insightface.load()

    @staticmethod
    def version() -> str:
        import cv2

        libraries = f"onnxruntime {version('onnxruntime')}, opencv {cv2.__version__}, scipy {version('scipy')}"
        return f"insightface {weights.digest('insightface')}, {libraries}"

    @staticmethod
    def check() -> None:
        from tasks.networks import insightface

        weights.check("insightface")
        insightface.load()

    def faces(self, image: np.ndarray) -> list[landmarks.Face]:
        height, width = image.shape[:2]
        found = self._detector(image, self._least).boxes / (width, height, width, height, 1)
        # SCRFD's boxes begin at the hairline, about a fifth of their height above the brows
        faces = [
            landmarks.Face(x0, y0 + 0.2 * (y1 - y0), x1 - x0, 0.8 * (y1 - y0), score)
            for x0, y0, x1, y1, score in found.tolist()
        ]
        return sorted(faces, key=lambda face: -face.width * face.height)

    def description(self, image: np.ndarray, points: np.ndarray) -> np.ndarray:
        from tasks.networks import face_align

        height, width = image.shape[:2]
        five = points[list(FIVE), :2] * (width, height)
        return unit(self._recogniser(face_align.cut(image, five)[None])[0])


BACKENDS: dict[str, type[Faces]] = {"mediapipe": MediaPipeFaces, "insightface": InsightFaces}
_OWN = {"insightface": {"same_person": 0.4}}  # defaults, where a backend has others


class IdentitySettings(StageSettings):
    """How often is looked, and what counts as somebody.

    rate_hz: how often faces are counted and compared, times a second.
    every: the main face is looked for in each frame (1), or in each second or third one, box and lips in between being
        interpolated. 2 saves a third of the time; sync then finds the same offsets with a little less confidence.
    min_confidence: of the detector for a face to be found, 0 to 1 (0.5 is MediaPipe's default).
    speaker_s: seconds for which a face has to be seen to be one of the speakers.
    same_person: cosine of two descriptions from which they are of one person; on the backend's own scale, 0.4 being
        the default for `insightface`.
    """

    backend: str = "mediapipe"
    rate_hz: float = Field(default=3.0, ge=1.0, le=30.0)
    every: int = Field(default=1, ge=1, le=3)
    min_confidence: float = Field(default=0.5, ge=0.0, le=1.0)
    speaker_s: float = Field(default=1.0, ge=0.0, le=60.0)
    same_person: float = Field(default=0.75, ge=-1.0, le=1.0)

    @model_validator(mode="before")
    @classmethod
    def _as_the_backend_has_it(cls, given: Any) -> Any:
        return with_own_defaults(given, _OWN)

    @field_validator("backend")
    @classmethod
    def _known(cls, backend: str) -> str:
        return known_backend(backend, BACKENDS)


class Identity(Stage[IdentitySettings]):
    """Faces counted and told apart, and the main one followed.

    A face that is found in one sampled frame only is a false alarm, and so is one that the detector sees and the mesh
    does not fit. The main face is the person's whose height, summed over the sampled frames, is greatest.

    Columns, all but the first four None where no frame has a main face:
        faces: the most faces seen together.
        speakers: how many people show their face for `speaker_s` or longer. Faces seen together are different people;
            otherwise their descriptions tell, second by second, so that somebody who takes another's place counts too.
        single_share: share of the sampled frames with exactly one face, 0 to 1 (TalkVid takes off for each frame with
            none or several, and keeps 0.8 and more).
        face_share: share of all frames in which the main face's mesh is found, 0 to 1.
        face_height: median height of the main face, brows to chin, as a fraction of the frame's; face_px: in pixels.
        sharpness: median, 0 to 1 (tasks.face_looks.sharpness).
        yaw, pitch, roll: medians in degrees, zero for a face upright before the camera (tasks.face_mesh.pose_of).
        turn: how far the face turns away from the camera, degrees, 95th percentile.
        stability: median cosine of the main person's descriptions to their mean, up to 1.
        stability_min: lowest cosine between any two seconds of the main person, up to 1: low when somebody else takes
            the place, if only for a second, and also in quick turns or behind a hand.
    Arrays, of the main person, NaN in frames without the face:
        face_box: [frames, 4] float32, x0, y0, x1, y1 in fractions of the frame's width and height, side to side and
            brows to chin; it may reach beyond the frame.
        lips: [frames, 4] float32, inner opening, width, outer opening, chin distance, in distances of the outer
            corners of the eyes (tasks.face_mesh.lips_of).
    """

    name: ClassVar[str] = "identity"
    version: ClassVar[int] = 2
    backends: ClassVar = {"backend": BACKENDS}
    columns: ClassVar[dict[str, type]] = {
        "faces": int,
        "speakers": int,
        "single_share": float,
        "face_share": float,
        "face_height": float,
        "face_px": float,
        "sharpness": float,
        "yaw": float,
        "pitch": float,
        "roll": float,
        "turn": float,
        "stability": float,
        "stability_min": float,
    }

    def backend_version(self) -> str:
        return f"{BACKENDS[self.settings.backend].version()}, mediapipe {landmarks.version()}"

    def check(self) -> None:
        landmarks.check(MODEL)
        BACKENDS[self.settings.backend].check()

    @cached_property
    def _mesh(self) -> FaceMesh:
        return FaceMesh()

    @cached_property
    def _faces(self) -> Faces:
        import cv2

        cv2.setNumThreads(1)  # the workers are the parallelism
        return BACKENDS[self.settings.backend](self.settings.min_confidence)

    def measure(self, clip: Clip) -> Measurement:
        record, settings = clip.record, self.settings
        step = settings.every * max(1, round(record.fps / settings.rate_hz / settings.every))
        tracker = Tracker(self._mesh, self._faces.faces, step, settings.every)
        for number, image in enumerate(clip.frames(size=_size(record.width, record.height), rough=True)):
            for track in tracker.add(image) or ():
                if number in track.points:
                    track.looks.append(self._look(image, track.points[number]))
        if not tracker.frames:
            raise Unmeasurable("the clip has no frame")
        sampled = range(0, tracker.frames, step)
        people = [
            person
            for person in people_of(tracker.tracks, settings.same_person)
            if sum(len(track.seen) for track in person) >= min(2, len(sampled))
        ]
        counts = [sum(number in track.seen for person in people for track in person) for number in sampled]
        columns: dict[str, Value] = {
            **dict.fromkeys(self.columns),
            "faces": max(counts),
            "speakers": sum(self._speakers(person, step / record.fps) for person in people),
            "single_share": counts.count(1) / len(counts),
            "face_share": 0.0,
        }
        boxes, lips = (np.full((tracker.frames, 4), np.nan, np.float32) for _ in range(2))
        for track in people[0] if people else ():
            for number, points in track.points.items():
                boxes[number] = box_of(points)
                lips[number] = lips_of(points, (record.width, record.height))
        for values in (boxes, lips):
            _fill(values, settings.every)
        looks = [look for track in _in_time(people[0]) for look in track.looks] if people else []
        if looks:
            columns |= _main_face(boxes, looks, record.height, round(settings.rate_hz))
        return Measurement(columns, {"face_box": boxes, "lips": lips})

    def _look(self, image: np.ndarray, points: np.ndarray) -> Look:
        size = (image.shape[1], image.shape[0])
        sharp = sharpness(aligned(image, points, SIDE))
        return Look(self._faces.description(image, points), sharp, pose_of(points, size))

    def _speakers(self, person: list[Track], step_s: float) -> int:
        """How many people are behind what looks like one, none when seen too shortly."""
        if sum(len(track.seen) for track in person) * step_s < self.settings.speaker_s:
            return 0
        looks = [look for track in _in_time(person) for look in track.looks]
        seconds = _seconds(looks, round(self.settings.rate_hz))
        alike: list[list[np.ndarray]] = []
        for second in seconds:
            near = [group for group in alike if _cosine(np.mean(group, axis=0), second) >= self.settings.same_person]
            if near:
                max(near, key=lambda group: _cosine(np.mean(group, axis=0), second)).append(second)
            else:
                alike.append([second])
        # a single odd second is more often a hand before the face than somebody else
        return max(1, sum(len(group) >= max(2, self.settings.speaker_s) for group in alike))


def _main_face(boxes: np.ndarray, looks: list[Look], height: int, rate: int) -> dict[str, Value]:
    """The columns that tell of the main face. boxes: [frames, 4]. height: of the frame in pixels."""
    heights = boxes[:, 3] - boxes[:, 1]
    face_height = float(np.nanmedian(heights))
    yaw, pitch, roll = np.array([look.pose for look in looks]).T
    turns = np.degrees(np.arccos(np.clip(np.cos(np.radians(yaw)) * np.cos(np.radians(pitch)), -1, 1)))
    seconds = _seconds(looks, rate)
    mean = np.mean([look.description for look in looks], axis=0)
    return {
        "face_share": float(np.mean(~np.isnan(heights))),
        "face_height": face_height,
        "face_px": face_height * height,
        "sharpness": float(np.median([look.sharpness for look in looks])),
        "yaw": float(np.median(yaw)),
        "pitch": float(np.median(pitch)),
        "roll": float(np.median(roll)),
        "turn": float(np.percentile(turns, 95)),
        "stability": float(np.median([_cosine(look.description, mean) for look in looks])),
        "stability_min": min(_cosine(one, other) for one in seconds for other in seconds),
    }


def _fill(values: np.ndarray, every: int) -> None:
    """Interpolate [frames, ...] where only each `every`-th frame was looked at; longer gaps stay."""
    known = np.flatnonzero(~np.isnan(values[:, 0]))
    for before, after in pairwise(known):
        if after - before <= every:
            for between in range(before + 1, after):
                share = (between - before) / (after - before)
                values[between] = (1 - share) * values[before] + share * values[after]
    if known.size and len(values) - known[-1] <= every:
        values[known[-1] :] = values[known[-1]]


def _seconds(looks: list[Look], rate: int) -> list[np.ndarray]:
    """The mean description of each second, [size] each; `rate` looks make a second, the last may have up to twice."""
    bounds = [*range(0, max(1, len(looks) - rate + 1), rate), len(looks)]
    means = [np.mean([look.description for look in looks[a:b]], axis=0) for a, b in pairwise(bounds) if b > a]
    return [unit(mean) for mean in means]


def _in_time(person: list[Track]) -> list[Track]:
    return sorted(person, key=lambda track: track.seen[0])


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((unit(one) * unit(other)).sum())


def _size(width: int, height: int) -> tuple[int, int]:
    scale = min(1.0, _SHORT_SIDE / min(width, height))
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)
