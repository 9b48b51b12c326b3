"""Plans clips: which parts of a source become clips, within the lengths that training wants.

tasks.cutting.clip_writer writes the planned clips.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field, model_validator

from data_manifests.strict import Strict
from tasks.cutting.ingest import SourceInfo
from tasks.cutting.shots import Interval, Shot
from tasks.media.clip import ClipRecord
from tasks.media.encode import X264Preset

VERSION = 2

_TOLERANCE = 0.1  # part of a frame; a shot may fall this much short of its last output frame


class ClipSettings(Strict):
    """How clips are cut and encoded."""

    fps: int = Field(25, ge=1, le=120)
    """Frames a second."""
    short_side: int = Field(480, ge=16, multiple_of=2)
    """Pixels of the shorter side. A larger source is scaled down to it; a smaller one keeps its size."""
    min_s: float = Field(5.0, gt=0, le=86_400)
    """The shortest clip, in seconds."""
    max_s: float = Field(20.0, gt=0, le=86_400)
    """The longest clip, in seconds."""
    trim_s: float = Field(0.12, ge=0, le=86_400)
    """Seconds left off on each side of a cut. docs/thresholds.md has 3 frames or 0.5 s."""
    qp: int = Field(20, ge=1, le=51)
    """x264's constant quantiser. Smaller is better quality and larger files."""
    preset: X264Preset = "ultrafast"
    """x264's trade of encoding speed for file size."""

    @model_validator(mode="after")
    def _bounds_hold_a_frame(self) -> Self:
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
    """A part of a source that no clip shows, and why. Times are seconds on the source clock."""

    start_s: float
    end_s: float
    reason: str


def __getattr__(name: str) -> Any:
    # The ledger's columns are built on first use, because importing pyarrow takes a quarter of a second.
    if name != "COLUMNS":
        raise AttributeError(name)
    import pyarrow as pa

    kinds: dict[Any, Any] = {str: pa.string(), float: pa.float64(), int: pa.int64()}
    clip = pa.struct([(f.name, kinds[f.type]) for f in dataclasses.fields(ClipRecord) if f.name != "metadata"])
    skipped = pa.struct([(f.name, kinds[f.type]) for f in dataclasses.fields(Skipped)])
    return {"clips": pa.list_(clip), "skipped": pa.list_(skipped)}


def plan_clips(
    source: SourceInfo, shots: Sequence[Shot], holes: Sequence[Interval], settings: ClipSettings
) -> tuple[list[ClipRecord], list[Skipped]]:
    """Plan the clips of a source. Each consists of whole output frames within the bounds; longer shots are split.

    Returns the clips in order, not written yet, and the parts of the source that are left out, each with the reason.
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
            no_split = "between min_s and max_s the shot has no even split"
            after = no_split if sum(clip.frames for clip in found) < frames else "beside a cut"
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
    """The first clips of a shot whose end is not known yet. They are the same however long the shot goes on.

    shot: the part of the shot that is known. known: number of clips that the caller has already; only those after them
    are returned.
    """
    start_s, frames = _usable(shot, settings, tolerance=0.0)
    whole = _whole(frames, settings.min_frames, settings.max_frames)
    if whole <= known:
        return []
    return _records(source, shot, start_s, [settings.max_frames] * whole, settings)[known:]


def _usable(shot: Shot, settings: ClipSettings, tolerance: float = _TOLERANCE) -> tuple[float, int]:
    """The part of a shot away from its transitions: start in seconds, and number of whole output frames."""
    trim = math.ceil(settings.trim_s * settings.fps - 1e-6)
    frames = math.floor((shot.clear_to_s - shot.clear_from_s) * settings.fps + tolerance)
    before = trim if shot.cut_before and shot.clear_from_s == shot.start_s else 0
    after = trim if shot.cut_after and shot.clear_to_s == shot.end_s else 0
    # trimmed by whole frames: where the frame rates agree, each of the clip's frames coincides with one of the source
    return round(shot.clear_from_s + before / settings.fps, 6), frames - before - after


def _whole(frames: int, low: int, high: int) -> int:
    """How many clips of `high` frames a shot of at least `frames` frames begins with.

    After them enough frames are left for a rest that can be split. The answer therefore holds before the shot's end is
    known.
    """
    if high == low:
        return max(0, frames // high)
    # An even split of n frames has n / high parts, rounded up. From this n on, each part has at least `low` frames.
    enough = low * (math.ceil((high - 1) / (high - low)) - 1)
    return max(0, (frames - max(enough, low)) // high)


def _split(frames: int, low: int, high: int) -> list[int]:
    """Split frames into as few clips as possible, each of `low` to `high` frames, equal to within one frame.

    Returns their lengths in frames.
    """
    if frames < low:
        return []
    parts = math.ceil(frames / high)
    if frames // parts < low:  # the bounds are too narrow for an even split
        return [high] * (parts - 1)
    length, longer = divmod(frames, parts)
    return [length + (number < longer) for number in range(parts)]


def _records(
    source: SourceInfo, shot: Shot, start_s: float, lengths: Sequence[int], settings: ClipSettings
) -> list[ClipRecord]:
    found = []
    num_frames, ends_s = 0, start_s
    for length in lengths:
        begins_s = ends_s
        num_frames += length
        # by rounding, the last clip could end a millionth of a second beyond its shot
        ends_s = min(round(start_s + num_frames / settings.fps, 6), shot.end_s)
        found.append(_record(source, begins_s, ends_s, length, settings))
    return found


def _record(source: SourceInfo, start_s: float, end_s: float, frames: int, settings: ClipSettings) -> ClipRecord:
    width, height = clip_size(source.width, source.height, settings.short_side)
    # All that changes a byte of the clip, and nothing else. Measurements stay valid when other settings change.
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
    """A clip's width and height in pixels, both even, from its source's size on display. A clip is never enlarged."""
    scale = min(1.0, short_side / min(width, height))
    return tuple(max(2, min(2 * round(side * scale / 2), side // 2 * 2)) for side in (width, height))  # type: ignore[return-value]
