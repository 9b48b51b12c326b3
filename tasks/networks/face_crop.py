"""A mouth followed and cut out as SyncNet is used to it: tracker and crop of the reference's pipeline.

The numbers below are those behind the published figures. Boxes are x0, y0, x1, y1 in pixels of the frame.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.networks.syncnet import SIDE

MIN_TRACK = 100  # frames; a track has to have more
MIN_FACE = 100.0  # pixels; the face's larger side has to be more
MAX_GAP = 25  # frames without the face
_SAME_FACE = 0.5  # overlap with the box before
_SMOOTHED = 13  # frames
_WIDER = 0.4  # of the face's half side, added at either side and, twice, below
_GREY = 110  # beyond the picture's edges


@dataclass(frozen=True)
class Track:
    """A face in successive frames. first: the number of its first frame. boxes: [frames, 4] float64."""

    first: int
    boxes: np.ndarray

    @property
    def last(self) -> int:
        return self.first + len(self.boxes) - 1

    @property
    def side(self) -> float:
        """Of the face, pixels: the larger of mean width and mean height."""
        return float((self.boxes[:, 2:] - self.boxes[:, :2]).mean(axis=0).max())


def tracks(
    found: Sequence[np.ndarray], min_track: int = MIN_TRACK, min_face: float = MIN_FACE, first: int = 0
) -> list[Track]:
    """Detections joined to faces, each to the next one that overlaps it, the earliest first.

    found: for each frame of one shot, [faces, 4 or more], boxes of a detector. min_track: detections that a track has
    to have more than. min_face: pixels that its side has to be more than. first: the number of the shot's first frame.
    """
    left = [[np.asarray(face[:4], np.float64) for face in faces] for faces in found]
    kept = []
    for start in range(len(left)):
        while left[start]:
            frames, boxes = [start], [left[start].pop(0)]
            for number in range(start + 1, len(left)):
                if number - frames[-1] > MAX_GAP:
                    break
                near = next(
                    (at for at, face in enumerate(left[number]) if _overlap(face, boxes[-1]) > _SAME_FACE), None
                )
                if near is not None:
                    frames.append(number)
                    boxes.append(left[number].pop(near))
            if len(frames) > min_track:
                track = Track(first + start, _filled(np.array(frames), np.array(boxes)))
                if track.side > min_face:
                    kept.append(track)
    return kept


def followed(boxes: np.ndarray, min_track: int = MIN_TRACK) -> Track | None:
    """The longest stretch of a face that something else has followed.

    boxes: [frames, 4], NaN where it is not seen; gaps of up to 25 frames are bridged. min_track: frames in which it has
    to be seen more than. Returns: None when there is no such stretch.
    """
    seen = np.flatnonzero(~np.isnan(boxes).any(axis=1))
    if not seen.size:
        return None
    stretches = np.split(seen, np.flatnonzero(np.diff(seen) > MAX_GAP) + 1)
    longest = max(stretches, key=len)
    if len(longest) <= min_track:
        return None
    return Track(int(longest[0]), _filled(longest, boxes[longest].astype(np.float64)))


def _filled(frames: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """[frames[-1] - frames[0] + 1, 4]: boxes of all frames, linear between those known."""
    every = np.arange(frames[0], frames[-1] + 1)
    return np.stack([np.interp(every, frames, values) for values in boxes.T], axis=1)


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union."""
    both = np.maximum(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0).prod()
    union = (one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - both
    return float(both / union) if union > 0 else 0.0


def smoothed(boxes: np.ndarray) -> np.ndarray:
    """[frames, 3]: centre x, centre y and half the larger side of boxes [frames, 4], each by a median over 13 frames,
    zeros beyond the ends: the first and last six are drawn towards the top left and shrunk, as in the reference."""
    from scipy.signal import medfilt

    half = (boxes[:, 2:] - boxes[:, :2]).max(axis=1) / 2
    places = np.column_stack([(boxes[:, :2] + boxes[:, 2:]) / 2, half])
    return np.stack([medfilt(values, _SMOOTHED) for values in places.T], axis=1)


def window(place: np.ndarray) -> tuple[int, int, int, int]:
    """Rows y0, y1 and columns x0, x1 that are cut out about a place (x, y, half side), in pixels of the frame; to be
    found beyond its edges too. It reaches lower than higher, which brings the mouth to the middle."""
    x, y, half = (float(value) for value in place)
    border = int(half * (1 + 2 * _WIDER))  # the reference pads by so much, then cuts; the rounding is that of its sums
    edges = (
        (y + border) - half,
        (y + border) + half * (1 + 2 * _WIDER),
        (x + border) - half * (1 + _WIDER),
        (x + border) + half * (1 + _WIDER),
    )
    y0, y1, x0, x1 = (int(edge) - border for edge in edges)
    return y0, y1, x0, x1


def crops(frames: Iterable[np.ndarray], track: Track) -> Iterator[np.ndarray]:
    """The mouth in each frame of a track.

    frames: [height, width, 3] uint8 each, of the whole video in order. Yields: [224, 224, 3] uint8.
    """
    places = smoothed(track.boxes)
    for number, image in enumerate(frames):
        if number > track.last:
            return
        if number >= track.first:
            yield cut(image, places[number - track.first])


def cut(image: np.ndarray, place: np.ndarray) -> np.ndarray:
    """One picture, [224, 224, 3] uint8, from about a place (x, y, half side); grey where it is beyond the image."""
    import cv2

    height, width = image.shape[:2]
    y0, y1, x0, x1 = window(place)
    border = int(float(place[2]) * (1 + 2 * _WIDER))
    y1, x1 = min(y1, height + border), min(x1, width + border)  # where the reference's padded image ends
    inside = image[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)]
    if y1 <= y0 or x1 <= x0 or not inside.size:
        return np.full((SIDE, SIDE, 3), _GREY, np.uint8)
    beyond = (max(0, -y0), max(0, y1 - height), max(0, -x0), max(0, x1 - width))
    whole = cv2.copyMakeBorder(inside, *beyond, cv2.BORDER_CONSTANT, value=(_GREY,) * 3)
    return cv2.resize(whole, (SIDE, SIDE))
