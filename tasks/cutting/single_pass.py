"""The single pass: one decoding of a source finds its shots and writes its clips.

The single pass only saves time. Clips that it could not write are written by tasks.cutting.clip_writer in a second
decoding, with the same bytes.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_manifests.storage import Storage, StoreError, describe, store_access
from tasks.cutting.clip_plan import ClipSettings, clips_of, first_clips
from tasks.cutting.clip_writer import ClipWriter, is_written
from tasks.cutting.ingest import SourceInfo
from tasks.cutting.shots import OpenShot, Scenes, ScenesSettings, Shot, ShotFinder
from tasks.media.clip import ClipRecord
from tasks.media.container import MediaError, open_media
from tasks.media.decode import AudioPacket, BadFrame, read_container
from tasks.media.upright import DecodedFrame

if TYPE_CHECKING:
    import av

log = logging.getLogger(__name__)

_MAX_STORED = 6  # frames that wait at their stored size; a cut before them is found within so many frames
_NEAR_S = 0.002  # more than time stamps are rounded by


def find_and_cut(
    source: SourceInfo,
    path: Path,
    scenes: ScenesSettings,
    clips: ClipSettings,
    storage: Storage,
    keep_bytes: int,
) -> tuple[Scenes, float]:
    """Find a source's shots, and write its clips as far as the single pass can.

    path: the source as a local file.
    keep_bytes: memory for frames and audio whose clip is not known yet; frames take 1.5 bytes a pixel of the clip. When
        they take more, the remaining clips are left for `tasks.cutting.clip_writer.write_clips`.

    Returns the shots, and the seconds that the clips took.

    Raises MediaError as `tasks.cutting.shots.find_shots` does, after the clips written so far have been removed;
    OSError when the storage fails.
    """
    finder = ShotFinder(scenes)
    seconds = 0.0
    with open_media(path) as container, SinglePassWriter(source, container, clips, storage, keep_bytes) as writer:
        try:
            for event in read_container(container, writer.audio):
                if not isinstance(event, AudioPacket):
                    finder.add(event)
                started = time.perf_counter()
                writer.follow(event, finder)
                seconds += time.perf_counter() - started
            found = finder.finish()
        except StoreError:
            raise  # the next try can use the clips that have been written
        except Exception:
            writer.take_back()
            raise
        started = time.perf_counter()
        writer.follow(None, finder)
        seconds += time.perf_counter() - started
    return found, seconds


class SinglePassWriter(ClipWriter):
    """Writes each clip as soon as it is certain, while the shots are still being found.

    Until then it keeps the source frames that clips could show, at the clips' size.
    """

    def __init__(
        self, source: SourceInfo, container: Any, settings: ClipSettings, storage: Storage, keep_bytes: int
    ) -> None:
        super().__init__(source, container, settings, storage)
        self._keep_bytes = keep_bytes
        self._stored: deque[DecodedFrame] = deque()  # frames at their stored size, the newest of all
        self._kept: deque[DecodedFrame | BadFrame] = deque()  # older frames, upright and scaled
        self._kept_bytes = 0
        self._starts: deque[float] = deque()  # where the clear parts of shots may begin, in order
        self._decided_s = -math.inf  # frames before this time are kept or dropped already
        self._late: dict[float, float] = {}  # starts that were found after that, each with the `_decided_s` of then
        self._black_since_s = math.inf
        self._num_shots = 0  # finished shots whose clips are certain
        self._num_clips = 0  # clips of the open shot that are certain
        self._next_s = -math.inf  # every clip that is not certain yet begins here or later
        self._given_up = False
        self._made: list[ClipRecord] = []

    def follow(self, event: Any, finder: ShotFinder) -> None:
        """Take the decoder's next event, None at the end of the file. The finder must have taken it before.

        Raises OSError when the storage or the machine fails. After any other error this writer gives up: `write_clips`
        will meet the same error.
        """
        import av

        if self._given_up:
            return
        try:
            if isinstance(event, AudioPacket):
                self.add(event)
            else:
                self._follow_shots(event, finder.shots, finder.open_shot)
            if event is None:
                self.finish()
            elif self._kept_bytes + self._audio_bytes() > self._keep_bytes:
                self._give_up("it takes more memory than run.keep_frames_mb allows")
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, av.FFmpegError):
                raise
            self._give_up(describe(error))

    def take_back(self) -> None:
        """Remove the clips that have been written."""
        for clip in self._made:
            for name in filter(None, (clip.audio, clip.video)):
                with store_access(f"remove {name}"):
                    self._storage.remove(name)

    def _give_up(self, why: str) -> None:
        log.info("%s: clips from here on are cut in a second pass: %s", self._source.uri, why)
        self._given_up = True
        self._stored.clear()
        self._kept.clear()
        self.drop()

    # ---- which clips are certain ----

    def _follow_shots(self, event: Any, shots: Sequence[Shot], open_shot: OpenShot | None) -> None:
        self._black_since_s = open_shot.black_since_s if open_shot is not None else math.inf
        if open_shot is not None and (not self._starts or open_shot.newest_start_s > self._starts[-1]):
            self._starts.append(open_shot.newest_start_s)
            if open_shot.newest_start_s < self._decided_s:
                self._late[open_shot.newest_start_s] = self._decided_s
        if event is not None:
            self.add(event)
        self._update_clips(shots, open_shot, ended=event is None)

    def _update_clips(self, shots: Sequence[Shot], open_shot: OpenShot | None, ended: bool) -> None:
        """Schedule the clips that have become certain, and release the frames that no other clip will show."""
        finished = shots[self._num_shots :]
        for shot in finished:
            self._schedule(clips_of(self._source, shot, self._settings)[self._num_clips :], shot.clear_from_s)
            self._num_clips = 0
        self._num_shots += len(finished)
        if ended:
            self._next_s = math.inf
        elif open_shot is None:
            self._next_s = finished[-1].end_s if finished else self._next_s
        else:
            # cut_after is True: the end is trimmed, as it will be if a cut follows
            times = open_shot.start_s, open_shot.sure_to_s, open_shot.clear_from_s, open_shot.sure_to_s
            so_far = Shot(*times, cut_before=open_shot.cut_before, cut_after=True)
            clips = first_clips(self._source, so_far, self._settings, self._num_clips)
            self._schedule(clips, open_shot.clear_from_s)
            self._num_clips += len(clips)
            if clips:
                self._next_s = clips[-1].end_s
            elif not self._num_clips:
                self._next_s = open_shot.clear_from_s
        while self._kept and self._kept[0].time_s <= self._next_s:
            self._show(self._pop_kept())
        if self._kept:
            self._show_until(self._kept[0].time_s)
        if finished:
            self._forget_audio()

    def _schedule(self, clips: Sequence[ClipRecord], clear_from_s: float) -> None:
        for clip in clips:
            if clip.start_s < self._late.get(clear_from_s, -math.inf):
                raise MediaError(f"it was found too late that a shot begins at {clear_from_s:.3f} s")
            if not is_written(clip, self._storage):
                self.to_show.append(clip)
                self._made.append(clip)

    # ---- frames that wait ----

    def _add_frames(self, events: Iterable[DecodedFrame | BadFrame]) -> None:
        for event in events:
            if isinstance(event, DecodedFrame):
                self._seen_s = event.time_s
                self._stored.append(event)
                while len(self._stored) > _MAX_STORED:
                    self._keep(self._stored.popleft(), self._stored[0].time_s)
            else:
                self._keep_stored(event.time_s)
                self._kept.append(event)

    def _end_frames(self) -> None:
        if self._stored:
            self._keep_stored(self._stored[-1].end_s)
        while self._kept:
            self._show(self._pop_kept())

    def _keep_stored(self, until_s: float) -> None:
        while self._stored:
            picture = self._stored.popleft()
            self._keep(picture, self._stored[0].time_s if self._stored else until_s)

    def _keep(self, picture: DecodedFrame, until_s: float) -> None:
        """Keep a frame that is on display until `until_s`, if an output frame of a clip could show it."""
        self._decided_s = until_s
        while len(self._starts) > 1 and self._starts[1] <= picture.time_s:
            self._starts.popleft()
        if not self._starts or picture.time_s < self._starts[0] or picture.time_s >= self._black_since_s:
            return
        start_s, fps = self._starts[0], self._settings.fps
        # a clip begins a whole number of output frames after the clear part of its shot
        frame = max(0, round((picture.time_s - _NEAR_S - start_s) * fps))
        if start_s + (frame + 0.5) / fps > until_s + _NEAR_S:
            return
        upright = self._convert(picture.frame)
        self._kept.append(picture._replace(frame=upright))
        self._kept_bytes += _bytes(upright)

    def _pop_kept(self) -> DecodedFrame | BadFrame:
        event = self._kept.popleft()
        if isinstance(event, DecodedFrame):
            self._kept_bytes -= _bytes(event.frame)
        return event

    def _converted(self, frame: "av.VideoFrame") -> "av.VideoFrame":
        return frame  # `_keep` has converted it

    def _wanted_audio(self) -> list[tuple[float, float]]:
        return [*super()._wanted_audio(), (self._next_s, math.inf)]


def _bytes(frame: "av.VideoFrame") -> int:
    return sum(plane.buffer_size for plane in frame.planes)
