"""Clips: which parts of a source they are, cut to the lengths that training wants; tasks.cut writes them."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from data_manifests.strict import Strict
from tasks.clip import ClipRecord
from tasks.ingest import SourceInfo
from tasks.scenes import Shot, Span

VERSION = 2

_STRETCH = 0.1  # part of a frame by which a shot may fall short of its last one


class ClipSettings(Strict):
    """What clips are like.

    fps: frames a second. short_side: pixels that a larger picture is scaled down to; smaller ones stay.
    min_s, max_s: bounds of a clip's length. trim_s: left off at each side of a cut (thresholds.md: 3 frames or 0.5 s).
    qp, preset: x264's quality, a constant quantiser, and speed.
    """

    fps: int = Field(25, ge=1, le=120)
    short_side: int = Field(480, ge=16, multiple_of=2)
    min_s: float = Field(5.0, gt=0, le=86_400)
    max_s: float = Field(20.0, gt=0, le=86_400)
    trim_s: float = Field(0.12, ge=0, le=86_400)
    qp: int = Field(20, ge=1, le=51)
    preset: Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"] = (
        "ultrafast"
    )

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.min_frames > self.max_frames:
            raise ValueError(f"no whole number of frames lies between min_s {self.min_s} and max_s {self.max_s}")
        return self

    @property
    def min_frames(self) -> int:
        return max(1, math.ceil(self.min_s * self.fps - 1e-6))

    @property
    def max_frames(self) -> int:
        return math.floor(self.max_s * self.fps + 1e-6)


@dataclass(frozen=True)
class Skipped:
    """A part of a source that no clip shows: seconds on the source clock, and why."""

    start_s: float
    end_s: float
    reason: str


def __getattr__(name: str) -> Any:
    # the ledger's columns, made when asked for: pyarrow takes a quarter of a second to import
    if name != "COLUMNS":
        raise AttributeError(name)
    import pyarrow as pa

    kinds: dict[Any, Any] = {str: pa.string(), float: pa.float64(), int: pa.int64()}
    clip = pa.struct([(f.name, kinds[f.type]) for f in dataclasses.fields(ClipRecord) if f.name != "metadata"])
    skipped = pa.struct([(f.name, kinds[f.type]) for f in dataclasses.fields(Skipped)])
    return {"clips": pa.list_(clip), "skipped": pa.list_(skipped)}


def plan(
    source: SourceInfo, shots: Sequence[Shot], holes: Sequence[Span], settings: ClipSettings
) -> tuple[list[ClipRecord], list[Skipped]]:
    """Say which clips a source gives: whole output frames, within the bounds, longer shots split.

    Returns the clips in order, not written yet, and what is left out with the reason.
    """
    clips: list[ClipRecord] = []
    skipped = [Skipped(hole.start_s, hole.end_s, "cannot be decoded") for hole in holes]
    for shot in shots:
        start_s, frames = _usable(shot, settings)
        found = clips_of(source, shot, settings)
        clips += found
        left_out = [
            (shot.start_s, shot.clear_from_s, "black or fading"),
            (shot.clear_to_s, shot.end_s, "black or fading"),
        ]
        if not found:
            left_out.append((shot.clear_from_s, shot.clear_to_s, f"shorter than min_s {settings.min_s:g}"))
        else:
            uneven = "between min_s and max_s the shot has no even split"
            after = uneven if sum(clip.frames for clip in found) < frames else "beside a cut"
            left_out += [(shot.clear_from_s, start_s, "beside a cut"), (found[-1].end_s, shot.clear_to_s, after)]
        skipped += [Skipped(a, b, why) for a, b, why in left_out if b - a >= 1 / settings.fps]
    return clips, sorted(skipped, key=lambda part: part.start_s)


def clips_of(source: SourceInfo, shot: Shot, settings: ClipSettings) -> list[ClipRecord]:
    """The clips of one shot, in order."""
    start_s, frames = _usable(shot, settings)
    whole = _whole(frames, settings.min_frames, settings.max_frames)
    rest = frames - whole * settings.max_frames
    lengths = [settings.max_frames] * whole + _split(rest, settings.min_frames, settings.max_frames)
    return _records(source, shot, start_s, lengths, settings)


def first_clips(source: SourceInfo, shot: Shot, settings: ClipSettings, known: int = 0) -> list[ClipRecord]:
    """The clips with which a shot begins that goes on beyond this part of it, however long it does; only those after
    the first `known`, for who asks at every picture."""
    start_s, frames = _usable(shot, settings, stretch=0.0)
    whole = _whole(frames, settings.min_frames, settings.max_frames)
    if whole <= known:
        return []
    return _records(source, shot, start_s, [settings.max_frames] * whole, settings)[known:]


def _usable(shot: Shot, settings: ClipSettings, stretch: float = _STRETCH) -> tuple[float, int]:
    """Start in seconds, and the number of whole output frames of a shot that are away from its transitions."""
    trim = math.ceil(settings.trim_s * settings.fps - 1e-6)
    frames = math.floor((shot.clear_to_s - shot.clear_from_s) * settings.fps + stretch)
    before = trim if shot.cut_before and shot.clear_from_s == shot.start_s else 0
    after = trim if shot.cut_after and shot.clear_to_s == shot.end_s else 0
    # by whole frames, so that where rates agree a clip's frames fall onto the source's
    return round(shot.clear_from_s + before / settings.fps, 6), frames - before - after


def _whole(frames: int, low: int, high: int) -> int:
    """How many clips of `high` frames a shot of at least so many frames begins with: as many as leave enough for a
    rest that can be split, so that they are known before the shot's end is."""
    if high == low:
        return max(0, frames // high)
    # an even split of n frames has n / high parts, rounded up, and from this n on each of them has `low` frames
    enough = low * (math.ceil((high - 1) / (high - low)) - 1)
    return max(0, (frames - max(enough, low)) // high)


def _split(frames: int, low: int, high: int) -> list[int]:
    """Lengths, in frames, of as few clips as can be, equal to a frame, each from `low` to `high`."""
    if frames < low:
        return []
    parts = math.ceil(frames / high)
    if frames // parts < low:  # narrow bounds, between which no even split falls
        return [high] * (parts - 1)
    length, longer = divmod(frames, parts)
    return [length + (number < longer) for number in range(parts)]


def _records(
    source: SourceInfo, shot: Shot, start_s: float, lengths: Sequence[int], settings: ClipSettings
) -> list[ClipRecord]:
    found = []
    at, ends_s = 0, start_s
    for length in lengths:
        begins_s = ends_s
        at += length
        # by rounding the last one could end a millionth beyond its shot
        ends_s = min(round(start_s + at / settings.fps, 6), shot.end_s)
        found.append(_record(source, begins_s, ends_s, length, settings))
    return found


def _record(source: SourceInfo, start_s: float, end_s: float, frames: int, settings: ClipSettings) -> ClipRecord:
    width, height = clip_size(source.width, source.height, settings.short_side)
    # everything that changes a byte of the clip, and nothing else: measurements of a clip outlive other settings
    made_of = [source.source_id, start_s, frames, settings.fps, width, height, settings.qp, settings.preset, VERSION]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
    clip_id = f"{source.source_id}-{round(start_s * 1000):08d}-{digest}"
    name = f"clips/{source.source_id[:2]}/{clip_id}"
    return ClipRecord(
        clip_id=clip_id,
        source_id=source.source_id,
        start_s=start_s,
        end_s=end_s,
        fps=settings.fps,
        frames=frames,
        width=width,
        height=height,
        video=f"{name}.mp4",
        audio=f"{name}.flac" if source.has_audio else "",
    )


def clip_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height of a clip in pixels, even, from those of its source on display; never larger."""
    scale = min(1.0, short_side / min(width, height))
    return tuple(max(2, min(2 * round(side * scale / 2), side // 2 * 2)) for side in (width, height))  # type: ignore[return-value]
