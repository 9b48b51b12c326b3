"""Shots: where the picture cuts or fades from one to the next, and where it cannot be decoded.

Cuts by PySceneDetect's AdaptiveDetector, which compares a frame's change of content with that of its neighbours, so
that fast pans and shaking cameras are not taken for cuts. Fades through black by the rule of its ThresholdDetector:
frames darker on average than a threshold are black, and the middle of the black parts the shots.
"""

import math
from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from tasks.decode import Bad, Missing, read_video
from tasks.media import MediaError
from tasks.stage import StageSettings
from tasks.upright import Picture

if TYPE_CHECKING:
    from scenedetect.detectors import AdaptiveDetector

VERSION = 3

_WINDOW = 2  # frames each side that the adaptive detector compares with, its default
_SAME = 0.4  # mean difference of 8-bit values below which a frame repeats the one before it
_REPEAT_S = 0.1  # how long a frame is repeated where 10 and more a second are shown; longer, the picture stands still
_LEVEL = 0.3  # change of mean brightness a frame below which a fade has come to rest
_RAMP_S = 3.0  # no fade takes longer on one side


class ScenesSettings(StageSettings):
    """How shots are told apart.

    adaptive_threshold: change against the mean change of the four frames around (thresholds.md: 2 to 3).
    min_content: mean change of hue, saturation and value, 0 to 255, that a cut has at least (PySceneDetect: 15).
    fade_threshold: mean of R, G and B, 0 to 255, below which a frame is black (PySceneDetect: 12).
    height: lines that frames are scaled to before they are compared.
    max_bad_frames: share of a file's frames that may fail to decode before the file as a whole is an error.
    """

    backend: Literal["pyscenedetect"] = "pyscenedetect"
    adaptive_threshold: float = Field(3.0, gt=1)
    min_content: float = Field(15.0, gt=0)
    fade_threshold: float = Field(12.0, ge=0)
    height: int = Field(108, ge=32)
    max_bad_frames: float = Field(0.2, ge=0, le=1)


@dataclass(frozen=True)
class Span:
    """Seconds on the source clock."""

    start_s: float
    end_s: float


@dataclass(frozen=True)
class Shot:
    """What lies between two transitions; start_s and end_s are the transitions, on the source clock.

    At a cut, that is the time of the first frame of the next shot; at a fade, the middle of the black.
    clear_from_s, clear_to_s: the part at full brightness, without black and fades; empty when all is black.
    cut_before, cut_after: whether a transition bounds the shot there, rather than the file's end or a hole.
    """

    start_s: float
    end_s: float
    clear_from_s: float
    clear_to_s: float
    cut_before: bool
    cut_after: bool


@dataclass(frozen=True)
class Scenes:
    """The shots of one source in order, the spans that cannot be decoded, and the number of frames, good and bad.

    duration_s: to the end of the last good frame, on the source clock.
    """

    shots: list[Shot]
    holes: list[Span]
    frames: int
    bad_frames: int
    duration_s: float


def backend_version() -> str:
    """PySceneDetect's version."""
    from importlib.metadata import version

    return f"scenedetect {version('scenedetect')}"


def __getattr__(name: str) -> Any:
    # the ledger's columns, made when asked for: pyarrow takes a quarter of a second to import
    if name != "COLUMNS":
        raise AttributeError(name)
    import pyarrow as pa

    kinds: dict[Any, Any] = {float: pa.float64(), bool: pa.bool_()}
    structs = {
        c: pa.list_(pa.struct([(n, kinds[f.type]) for n, f in c.__dataclass_fields__.items()])) for c in (Shot, Span)
    }
    return {"shots": structs[Shot], "holes": structs[Span], "frames": int, "bad_frames": int, "duration_s": float}


def spans(row: Mapping[str, Any]) -> tuple[list[Shot], list[Span]]:
    """Shots and holes out of a row of the ledger."""
    return [Shot(**shot) for shot in row["shots"]], [Span(**hole) for hole in row["holes"]]


