"""Writes clips at a constant frame rate with their audio, in one decoding of their source.

Output frame k of a clip that starts at t shows what is on display in the source at t + (k + 1/2) / fps. No event is
therefore shown more than half a frame early or late, whatever the source's timing. Audio is placed at t to the sample.
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

from data_manifests.storage import Storage, store_access
from tasks.cutting.clip_plan import ClipSettings, clip_size
from tasks.cutting.ingest import SourceInfo
from tasks.media.audio_track import AudioTrack
from tasks.media.clip import SAMPLE_RATE, ClipRecord
from tasks.media.container import MediaError, audio_stream, open_media, start_time_s, video_stream
from tasks.media.decode import AudioPacket, BadFrame, MissingEnd, read_container
from tasks.media.encode import ClipEncoder
from tasks.media.upright import DecodedFrame, FrameConverter

if TYPE_CHECKING:
    import av

_ROUNDING_S = 0.001  # some containers round their time stamps to milliseconds


def write_clips(
    source: SourceInfo, path: Path, clips: Sequence[ClipRecord], settings: ClipSettings, storage: Storage
) -> list[ClipRecord]:
    """Write the clips of one source in one decoding of its file. Clips that are in the storage already are left alone.

    path: the source as a local file. Returns the clips with their sizes in bytes.

    Raises tasks.media.container.MediaError when a frame that a clip shows cannot be decoded, OSError when the storage
    fails.
    """
    missing = sorted((clip for clip in clips if not is_written(clip, storage)), key=lambda clip: clip.start_s)
    if missing:
        with open_media(path) as container, ClipWriter(source, container, settings, storage) as writer:
            writer.to_show.extend(missing)
            for event in read_container(container, writer.audio):
                writer.add(event)
                if writer.done:
                    break
            else:
                writer.finish()
    return [
        dataclasses.replace(clip, bytes=sum(storage.size(name) for name in (clip.video, clip.audio) if name))
        for clip in clips
    ]


def is_written(clip: ClipRecord, storage: Storage) -> bool:
    """Whether a clip's video and audio are in the storage."""
    with store_access(f"look for {clip.video}"):
        return all(storage.exists(name) for name in (clip.video, clip.audio) if name)


