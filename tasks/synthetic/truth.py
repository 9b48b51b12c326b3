"""What is true of a generated file, and the table `truth.csv` that records it for all files of a folder."""

import csv
import os
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

TABLE = "truth.csv"

TimeRange = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Truth:
    """What is true of one file.

    Times are in seconds on the source clock. Its zero is the container's start time, which is where a player starts.
    Boxes are x0, y0, x1, y1 as fractions of the upright frame on display.
    """

    file: str
    """The file name."""
    groups: tuple[str, ...] = ()
    """The sets that the file belongs to."""
    usable: bool = True
    """Whether a curation should get clips out of it."""
    error: str = ""
    """What is wrong with an unusable file: "empty", "not media", "truncated", "no video" or "damaged"."""
    duration_s: float = 0.0
    """When the last frame leaves the display."""
    fps: float = 0.0
    """Average frames a second of the displayed frames."""
    has_audio: bool = False
    """Whether there is a sound stream."""
    cuts_s: tuple[float, ...] = ()
    """The first frame of each new shot after a hard cut."""
    fades_s: tuple[float, ...] = ()
    """The middle of the black of each fade through black."""
    events_s: tuple[float, ...] = ()
    """The onset of each flash with its beep."""
    event_box: Box | None = None
    """The box that flashes."""
    speech_s: tuple[TimeRange, ...] = ()
    """Spans with speech."""
    person_s: tuple[TimeRange, ...] = ()
    """Spans with a person in view."""
    frozen_s: tuple[TimeRange, ...] = ()
    """Spans in which the frame stands still."""
    shake_s: tuple[TimeRange, ...] = ()
    """Spans with a violently shaken camera."""
    pan_s: tuple[TimeRange, ...] = ()
    """Spans with a panning camera."""
    corrupt_s: tuple[TimeRange, ...] = ()
    """Spans with damaged data."""
    framing: str = ""
    """How the person is framed: "upper body" (chest up), "medium" (hips up), "full" or "long"; "" when the framing
    changes or no person is in view."""
    display_width: int = 0
    """Pixels, upright and with square pixels: the height is kept, the width is scaled."""
    display_height: int = 0
    """Pixels, likewise."""
    same_as: str = ""
    """The name of the file with the same bytes, for a duplicate."""
    like: str = ""
    """The name of the file with the same images and sound, coded, scaled or lit a little differently, for a copy."""
    subtitles_s: tuple[TimeRange, ...] = ()
    """Spans with a line of burned-in text, one span for each line."""
    subtitle_box: Box | None = None
    """The box around all subtitles."""
    watermark_box: Box | None = None
    """The box around the text that stands in the frame all the time."""
    scene_text_s: tuple[TimeRange, ...] = ()
    """Spans with a sign in the scene, which moves through the frame with the scene."""
    people: int = 0
    """The most people in view at one time."""
    second_s: tuple[TimeRange, ...] = ()
    """Spans with a second person in view."""
    lips: str = ""
    """How the lips in view go with the sound: "own", they form what is heard; "other", they form something else;
    "closed", they stay closed during speech; "", no person is in view or there is no speech."""
    sound_offset_s: float = 0.0
    """Seconds by which the sound is later than in sync, negative for earlier."""
    music_s: tuple[TimeRange, ...] = ()
    """Spans with music."""
    fault: str = ""
    """What is wrong with the file as footage of a talker, "" for nothing. In brackets the meaning of `strength`:
    "blur" (sigma in pixels), "motion blur" (length in pixels), "dark" (factor on the light), "bright" (share of the
    frame that is burnt out), "noise" (standard deviation of 8-bit values), "blocks" (H.264's constant rate factor,
    without its deblocking), "subtitles" and "watermark" (height of a line's row, as a fraction of the frame's),
    "scene text" (speed of the camera in frame widths a second), "two people", "second face" (share of the time),
    "nobody", "static", "shake" (share of the time), "offset" (seconds), "other speech", "voice-over", "silence",
    "music", "copy"."""
    strength: float = 0.0
    """How strong the fault is, in the unit given at `fault`."""
    notes: str = ""
    """For readers of the table."""


def _to_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6f}"
    if isinstance(value, tuple):
        return ";".join("-".join(map(_to_text, v)) if isinstance(v, tuple) else _to_text(v) for v in value)
    return str(value)


def _from_text(name: str, text: str) -> Any:
    if name in ("usable", "has_audio"):
        return text == "yes"
    if name in ("duration_s", "fps", "sound_offset_s", "strength"):
        return float(text)
    if name in ("display_width", "display_height", "people"):
        return int(text)
    if name == "groups":
        return tuple(filter(None, text.split(";")))
    if name.endswith("_box"):
        return tuple(float(v) for v in text.split(";")) if text else None
    if name in ("cuts_s", "fades_s", "events_s"):
        return tuple(float(v) for v in text.split(";") if v)
    if name.endswith("_s"):
        return tuple(tuple(float(v) for v in span.split("-")) for span in text.split(";") if span)
    return text


def write_table(folder: Path, rows: Iterable[Truth]) -> None:
    """Write `truth.csv`. Lists are separated by `;`, spans are written start-end, times have six decimals."""
    names = [f.name for f in fields(Truth)]
    beside = folder / f".{TABLE}.{os.getpid()}.tmp"
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in sorted(rows, key=lambda row: row.file):
            values = asdict(row)
            writer.writerow([_to_text(values[name]) for name in names])
    beside.replace(folder / TABLE)


def read_table(folder: Path, names: Collection[str] | None = None) -> list[Truth]:
    """The rows of a folder's `truth.csv`: all, or those of the named files; none if there is no table.

    Raises ValueError for a table that this program did not write.
    """
    path = folder / TABLE
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [Truth(**{k: _from_text(k, v) for k, v in row.items()}) for row in csv.DictReader(file)]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a table that this program wrote ({error}); move it to another folder"
        ) from error
    return [row for row in rows if names is None or row.file in names]
