"""The signals that guidance is written from: a clip's audio, its manifest fields and earlier stages' results."""

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from tasks.media.clip import SAMPLE_RATE, Clip, Unmeasurable
from tasks.stages.aesthetics.measures import light
from tasks.stages.guidance.prosody import HOP_S, Contours, Voice, contours, voice
from tasks.stages.guidance.schema import Origin
from tasks.stages.guidance.settings import GuidanceSettings
from tasks.stages.people.stage import face_framing

_STILL_WINDOW = 0.02  # window widths a second; a crop's window up to this speed counts as still
_MOVE_S = 0.2  # seconds over which the head's speed is taken; over less, the face detector's jitter dominates


@dataclass(frozen=True)
class SegmentSignals:
    """The signals of one segment, a part of the clip between two pauses of speech."""

    start_s: float
    """Seconds from the clip's start."""
    end_s: float
    """Seconds from the clip's start."""
    spoken: float = 0.0
    """Share of the time with speech, 0 to 1."""
    louder_db: float | None = None
    """Median loudness of the voice minus that of the whole clip's voice, dB; None without a voice."""
    higher: float | None = None
    """Median pitch against that of the whole clip's voice, semitones; None without a voice."""
    mouth: float | None = None
    """Standard deviation of the inner-lip opening, in the unit of identity's array `lips`; None without a face."""
    head_speed: float | None = None
    """Median speed of the face's centre, in face sizes (its widths in x, its heights in y) a second; None without a
    face."""
    right: float | None = None
    """How far the face has moved to the right, in face widths; None without a face."""
    down: float | None = None
    """How far the face has moved down, in face heights; None without a face."""
    nearer: float | None = None
    """How much taller the face has become, as a share of its height; None without a face."""


@dataclass(frozen=True)
class Signals:
    """The signals of one clip. A field is None or "" where it was not measured."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    segments: tuple[SegmentSignals, ...]
    """In order, from the clip's start to its end without gaps."""
    caption: str = ""
    """The source's caption, unchanged."""
    language: str = ""
    """The source's language, unchanged."""
    transcript: str = ""
    """The source's transcript, unchanged."""
    loudness_db: float | None = None
    """Loudness of the whole audio, dBFS; None without audio."""
    spoken: float = 0.0
    """Share of the time with speech, 0 to 1."""
    voice: Voice | None = None
    """The prosody of the speech; None without a voice."""
    person_share: float | None = None
    """The column of `people`."""
    framing: str = ""
    """The framing, by `framing_by`."""
    framing_by: Origin = "people"
    """The stage that the framing is from: "people", or "crop" for a cropped clip."""
    scene: str = ""
    """The column of `people`."""
    faces: int | None = None
    """The column of `identity`; None for a cropped clip."""
    yaw: float | None = None
    """The column of `identity`, degrees."""
    roll: float | None = None
    """The column of `identity`, degrees."""
    camera_speed: float | None = None
    """The column of `motion`, short sides of the uncropped frame a second; None where a crop's window moved."""
    subject_speed: float | None = None
    """The column of `motion`, short sides of the uncropped frame a second."""
    brightness: float | None = None
    """Mean luma, 0 to 255, by `light_by`."""
    colourfulness: float | None = None
    """Hasler and Suesstrunk's M3, by `light_by`."""
    light_by: Origin = "aesthetics"
    """The stage whose image brightness and colourfulness are of: "aesthetics", or "crop" for a cropped clip."""
    hands: float | None = None
    """Share of the frames with the hand that is seen more often, 0 to 1."""


