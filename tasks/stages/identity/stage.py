"""Who is in a clip: how many people, whose face is the main one, where it is in each frame, and whether it stays.

physavatar (appendix A) verifies the speaker's identity with InsightFace and keeps clips of a single speaker. The
embedded backend follows faces with MediaPipe and compares them by tasks.stages.identity.face_descriptor, which is
weaker than ArcFace.
"""

from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import numpy as np
from pydantic import Field

from tasks.media.clip import Clip, Measurement, Unmeasurable, Value
from tasks.stages import mediapipe
from tasks.stages.base import Stage, StageSettings
from tasks.stages.identity.backends import BACKENDS, IdentityBackend
from tasks.stages.identity.face_descriptor import SIDE, face_sharpness, unit
from tasks.stages.identity.face_mesh import MODEL, FaceMesh, aligned, box_of, lips_of, pose_of
from tasks.stages.identity.face_tracks import FaceSample, FaceTrack, FaceTracker, people_of

_SHORT_SIDE = 480  # pixels of the frames that are searched; the mesh network scales a face to 192


class IdentitySettings(StageSettings):
    """How often faces are compared, and what counts as a face, a person and a speaker."""

    choices: ClassVar = {"backend": BACKENDS}

    backend: str = "mediapipe"
    """What finds and describes faces: "mediapipe" or "insightface"."""
    rate_hz: float = Field(default=3.0, ge=1.0, le=30.0)
    """How often faces are counted and compared, times a second."""
    every: int = Field(default=1, ge=1, le=3)
    """The main face is searched in each frame (1), or in each second or third frame. Box and lips between these frames
    are interpolated. 2 saves a third of the time; sync then finds the same offsets with a little less confidence."""
    min_confidence: float = Field(default=0.5, ge=0.0, le=1.0)
    """The detector's confidence for a face to be found, 0 to 1. 0.5 is MediaPipe's default."""
    speaker_s: float = Field(default=1.0, ge=0.0, le=60.0)
    """Seconds for which a face has to show to be a speaker's."""
    same_person: float = Field(default=0.75, ge=-1.0, le=1.0)
    """Cosine of two descriptions from which they are of one person, on the backend's own scale. The default for
    `insightface` is 0.4."""


