"""A source decoded once for both: its clips are written while its shots are being found.

Nothing depends on it but the time: what could not be written in this pass, tasks.cut writes in another, with the same
bytes.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_manifests.storage import Storage
from tasks.clip import ClipRecord
from tasks.clips import ClipSettings, clips_of, first_clips
from tasks.cut import Cutter, is_written
from tasks.decode import Bad, Sound, read
from tasks.engine import StoreError, describe, store_access
from tasks.ingest import SourceInfo
from tasks.media import MediaError, open_media
from tasks.scenes import Scenes, ScenesSettings, Shot, ShotFinder, UnderWay
from tasks.upright import Picture

if TYPE_CHECKING:
    import av

log = logging.getLogger(__name__)

_BEHIND = 6  # pictures that wait at their full size until a cut before them has been found
_NEAR_S = 0.002  # more than time stamps are rounded by


def find_and_cut(
    source: SourceInfo,
    path: Path,
    scenes: ScenesSettings,
    clips: ClipSettings,
    storage: Storage,
    keep_bytes: int,
) -> tuple[Scenes, float]:
    """Find the shots of a source, and write of its clips what can be written in the same pass.

    path: the source as a local file. keep_bytes: memory for pictures whose clip is not known yet, 1.5 bytes a pixel of
    the clip; where they take more, clips are left for `tasks.cut.write_clips`. Returns the shots, and the seconds that
    went into the clips.

    Raises MediaError as `tasks.scenes.find_shots` does, with nothing left of clips; OSError when the storage fails.
    """
    finder = ShotFinder(scenes)
    seconds = 0.0
    with open_media(path) as container, CutterAhead(source, container, clips, storage, keep_bytes) as cutter:
        try:
            for event in read(container, cutter.audio):
                if not isinstance(event, Sound):
                    finder.add(event)
                started = time.perf_counter()
                cutter.follow(event, finder)
                seconds += time.perf_counter() - started
            found = finder.finish()
        except StoreError:
            raise  # what has been written is of use to the next try
        except Exception:
            cutter.take_back()
            raise
        started = time.perf_counter()
        cutter.follow(None, finder)
        seconds += time.perf_counter() - started
    return found, seconds


class CutterAhead(Cutter):
    """Writes clips as soon as it is sure that they will be clips.

    Until then it keeps the pictures that clips would show, at the clips' size.
    """

    def __init__(
        self, source: SourceInfo, container: Any, settings: ClipSettings, storage: Storage, keep_bytes: int
    ) -> None:
        super().__init__(source, container, settings, storage)
        self._keep_bytes = keep_bytes
        self._raw: deque[Picture] = deque()
        self._kept: deque[Picture | Bad] = deque()  # upright and scaled
        self._kept_bytes = 0
        self._starts: deque[float] = deque()  # where shots were thought to begin, in order
        self._judged_s = -math.inf  # up to when it has been decided which pictures to keep
        self._late: dict[float, float] = {}  # where shots begin that were found later than that, and when that was
        self._black_s = math.inf  # since when it has been black
        self._shots = 0  # that have been dealt with
        self._told = 0  # how many clips of the shot under way have been taken on
        self._next_s = -math.inf  # no clip that is not known yet begins earlier
        self._given_up = False
        self._made: list[ClipRecord] = []

    def follow(self, event: Any, finder: ShotFinder) -> None:
        """Go on with the next thing in the file, None at its end, after the finder has seen it.

        Raises OSError where the storage or the machine is at fault; whatever else it is, write_clips will meet it too.
        """
        import av

        if self._given_up:
            return
        try:
            if isinstance(event, Sound):
                self.add(event)
            else:
                self._look(event, finder.shots, finder.under_way)
            if event is None:
                self.finish()
            elif self._kept_bytes + self._sound_bytes() > self._keep_bytes:
                self._give_up("it takes more memory than run.keep_frames_mb allows")
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, av.FFmpegError):
                raise
            self._give_up(describe(error))

    def take_back(self) -> None:
        """Remove what has been written."""
        for clip in self._made:
            for name in filter(None, (clip.audio, clip.video)):
                with store_access(f"remove {name}"):
                    self._storage.remove(name)

    def _give_up(self, why: str) -> None:
        log.info("%s: clips from here on are cut in a second pass: %s", self._source.uri, why)
        self._given_up = True
        self._raw.clear()
        self._kept.clear()
        self.drop()

    # ---- which clips there are ----

    def _look(self, event: Any, shots: Sequence[Shot], going_on: UnderWay | None) -> None:
        self._black_s = going_on.black_s if going_on is not None else math.inf
        if going_on is not None and (not self._starts or going_on.newest_s > self._starts[-1]):
            self._starts.append(going_on.newest_s)
            if going_on.newest_s < self._judged_s:
                self._late[going_on.newest_s] = self._judged_s
        if event is not None:
            self.add(event)
        self._tell(shots, going_on, ended=event is None)

    def _tell(self, shots: Sequence[Shot], going_on: UnderWay | None, ended: bool) -> None:
        """Take on the clips that have become sure, and let go of the pictures that none will show."""
        parted = shots[self._shots :]
        for shot in parted:
            self._take_on(clips_of(self._source, shot, self._settings)[self._told :], shot.clear_from_s)
            self._told = 0
        self._shots += len(parted)
        if ended:
            self._next_s = math.inf
        elif going_on is None:
            self._next_s = parted[-1].end_s if parted else self._next_s
        else:
            # trimmed at its end, as it will be if a cut follows
            bounds = going_on.start_s, going_on.to_s, going_on.clear_from_s, going_on.to_s
            sure = first_clips(self._source, Shot(*bounds, going_on.cut_before, True), self._settings, self._told)
            self._take_on(sure, going_on.clear_from_s)
            self._told += len(sure)
            if sure:
                self._next_s = sure[-1].end_s
            elif not self._told:
                self._next_s = going_on.clear_from_s
        while self._kept and self._kept[0].time_s <= self._next_s:
            self._show(self._let_go())
        if self._kept:
            self._show_until(self._kept[0].time_s)
        if parted:
            self._forget_sound()

    def _take_on(self, clips: Sequence[ClipRecord], clear_from_s: float) -> None:
        for clip in clips:
            if clip.start_s < self._late.get(clear_from_s, -math.inf):
                raise MediaError(f"it was found too late that a shot begins at {clear_from_s:.3f} s")
            if not is_written(clip, self._storage):
                self.to_show.append(clip)
                self._made.append(clip)

    # ---- pictures that wait ----

    def _pass(self, events: Iterable[Picture | Bad]) -> None:
        for event in events:
            if isinstance(event, Picture):
                self._seen_s = event.time_s
                self._raw.append(event)
                while len(self._raw) > _BEHIND:
                    self._keep(self._raw.popleft(), self._raw[0].time_s)
            else:
                self._keep_raw(event.time_s)
                self._kept.append(event)

    def _end(self) -> None:
        if self._raw:
            self._keep_raw(self._raw[-1].end_s)
        while self._kept:
            self._show(self._let_go())

    def _keep_raw(self, until_s: float) -> None:
        while self._raw:
            picture = self._raw.popleft()
            self._keep(picture, self._raw[0].time_s if self._raw else until_s)

    def _keep(self, picture: Picture, until_s: float) -> None:
        """Keep a picture that is on display until then, if it is where a frame of a clip could fall."""
        self._judged_s = until_s
        while len(self._starts) > 1 and self._starts[1] <= picture.time_s:
            self._starts.popleft()
        if not self._starts or picture.time_s < self._starts[0] or picture.time_s >= self._black_s:
            return
        start_s, fps = self._starts[0], self._settings.fps
        # clips begin whole frames after their shot's clear part does
        frame = max(0, round((picture.time_s - _NEAR_S - start_s) * fps))
        if start_s + (frame + 0.5) / fps > until_s + _NEAR_S:
            return
        upright = self._upright(picture.frame)
        self._kept.append(picture._replace(frame=upright))
        self._kept_bytes += _bytes(upright)

    def _let_go(self) -> Picture | Bad:
        event = self._kept.popleft()
        if isinstance(event, Picture):
            self._kept_bytes -= _bytes(event.frame)
        return event

    def _made_ready(self, frame: "av.VideoFrame") -> "av.VideoFrame":
        return frame

    def _wanted(self) -> list[tuple[float, float]]:
        return [*super()._wanted(), (self._next_s, math.inf)]


def _bytes(frame: "av.VideoFrame") -> int:
    return sum(plane.buffer_size for plane in frame.planes)