def find_shots(path: Path, settings: ScenesSettings) -> Scenes:
    """Decode a file once and find its shots. Raises tasks.media.MediaError when it cannot be opened, and as
    `ShotFinder.finish` does."""
    finder = ShotFinder(settings)
    for event in read_video(path):
        finder.add(event)
    return finder.finish()


@dataclass(frozen=True)
class UnderWay:
    """What is sure of a shot before its end has been found; seconds on the source clock.

    start_s, clear_from_s, cut_before: as of the `Shot` that it will be. to_s: it does not end, or begin to fade,
    earlier. newest_s: where the newest transition, sure or not, leads to a clear picture. black_s: since when it has
    been black; infinite when it is not.
    """

    start_s: float
    clear_from_s: float
    cut_before: bool
    to_s: float
    newest_s: float
    black_s: float


class ShotFinder:
    """Finds the shots of a source while it is decoded.

    shots: those whose end is sure, in order; what follows changes none of them.
    """

    def __init__(self, settings: ScenesSettings) -> None:
        from av.video.reformatter import VideoReformatter

        self.shots: list[Shot] = []
        self._settings = settings
        self._scaler = VideoReformatter()
        self._segment = _Segment(settings)
        self._holes: list[Span] = []
        self._frames = self._bad = 0

    @property
    def under_way(self) -> UnderWay | None:
        """The shot after the last of `shots`; None before its first frame."""
        return self._segment.under_way if self._segment.times else None

    def add(self, event: Picture | Bad | Missing) -> None:
        """Look at what comes next out of the decoder."""
        from av.video.reformatter import Interpolation

        if isinstance(event, Picture):
            frame = event.frame
            height = min(self._settings.height, frame.height)
            width = max(2, round(frame.width * height / frame.height))
            # of the scalers the cheapest, which finds the same shots
            small = self._scaler.reformat(
                frame, width, height, "bgr24", interpolation=Interpolation.FAST_BILINEAR, threads=1
            )
            self.shots += self._segment.add(event.time_s, event.end_s, small.to_ndarray())
            self._frames += 1
            return
        if isinstance(event, Bad):
            self._bad += 1
        _add_hole(self._holes, event)
        if self._segment.times and event.time_s >= self._segment.times[-1]:
            self._segment.end_s = min(self._segment.end_s, event.time_s)
            self.shots += self._segment.finish()
            self._segment = _Segment(self._settings)

    def finish(self) -> Scenes:
        """The shots, once the file has ended. Raises MediaError when nothing of it could be decoded, and when the share
        of bad frames exceeds the settings'."""
        self.shots += self._segment.finish()
        frames, bad = self._frames, self._bad
        if not frames:
            raise MediaError("no frame of its video can be decoded")
        if bad > self._settings.max_bad_frames * (frames + bad):
            raise MediaError(
                f"{bad} of {frames + bad} frames cannot be decoded ({bad / (frames + bad):.0%}, at most "
                f"{self._settings.max_bad_frames:.0%} may), the first at {self._holes[0].start_s:.3f} s"
            )
        return Scenes(self.shots, self._holes, frames, bad, max(shot.end_s for shot in self.shots))


def _add_hole(holes: list[Span], event: Bad | Missing) -> None:
    if holes and event.time_s <= holes[-1].end_s + 0.001:
        holes[-1] = Span(min(holes[-1].start_s, event.time_s), max(holes[-1].end_s, event.end_s))
    else:
        holes.append(Span(event.time_s, event.end_s))


@dataclass
class _Fade:
    """Frame indices. full_to: from here on the picture darkens. black_from to black_to (exclusive): black. full_from:
    from here on it is bright again. The last two are None as long as it is black."""

    full_to: int
    black_from: int
    black_to: int | None = None
    full_from: int | None = None