class Identity(Stage[IdentitySettings]):
    """The number of faces and speakers, and the main face.

    Faces are counted and compared in sampled frames, `rate_hz` a second. A face counts only if it is found in two
    sampled frames and the mesh fits it. The main person is the one whose face height, summed over the sampled frames,
    is greatest.

    Columns. All but the first four are None if no frame has a main face.
        faces: the most faces in one sampled frame.
        speakers: how many people show their face for `speaker_s` or longer. Faces in one frame are different people.
            Faces of different seconds are compared by their descriptions, so a second person counts who appears after
            the first one has left.
        single_share: share of the sampled frames with exactly one face, 0 to 1. TalkVid subtracts points for each frame
            with none or several, and keeps clips with 0.8 or more.
        face_share: share of all frames in which the main face's mesh is found, 0 to 1.
        face_height: median height of the main face, brows to chin, as a fraction of the frame's height.
        face_px: the same in pixels.
        sharpness: median, 0 to 1 (tasks.stages.identity.face_descriptor.face_sharpness).
        yaw, pitch, roll: medians in degrees, zero for an upright face that looks into the camera
            (tasks.stages.identity.face_mesh.pose_of).
        turn: how far the face turns away from the camera, degrees, 95th percentile.
        stability: median cosine of the main person's descriptions to their mean, up to 1.
        stability_min: lowest cosine between any two seconds of the main person, up to 1. It is low if another person
            takes the place, even for one second, and also in quick turns or behind a hand.
    Arrays, of the main person, NaN in frames without the face:
        face_box: [frames, 4] float32, x0, y0, x1, y1 in fractions of the frame's width and height, side to side and
            brows to chin. It may reach beyond the frame.
        lips: [frames, 4] float32, inner opening, width, outer opening, chin distance, in distances of the outer
            corners of the eyes (tasks.stages.identity.face_mesh.lips_of).
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

    def library_version(self) -> str:
        return f"mediapipe {mediapipe.version()}"

    def check(self) -> None:
        mediapipe.check(MODEL)
        super().check()

    @cached_property
    def _mesh(self) -> FaceMesh:
        return FaceMesh()

    @cached_property
    def _backend(self) -> IdentityBackend:
        import cv2

        cv2.setNumThreads(1)  # the workers run in parallel, so each uses one thread
        return BACKENDS[self.settings.backend](self.settings.min_confidence)

    def measure(self, clip: Clip) -> Measurement:
        record, settings = clip.record, self.settings
        step = settings.every * max(1, round(record.fps / settings.rate_hz / settings.every))
        tracker = FaceTracker(self._mesh, self._backend.faces, step, settings.every)
        for number, image in enumerate(clip.frames(size=_size(record.width, record.height), rough=True)):
            for track in tracker.add(image) or ():
                if number in track.points:
                    track.samples.append(self._sample(image, track.points[number]))
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
            "speakers": sum(self._num_speakers(person, step / record.fps) for person in people),
            "single_share": counts.count(1) / len(counts),
            "face_share": 0.0,
        }
        boxes, lips = (np.full((tracker.frames, 4), np.nan, np.float32) for _ in range(2))
        for track in people[0] if people else ():
            for number, points in track.points.items():
                boxes[number] = box_of(points)
                lips[number] = lips_of(points, (record.width, record.height))
        for values in (boxes, lips):
            _interpolate(values, settings.every)
        samples = _samples_of(people[0]) if people else []
        if samples:
            columns |= _main_face(boxes, samples, record.height, round(settings.rate_hz))
        return Measurement(columns, {"face_box": boxes, "lips": lips})

    def _sample(self, image: np.ndarray, points: np.ndarray) -> FaceSample:
        size = (image.shape[1], image.shape[0])
        sharpness = face_sharpness(aligned(image, points, SIDE))
        return FaceSample(self._backend.description(image, points), sharpness, pose_of(points, size))

    def _num_speakers(self, person: list[FaceTrack], step_s: float) -> int:
        """How many people the tracks of one person really show. 0 if they show for less than `speaker_s`.

        step_s: seconds from one sampled frame to the next.
        """
        if sum(len(track.seen) for track in person) * step_s < self.settings.speaker_s:
            return 0
        groups: list[list[np.ndarray]] = []
        for second in _seconds(_samples_of(person), round(self.settings.rate_hz)):
            alike = [group for group in groups if _cosine(np.mean(group, axis=0), second) >= self.settings.same_person]
            if alike:
                max(alike, key=lambda group: _cosine(np.mean(group, axis=0), second)).append(second)
            else:
                groups.append([second])
        # A single odd second is more often a hand before the face than another person.
        return max(1, sum(len(group) >= max(2, self.settings.speaker_s) for group in groups))


def _main_face(boxes: np.ndarray, samples: list[FaceSample], height: int, rate: int) -> dict[str, Value]:
    """The columns about the main face.

    boxes: [frames, 4]. samples: of the main person, in order. height: of the frame in pixels. rate: samples a second.
    """
    heights = boxes[:, 3] - boxes[:, 1]
    face_height = float(np.nanmedian(heights))
    yaw, pitch, roll = np.array([sample.pose for sample in samples]).T
    turns = np.degrees(np.arccos(np.clip(np.cos(np.radians(yaw)) * np.cos(np.radians(pitch)), -1, 1)))
    seconds = _seconds(samples, rate)
    mean = np.mean([sample.description for sample in samples], axis=0)
    return {
        "face_share": float(np.mean(~np.isnan(heights))),
        "face_height": face_height,
        "face_px": face_height * height,
        "sharpness": float(np.median([sample.sharpness for sample in samples])),
        "yaw": float(np.median(yaw)),
        "pitch": float(np.median(pitch)),
        "roll": float(np.median(roll)),
        "turn": float(np.percentile(turns, 95)),
        "stability": float(np.median([_cosine(sample.description, mean) for sample in samples])),
        "stability_min": min(_cosine(one, other) for one in seconds for other in seconds),
    }


def _interpolate(values: np.ndarray, every: int) -> None:
    """Fill the gaps between each `every`-th frame in [frames, ...], in place. Longer gaps stay NaN."""
    known = np.flatnonzero(~np.isnan(values[:, 0]))
    for before, after in pairwise(known):
        if after - before <= every:
            for between in range(before + 1, after):
                share = (between - before) / (after - before)
                values[between] = (1 - share) * values[before] + share * values[after]
    if known.size and len(values) - known[-1] <= every:
        values[known[-1] :] = values[known[-1]]


def _seconds(samples: list[FaceSample], rate: int) -> list[np.ndarray]:
    """The mean description of each second, [size] each. `rate` samples are a second; the last may have up to twice as
    many."""
    bounds = [*range(0, max(1, len(samples) - rate + 1), rate), len(samples)]
    means = [np.mean([sample.description for sample in samples[a:b]], axis=0) for a, b in pairwise(bounds) if b > a]
    return [unit(mean) for mean in means]


def _samples_of(person: list[FaceTrack]) -> list[FaceSample]:
    """The samples of a person's tracks, in the order in which the tracks begin."""
    return [sample for track in sorted(person, key=lambda track: track.seen[0]) for sample in track.samples]


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((unit(one) * unit(other)).sum())


def _size(width: int, height: int) -> tuple[int, int]:
    scale = min(1.0, _SHORT_SIDE / min(width, height))
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)
