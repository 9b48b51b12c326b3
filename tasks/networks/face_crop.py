"""Face tracks and mouth crops as in the pipeline of SyncNet's reference implementation (joonson/syncnet_python).

The numbers below are those behind the published figures. Boxes are x0, y0, x1, y1 in pixels of the frame.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.networks.syncnet import SIDE

MIN_TRACK = 100  # detections that a track has to exceed
MIN_FACE = 100.0  # pixels that the longer side of a track's face has to exceed
MAX_GAP = 25  # frames, at most, from one detection of a track to the next
_MIN_IOU = 0.5  # intersection over union with the track's last box that a detection has to exceed
_MEDIAN_FRAMES = 13  # of the median filter over boxes
_MARGIN = 0.4  # of half the face's side: added at the left and the right, and twice below
_GREY = 110  # beyond the frame's edges


@dataclass(frozen=True)
class FaceCropTrack:
    """One face in successive frames.

    first: the number of its first frame. boxes: [frames, 4] float64.
    """

    first: int
    boxes: np.ndarray

    @property
    def last(self) -> int:
        return self.first + len(self.boxes) - 1

    @property
    def side(self) -> float:
        """The larger of the face's mean width and mean height, in pixels."""
        return float((self.boxes[:, 2:] - self.boxes[:, :2]).mean(axis=0).max())


def tracks(
    found: Sequence[np.ndarray], min_track: int = MIN_TRACK, min_face: float = MIN_FACE, first: int = 0
) -> list[FaceCropTrack]:
    """Join the detections of one shot to tracks.

    Tracks are built one after the other, each from the earliest detection that is left. In each frame a track takes the
    first detection that overlaps its last box. It ends where the next such detection is more than 25 frames away.

    found: for each frame, [faces, 4 or more], the boxes of a detector.
    min_track: detections that a track has to exceed to be kept.
    min_face: pixels that its face's side has to exceed.
    first: the number of the shot's first frame.
    """
    left = [[np.asarray(face[:4], np.float64) for face in faces] for faces in found]
    kept = []
    for start in range(len(left)):
        while left[start]:
            frames, boxes = [start], [left[start].pop(0)]
            for number in range(start + 1, len(left)):
                if number - frames[-1] > MAX_GAP:
                    break
                match = next(
                    (index for index, face in enumerate(left[number]) if _iou(face, boxes[-1]) > _MIN_IOU), None
                )
                if match is not None:
                    frames.append(number)
                    boxes.append(left[number].pop(match))
            if len(frames) > min_track:
                track = FaceCropTrack(first + start, _interpolated(np.array(frames), np.array(boxes)))
                if track.side > min_face:
                    kept.append(track)
    return kept


def followed(boxes: np.ndarray, min_track: int = MIN_TRACK) -> FaceCropTrack | None:
    """The longest track in the boxes of one face that was already followed, such as by the stage `identity`.

    boxes: [frames, 4], NaN in frames where the face is not seen. Boxes up to 25 frames apart are joined by
        interpolation.
    min_track: frames with the face that the track has to exceed.

    Returns: None where no track is long enough.
    """
    seen = np.flatnonzero(~np.isnan(boxes).any(axis=1))
    if not seen.size:
        return None
    stretches = np.split(seen, np.flatnonzero(np.diff(seen) > MAX_GAP) + 1)
    longest = max(stretches, key=len)
    if len(longest) <= min_track:
        return None
    return FaceCropTrack(int(longest[0]), _interpolated(longest, boxes[longest].astype(np.float64)))


def _interpolated(frames: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """[frames[-1] - frames[0] + 1, 4]: boxes of all frames, linear between the known ones."""
    every = np.arange(frames[0], frames[-1] + 1)
    return np.stack([np.interp(every, frames, values) for values in boxes.T], axis=1)


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    both = np.maximum(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0).prod()
    union = (one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - both
    return float(both / union) if union > 0 else 0.0


def smoothed(boxes: np.ndarray) -> np.ndarray:
    """Boxes as centre and half side, each smoothed by a median over 13 frames.

    The filter sees zeros beyond the ends, as in the reference. So the first and last six frames are drawn towards the
    top left corner and made smaller.

    boxes: [frames, 4]. Returns: [frames, 3]: centre x, centre y and half the longer side, in pixels.
    """
    from scipy.signal import medfilt

    half = (boxes[:, 2:] - boxes[:, :2]).max(axis=1) / 2
    places = np.column_stack([(boxes[:, :2] + boxes[:, 2:]) / 2, half])
    return np.stack([medfilt(values, _MEDIAN_FRAMES) for values in places.T], axis=1)


def window(place: np.ndarray) -> tuple[int, int, int, int]:
    """The rectangle that is cut out around a face.

    It reaches further down than up, which brings the mouth to its middle.

    place: [3] centre x, centre y and half side (see `smoothed`).

    Returns: rows y0, y1 and columns x0, x1 in pixels of the frame. They may lie beyond its edges.
    """
    x, y, half = (float(value) for value in place)
    border = int(half * (1 + 2 * _MARGIN))  # the reference pads by this and then cuts; its sums decide the rounding
    edges = (
        (y + border) - half,
        (y + border) + half * (1 + 2 * _MARGIN),
        (x + border) - half * (1 + _MARGIN),
        (x + border) + half * (1 + _MARGIN),
    )
    y0, y1, x0, x1 = (int(edge) - border for edge in edges)
    return y0, y1, x0, x1


def crops(frames: Iterable[np.ndarray], track: FaceCropTrack) -> Iterator[np.ndarray]:
    """The mouth crop of each frame of a track.

    frames: [height, width, 3] uint8 each, all frames of the video in order. Yields: [224, 224, 3] uint8.
    """
    places = smoothed(track.boxes)
    for number, image in enumerate(frames):
        if number > track.last:
            return
        if number >= track.first:
            yield cut_face(image, places[number - track.first])


def cut_face(image: np.ndarray, place: np.ndarray) -> np.ndarray:
    """One mouth crop. It is grey beyond the image's edges.

    image: [height, width, 3] uint8. place: [3] centre x, centre y and half side (see `smoothed`).

    Returns: [224, 224, 3] uint8.
    """
    import cv2

    height, width = image.shape[:2]
    y0, y1, x0, x1 = window(place)
    border = int(float(place[2]) * (1 + 2 * _MARGIN))
    y1, x1 = min(y1, height + border), min(x1, width + border)  # where the reference's padded image ends
    inside = image[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)]
    if y1 <= y0 or x1 <= x0 or not inside.size:
        return np.full((SIDE, SIDE, 3), _GREY, np.uint8)
    beyond = (max(0, -y0), max(0, y1 - height), max(0, -x0), max(0, x1 - width))
    padded = cv2.copyMakeBorder(inside, *beyond, cv2.BORDER_CONSTANT, value=(_GREY,) * 3)
    return cv2.resize(padded, (SIDE, SIDE))
