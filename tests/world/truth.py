"""What is true of a generated file, and the one table that says it."""

import csv
import os
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

TABLE = "truth.csv"

Span = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Truth:
    """What is true of one file.

    All times are seconds on the source clock: zero is the container's start time, which is where a player starts.

    groups: the sets that the file belongs to. usable: whether a curation should get clips out of it.
    error: for an unusable file, what is wrong with it: "empty", "not media", "truncated", "no video" or "damaged".
    duration_s: to the end of the last picture on display. fps: average frames a second of the displayed pictures.
    has_audio: whether there is a sound stream. cuts_s: first frame of each new shot after a hard cut.
    fades_s: middle of the black of each fade through black. events_s: onset of each flash with its beep.
    event_box: x0, y0, x1, y1 of the flashing box as fractions of the upright frame on display.
    speech_s, person_s, frozen_s, shake_s, pan_s, corrupt_s: spans with speech, with somebody in view, with a picture
        that stands still, with a violently shaken camera, with a panning camera, with damaged data.
    framing: "upper body" (chest up), "medium" (hips up), "full", "long", or "" when it changes or nobody is there.
    display_width, display_height: pixels, upright and with square pixels (the height is kept, the width scaled).
    same_as: the name of the file with the same bytes, for a duplicate. like: the name of the file with the same
        pictures and sound, coded, scaled or lit a little differently.
    subtitles_s: spans with a line of burned-in text, one for each line; subtitle_box: around all of them.
    watermark_box: around the text that stands in the picture all the time. scene_text_s: spans with a sign in the
        scene, which moves in the picture as the scene does. Boxes are fractions of the upright frame: x0, y0, x1, y1.
    people: the most seen together. second_s: spans in which a second person is in view.
    lips: how the lips in view go with the sound: "own" speech; "other": they form something else than is heard;
        "closed" while somebody speaks; "" where nobody is in view or nothing is said.
    sound_offset_s: by how much the sound comes later than in sync; negative for earlier.
    music_s: spans with music.
    fault: what is wrong with the file as footage of a talker, "" where nothing is, with its strength:
        "blur" (sigma in pixels), "motion blur" (length in pixels), "dark" (factor on the light), "bright" (share of
        the picture that is burnt out), "noise" (standard deviation, of 255), "blocks" (H.264's constant rate factor,
        without its deblocking), "subtitles" and "watermark" (height of a line's row, of the frame's), "scene text"
        (speed of the camera in frame widths a second), "two people", "second face" (share of the time), "nobody",
        "static", "shake" (share of the time), "offset" (s), "other speech", "voice-over", "silence", "music", "copy".
    """

    file: str
    groups: tuple[str, ...] = ()
    usable: bool = True
    error: str = ""
    duration_s: float = 0.0
    fps: float = 0.0
    has_audio: bool = False
    cuts_s: tuple[float, ...] = ()
    fades_s: tuple[float, ...] = ()
    events_s: tuple[float, ...] = ()
    event_box: Box | None = None
    speech_s: tuple[Span, ...] = ()
    person_s: tuple[Span, ...] = ()
    frozen_s: tuple[Span, ...] = ()
    shake_s: tuple[Span, ...] = ()
    pan_s: tuple[Span, ...] = ()
    corrupt_s: tuple[Span, ...] = ()
    framing: str = ""
    display_width: int = 0
    display_height: int = 0
    same_as: str = ""
    like: str = ""
    subtitles_s: tuple[Span, ...] = ()
    subtitle_box: Box | None = None
    watermark_box: Box | None = None
    scene_text_s: tuple[Span, ...] = ()
    people: int = 0
    second_s: tuple[Span, ...] = ()
    lips: str = ""
    sound_offset_s: float = 0.0
    music_s: tuple[Span, ...] = ()
    fault: str = ""
    strength: float = 0.0
    notes: str = ""


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
    """Write `truth.csv`: lists are separated by `;`, spans are written start-end, times have microseconds."""
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
    """The rows of a folder's `truth.csv`, all or those named; none where there is no table.

    Raises ValueError for a table that was not written by this program.
    """
    path = folder / TABLE
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [Truth(**{k: _from_text(k, v) for k, v in row.items()}) for row in csv.DictReader(file)]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a table that this program wrote ({error}); move it away") from error
    return [row for row in rows if names is None or row.file in names]
