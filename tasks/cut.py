"""Clips written, each once, at a constant frame rate with its sound: in one pass over their source.

Output frame k of a clip that starts at t shows what is on display in the source at t + (k + 1/2) / fps, so that no
event is shown more than half a frame early or late whatever the source's timing; sound is put at t to the sample.
"""

import contextlib
import dataclasses
import functools
import io
import math
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from data_manifests.storage import Storage
from tasks.clip import SAMPLE_RATE, ClipRecord
from tasks.clips import ClipSettings, clip_size
from tasks.decode import Bad, Missing, Sound, read
from tasks.encode import ClipEncoder
from tasks.engine import store_access
from tasks.ingest import SourceInfo
from tasks.media import MediaError, audio_stream, open_media, start_of, video_stream
from tasks.sound import SoundTrack
from tasks.upright import Picture, Upright

if TYPE_CHECKING:
    import av

_ROUNDING_S = 0.001  # containers that keep milliseconds round their time stamps


def write_clips(
    source: SourceInfo, path: Path, clips: Sequence[ClipRecord], settings: ClipSettings, storage: Storage
) -> list[ClipRecord]:
    """Write the clips of one source, in one pass over its file; those in the storage already are left alone.

    path: the source as a local file. Returns the clips with their sizes in bytes.

    Raises tasks.media.MediaError when a clip's picture cannot be decoded throughout, OSError when the storage fails.
    """
    missing = sorted((clip for clip in clips if not is_written(clip, storage)), key=lambda clip: clip.start_s)
    if missing:
        with open_media(path) as container, Cutter(source, container, settings, storage) as cutter:
            cutter.to_show.extend(missing)
            for event in read(container, cutter.audio):
                cutter.add(event)
                if cutter.done:
                    break
            else:
                cutter.finish()
    return [
        dataclasses.replace(clip, bytes=sum(storage.size(name) for name in (clip.video, clip.audio) if name))
        for clip in clips
    ]


def is_written(clip: ClipRecord, storage: Storage) -> bool:
    """Whether a clip is there, with its sound."""
    with store_access(f"look for {clip.video}"):
        return all(storage.exists(name) for name in (clip.video, clip.audio) if name)


