"""Sync-C and Sync-D of a whole video, as papers report them (SyncNet's confidence and distance).

Faces are detected and joined to tracks, and each track's mouth crops are compared with the audio. The same function
measures generated video and the footage that it is compared with. A figure is comparable only to figures of the same
`min_track`, and should be reported with its tracks and its failures.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import numpy as np

from tasks.media.clip import SAMPLE_RATE
from tasks.networks.face_crop import MIN_FACE, MIN_TRACK, FaceCropTrack, crops, tracks
from tasks.networks.syncnet import FPS, Fit, SyncNet, evaluate

_DETECTION_BATCH = 32  # frames that are held in memory for the detector

Detector = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True)
class TrackScore:
    """The figures of one face track."""

    first: int
    """The track's first frame."""
    last: int
    """The track's last frame."""
    sync_c: float
    """SyncNet's confidence at the best offset, higher is better."""
    sync_d: float
    """SyncNet's distance at the best offset, lower is better."""
    offset: int
    """Frames by which the audio is early."""


@dataclass(frozen=True)
class SyncScores:
    """The figures of a video."""

    sync_c: float | None
    """Mean Sync-C over the tracks; None without a track."""
    sync_d: float | None
    """Mean Sync-D over the tracks; None without a track."""
    offset: int | None
    """Frames by which the audio is early, of the track with the highest Sync-C; None without a track."""
    tracks: tuple[TrackScore, ...]
    """The tracks behind the means."""
    failures: tuple[str, ...]
    """Messages on shots without a track and on tracks that could not be measured."""
    min_track: int
    """Detections that a track had to exceed."""


def lip_scores(
    network: SyncNet,
    detect: Detector,
    frames: Callable[[], Iterable[np.ndarray]],
    samples: np.ndarray,
    shots: Sequence[int] = (0,),
    min_track: int = MIN_TRACK,
    min_face: float = MIN_FACE,
    measure: Callable[[SyncNet, Iterable[np.ndarray], np.ndarray], Fit] = evaluate,
) -> SyncScores:
    """Measure every face track of a video against its audio.

    detect: returns the faces in frames of one size, [faces, 4 or more] each: boxes in pixels. Published figures use
        tasks.networks.s3fd.faces.
    frames: returns an iterator over all frames, [height, width, 3] uint8 RGB at 25 a second. It is called once for
        detection and once for each track, so the video need not be held in memory.
    samples: [samples] at 16 kHz on the scale of int16, from the time of the first frame.
    shots: the frames at which shots start. No track crosses a cut. A shot with fewer than `min_track` frames is not
        searched.
    min_track: detections that a track has to exceed. 100 in published figures, 50 in LatentSync's. With 100, a video of
        81 frames has no track.
    min_face: pixels that a track's face has to exceed.
    measure: tasks.networks.syncnet.evaluate as published, tasks.networks.syncnet.compare_windows for short videos.
    """
    faces, failures = _tracks(detect, frames, shots, min_track, min_face)
    scores = []
    for track in faces:
        try:
            found = measure(network, crops(frames(), track), sound_under(samples, track))
        except ValueError as error:
            failures.append(f"frames {track.first} to {track.last}: {error}")
            continue
        scores.append(TrackScore(track.first, track.last, found.confidence, found.distance, found.offset))
    best = max(scores, key=lambda score: score.sync_c, default=None)
    return SyncScores(
        sync_c=fmean(score.sync_c for score in scores) if scores else None,
        sync_d=fmean(score.sync_d for score in scores) if scores else None,
        offset=best.offset if best else None,
        tracks=tuple(scores),
        failures=tuple(failures),
        min_track=min_track,
    )


def _tracks(
    detect: Detector,
    frames: Callable[[], Iterable[np.ndarray]],
    shots: Sequence[int],
    min_track: int,
    min_face: float,
) -> tuple[list[FaceCropTrack], list[str]]:
    found = list(search(detect, frames()))
    kept: list[FaceCropTrack] = []
    failures = []
    for first, end in zip(shots, [*shots[1:], len(found)], strict=True):
        in_shot = tracks(found[first:end], min_track, min_face, first) if end - first >= min_track else []
        kept += in_shot
        if not in_shot:
            seen = sum(len(faces) > 0 for faces in found[first:end])
            failures.append(
                f"frames {first} to {end - 1}: no face larger than {min_face:g} pixels is followed through more than "
                f"{min_track} frames; a face is found in {seen} of them"
            )
    return kept, failures


def search(detect: Detector, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The faces in each frame, [faces, 4 or more] each. The detector gets the frames in batches."""
    remaining = iter(frames)
    while batch := list(islice(remaining, _DETECTION_BATCH)):
        yield from detect(batch)


def sound_under(samples: np.ndarray, track: FaceCropTrack) -> np.ndarray:
    """The audio samples of a track's frames."""
    return samples[track.first * SAMPLE_RATE // FPS : (track.last + 1) * SAMPLE_RATE // FPS]
