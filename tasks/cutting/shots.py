"""Finds the shots of a source: the spans between cuts and fades, and the holes where frames cannot be decoded.

Cuts are found by PySceneDetect's AdaptiveDetector (tasks.cutting.cut_detector).

Fades through black are found by the rule of its ThresholdDetector: a frame whose mean brightness lies below a threshold
is black, and the middle of the black separates the shots.

The recipe's section and the ledger's table of shots are called `scenes`.
"""

import math
from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from tasks.cutting.cut_detector import CutDetector
from tasks.media.container import MediaError
from tasks.media.decode import BadFrame, MissingEnd, read_video
from tasks.media.upright import DecodedFrame
from tasks.stages.base import StageSettings

VERSION = 3

_MIN_RAMP = 0.3  # change of mean brightness a frame, 0 to 255; below it a fade has come to rest
_MAX_RAMP_S = 3.0  # no fade takes longer on one side of the black


class ScenesSettings(StageSettings):
    """How shots are told apart."""

    backend: Literal["pyscenedetect"] = "pyscenedetect"
    """The library that tells shots apart."""
    adaptive_threshold: float = Field(3.0, gt=1)
    """A cut's change of content, as a multiple of the mean change of the four frames around it. docs/thresholds.md has
    2 to 3."""
    min_content: float = Field(15.0, gt=0)
    """A cut's least change of content: mean change of hue, saturation and value, 0 to 255. PySceneDetect has 15."""
    fade_threshold: float = Field(12.0, ge=0)
    """A frame is black when its mean of R, G and B, 0 to 255, lies below this. PySceneDetect has 12."""
    height: int = Field(108, ge=32)
    """Lines that frames are scaled down to before they are compared."""
    max_bad_frames: float = Field(0.2, ge=0, le=1)
    """The largest share of a file's frames that may fail to decode. With more, the file as a whole is an error."""


@dataclass(frozen=True)
class Interval:
    """Seconds on the source clock."""

    start_s: float
    end_s: float


@dataclass(frozen=True)
class Shot:
    """What lies between two transitions. Times are seconds on the source clock."""

    start_s: float
    """The transition before it: the time of its first frame after a cut, the middle of the black after a fade."""
    end_s: float
    """The transition after it: the time of the next shot's first frame at a cut, the middle of the black at a fade."""
    clear_from_s: float
    """Where the part at full brightness begins, without black and fades."""
    clear_to_s: float
    """Where the part at full brightness ends. It equals `clear_from_s` in a shot that is black throughout."""
    cut_before: bool
    """Whether the shot begins at a transition; otherwise at the file's start or a hole."""
    cut_after: bool
    """Whether the shot ends at a transition; otherwise at the file's end or a hole."""


@dataclass(frozen=True)
class Scenes:
    """All shots of one source."""

    shots: list[Shot]
    """In order."""
    holes: list[Interval]
    """The spans that cannot be decoded, in order."""
    frames: int
    """Number of good frames."""
    bad_frames: int
    duration_s: float
    """The end of the last good frame, in seconds on the source clock."""


def backend_version() -> str:
    """PySceneDetect's version."""
    from importlib.metadata import version

    return f"scenedetect {version('scenedetect')}"


def __getattr__(name: str) -> Any:
    # The ledger's columns are built on first use, because importing pyarrow takes a quarter of a second.
    if name != "COLUMNS":
        raise AttributeError(name)
    import pyarrow as pa

    kinds: dict[Any, Any] = {float: pa.float64(), bool: pa.bool_()}
    structs = {
        c: pa.list_(pa.struct([(n, kinds[f.type]) for n, f in c.__dataclass_fields__.items()]))
        for c in (Shot, Interval)
    }
    return {"shots": structs[Shot], "holes": structs[Interval], "frames": int, "bad_frames": int, "duration_s": float}


def shots_of_row(row: Mapping[str, Any]) -> tuple[list[Shot], list[Interval]]:
    """Shots and holes from a row of the ledger's table `scenes`."""
    return [Shot(**shot) for shot in row["shots"]], [Interval(**hole) for hole in row["holes"]]


def find_shots(path: Path, settings: ScenesSettings) -> Scenes:
    """Decode a file once and find its shots.

    Raises tasks.media.container.MediaError when the file cannot be opened, and where `ShotFinder.finish` raises it.
    """
    finder = ShotFinder(settings)
    for event in read_video(path):
        finder.add(event)
    return finder.finish()


@dataclass(frozen=True)
class OpenShot:
    """What is certain of a shot whose end has not been found yet. Times are seconds on the source clock."""

    start_s: float
    """As the finished `Shot` will have it."""
    clear_from_s: float
    """As the finished `Shot` will have it."""
    cut_before: bool
    """As the finished `Shot` will have it."""
    sure_to_s: float
    """The shot neither ends nor begins to fade before this time."""
    newest_start_s: float
    """The clear part after the newest transition begins here. It need not be certain that this is a transition."""
    black_since_s: float
    """Frames have been black since this time; infinite when the last frame is not black."""


