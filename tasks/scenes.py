"""Shots: where the picture cuts or fades from one to the next, and where it cannot be decoded.

Cuts by PySceneDetect's AdaptiveDetector, which compares a frame's change of content with that of its neighbours, so
that fast pans and shaking cameras are not taken for cuts. Fades through black by the rule of its ThresholdDetector:
frames darker on average than a threshold are black, and the middle of the black parts the shots.
"""

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

VERSION = 2

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
    """Decode a file once, small, and find its shots.

    Raises tasks.media.MediaError when it cannot be opened, when nothing of it can be decoded, and when the share of
    bad frames exceeds the settings'.
    """
    from av.video.reformatter import Interpolation, VideoReformatter

    scaler = VideoReformatter()
    segments = [_Segment(settings)]
    holes: list[Span] = []
    frames = bad = 0
    for event in read_video(path, rough=True):
        if isinstance(event, Picture):
            frame = event.frame
            height = min(settings.height, frame.height)
            width = max(2, round(frame.width * height / frame.height))
            # of the scalers the cheapest, which finds the same shots
            small = scaler.reformat(frame, width, height, "bgr24", interpolation=Interpolation.FAST_BILINEAR, threads=1)
            segments[-1].add(event.time_s, event.end_s, small.to_ndarray())
            frames += 1
            continue
        if isinstance(event, Bad):
            bad += 1
        _add_hole(holes, event)
        if segments[-1].times and event.time_s >= segments[-1].times[-1]:
            segments[-1].end_s = min(segments[-1].end_s, event.time_s)
            segments.append(_Segment(settings))
    if not frames:
        raise MediaError("no frame of its video can be decoded")
    if bad > settings.max_bad_frames * (frames + bad):
        share = bad / (frames + bad)
        raise MediaError(
            f"{bad} of {frames + bad} frames cannot be decoded ({share:.0%}, at most {settings.max_bad_frames:.0%} "
            f"may), the first at {holes[0].start_s:.3f} s"
        )
    shots = [shot for segment in segments for shot in segment.shots()]
    return Scenes(shots, holes, frames, bad, max(shot.end_s for shot in shots))


def _add_hole(holes: list[Span], event: Bad | Missing) -> None:
    if holes and event.time_s <= holes[-1].end_s + 0.001:
        holes[-1] = Span(min(holes[-1].start_s, event.time_s), max(holes[-1].end_s, event.end_s))
    else:
        holes.append(Span(event.time_s, event.end_s))


@dataclass
class _Segment:
    """Frames without a hole among them."""

    settings: ScenesSettings
    times: list[float] = field(default_factory=list)
    end_s: float = 0.0
    brightness: list[float] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    _indices: list[int] = field(default_factory=list)  # of the frames that the detector is shown
    _fed: list[int] = field(default_factory=list)  # what the detector's frame numbers stand for
    _recent: list[np.ndarray] = field(default_factory=list)  # the last frames that the detector was shown
    _moved: int = 0  # the last frame that was no repeat
    _detector: "AdaptiveDetector | None" = None

    def add(self, time_s: float, end_s: float, image: np.ndarray) -> None:
        """image: [height, width, 3] uint8 BGR."""
        import cv2

        index = len(self.times)
        self.times.append(time_s)
        self.end_s = end_s
        self.brightness.append(sum(cv2.mean(image)[:3]) / 3)
        # Frames that repeat the last one (pulldown, doubled frames) would make every true frame between them stand out
        # like a cut.
        if self._recent and self._recent[-1].shape != image.shape:
            self._finish()
            self.cuts.append(index)  # the picture changes its size mid-stream
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

    def shots(self) -> list[Shot]:
        """The shots, once all frames have been added."""
        if not self.times:
            return []
        self._finish()
        fades = self._fades()
        inside = {i for fade in fades for i in range(fade.full_to, fade.full_from + 1)}
        edges = sorted(
            [(self.times[c], self.times[c], self.times[c]) for c in self.cuts if c not in inside]
            + [(self.times[f.middle], self._time(f.full_to), self._time(f.full_from)) for f in fades if f.parts]
        )
        starts = [(self.times[0], self.times[0]), *((middle, clear) for middle, _, clear in edges)]
        ends = [*((middle, clear) for middle, clear, _ in edges), (self.end_s, self.end_s)]
        if fades and fades[0].black_from == 0:
            starts[0] = (self.times[0], self._time(fades[0].full_from))
        if fades and fades[-1].black_to == len(self.times):
            ends[-1] = (self.end_s, self._time(fades[-1].full_to))
        found = []
        for number, ((start, clear_from), (end, clear_to)) in enumerate(zip(starts, ends, strict=True)):
            clear_to = max(clear_to, clear_from)
            found.append(Shot(start, end, clear_from, clear_to, number > 0, number < len(edges)))
        return found

    def _time(self, index: int) -> float:
        return self.times[index] if index < len(self.times) else self.end_s

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
        self.cuts += [self._fed[cut.frame_num] for cut in found if self._fed[cut.frame_num] != self._indices[0]]

    def _finish(self) -> None:
        if self._detector is not None:
            for mirrored in self._recent[-2::-1]:
                self._feed(self._indices[-1], mirrored)
        self._detector, self._fed, self._indices, self._recent = None, [], [], []

    def _fades(self) -> list["_Fade"]:
        level = np.asarray(self.brightness)
        black = np.concatenate([[False], level < self.settings.fade_threshold, [False]])
        turns = np.flatnonzero(black[1:] != black[:-1])
        found = []
        for black_from, black_to in zip(turns[::2].tolist(), turns[1::2].tolist(), strict=True):
            full_to, full_from = black_from, black_to
            while (
                full_to > 1
                and level[full_to - 2] > level[full_to - 1] + _LEVEL
                and self.times[black_from] - self.times[full_to - 1] < _RAMP_S
            ):
                full_to -= 1
            while (
                full_from < len(level) - 1
                and level[full_from + 1] > level[full_from] + _LEVEL
                and self.times[full_from + 1] - self.times[black_to] < _RAMP_S
            ):
                full_from += 1
            middle = black_from + round((black_to - black_from) / 2)
            parts = black_from > 0 and black_to < len(level)
            found.append(_Fade(full_to, black_from, min(middle, len(level) - 1), black_to, full_from, parts))
        return found


@dataclass(frozen=True)
class _Fade:
    """Frame indices. full_to: from here on the picture darkens. black_from to black_to (exclusive): black, about
    `middle`. full_from: from here on it is bright again. parts: whether there is a picture on both sides."""

    full_to: int
    black_from: int
    middle: int
    black_to: int
    full_from: int
    parts: bool
