"""A clip as the stages see it: constant frame rate, square pixels, upright; 16 kHz mono sound beside it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import av

    from tasks.clip_frames import Decoded
    from tasks.stage import Measurement

SAMPLE_RATE = 16_000  # Hz, of every clip's sound


@dataclass(frozen=True)
class ClipRecord:
    """One clip, as the ledger's `clips` table lists it.

    start_s, end_s: its range in the source, seconds on the source's own clock (zero is where a player starts).
    fps: frames a second, constant. frames: their number. width, height: pixels, even numbers.
    video, audio: names inside the run's storage; audio is empty when the source has no sound.
    metadata: the manifest's fields for the source (caption, language, ...). bytes: size of video and audio together.
    """

    clip_id: str
    source_id: str
    start_s: float
    end_s: float
    fps: int
    frames: int
    width: int
    height: int
    video: str
    audio: str
    metadata: dict[str, str] = field(default_factory=dict)
    bytes: int = 0

    @property
    def duration_s(self) -> float:
        return self.frames / self.fps


@dataclass(frozen=True)
class Clip:
    """A clip whose files are at hand on a local disk.

    found: what the stages that the measuring one `needs` or `uses` found in this clip, by stage; the arrays and files
        of a measurement are read when asked for.
    decoded: its frames, where stages that look one after the other share them; decoded anew for each when None.
    """

    record: ClipRecord
    video_path: Path
    audio_path: Path | None
    found: "Mapping[str, Measurement]" = field(default_factory=dict)
    decoded: "Decoded | None" = None

    @cached_property
    def _decoded(self) -> "Decoded":
        from tasks.clip_frames import Decoded

        return self.decoded or Decoded(self.video_path)

    def pictures(self) -> Iterator["av.VideoFrame"]:
        """The frames in order as they come out of the decoder, yuv420p, shared with others and not to be changed.

        Raises MediaError when one cannot be decoded.
        """
        return self._decoded.frames()

    def frames(
        self, rate: float | None = None, size: tuple[int, int] | None = None, rough: bool = False
    ) -> Iterator[np.ndarray]:
        """Decode frames in order.

        rate: frames a second to take, by nearest time; all when None. size: (width, height) to scale to. rough: four
        neighbouring pixels share their colour, as they do in the clip, instead of having it interpolated between them;
        that is a fifth of the work, and no less true in brightness.

        Yields: [height, width, 3] uint8 RGB. Raises MediaError when a frame cannot be decoded.
        """
        from tasks.clip_frames import images

        return images(self.pictures(), self.record.fps, rate, size, rough)

    def keyframes(self, size: tuple[int, int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Decode only the key frames, one a second: about 20 times cheaper than all frames.

        Yields: (frame index, [height, width, 3] uint8 RGB). Raises MediaError when one cannot be decoded.
        """
        from tasks.clip_frames import ToRgb

        to_rgb = ToRgb(size)
        for frame in self._decoded.keyframes():
            yield round(frame.time * self.record.fps), to_rgb(frame)

    def samples(self) -> np.ndarray | None:
        """The sound: [samples] float32 in -1..1 at 16 kHz, as long as the video to a sample; None without sound."""
        if self.audio_path is None:
            return None
        import soundfile

        samples, _ = soundfile.read(self.audio_path, dtype="float32")
        return samples