class ShotFinder:
    """Finds the shots of a source while the source is being decoded."""

    def __init__(self, settings: ScenesSettings) -> None:
        from av.video.reformatter import VideoReformatter

        self.shots: list[Shot] = []
        """Shots whose end is certain, in order. Later frames change none of them."""
        self._settings = settings
        self._scaler = VideoReformatter()
        self._stretch = _UnbrokenStretch(settings)
        self._holes: list[Interval] = []
        self._frames = self._bad = 0

    @property
    def open_shot(self) -> OpenShot | None:
        """The shot after the last of `shots`. None before its first frame."""
        return self._stretch.open_shot if self._stretch.times else None

    def add(self, event: DecodedFrame | BadFrame | MissingEnd) -> None:
        """Look at the decoder's next event."""
        from av.video.reformatter import Interpolation

        if isinstance(event, DecodedFrame):
            frame = event.frame
            height = min(self._settings.height, frame.height)
            width = max(2, round(frame.width * height / frame.height))
            # the cheapest scaler finds the same shots as better ones
            small = self._scaler.reformat(
                frame, width, height, "bgr24", interpolation=Interpolation.FAST_BILINEAR, threads=1
            )
            self.shots += self._stretch.add(event.time_s, event.end_s, small.to_ndarray())
            self._frames += 1
            return
        if isinstance(event, BadFrame):
            self._bad += 1
        _add_hole(self._holes, event)
        if self._stretch.times and event.time_s >= self._stretch.times[-1]:
            self._stretch.end_s = min(self._stretch.end_s, event.time_s)
            self.shots += self._stretch.finish()
            self._stretch = _UnbrokenStretch(self._settings)

    def finish(self) -> Scenes:
        """All shots, once the file has ended.

        Raises MediaError when no frame could be decoded, or more were bad than the settings allow.
        """
        self.shots += self._stretch.finish()
        frames, bad = self._frames, self._bad
        if not frames:
            raise MediaError("no frame of its video can be decoded")
        if bad > self._settings.max_bad_frames * (frames + bad):
            raise MediaError(
                f"{bad} of {frames + bad} frames cannot be decoded ({bad / (frames + bad):.0%}, at most "
                f"{self._settings.max_bad_frames:.0%} may), the first at {self._holes[0].start_s:.3f} s"
            )
        return Scenes(self.shots, self._holes, frames, bad, max(shot.end_s for shot in self.shots))


def _add_hole(holes: list[Interval], event: BadFrame | MissingEnd) -> None:
    if holes and event.time_s <= holes[-1].end_s + 0.001:
        holes[-1] = Interval(min(holes[-1].start_s, event.time_s), max(holes[-1].end_s, event.end_s))
    else:
        holes.append(Interval(event.time_s, event.end_s))


@dataclass
class _Fade:
    """A fade through black, by frame numbers."""

    bright_to: int
    """The first frame that is darker than full brightness."""
    black_from: int
    """The first black frame."""
    black_to: int | None = None
    """The first frame after the black; None while it is black."""
    bright_from: int | None = None
    """The first frame at full brightness again; None while it is black."""


