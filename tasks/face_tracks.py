"""Faces followed through a clip: who is where in which frame, and which faces are one person's."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tasks.face_looks import unit
from tasks.face_mesh import Region, box_of, region_of_face, region_of_points
from tasks.landmarks import Face

Mesh = Callable[[np.ndarray, Region], np.ndarray | None]
Detect = Callable[[np.ndarray], list[Face]]

_OVERLAP = 0.3  # intersection over union from which two boxes are one face's
_SAME_PLACE = 0.6  # from which two faces that are followed have become one
_MOST = 3  # faces that are followed at once; more are counted all the same


@dataclass(frozen=True)
class Look:
    """One look at a face: its description, a unit vector [size]; sharpness, 0 to 1; yaw, pitch and roll in degrees."""

    description: np.ndarray
    sharpness: float
    pose: tuple[float, float, float]


@dataclass
class Track:
    """One face, from where it was first seen to where it was last.

    points: its mesh, [478, 3], by number of frame. seen: the sampled frames in which it was found. weight: sum of its
    heights over these, in fractions of the frame's. looks: what it looks like in the sampled frames that have a mesh.
    """

    box: np.ndarray
    region: Region | None = None
    points: dict[int, np.ndarray] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)
    weight: float = 0.0
    looks: list[Look] = field(default_factory=list)


class Tracker:
    """Follows the faces of one clip, frame by frame.

    The detector looks at every `step`-th frame, for faces that are new or were lost; in between, each face is looked
    for where it just was. A face is what the mesh fits: the detector alone takes some patterns for faces.
    """

    def __init__(self, mesh: Mesh, detect: Detect, step: int, every: int = 1) -> None:
        """step: a multiple of `every`; of the frames, only each `every`-th is looked at."""
        self._mesh, self._detect, self._step, self._every = mesh, detect, step, every
        self._alive: list[Track] = []
        self.tracks: list[Track] = []
        self.frames = 0

    def add(self, image: np.ndarray) -> list[Track] | None:
        """Take the next frame, [height, width, 3] uint8 RGB. Returns: the faces in a sampled one, None for others."""
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
        present: list[Track] = []
        for track in self._alive:
            here = number in track.points
            if here and not any(overlap(track.box, other.box) > _SAME_PLACE for other in present):
                track.seen.append(number)
                track.weight += float(track.box[3] - track.box[1])
                present.append(track)
        self._alive = present
        return list(present)

    def _follow(self, track: Track, image: np.ndarray, number: int, size: tuple[int, int]) -> None:
        points = self._mesh(image, track.region) if track.region else None
        if points is None:
            track.region = None
            return
        track.points[number], track.box = points, box_of(points)
        track.region = region_of_points(points, size)

    def _match(self, face: Face, image: np.ndarray, number: int, size: tuple[int, int]) -> None:
        """Give a detected face to the track that it belongs to, or a new one; without a mesh it is none."""
        box = np.array([face.x, face.y, face.x + face.width, face.y + face.height], np.float32)
        track = max(self._alive, key=lambda t: overlap(t.box, box), default=None)
        if track is None or overlap(track.box, box) < _OVERLAP:
            track = Track(box)
        if number in track.points:
            return
        followed = sum(other.region is not None for other in self._alive)
        track.region = region_of_face(face, size)
        # twice, because the detector's box tells neither the turn nor the exact size
        self._follow(track, image, number, size)
        self._follow(track, image, number, size)
        if followed >= _MOST:
            track.region = None
        if number in track.points and not any(track is other for other in self._alive):
            self.tracks.append(track)
            self._alive.append(track)


def people_of(tracks: list[Track], same_person: float) -> list[list[Track]]:
    """Tracks by person, the most prominent first: those that share no frame and look alike are one person's.

    same_person: cosine of two descriptions from which they are of one person.
    """
    people: list[list[Track]] = []
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


def likeness(one: list[Track], other: list[Track]) -> float:
    """Cosine of the mean descriptions of two lists of tracks; -1 where one of them was never looked at."""
    means = [[look.description for track in tracks for look in track.looks] for tracks in (one, other)]
    if not all(means):
        return -1.0
    first, second = (unit(np.mean(mean, axis=0)) for mean in means)
    return float((first * second).sum())


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two boxes, [4] x0, y0, x1, y1."""
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = float(np.prod(np.maximum(high - low, 0)))
    areas = sum(float(np.prod(np.maximum(box[2:] - box[:2], 0))) for box in (one, other))
    return shared / (areas - shared) if areas > shared else 0.0