@dataclass
class _Segment:
    """Frames without a hole among them. A cut or fade parts the shots as soon as nothing that follows can change it."""

    settings: ScenesSettings
    times: "array[float]" = field(default_factory=lambda: array("d"))
    end_s: float = 0.0
    _brightness: "array[float]" = field(default_factory=lambda: array("d"))
    _start_s: float = 0.0  # of the shot under way
    _clear_from_s: float = 0.0
    _parted: int = 0  # how many shots have been found
    _cuts: deque[int] = field(default_factory=deque)  # which part no shots yet
    _fades: deque[_Fade] = field(default_factory=deque)  # likewise; the last one may be going on
    _inside_to: int = -1  # the last frame of the last fade that has been dealt with: a cut in it is part of it
    _falls_from: int = 0  # since when each frame has been darker than the one before it, as far back as a fade goes
    _indices: "array[int]" = field(default_factory=lambda: array("q"))  # of the frames that the detector is shown
    _fed: "array[int]" = field(default_factory=lambda: array("q"))  # what the detector's frame numbers stand for
    _recent: list[np.ndarray] = field(default_factory=list)  # the last frames that the detector was shown
    _moved: int = 0  # the last frame that was no repeat
    _detector: "AdaptiveDetector | None" = None

    def add(self, time_s: float, end_s: float, image: np.ndarray) -> list[Shot]:
        """The shots whose end this frame makes sure. image: [height, width, 3] uint8 BGR."""
        import cv2

        if not self.times:
            self._start_s = self._clear_from_s = time_s
        self.times.append(time_s)
        self.end_s = end_s
        self._brightness.append(sum(cv2.mean(image)[:3]) / 3)
        self._detect(image)
        self._watch_fades()
        return self._sure()

    def finish(self) -> list[Shot]:
        """The rest of the shots, once all frames have been added."""
        if not self.times:
            return []
        self._end_detection()
        black_to_the_end = None
        if self._fades and self._fades[-1].black_to is None:
            fade = self._fades[-1]
            fade.black_to = fade.full_from = len(self.times)
            black_to_the_end = self._time(fade.full_to)
        found = self._sure(ended=True)
        clear_to_s = self.end_s if black_to_the_end is None else black_to_the_end
        return [*found, self._shot(self.end_s, clear_to_s, cut_after=False)]

    @property
    def under_way(self) -> UnderWay:
        newest_s, black_s = self._clear_from_s, math.inf
        ends = [self._falls_from, self._unjudged()]
        if self._cuts:
            newest_s = self.times[self._cuts[-1]]
            ends.append(self._cuts[0])
        if self._fades:
            fade = self._fades[-1]
            if fade.full_from is None:
                black_s = self.times[fade.black_from]
            else:
                newest_s = max(newest_s, self._time(fade.full_from))
            ends.append(self._fades[0].full_to)
        return UnderWay(self._start_s, self._clear_from_s, self._parted > 0, self._time(min(ends)), newest_s, black_s)

    def _time(self, index: int) -> float:
        return self.times[index] if index < len(self.times) else self.end_s

    # ---- what parts the shots ----

    def _sure(self, ended: bool = False) -> list[Shot]:
        """Part the shots by what nothing that follows can change."""
        found: list[Shot] = []
        while self._cuts or self._fades:
            fade = self._fades[0] if self._fades else None
            if self._cuts and (fade is None or self._cuts[0] < fade.full_to):
                cut = self._cuts[0]
                # darkening since before the cut, it may yet turn out to be part of a fade
                if not ended and fade is None and self._falls_from < cut > self._inside_to:
                    break
                self._cuts.popleft()
                if cut > self._inside_to:
                    found.append(self._part(self.times[cut], self.times[cut], self.times[cut]))
                continue
            assert fade is not None
            going_on = fade is self._fades[-1] and self._fade_goes_on()
            if not ended and (going_on or self._unjudged() <= fade.full_to):
                break
            self._fades.popleft()
            assert fade.black_to is not None and fade.full_from is not None
            self._inside_to = fade.full_from
            if fade.black_from == 0:
                self._clear_from_s = self._time(fade.full_from)
            elif fade.black_to < len(self.times):
                middle = fade.black_from + round((fade.black_to - fade.black_from) / 2)
                found.append(self._part(self.times[middle], self._time(fade.full_to), self._time(fade.full_from)))
        return found

    def _part(self, middle_s: float, clear_to_s: float, clear_from_s: float) -> Shot:
        shot = self._shot(middle_s, clear_to_s, cut_after=True)
        self._start_s, self._clear_from_s = middle_s, clear_from_s
        self._parted += 1
        return shot

    def _shot(self, end_s: float, clear_to_s: float, cut_after: bool) -> Shot:
        clear_to_s = max(clear_to_s, self._clear_from_s)
        return Shot(self._start_s, end_s, self._clear_from_s, clear_to_s, self._parted > 0, cut_after)

    # ---- fades ----

    def _watch_fades(self) -> None:
        level, now = self._brightness, len(self.times) - 1
        if now == 0 or level[now - 1] <= level[now] + _LEVEL:
            self._falls_from = now
        while self.times[now] - self.times[self._falls_from] >= _RAMP_S:
            self._falls_from += 1
        black = level[now] < self.settings.fade_threshold
        fade = self._fades[-1] if self._fades else None
        if fade is not None and fade.black_to is None:
            if not black:
                fade.black_to = fade.full_from = now
        elif black:
            self._fades.append(_Fade(self._full_to(now), now))
        elif fade is not None and fade.full_from == now - 1 and self._brightens(fade, now):
            fade.full_from = now

    def _full_to(self, black_from: int) -> int:
        level, full_to = self._brightness, black_from
        while (
            full_to > 1
            and level[full_to - 2] > level[full_to - 1] + _LEVEL
            and self.times[black_from] - self.times[full_to - 1] < _RAMP_S
        ):
            full_to -= 1
        return full_to

    def _brightens(self, fade: _Fade, frame: int) -> bool:
        assert fade.black_to is not None
        rises = self._brightness[frame] > self._brightness[frame - 1] + _LEVEL
        return rises and self.times[frame] - self.times[fade.black_to] < _RAMP_S

    def _fade_goes_on(self) -> bool:
        """Whether the next frame may belong to the last fade, too."""
        return self._fades[-1].full_from in (None, len(self.times) - 1)

    # ---- cuts ----

    def _unjudged(self) -> int:
        """The first frame of which the detector may yet say that a shot begins with it."""
        if len(self._indices) > _WINDOW:
            return self._indices[-_WINDOW]
        return self._indices[0] + 1 if self._indices else len(self.times)

    def _detect(self, image: np.ndarray) -> None:
        import cv2

        index, time_s = len(self.times) - 1, self.times[-1]
        # Frames that repeat the last one (pulldown, doubled frames) would make every true frame between them stand out
        # like a cut.
        if self._recent and self._recent[-1].shape != image.shape:
            self._end_detection()
            self._cuts.append(index)  # the picture changes its size mid-stream
        elif self._recent and cv2.norm(self._recent[-1], image, cv2.NORM_L1) < _SAME * image.size:
            if time_s - self.times[self._moved] < _REPEAT_S:
                return
        else:
            self._moved = index
        self._indices.append(index)
        self._recent = [*self._recent[-_WINDOW:], image]
        if len(self._indices) == 1 + _WINDOW:
            # the first frames have none before them to be compared with: those after stand in, as in a mirror
            for mirrored in self._recent[:0:-1]:
                self._feed(self._indices[0], mirrored)
            for number, first in zip(self._indices, self._recent, strict=True):
                self._feed(number, first)
        elif len(self._indices) > 1 + _WINDOW:
            self._feed(index, image)

    def _feed(self, index: int, image: np.ndarray) -> None:
        from scenedetect.common import FrameTimecode
        from scenedetect.detectors import AdaptiveDetector

        if self._detector is None:
            self._detector = AdaptiveDetector(
                adaptive_threshold=self.settings.adaptive_threshold,
                min_content_val=self.settings.min_content,
                min_scene_len=0,
                window_width=_WINDOW,
            )
        # the detector counts frames; when they are shown is for us to know
        number = len(self._fed)
        self._fed.append(index)
        found = self._detector.process_frame(FrameTimecode(number, fps=25.0), image)
        self._cuts += [self._fed[cut.frame_num] for cut in found if self._fed[cut.frame_num] != self._indices[0]]

    def _end_detection(self) -> None:
        if self._detector is not None:
            for mirrored in self._recent[-2::-1]:
                self._feed(self._indices[-1], mirrored)
        self._detector, self._fed, self._indices, self._recent = None, array("q"), array("q"), []