def signals_of(
    clip: Clip, samples: np.ndarray | None, spans: list[tuple[int, int]], settings: GuidanceSettings
) -> Signals:
    """Collect the signals of a clip.

    samples: [samples] float32 at 16 kHz; None without audio.
    spans: first and end sample of each span of speech.

    Raises Unmeasurable for a cropped clip without a key frame.
    """
    record = clip.record
    sound = None if samples is None else contours(samples)
    spoken = np.zeros(0 if sound is None else len(sound.pitch_hz), bool)
    for start, end in spans:
        spoken[round(start / SAMPLE_RATE / HOP_S) : round(end / SAMPLE_RATE / HOP_S)] = True
    whole = None if sound is None else voice(sound, spoken)
    power = 0.0 if samples is None else float(np.mean(np.square(samples, dtype=np.float64)))
    bounds = cut_at_pauses([(a / SAMPLE_RATE, b / SAMPLE_RATE) for a, b in spans], record.duration_s, settings)
    measured, head = _measured_before(clip)
    return Signals(
        width=record.width,
        height=record.height,
        segments=tuple(_segment(a, b, sound, spoken, whole, head) for a, b in pairwise(bounds)),
        caption=str(record.metadata.get("caption") or ""),
        language=str(record.metadata.get("language") or ""),
        transcript=str(record.metadata.get("transcript") or ""),
        loudness_db=None if samples is None else 10 * math.log10(max(power, 1e-12)),
        spoken=float(spoken.mean()) if len(spoken) else 0.0,
        voice=whole,
        **measured,
    )


def cut_at_pauses(spans_s: list[tuple[float, float]], duration_s: float, settings: GuidanceSettings) -> list[float]:
    """The bounds of a clip's segments in seconds, from 0 to its duration.

    Segments end in the middle of pauses between spans of speech. Pauses are taken from the longest one down. A pause is
    left out where a segment beside it would be shorter than `min_segment_s`.

    spans_s: start and end of each span of speech in seconds.
    """
    pauses = [(start - end, (start + end) / 2) for (_, end), (start, _) in pairwise(spans_s)]
    bounds = [0.0, duration_s]
    for length, middle in sorted(pauses, key=lambda p: (-p[0], p[1])):
        cut = round(middle, 3)
        if length < settings.min_pause_s or len(bounds) > settings.max_segments:
            break
        if min(abs(cut - bound) for bound in bounds) >= settings.min_segment_s and cut < duration_s:
            bounds = sorted([*bounds, cut])
    return bounds


@dataclass(frozen=True)
class _Head:
    """A face and its lips over time."""

    box: np.ndarray
    """[frames, 4] x0, y0, x1, y1, NaN where the face is not seen."""
    opening: np.ndarray
    """[frames] inner-lip opening, NaN where the face is not seen."""
    fps: int
    followed: bool = False
    """Whether a crop's window follows the face, so that its own way through the image is not known."""

    @classmethod
    def of(cls, box: np.ndarray, lips: np.ndarray, fps: int) -> "_Head":
        return cls(box.astype(np.float64), lips[:, 0].astype(np.float64), fps)

    def within(self, start_s: float, end_s: float) -> dict[str, float]:
        """The fields of SegmentSignals on mouth and head; none where fewer than half of the frames show the face."""
        frames = slice(round(start_s * self.fps), round(end_s * self.fps))
        box, opening = self.box[frames], self.opening[frames]
        seen = ~np.isnan(box).any(axis=1)
        step = max(1, round(_MOVE_S * self.fps))
        if len(box) <= step or seen.mean() < 0.5 or np.isnan(opening).all():
            return {}
        size = np.nanmedian(box[:, 2:] - box[:, :2], axis=0)  # of the face
        if not (size > 0).all():
            return {}
        centre = (box[:, :2] + box[:, 2:]) / 2 / size
        speed = np.hypot(*(centre[step:] - centre[:-step]).T) / (step / self.fps)
        edge = max(1, round(len(box) * 0.2))
        first, last = np.flatnonzero(seen)[:edge], np.flatnonzero(seen)[-edge:]
        height = (box[:, 3] - box[:, 1]) / size[1]
        way = np.zeros(2) if self.followed else centre[last].mean(axis=0) - centre[first].mean(axis=0)
        return {
            "mouth": float(np.nanstd(opening)),
            "head_speed": float(np.nanmedian(speed)) if not np.isnan(speed).all() else 0.0,
            "right": float(way[0]),
            "down": float(way[1]),
            "nearer": float(height[last].mean() - height[first].mean()),
        }


