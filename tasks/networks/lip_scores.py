"""Sync-C and Sync-D of a whole video, as papers report them: faces found and followed, each measured by SyncNet.

The same for generated video and for the footage that it is compared with; a figure belongs with its `min_track`, the
tracks that it is the mean of and what could not be measured.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import numpy as np

from tasks.clip import SAMPLE_RATE
from tasks.networks.face_crop import MIN_FACE, MIN_TRACK, Track, crops, tracks
from tasks.networks.syncnet import FPS, Fit, SyncNet, evaluate

_SEARCHED = 32  # pictures that are held to be searched for faces together

Detector = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True)
class TrackScore:
    """One face's figures. first, last: frames of its track. offset: frames by which the sound is early."""

    first: int
    last: int
    sync_c: float
    sync_d: float
    offset: int


@dataclass(frozen=True)
class SyncScores:
    """A video's figures.

    sync_c, sync_d: means over the tracks. offset: of the track with the highest Sync-C, frames by which the sound is
    early. All three None without a track. tracks: what they come from. failures: what could not be measured, in words;
    empty when every track was. min_track: frames that a face had to be found in more than.
    """

    sync_c: float | None
    sync_d: float | None
    offset: int | None
    tracks: tuple[TrackScore, ...]
    failures: tuple[str, ...]
    min_track: int


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
    """Measure every face of a video against its sound.

    detect: the faces in pictures of one size, [faces, 4 or more] each: boxes in pixels (tasks.networks.s3fd.faces for
    published figures). frames: gives the frames from the start, [height, width, 3] uint8 RGB at 25 a second; called
    once to find faces and once for each track, so that a video need not be held in memory. samples: [samples] at
    16 kHz on the scale of int16, from the time of the first frame. shots: the frames at which shots start; no track
    goes from one into the next, and a shot with fewer than `min_track` frames is not searched. min_track: 100 in
    published figures, 50 in LatentSync's, under which a video of 81 frames has none. measure: `evaluate` as published,
    `compare` for short videos (tasks.networks.syncnet).
    """
    faces, failures = _tracks(detect, frames, shots, min_track, min_face)
    scores = []
    for track in faces:
        try:
            found = measure(network, crops(frames(), track), sound_of(samples, track))
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
) -> tuple[list[Track], list[str]]:
    found = list(search(detect, frames()))
    kept: list[Track] = []
    failures = []
    for first, end in zip(shots, [*shots[1:], len(found)], strict=True):
        in_shot = tracks(found[first:end], min_track, min_face, first) if end - first >= min_track else []
        kept += in_shot
        if not in_shot:
            seen = sum(len(faces) > 0 for faces in found[first:end])
            failures.append(
                f"frames {first} to {end - 1}: no face is followed in more than {min_track} frames at more than "
                f"{min_face:g} pixels; one is found in {seen}"
            )
    return kept, failures


def search(detect: Detector, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The faces in each frame, [faces, 4 or more], found in batches."""
    left = iter(frames)
    while some := list(islice(left, _SEARCHED)):
        yield from detect(some)


def sound_of(samples: np.ndarray, track: Track) -> np.ndarray:
    """The sound of a track's frames."""
    return samples[track.first * SAMPLE_RATE // FPS : (track.last + 1) * SAMPLE_RATE // FPS]
