"""Files that are broken in a known way, and a file that is only a copy."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tasks.synthetic.film import Film
from tasks.synthetic.truth import TimeRange, Truth


@dataclass(frozen=True)
class Bytes:
    """A file that is not a media file."""

    name: str
    groups: tuple[str, ...]
    content: bytes
    error: str
    notes: str = ""

    def write(self, path: Path) -> Truth:
        path.write_bytes(self.content)
        return Truth(self.name, self.groups, usable=False, error=self.error, notes=self.notes)


@dataclass(frozen=True)
class Changed:
    """The file of a film, changed after it was written."""

    name: str
    groups: tuple[str, ...]
    film: Film
    change: Callable[[Path, Truth], Truth]
    """Changes the file at a path. Takes the truth of the film, returns the truth of the changed file."""
    notes: str = ""

    def write(self, path: Path) -> Truth:
        truth = replace(self.film.write(path), file=self.name, groups=self.groups, notes=self.notes)
        return self.change(path, truth)


def copy_of(path: Path, truth: Truth, name: str) -> Truth:
    """Leave the bytes as they are: the file is a copy of the file `name`."""
    return replace(truth, same_as=name)


def unusable(truth: Truth, error: str) -> Truth:
    """The truth of a file that no clip can be taken from. error: as in `Truth`."""
    return Truth(truth.file, truth.groups, usable=False, error=error, has_audio=truth.has_audio, notes=truth.notes)


def without_pictures(path: Path, truth: Truth) -> Truth:
    """Remove the video stream."""
    import av

    beside = path.with_suffix(".sound")
    with (
        av.open(str(path)) as source,
        av.open(str(beside), "w", format="mp4", container_options={"fflags": "+bitexact"}) as target,
    ):
        sound = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = sound
                target.mux(packet)
    beside.replace(path)
    return unusable(truth, "no video")


def cut_off(path: Path, truth: Truth, share: float) -> Truth:
    """Keep the first `share` of the bytes. If the file still opens, it is usable up to the last whole frame."""
    import av

    data = path.read_bytes()
    path.write_bytes(data[: round(share * len(data))])
    try:
        with av.open(str(path)) as container:
            start = Fraction(container.start_time or 0, 1_000_000)
            end = max(
                (p.pts + (p.duration or 0)) * p.time_base
                for p in container.demux(container.streams.video[0])
                if p.pts is not None and not p.is_corrupt
            )
    except av.error.InvalidDataError:
        return unusable(truth, "truncated")
    return until(truth, float(end - start))


def until(truth: Truth, end_s: float) -> Truth:
    """The truth of a file that ends at `end_s` seconds."""
    changes: dict[str, Any] = {"duration_s": end_s}
    for name in ("cuts_s", "fades_s", "events_s"):
        changes[name] = tuple(t for t in getattr(truth, name) if t < end_s)
    seen = ("person_s", "second_s", "frozen_s", "shake_s", "pan_s", "subtitles_s", "scene_text_s")
    for name in (*seen, "speech_s", "music_s"):
        changes[name] = tuple((a, min(b, end_s)) for a, b in getattr(truth, name) if a < end_s)
    return replace(truth, **changes)


def overwrite(path: Path, truth: Truth, spans: tuple[TimeRange, ...], whole: bool, usable: bool = True) -> Truth:
    """Overwrite the coded frames that are shown in the given spans.

    spans: seconds on the source clock.
    whole: overwrite all bytes of a frame, or only its later part, which a decoder may notice late or never.
    usable: whether clips can still be taken from the file.

    The damage lasts up to the next key frame; `corrupt_s` gives these spans. Events within them are no longer listed.
    """
    import av

    data = bytearray(path.read_bytes())
    noise = np.random.default_rng(5)
    damaged: list[TimeRange] = []
    with av.open(str(path)) as container:
        start = (container.start_time or 0) / 1e6
        open_since: float | None = None
        for packet in container.demux(container.streams.video[0]):
            if packet.pts is None or packet.pos is None:
                continue
            time = float(packet.pts * packet.time_base) - start
            hit = any(a <= time < b for a, b in spans)
            if open_since is not None and packet.is_keyframe and not hit:
                damaged.append((open_since, time))
                open_since = None
            if hit:
                open_since = time if open_since is None else open_since
                first = packet.pos if whole else packet.pos + min(64, packet.size // 3)
                length = packet.pos + packet.size - first
                data[first : first + length] = b"\xff" * length if whole else noise.bytes(length)
        if open_since is not None:
            damaged.append((open_since, truth.duration_s))
    path.write_bytes(data)
    events = tuple(t for t in truth.events_s if not any(a - 0.05 <= t < b + 0.05 for a, b in damaged))
    changed = replace(truth, events_s=events, corrupt_s=tuple(damaged))
    return changed if usable else replace(changed, usable=False, error="damaged")