class Cutter:
    """Writes clips one after the other, from what comes out of their source's decoder.

    to_show: clips, in order of time, whose pictures are still to come. audio: the stream whose packets are wanted, if
    any.
    """

    def __init__(self, source: SourceInfo, container: Any, settings: ClipSettings, storage: Storage) -> None:
        self._source, self._settings, self._storage = source, settings, storage
        video = video_stream(container)
        self.audio = audio_stream(container, video)
        self._sound = SoundTrack(self.audio, start_of(container)) if self.audio is not None else None
        size = clip_size(source.width, source.height, settings.short_side)
        self._upright = Upright(size, source.interlaced)
        self._scratch = tempfile.TemporaryDirectory(prefix="understudy-")
        self.to_show: deque[ClipRecord] = deque()
        self._to_store: deque[tuple[ClipRecord, Path]] = deque()  # whose sound may not have been read yet
        self._encoder: ClipEncoder | None = None
        self._shown: Picture | None = None
        self._ready: av.VideoFrame | None = None  # `_shown`, upright and scaled
        self._seen_s = 0.0  # the time of the last picture that came

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()
        self._scratch.cleanup()

    def drop(self) -> None:
        """Let go of the clips that are not in the storage yet, and of all that was kept for them."""
        self.to_show.clear()
        self._to_store.clear()
        self._shown = self._ready = None
        if self._sound is not None:
            self._sound.forget(math.inf)
        if self._encoder is not None:
            with contextlib.suppress(Exception):  # what it has failed with before
                self._encoder.abandon()
            self._encoder = None

    @property
    def done(self) -> bool:
        """Whether all clips that were asked for are in the storage."""
        return not self.to_show and not self._to_store

    def add(self, event: Picture | Bad | Missing | Sound) -> None:
        """Go on with the next thing in the file. Raises MediaError where a clip has no picture, StoreError."""
        if isinstance(event, Sound):
            self._listen(event.packet)
        elif isinstance(event, Picture):
            self._pass(self._upright.progressive(event))
        elif isinstance(event, Bad):
            self._pass(self._upright.flush())
            self._pass([event])
        self._store()

    def finish(self) -> None:
        """Write what is left, once the file has ended."""
        self._pass(self._upright.flush())
        self._end()
        if self._shown is not None:
            self._show_until(self._shown.end_s)
        if self.to_show:
            raise MediaError(f"the picture ends before clip {self.to_show[0].clip_id} does")
        self._listen(None)
        self._store(at_end=True)

    def _pass(self, events: Iterable[Picture | Bad]) -> None:
        """Progressive pictures and holes, in order."""
        for event in events:
            if isinstance(event, Picture):
                self._seen_s = event.time_s
            self._show(event)

    def _end(self) -> None:
        """No more pictures come."""

    def _show(self, event: Picture | Bad) -> None:
        self._show_until(event.time_s)
        if isinstance(event, Picture):
            self._shown, self._ready = event, None
        elif self._shown is None or event.time_s >= self._shown.time_s:
            self._shown = self._ready = None  # what comes next is not on display

    def _show_until(self, time_s: float) -> None:
        """Encode every output frame whose time comes before `time_s`, when the next picture appears."""
        while self.to_show:
            clip = self.to_show[0]
            done = self._encoder.frames if self._encoder else 0
            middle_s = clip.start_s + (done + 0.5) / clip.fps
            if middle_s + _ROUNDING_S >= time_s:
                return
            if self._shown is None or self._shown.time_s > middle_s + _ROUNDING_S:
                raise MediaError(f"no picture at {middle_s:.3f} s, where clip {clip.clip_id} needs one")
            path = Path(self._scratch.name) / f"{clip.clip_id}.mp4"
            if self._encoder is None:
                size, settings = (clip.width, clip.height), self._settings
                self._encoder = ClipEncoder(path, clip.fps, size, settings.qp, settings.preset, self._source.height)
            if self._ready is None:
                self._ready = self._made_ready(self._shown.frame)
            self._encoder.add(self._ready)
            if self._encoder.frames == clip.frames:
                self._encoder.close()
                self._encoder = None
                self._to_store.append((clip, path))
                self.to_show.popleft()

    def _made_ready(self, frame: "av.VideoFrame") -> "av.VideoFrame":
        return self._upright(frame)

    # ---- sound, and the finished clip ----

    def _wanted(self) -> list[tuple[float, float]]:
        """Spans of sound that clips need, in seconds, in order."""
        return [(clip.start_s, clip.end_s) for clip in (*(clip for clip, _ in self._to_store), *self.to_show)]

    def _listen(self, packet: Any) -> None:
        if self._sound is not None:
            self._sound.feed(packet, self._wanted(), self._seen_s)

    def _store(self, at_end: bool = False) -> None:
        """Store the clips whose sound has been read: sound first, so that a clip with a picture is complete."""
        while self._to_store:
            clip, video = self._to_store[0]
            if clip.audio and self._sound is not None:
                if not (at_end or self._sound.covers(clip.end_s, self._seen_s)):
                    return
                sound = self._sound.take(clip.start_s, round(clip.frames * SAMPLE_RATE / clip.fps))
                with store_access(f"write {clip.audio}"):
                    self._storage.write_bytes(clip.audio, _flac(sound))
            with store_access(f"write {clip.video}"):
                self._storage.write(clip.video, functools.partial(shutil.copyfile, video))
            video.unlink()
            self._to_store.popleft()
            self._forget_sound()

    def _sound_bytes(self) -> int:
        return self._sound.bytes if self._sound is not None else 0

    def _forget_sound(self) -> None:
        if self._sound is not None:
            self._sound.forget(min((start_s for start_s, _ in self._wanted()), default=math.inf))


def _flac(samples: Any) -> bytes:
    """In memory, because libsndfile does not say that a disk is full in a way that can be told from other faults."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
