"""Clips: shots cut to the lengths that training wants, each written once at a constant frame rate with its sound.

Output frame k of a clip that starts at t shows what is on display in the source at t + (k + 1/2) / fps, so that no
event is shown more than half a frame early or late whatever the source's timing; sound is put at t to the sample.
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from data_manifests.storage import Storage
from data_manifests.strict import Strict
from tasks.clip import SAMPLE_RATE, ClipRecord
from tasks.decode import Bad, VideoDecoder
from tasks.encode import ClipEncoder
from tasks.engine import store_access
from tasks.ingest import SourceInfo
from tasks.media import Gaps, MediaError, audio_stream, open_media, packets, start_of, video_stream
from tasks.scenes import Shot, Span
from tasks.sound import SoundTrack
from tasks.upright import Picture, Upright

if TYPE_CHECKING:
    import av

VERSION = 1

_ROUNDING_S = 0.001  # containers that keep milliseconds round their time stamps
_SOUND_LATE_S = 10.0  # no muxer lets sound come so long after its picture
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
    """Say which clips a source gives: whole output frames, within the bounds, longer shots split evenly.

    Returns the clips in order, not written yet, and what is left out with the reason.
    """
    clips: list[ClipRecord] = []
    skipped = [Skipped(hole.start_s, hole.end_s, "cannot be decoded") for hole in holes]
    for shot in shots:
        start_s, frames = _usable(shot, settings)
        lengths = _split(frames, settings.min_frames, settings.max_frames)
        at, ends_s = 0, start_s
        for length in lengths:
            begins_s = ends_s
            at += length
            # by rounding the last one could end a millionth beyond its shot
            ends_s = min(round(start_s + at / settings.fps, 6), shot.end_s)
            clips.append(_record(source, begins_s, ends_s, length, settings))
        left_out = [
            (shot.start_s, shot.clear_from_s, "black or fading"),
            (shot.clear_to_s, shot.end_s, "black or fading"),
        ]
        if not lengths:
            left_out.append((shot.clear_from_s, shot.clear_to_s, f"shorter than min_s {settings.min_s:g}"))
        else:
            uneven = "between min_s and max_s the shot has no even split"
            after = uneven if sum(lengths) < frames else "beside a cut"
            left_out += [(shot.clear_from_s, start_s, "beside a cut"), (ends_s, shot.clear_to_s, after)]
        skipped += [Skipped(a, b, why) for a, b, why in left_out if b - a >= 1 / settings.fps]
    return clips, sorted(skipped, key=lambda part: part.start_s)


def _usable(shot: Shot, settings: ClipSettings) -> tuple[float, int]:
    """Start in seconds, and the number of whole output frames of a shot that are away from its transitions."""
    trim = math.ceil(settings.trim_s * settings.fps - 1e-6)
    frames = math.floor((shot.clear_to_s - shot.clear_from_s) * settings.fps + _STRETCH)
    before = trim if shot.cut_before and shot.clear_from_s == shot.start_s else 0
    after = trim if shot.cut_after and shot.clear_to_s == shot.end_s else 0
    # by whole frames, so that where rates agree a clip's frames fall onto the source's
    return round(shot.clear_from_s + before / settings.fps, 6), frames - before - after


def _split(frames: int, low: int, high: int) -> list[int]:
    """Lengths, in frames, of the clips of a shot: as few as can be, equal to a frame, each from `low` to `high`."""
    if frames < low:
        return []
    parts = math.ceil(frames / high)
    if frames // parts < low:  # narrow bounds, between which no even split falls
        return [high] * (parts - 1)
    length, longer = divmod(frames, parts)
    return [length + (number < longer) for number in range(parts)]


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


def write_clips(
    source: SourceInfo, path: Path, clips: Sequence[ClipRecord], settings: ClipSettings, storage: Storage
) -> list[ClipRecord]:
    """Write the clips of one source, in one pass over its file; those in the storage already are left alone.

    path: the source as a local file. Returns the clips with their sizes in bytes.

    Raises tasks.media.MediaError when a clip's picture cannot be decoded throughout, OSError when the storage fails.
    """
    missing = sorted((clip for clip in clips if not storage.exists(clip.video)), key=lambda clip: clip.start_s)
    if missing:
        with tempfile.TemporaryDirectory(prefix="understudy-") as scratch, open_media(path) as container:
            _Cutter(source, container, missing, settings, storage, Path(scratch)).run()
    return [
        dataclasses.replace(clip, bytes=sum(storage.size(name) for name in (clip.video, clip.audio) if name))
        for clip in clips
    ]


class _Cutter:
    """One pass over a source that writes its clips one after the other."""

    def __init__(
        self,
        source: SourceInfo,
        container: Any,
        clips: Sequence[ClipRecord],
        settings: ClipSettings,
        storage: Storage,
        scratch: Path,
    ) -> None:
        self._source, self._settings, self._storage, self._scratch = source, settings, storage, scratch
        self._container = container
        self._video = video_stream(container)
        start_s = start_of(container)
        self._decoder = VideoDecoder(self._video, start_s)
        self._upright = Upright((clips[0].width, clips[0].height), source.interlaced)
        self._gaps = Gaps(container, self._video)
        audio = audio_stream(container, self._video)
        self._audio_index = audio.index if audio is not None else -1
        self._sound = SoundTrack(audio, start_s) if audio is not None else None
        self._to_show = deque(clips)  # whose picture is not complete
        self._to_store: deque[tuple[ClipRecord, Path]] = deque()  # whose sound may not have been read yet
        self._encoder: ClipEncoder | None = None
        self._shown: Picture | None = None
        self._ready: av.VideoFrame | None = None  # `_shown`, upright and scaled

    def run(self) -> None:
        try:
            for packet in packets(self._container, *(s for s in self._container.streams if self._wants(s.index))):
                if self._gaps.before(packet):
                    self._decoder.lose(packet)
                if packet.stream_index == self._video.index:
                    self._look(self._decoder.feed(packet))
                elif self._sound is not None:
                    self._listen(packet)
                self._store()
                if not self._to_show and not self._to_store:
                    return
            self._look(self._decoder.finish())
            self._progress(self._upright.flush())
            if self._shown is not None:
                self._show_until(self._shown.end_s)
            if self._to_show:
                raise MediaError(f"the picture ends before clip {self._to_show[0].clip_id} does")
            if self._sound is not None:
                self._listen(None)
            self._store(at_end=True)
        finally:
            if self._encoder is not None:
                self._encoder.abandon()

    def _wants(self, index: int) -> bool:
        return index in (self._video.index, self._audio_index)

    def _listen(self, packet: Any) -> None:
        assert self._sound is not None
        waiting = [clip for clip, _ in self._to_store] + list(self._to_show)
        self._sound.feed(packet, [(clip.start_s, clip.end_s) for clip in waiting])

    def _look(self, events: Iterator[Picture | Bad]) -> None:
        for event in events:
            if isinstance(event, Picture):
                self._progress(self._upright.progressive(event))
                continue
            self._progress(self._upright.flush())
            self._show_until(event.time_s)
            if self._shown is None or event.time_s >= self._shown.time_s:
                self._shown = self._ready = None  # what comes next is not on display

    def _progress(self, pictures: Iterator[Picture]) -> None:
        for picture in pictures:
            self._show_until(picture.time_s)
            self._shown, self._ready = picture, None

    def _show_until(self, time_s: float) -> None:
        """Encode every output frame whose time comes before `time_s`, when the next picture appears."""
        while self._to_show:
            clip = self._to_show[0]
            done = self._encoder.frames if self._encoder else 0
            middle_s = clip.start_s + (done + 0.5) / clip.fps
            if middle_s + _ROUNDING_S >= time_s:
                return
            if self._shown is None or self._shown.time_s > middle_s + _ROUNDING_S:
                raise MediaError(f"no picture at {middle_s:.3f} s, where clip {clip.clip_id} needs one")
            if self._encoder is None:
                path = self._scratch / f"{clip.clip_id}.mp4"
                size, settings = (clip.width, clip.height), self._settings
                self._encoder = ClipEncoder(path, clip.fps, size, settings.qp, settings.preset, self._source.height)
            if self._ready is None:
                self._ready = self._upright(self._shown.frame)
            self._encoder.add(self._ready)
            if self._encoder.frames == clip.frames:
                self._encoder.close()
                self._encoder = None
                self._to_store.append((clip, self._scratch / f"{clip.clip_id}.mp4"))
                self._to_show.popleft()

    def _store(self, at_end: bool = False) -> None:
        """Store the clips whose sound has been read: sound first, so that a clip with a picture is complete."""
        while self._to_store:
            clip, video = self._to_store[0]
            if clip.audio and self._sound is not None:
                seen_s = self._shown.time_s if self._shown is not None else 0.0
                # sound that ends before the picture would never come: the clip must not wait for it in scratch space
                if not (at_end or self._sound.covers(clip.end_s) or seen_s > clip.end_s + _SOUND_LATE_S):
                    return
                sound = self._sound.take(clip.start_s, round(clip.frames * SAMPLE_RATE / clip.fps))
                with store_access(f"write {clip.audio}"):
                    self._storage.write_bytes(clip.audio, _flac(sound))
            with store_access(f"write {clip.video}"):
                self._storage.write(clip.video, functools.partial(shutil.copyfile, video))
            video.unlink()
            self._to_store.popleft()
            if self._sound is not None:
                following = [c for c, _ in self._to_store] + list(self._to_show)
                self._sound.forget(following[0].start_s if following else float("inf"))


def _flac(samples: Any) -> bytes:
    """In memory, because libsndfile does not say that a disk is full in a way that can be told from other faults."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