def _measured_before(clip: Clip) -> tuple[dict[str, Any], _Head | None]:
    """The fields of Signals that come from earlier stages, and the face that `identity` followed."""
    found = clip.found

    def number(stage: str, column: str) -> float | None:
        value = found[stage].columns.get(column) if stage in found else None
        return float(value) if isinstance(value, (int, float)) else None

    def text(stage: str, column: str) -> str:
        return str((found[stage].columns.get(column) if stage in found else None) or "")

    arrays = found["identity"].arrays if "identity" in found else {}
    head = _Head.of(arrays["face_box"], arrays["lips"], clip.record.fps) if "face_box" in arrays else None
    hands = [number("pose", f"{side}_hand_share") for side in ("left", "right")]
    faces, framing = number("identity", "faces"), text("people", "framing")
    brightness, colourfulness = number("aesthetics", "brightness"), number("aesthetics", "colourfulness")
    camera_speed = number("motion", "camera_speed")
    # people, aesthetics, motion and identity have measured the frame before it was cropped
    cropped = "crop" in found and "mp4" in found["crop"].files
    if cropped:
        face_height = number("crop", "face_height")
        faces, framing = None, "" if face_height is None else face_framing(face_height)
        if brightness is not None:
            brightness, colourfulness = _light(clip)
        if (number("crop", "window_speed") or 0.0) > _STILL_WINDOW:
            camera_speed = None
            head = head and dataclasses.replace(head, followed=True)
    measured: dict[str, Any] = {
        "person_share": number("people", "person_share"),
        "framing": framing,
        "framing_by": "crop" if cropped else "people",
        "scene": text("people", "scene"),
        "faces": None if faces is None else int(faces),
        "yaw": number("identity", "yaw"),
        "roll": number("identity", "roll"),
        "camera_speed": camera_speed,
        "subject_speed": number("motion", "subject_speed"),
        "brightness": brightness,
        "colourfulness": colourfulness,
        "light_by": "crop" if cropped else "aesthetics",
        "hands": max((share for share in hands if share is not None), default=None),
    }
    return measured, head


def _light(clip: Clip) -> tuple[float, float]:
    """Brightness and colourfulness of the clip's image: medians over its key frames."""
    measured = [light(image) for _, image in clip.keyframes()]
    if not measured:
        raise Unmeasurable("the clip has no key frame")
    return float(np.median([m.brightness for m in measured])), float(np.median([m.colourfulness for m in measured]))


def _segment(
    start_s: float,
    end_s: float,
    sound: Contours | None,
    spoken: np.ndarray,
    whole: Voice | None,
    head: _Head | None,
) -> SegmentSignals:
    """The signals of one segment. sound, spoken, whole, head: of the whole clip."""
    moves = head.within(start_s, end_s) if head else {}
    if sound is None:
        return SegmentSignals(start_s, end_s, **moves)
    steps = slice(round(start_s / HOP_S), max(round(start_s / HOP_S) + 1, round(end_s / HOP_S)))
    here = spoken[steps]
    voiced = here & ~np.isnan(sound.pitch_hz[steps])
    louder = higher = None
    if whole is not None and voiced.any():
        everywhere = spoken & ~np.isnan(sound.pitch_hz)
        loudness = sound.loudness_db
        louder = float(np.median(loudness[steps][voiced]) - np.median(loudness[everywhere]))
        higher = 12 * math.log2(float(np.median(sound.pitch_hz[steps][voiced])) / whole.pitch_hz)
    return SegmentSignals(start_s, end_s, float(here.mean()) if len(here) else 0.0, louder, higher, **moves)
