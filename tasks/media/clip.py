"""A clip as the stages see it, and what a stage measures in it.

A clip's video has a constant frame rate and square pixels, and stands upright. Its audio is a file of its own, 16 kHz
mono.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import av

    from tasks.media.frames import FrameCache

SAMPLE_RATE = 16_000
"""Sample rate of every clip's audio, Hz."""


@dataclass(frozen=True)
class ClipRecord:
    """One clip, as the ledger's `clips` table lists it."""

    clip_id: str
    """Made of the source_id, the start in milliseconds and a digest of all that decides the clip's bytes."""
    source_id: str
    """The first 16 hex digits of the sha256 of the source file."""
    start_s: float
    """Where the clip begins, in seconds on the source clock (zero is where a player starts)."""
    end_s: float
    """Where the clip ends, in seconds on the source clock."""
    fps: int
    """Frames a second, constant."""
    frames: int
    """Number of frames."""
    width: int
    """Pixels, even."""
    height: int
    """Pixels, even."""
    video: str
    """Name of the video file in the run's storage."""
    audio: str
    """Name of the audio file in the run's storage; empty when the source has no audio."""
    metadata: dict[str, str] = field(default_factory=dict)
    """The source manifest's fields for the source: caption, language and others."""
    bytes: int = 0
    """Size of the video and audio files together."""

    @property
    def duration_s(self) -> float:
        return self.frames / self.fps


@dataclass(frozen=True)
class Clip:
    """A clip whose files lie on a local disk."""

    record: ClipRecord
    video_path: Path
    audio_path: Path | None
    """None when the source has no audio."""
    found: "Mapping[str, Measurement]" = field(default_factory=dict)
    """Results of earlier stages for this clip, by stage: of those that the measuring stage `needs` or `uses`. Their
    arrays and files are read only when they are asked for."""
    decoded: "FrameCache | None" = None
    """The clip's decoded frames, shared by stages that run one after the other. When None, this object decodes the clip
    itself."""

    @cached_property
    def _decoded(self) -> "FrameCache":
        from tasks.media.frames import FrameCache

        return self.decoded or FrameCache(self.video_path)

    def decoded_frames(self) -> Iterator["av.VideoFrame"]:
        """The frames in order as the decoder gives them, yuv420p. They are shared: the caller must not change them.

        Raises MediaError when a frame cannot be decoded.
        """
        return self._decoded.frames()

    def frames(
        self, rate: float | None = None, size: tuple[int, int] | None = None, rough: bool = False
    ) -> Iterator[np.ndarray]:
        """Decode frames in order, as RGB.

        rate: frames a second to take, by nearest time; all when None.
        size: (width, height) to scale to; the clip's own when None.
        rough: each block of four neighbouring pixels shares one colour, as stored in the clip, instead of an
            interpolated one. This takes a fifth of the work, and brightness is as true as without it.

        Yields: [height, width, 3] uint8 RGB. Raises MediaError when a frame cannot be decoded.
        """
        from tasks.media.frames import rgb_frames

        return rgb_frames(self.decoded_frames(), self.record.fps, rate, size, rough)

    def keyframes(self, size: tuple[int, int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Decode only the key frames, one a second. This is about 20 times cheaper than decoding all frames.

        size: (width, height) to scale to; the clip's own when None.

        Yields: (frame index, [height, width, 3] uint8 RGB). Raises MediaError when a key frame cannot be decoded.
        """
        from tasks.media.frames import RgbConverter

        to_rgb = RgbConverter(size)
        for frame in self._decoded.keyframes():
            yield round(frame.time * self.record.fps), to_rgb(frame)

    def samples(self) -> np.ndarray | None:
        """The audio: [samples] float32 in -1..1 at 16 kHz, as long as the video to a sample. None without audio."""
        if self.audio_path is None:
            return None
        import soundfile

        samples, _ = soundfile.read(self.audio_path, dtype="float32")
        return samples


Value = float | int | bool | str | None
"""A value of a ledger column."""


@dataclass(frozen=True)
class Measurement:
    """What a stage measured in one clip."""

    columns: dict[str, Value]
    """The ledger row's values, one for each of the stage's declared columns. None where a value has no meaning for this
    clip, such as the fraction of speech in a clip without audio."""
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Features stored beside the video, by name. Each is [frames, ...], aligned to the clip's frames, unless the stage
    lists it among its `unaligned` arrays."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Contents of whole files stored beside the video, by name with extension ("plan.json")."""


class Unmeasurable(ValueError):
    """A stage cannot measure this clip, for the reason given. The clip gets an error row; it is not rejected."""
