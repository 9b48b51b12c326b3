"""Files that are broken in a known way, and a few that look odd but are fine."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tests.world.film import Film
from tests.world.truth import Span, Truth


@dataclass(frozen=True)
class Bytes:
    """A file that is no footage at all."""

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
    """A film's file, changed afterwards.

    change: changes the file at a path and returns what is now true of it, given what was true of the film.
    """

    name: str
    groups: tuple[str, ...]
    film: Film
    change: Callable[[Path, Truth], Truth]
    notes: str = ""

    def write(self, path: Path) -> Truth:
        truth = replace(self.film.write(path), file=self.name, groups=self.groups, notes=self.notes)
        return self.change(path, truth)


def copy_of(path: Path, truth: Truth, name: str) -> Truth:
    """The same bytes under another name."""
    return replace(truth, same_as=name)


def unusable(truth: Truth, error: str) -> Truth:
    """Nothing can be had from the file."""
    return Truth(truth.file, truth.groups, usable=False, error=error, has_audio=truth.has_audio, notes=truth.notes)


def without_pictures(path: Path, truth: Truth) -> Truth:
    """Keep the sound stream only."""
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
    """Keep the first part of the bytes. What still opens is usable up to the last whole frame."""
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
    """What is left of the truth when a file ends early."""
    changes: dict[str, Any] = {"duration_s": end_s}
    for name in ("cuts_s", "fades_s", "events_s"):
        changes[name] = tuple(t for t in getattr(truth, name) if t < end_s)
    seen = ("person_s", "second_s", "frozen_s", "shake_s", "pan_s", "subtitles_s", "scene_text_s")
    for name in (*seen, "speech_s", "music_s"):
        changes[name] = tuple((a, min(b, end_s)) for a, b in getattr(truth, name) if a < end_s)
    return replace(truth, **changes)


def overwrite(path: Path, truth: Truth, spans: tuple[Span, ...], whole: bool, usable: bool = True) -> Truth:
    """Overwrite the coded pictures shown in the given spans.

    whole: all bytes of each, or only its later part, where a decoder may notice late or never. The damage lasts to
    the next key frame, which is what `corrupt_s` says. Events in it are no longer listed.
    """
    import av

    data = bytearray(path.read_bytes())
    noise = np.random.default_rng(5)
    damaged: list[Span] = []
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