class ClipWriter:
    """Writes clips one after the other, from the events of their source's decoder."""

    def __init__(self, source: SourceInfo, container: Any, settings: ClipSettings, storage: Storage) -> None:
        self._source, self._settings, self._storage = source, settings, storage
        video = video_stream(container)
        self.audio = audio_stream(container, video)
        """The audio stream whose packets this writer takes; None without audio."""
        self._track = AudioTrack(self.audio, start_time_s(container)) if self.audio is not None else None
        size = clip_size(source.width, source.height, settings.short_side)
        self._convert = FrameConverter(size, source.interlaced)
        self._scratch = tempfile.TemporaryDirectory(prefix="understudy-")
        self.to_show: deque[ClipRecord] = deque()
        """Clips, in order of time, some of whose frames are still to come."""
        self._to_store: deque[tuple[ClipRecord, Path]] = deque()  # encoded, but not all of their audio may be read
        self._encoder: ClipEncoder | None = None
        self._shown: DecodedFrame | None = None  # the source frame on display
        self._ready: av.VideoFrame | None = None  # the same frame, upright and scaled
        self._seen_s = 0.0  # the time of the last frame that was added

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()
        self._scratch.cleanup()

    def drop(self) -> None:
        """Give up the clips that are not in the storage yet, and free what was kept for them."""
        self.to_show.clear()
        self._to_store.clear()
        self._shown = self._ready = None
        if self._track is not None:
            self._track.forget(math.inf)
        if self._encoder is not None:
            with contextlib.suppress(Exception):  # closing may repeat an error that has been reported already
                self._encoder.abandon()
            self._encoder = None

    @property
    def done(self) -> bool:
        """Whether all clips of `to_show` are in the storage."""
        return not self.to_show and not self._to_store

    def add(self, event: DecodedFrame | BadFrame | MissingEnd | AudioPacket) -> None:
        """Take the decoder's next event. Raises MediaError where a clip lacks a frame, StoreError."""
        if isinstance(event, AudioPacket):
            self._add_audio(event.packet)
        elif isinstance(event, DecodedFrame):
            self._add_frames(self._convert.progressive(event))
        elif isinstance(event, BadFrame):
            self._add_frames(self._convert.flush())
            self._add_frames([event])
        self._store()

    def finish(self) -> None:
        """Write the rest, once the file has ended. Raises MediaError where a clip lacks a frame, StoreError."""
        self._add_frames(self._convert.flush())
        self._end_frames()
        if self._shown is not None:
            self._show_until(self._shown.end_s)
        if self.to_show:
            raise MediaError(f"the video ends before clip {self.to_show[0].clip_id} does")
        self._add_audio(None)
        self._store(at_end=True)

    def _add_frames(self, events: Iterable[DecodedFrame | BadFrame]) -> None:
        """Take progressive frames and holes, in order."""
        for event in events:
            if isinstance(event, DecodedFrame):
                self._seen_s = event.time_s
            self._show(event)

    def _end_frames(self) -> None:
        """Called once, when no more frames come."""

    def _show(self, event: DecodedFrame | BadFrame) -> None:
        """Put the next source frame on display; nothing is on display in a hole."""
        self._show_until(event.time_s)
        if isinstance(event, DecodedFrame):
            self._shown, self._ready = event, None
        elif self._shown is None or event.time_s >= self._shown.time_s:
            self._shown = self._ready = None

    def _show_until(self, time_s: float) -> None:
        """Encode every output frame whose time comes before `time_s`, when the next source frame appears."""
        while self.to_show:
            clip = self.to_show[0]
            done = self._encoder.frames if self._encoder else 0
            middle_s = clip.start_s + (done + 0.5) / clip.fps
            if middle_s + _ROUNDING_S >= time_s:
                return
            if self._shown is None or self._shown.time_s > middle_s + _ROUNDING_S:
                raise MediaError(f"no frame at {middle_s:.3f} s, where clip {clip.clip_id} needs one")
            path = Path(self._scratch.name) / f"{clip.clip_id}.mp4"
            if self._encoder is None:
                size, settings = (clip.width, clip.height), self._settings
                self._encoder = ClipEncoder(path, clip.fps, size, settings.qp, settings.preset, self._source.height)
            if self._ready is None:
                self._ready = self._converted(self._shown.frame)
            self._encoder.add(self._ready)
            if self._encoder.frames == clip.frames:
                self._encoder.close()
                self._encoder = None
                self._to_store.append((clip, path))
                self.to_show.popleft()

    def _converted(self, frame: "av.VideoFrame") -> "av.VideoFrame":
        return self._convert(frame)

    # ---- audio, and the finished clip ----

    def _wanted_audio(self) -> list[tuple[float, float]]:
        """Spans of audio that clips need, in seconds, in order."""
        return [(clip.start_s, clip.end_s) for clip in (*(clip for clip, _ in self._to_store), *self.to_show)]

    def _add_audio(self, packet: Any) -> None:
        if self._track is not None:
            self._track.feed(packet, self._wanted_audio(), self._seen_s)

    def _store(self, at_end: bool = False) -> None:
        """Store the encoded clips whose audio has been read. Audio goes first: a clip that has a video is complete."""
        while self._to_store:
            clip, video = self._to_store[0]
            if clip.audio and self._track is not None:
                if not (at_end or self._track.covers(clip.end_s, self._seen_s)):
                    return
                samples = self._track.take(clip.start_s, round(clip.frames * SAMPLE_RATE / clip.fps))
                with store_access(f"write {clip.audio}"):
                    self._storage.write_bytes(clip.audio, _flac(samples))
            with store_access(f"write {clip.video}"):
                self._storage.write(clip.video, functools.partial(shutil.copyfile, video))
            video.unlink()
            self._to_store.popleft()
            self._forget_audio()

    def _audio_bytes(self) -> int:
        return self._track.bytes if self._track is not None else 0

    def _forget_audio(self) -> None:
        if self._track is not None:
            self._track.forget(min((start_s for start_s, _ in self._wanted_audio()), default=math.inf))


def _flac(samples: Any) -> bytes:
    """Encode in memory: libsndfile's error for a full disk cannot be told from its other errors."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
