"""Finds cuts among consecutive frames, by PySceneDetect's AdaptiveDetector.

The detector compares a frame's change of content with the changes around it. Fast pans and shaking cameras are
therefore not taken for cuts.
"""

from array import array
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scenedetect.detectors import AdaptiveDetector

_WINDOW = 2  # frames on each side that the adaptive detector compares with, its default
_SAME = 0.4  # mean difference of 8-bit values below which a frame repeats the one before it
_REPEAT_S = 0.1  # the longest time that one frame repeats another in footage of 10 or more frames a second


class CutDetector:
    """Frames without a hole among them, added one by one; and the cuts found so far.

    Repeated frames (pulldown, doubled frames) are not shown to PySceneDetect. With them, every true frame in between
    would stand out like a cut. A frame that repeats for longer than 0.1 s is a still image, and is shown.

    Frames are numbered by the caller, from zero.
    """

    def __init__(self, adaptive_threshold: float, min_content: float) -> None:
        """adaptive_threshold, min_content: as in tasks.cutting.shots.ScenesSettings."""
        self.cuts: deque[int] = deque()
        """Frames that a new shot begins with, in order. The caller removes those that it has dealt with."""
        self._adaptive_threshold, self._min_content = adaptive_threshold, min_content
        self._detector: AdaptiveDetector | None = None
        self._num_frames = 0
        self._shown: array[int] = array("q")  # the frames that the detector has been shown, mirrored ones aside
        self._frame_of: array[int] = array("q")  # our frame number, by the detector's
        self._recent: list[np.ndarray] = []  # the last frames that the detector was shown
        self._moved_s = 0.0  # the time of the last frame that was no repeat

    def add(self, frame: int, time_s: float, image: np.ndarray) -> None:
        """Look at the next frame. image: [height, width, 3] uint8 BGR."""
        import cv2

        self._num_frames = frame + 1
        if self._recent and self._recent[-1].shape != image.shape:
            self.finish()
            self.cuts.append(frame)  # the video changes its size mid-stream
        elif self._recent and cv2.norm(self._recent[-1], image, cv2.NORM_L1) < _SAME * image.size:
            if time_s - self._moved_s < _REPEAT_S:
                return
        else:
            self._moved_s = time_s
        self._shown.append(frame)
        self._recent = [*self._recent[-_WINDOW:], image]
        if len(self._shown) == 1 + _WINDOW:
            # No frames come before the first ones. The frames after them are used instead, mirrored.
            for mirrored in self._recent[:0:-1]:
                self._show(self._shown[0], mirrored)
            for number, first in zip(self._shown, self._recent, strict=True):
                self._show(number, first)
        elif len(self._shown) > 1 + _WINDOW:
            self._show(frame, image)

    def finish(self) -> None:
        """Find the cuts among the last frames. A frame that is added later starts a new stretch of frames."""
        if self._detector is not None:
            for mirrored in self._recent[-2::-1]:
                self._show(self._shown[-1], mirrored)
        self._detector, self._frame_of, self._shown, self._recent = None, array("q"), array("q"), []

    @property
    def first_undecided(self) -> int:
        """The first frame that may still turn out to be a cut."""
        if len(self._shown) > _WINDOW:
            return self._shown[-_WINDOW]
        return self._shown[0] + 1 if self._shown else self._num_frames

    def _show(self, frame: int, image: np.ndarray) -> None:
        from scenedetect.common import FrameTimecode
        from scenedetect.detectors import AdaptiveDetector

        if self._detector is None:
            self._detector = AdaptiveDetector(
                adaptive_threshold=self._adaptive_threshold,
                min_content_val=self._min_content,
                min_scene_len=0,
                window_width=_WINDOW,
            )
        # the detector only counts frames, so any frame rate will do
        number = len(self._frame_of)
        self._frame_of.append(frame)
        found = self._detector.process_frame(FrameTimecode(number, fps=25.0), image)
        frames = [self._frame_of[cut.frame_num] for cut in found]
        self.cuts += [cut for cut in frames if cut != self._shown[0]]
