"""Faces followed through a clip: where each face is in each frame, and which faces belong to one person."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tasks.stages.identity.face_descriptor import unit
from tasks.stages.identity.face_mesh import Region, box_of, region_of_face, region_of_points
from tasks.stages.mediapipe import Face

Mesh = Callable[[np.ndarray, Region], np.ndarray | None]
Detect = Callable[[np.ndarray], list[Face]]

_OVERLAP = 0.3  # intersection over union from which two boxes are of one face
_SAME_PLACE = 0.6  # intersection over union from which two tracks follow the same face
_MAX_FOLLOWED = 3  # faces that are followed from frame to frame at once; more faces are still counted


@dataclass(frozen=True)
class FaceSample:
    """A face in one sampled frame."""

    description: np.ndarray
    """A unit vector [size]."""
    sharpness: float
    """0 to 1."""
    pose: tuple[float, float, float]
    """Yaw, pitch and roll in degrees."""


@dataclass
class FaceTrack:
    """One face, from the frame that shows it first to the one that shows it last."""

    box: np.ndarray
    """[4] x0, y0, x1, y1 in fractions of the frame: where it was found last."""
    region: Region | None = None
    """Where to search it in the next frame; None while it is lost."""
    points: dict[int, np.ndarray] = field(default_factory=dict)
    """Its mesh, [478, 3], by frame number."""
    seen: list[int] = field(default_factory=list)
    """The sampled frames in which it was found."""
    weight: float = 0.0
    """The sum of its heights over these frames, in fractions of the frame's height."""
    samples: list[FaceSample] = field(default_factory=list)
    """Its samples from the sampled frames that have a mesh."""


class FaceTracker:
    """Follows the faces of one clip, frame by frame.

    The detector runs on every `step`-th frame, to find faces that are new or were lost. In between, the mesh of each
    face is fitted where the face just was. A face counts only if the mesh fits, because the detector alone takes some
    patterns for faces.
    """

    def __init__(self, mesh: Mesh, detect: Detect, step: int, every: int = 1) -> None:
        """step: frames from one detection to the next, a multiple of `every`. every: only each `every`-th frame is
        searched."""
        self._mesh, self._detect, self._step, self._every = mesh, detect, step, every
        self._alive: list[FaceTrack] = []
        self.tracks: list[FaceTrack] = []
        """All tracks so far."""
        self.frames = 0
        """The number of frames so far."""

    def add(self, image: np.ndarray) -> list[FaceTrack] | None:
        """Search the next frame, [height, width, 3] uint8 RGB.

        Returns: the tracks of the faces in it if it is a sampled frame, each `step`-th; None for other frames.
        """
        number, size = self.frames, (image.shape[1], image.shape[0])
        self.frames += 1
        if number % self._every:
            return None
        for track in self._alive:
            self._follow(track, image, number, size)
        if number % self._step:
            return None
        for face in self._detect(image):
            self._match(face, image, number, size)
        present: list[FaceTrack] = []
        for track in self._alive:
            found = number in track.points
            if found and not any(overlap(track.box, other.box) > _SAME_PLACE for other in present):
                track.seen.append(number)
                track.weight += float(track.box[3] - track.box[1])
                present.append(track)
        self._alive = present
        return list(present)

    def _follow(self, track: FaceTrack, image: np.ndarray, number: int, size: tuple[int, int]) -> None:
        points = self._mesh(image, track.region) if track.region else None
        if points is None:
            track.region = None
            return
        track.points[number], track.box = points, box_of(points)
        track.region = region_of_points(points, size)

    def _match(self, face: Face, image: np.ndarray, number: int, size: tuple[int, int]) -> None:
        """Add a detected face to its track, or to a new one. A face that the mesh does not fit is ignored."""
        box = np.array([face.x, face.y, face.x + face.width, face.y + face.height], np.float32)
        track = max(self._alive, key=lambda t: overlap(t.box, box), default=None)
        if track is None or overlap(track.box, box) < _OVERLAP:
            track = FaceTrack(box)
        if number in track.points:
            return
        followed = sum(other.region is not None for other in self._alive)
        track.region = region_of_face(face, size)
        # Twice, because the detector's box gives neither the turn nor the exact size.
        self._follow(track, image, number, size)
        self._follow(track, image, number, size)
        if followed >= _MAX_FOLLOWED:
            track.region = None
        if number in track.points and not any(track is other for other in self._alive):
            self.tracks.append(track)
            self._alive.append(track)


def people_of(tracks: list[FaceTrack], same_person: float) -> list[list[FaceTrack]]:
    """Group tracks by person, the most prominent person first.

    Tracks that look alike and share no frame are one person.

    same_person: cosine of two descriptions from which they are of one person.
    """
    people: list[list[FaceTrack]] = []
    for track in sorted(tracks, key=lambda t: -t.weight):
        alike = [
            (likeness(person, [track]), person)
            for person in people
            if not any(track.points.keys() & other.points.keys() for other in person)
        ]
        likest, person = max(alike, key=lambda pair: pair[0], default=(-1.0, []))
        if person and likest >= same_person:
            person.append(track)
        else:
            people.append([track])
    return sorted(people, key=lambda person: -sum(track.weight for track in person))


def likeness(one: list[FaceTrack], other: list[FaceTrack]) -> float:
    """Cosine of the mean descriptions of two lists of tracks; -1 if one of them has no sample."""
    descriptions = [[sample.description for track in tracks for sample in track.samples] for tracks in (one, other)]
    if not all(descriptions):
        return -1.0
    first, second = (unit(np.mean(vectors, axis=0)) for vectors in descriptions)
    return float((first * second).sum())


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two boxes, [4] x0, y0, x1, y1."""
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = float(np.prod(np.maximum(high - low, 0)))
    areas = sum(float(np.prod(np.maximum(box[2:] - box[:2], 0))) for box in (one, other))
    return shared / (areas - shared) if areas > shared else 0.0