class _UnbrokenStretch:
    """Frames without a hole among them, and their shots.

    A shot is given out as soon as no later frame can change its end. Frames are numbered from zero in each stretch.
    """

    def __init__(self, settings: ScenesSettings) -> None:
        self.times: array[float] = array("d")
        """When each frame appears, in seconds."""
        self.end_s = 0.0
        """When the last frame ends, in seconds."""
        self._fade_threshold = settings.fade_threshold
        self._brightness: array[float] = array("d")
        self._start_s = 0.0  # of the open shot
        self._clear_from_s = 0.0  # of the open shot
        self._num_shots = 0  # given out so far
        self._detector = CutDetector(settings.adaptive_threshold, settings.min_content)
        self._cuts = self._detector.cuts  # those that have not ended a shot yet
        self._fades: deque[_Fade] = deque()  # those that have not ended a shot yet; the last one may be going on
        self._last_fade_to = -1  # where the last fade that ended a shot is over; a cut before it is part of the fade
        self._darkening_from = 0  # each frame since has been darker than the one before, within _MAX_RAMP_S

    def add(self, time_s: float, end_s: float, image: np.ndarray) -> list[Shot]:
        """Add the next frame. Returns the shots whose end is now certain. image: [height, width, 3] uint8 BGR."""
        import cv2

        if not self.times:
            self._start_s = self._clear_from_s = time_s
        self.times.append(time_s)
        self.end_s = end_s
        self._brightness.append(sum(cv2.mean(image)[:3]) / 3)
        self._detector.add(len(self.times) - 1, time_s, image)
        self._watch_fades()
        return self._certain_shots()

    def finish(self) -> list[Shot]:
        """The rest of the shots, once all frames have been added."""
        if not self.times:
            return []
        self._detector.finish()
        clear_to_s = self.end_s
        if self._fades and self._fades[-1].black_to is None:
            fade = self._fades[-1]
            fade.black_to = fade.bright_from = len(self.times)
            clear_to_s = self._time(fade.bright_to)
        found = self._certain_shots(ended=True)
        return [*found, self._shot(self.end_s, clear_to_s, cut_after=False)]

    @property
    def open_shot(self) -> OpenShot:
        newest_start_s, black_since_s = self._clear_from_s, math.inf
        ends = [self._darkening_from, self._detector.first_undecided]
        if self._cuts:
            newest_start_s = self.times[self._cuts[-1]]
            ends.append(self._cuts[0])
        if self._fades:
            fade = self._fades[-1]
            if fade.bright_from is None:
                black_since_s = self.times[fade.black_from]
            else:
                newest_start_s = max(newest_start_s, self._time(fade.bright_from))
            ends.append(self._fades[0].bright_to)
        return OpenShot(
            start_s=self._start_s,
            clear_from_s=self._clear_from_s,
            cut_before=self._num_shots > 0,
            sure_to_s=self._time(min(ends)),
            newest_start_s=newest_start_s,
            black_since_s=black_since_s,
        )

    def _time(self, frame: int) -> float:
        return self.times[frame] if frame < len(self.times) else self.end_s

    # ---- shots ----

    def _certain_shots(self, ended: bool = False) -> list[Shot]:
        """Give out the shots whose end no later frame can change. ended: no later frame comes."""
        found: list[Shot] = []
        while self._cuts or self._fades:
            fade = self._fades[0] if self._fades else None
            if self._cuts and (fade is None or self._cuts[0] < fade.bright_to):
                cut = self._cuts[0]
                # If frames have been darkening since before the cut, it may still turn out to be part of a fade.
                if not ended and fade is None and self._darkening_from < cut > self._last_fade_to:
                    break
                self._cuts.popleft()
                if cut > self._last_fade_to:
                    found.append(self._end_shot(self.times[cut], self.times[cut], self.times[cut]))
                continue
            assert fade is not None
            goes_on = fade is self._fades[-1] and self._last_fade_goes_on()
            if not ended and (goes_on or self._detector.first_undecided <= fade.bright_to):
                break
            self._fades.popleft()
            assert fade.black_to is not None and fade.bright_from is not None
            self._last_fade_to = fade.bright_from
            if fade.black_from == 0:
                self._clear_from_s = self._time(fade.bright_from)
            elif fade.black_to < len(self.times):
                middle = fade.black_from + round((fade.black_to - fade.black_from) / 2)
                found.append(
                    self._end_shot(self.times[middle], self._time(fade.bright_to), self._time(fade.bright_from))
                )
        return found

    def _end_shot(self, transition_s: float, clear_to_s: float, next_clear_from_s: float) -> Shot:
        """End the open shot at a transition, and begin the next one there."""
        shot = self._shot(transition_s, clear_to_s, cut_after=True)
        self._start_s, self._clear_from_s = transition_s, next_clear_from_s
        self._num_shots += 1
        return shot

    def _shot(self, end_s: float, clear_to_s: float, cut_after: bool) -> Shot:
        clear_to_s = max(clear_to_s, self._clear_from_s)
        return Shot(self._start_s, end_s, self._clear_from_s, clear_to_s, self._num_shots > 0, cut_after)

    # ---- fades ----

    def _watch_fades(self) -> None:
        level, now = self._brightness, len(self.times) - 1
        if now == 0 or level[now - 1] <= level[now] + _MIN_RAMP:
            self._darkening_from = now
        while self.times[now] - self.times[self._darkening_from] >= _MAX_RAMP_S:
            self._darkening_from += 1
        is_black = level[now] < self._fade_threshold
        fade = self._fades[-1] if self._fades else None
        if fade is not None and fade.black_to is None:
            if not is_black:
                fade.black_to = fade.bright_from = now
        elif is_black:
            self._fades.append(_Fade(self._bright_to(now), now))
        elif fade is not None and fade.bright_from == now - 1 and self._brightens(fade, now):
            fade.bright_from = now

    def _bright_to(self, black_from: int) -> int:
        """Where the fade began that has become black at the frame `black_from`."""
        level, bright_to = self._brightness, black_from
        while (
            bright_to > 1
            and level[bright_to - 2] > level[bright_to - 1] + _MIN_RAMP
            and self.times[black_from] - self.times[bright_to - 1] < _MAX_RAMP_S
        ):
            bright_to -= 1
        return bright_to

    def _brightens(self, fade: _Fade, frame: int) -> bool:
        """Whether a frame after the black is still part of the fade."""
        assert fade.black_to is not None
        rises = self._brightness[frame] > self._brightness[frame - 1] + _MIN_RAMP
        return rises and self.times[frame] - self.times[fade.black_to] < _MAX_RAMP_S

    def _last_fade_goes_on(self) -> bool:
        """Whether the next frame may still belong to the last fade."""
        return self._fades[-1].bright_from in (None, len(self.times) - 1)
