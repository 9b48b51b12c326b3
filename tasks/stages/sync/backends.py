"""The backends of the stage `sync`: comparing lips and sound, and finding the face for SyncNet."""

from abc import ABC, abstractmethod
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from tasks.media.clip import Clip
from tasks.stages.backend import Backend, Resources
from tasks.stages.sync.lip_audio_correlation import lip_curves, match, sound_curves
from tasks.weights import store as weights

if TYPE_CHECKING:
    import torch

    from tasks.networks.face_crop import FaceCropTrack
    from tasks.networks.s3fd import S3FD
    from tasks.networks.syncnet import SyncNet

MIN_FACE_S = 2.0
"""Seconds for which a face has to show."""

# How far a detector's box reaches above the brows, in heights from brows to chin. The boxes that S3FD was trained on
# end at the hairline. By the rule of facial thirds that is half a height above the brows, and hair hangs over it.
_FOREHEAD = 0.4


class SyncFit(NamedTuple):
    """How well sound and lips fit: the stage's columns, before the natural offset is subtracted."""

    offset_s: float | None
    confidence: float | None
    distance: float | None
    reason: str = ""


class FaceBackend(Backend, ABC):
    """A source of the main face's track for SyncNet."""

    @abstractmethod
    def __call__(self, clip: Clip, min_track: int) -> "FaceCropTrack | None":
        """Find the main face in the clip's frames at 25 a second.

        min_track: the face has to be found in more than this many frames, without a gap of more than a second.

        Returns: its track, with boxes in pixels from forehead to chin; None if there is no such face.
        """


class FollowedFace(FaceBackend):
    """The main face that the stage identity has followed. Its box is raised to the forehead."""

    resources: ClassVar[Resources] = Resources(memory_gb=0.1)  # measured, see `Lips`; beside SyncNet it adds 1 MB

    def __call__(self, clip: Clip, min_track: int) -> "FaceCropTrack | None":
        from tasks.networks.face_crop import followed
        from tasks.networks.syncnet import FPS

        record = clip.record
        boxes = clip.found["identity"].arrays["face_box"].astype(np.float64)
        boxes[:, 1] -= _FOREHEAD * (boxes[:, 3] - boxes[:, 1])
        shown = ((np.arange(-(-len(boxes) * FPS // record.fps) + 1) + 0.5) * record.fps / FPS).astype(int)
        return followed((boxes * ([record.width, record.height] * 2))[shown[shown < len(boxes)]], min_track)


class DetectedFace(FaceBackend):
    """The largest of the faces that S3FD finds and SyncNet's own tracker follows, as for published figures."""

    networks: ClassVar[tuple[str, ...]] = ("s3fd",)
    resources: ClassVar[Resources] = Resources(gpu=0.25, memory_gb=1.1, batch=8)
    """Memory by the size of its weights, not measured: the catalogue's 0.09 GB in float32, in which it computes, and an
    allowance of 1 GB for libraries and activations."""

    @classmethod
    def version(cls) -> str:
        return f"s3fd {weights.digest('s3fd')}"

    @cached_property
    def _network(self) -> "S3FD":
        from tasks.networks import s3fd

        return s3fd.load(_device())

    def __call__(self, clip: Clip, min_track: int) -> "FaceCropTrack | None":
        from tasks.networks.face_crop import tracks
        from tasks.networks.lip_scores import search
        from tasks.networks.s3fd import faces
        from tasks.networks.syncnet import FPS

        batch = self.resources.batch
        detections = list(search(lambda images: faces(self._network, images, batch=batch), clip.frames(rate=FPS)))
        # As in identity, the main face is the one whose height, summed over the frames, is greatest.
        return max(
            tracks(detections, min_track, min_face=0.0),
            key=lambda track: float((track.boxes[:, 3] - track.boxes[:, 1]).sum()),
            default=None,
        )


FACES: dict[str, type[FaceBackend]] = {"identity": FollowedFace, "s3fd": DetectedFace}


class SyncBackend(Backend, ABC):
    """A backend of the stage: compares the main face of a clip with its sound."""

    @abstractmethod
    def __init__(self, max_offset_s: float, face: FaceBackend) -> None:
        """max_offset_s: the largest offset to find, seconds. face: where the face comes from, for `syncnet`."""

    @abstractmethod
    def __call__(self, clip: Clip, samples: np.ndarray) -> SyncFit:
        """Find the best fit of the main face and `samples`, [samples] float32 at 16 kHz."""


class Lips(SyncBackend):
    """Canonical correlation of the face mesh's lips and the sound's energy in five bands.

    See tasks.stages.sync.lip_audio_correlation.
    """

    # measured: peak growth over one clip of 5 s (benchmarks/backends.py)
    resources: ClassVar[Resources] = Resources(memory_gb=0.2)

    def __init__(self, max_offset_s: float, face: FaceBackend) -> None:
        self._max_offset_s = max_offset_s

    @classmethod
    def version(cls) -> str:
        return f"scipy {version('scipy')}"

    def __call__(self, clip: Clip, samples: np.ndarray) -> SyncFit:
        lips = clip.found["identity"].arrays["lips"]
        fit = match(lip_curves(lips, clip.record.fps), sound_curves(samples), self._max_offset_s)
        if fit is None:
            return SyncFit(None, 0.0, 1.0)
        return SyncFit(fit.offset_s, fit.confidence, 1 - fit.correlation)


class SyncNetLips(SyncBackend):
    """SyncNet's vectors of lips and of sound, compared in windows that have both.

    See tasks.networks.syncnet.compare_windows. Frames are taken 25 a second by their times, whatever the clip's rate.
    The sound stays as it is.
    """

    networks: ClassVar[tuple[str, ...]] = ("syncnet",)
    defaults: ClassVar = {"max_offset_s": 0.6, "natural_s": 0.0}
    resources: ClassVar[Resources] = Resources(gpu=0.25, memory_gb=1.1, batch=16)
    """Memory by the size of its weights, not measured: the catalogue's 0.06 GB in float32, in which it computes, and an
    allowance of 1 GB for libraries and activations."""

    def __init__(self, max_offset_s: float, face: FaceBackend) -> None:
        self._max_offset_s, self._face = max_offset_s, face

    @classmethod
    def version(cls) -> str:
        import cv2

        libraries = f"torch {version('torch')}, scipy {version('scipy')}, opencv {cv2.__version__}"
        return f"syncnet {weights.digest('syncnet')}, {libraries}"

    @cached_property
    def _network(self) -> "SyncNet":
        from tasks.networks import syncnet

        return syncnet.load(_device())

    def __call__(self, clip: Clip, samples: np.ndarray) -> SyncFit:
        from tasks.networks.face_crop import crops
        from tasks.networks.lip_scores import sound_under
        from tasks.networks.syncnet import FPS, FRAMES, compare_windows

        shift = round(self._max_offset_s * FPS)
        track = self._face(clip, max(round(MIN_FACE_S * FPS), 2 * shift + FRAMES))
        if track is None:
            return SyncFit(None, None, None, "no face")
        sound = sound_under(samples * 32768.0, track)  # on the scale of int16
        fit = compare_windows(self._network, crops(clip.frames(rate=FPS), track), sound, shift, self.resources.batch)
        return SyncFit(-fit.offset / FPS, fit.confidence, fit.distance)


def _device() -> "torch.device":
    import torch

    from tasks.networks.device import device

    if device().type == "cpu":
        torch.set_num_threads(1)  # the workers run in parallel, so each uses one thread
    return device()


BACKENDS: dict[str, type[SyncBackend]] = {"lips": Lips, "syncnet": SyncNetLips}
