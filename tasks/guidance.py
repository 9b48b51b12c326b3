"""What a planning language model would say of a clip, here from what the stages before measured.

active-mind has an Analyzer that listens and looks, and a Planner that says what the person does, shot by shot;
physavatar has one model that puts sound, picture and movement into phrases. The embedded backend fills templates
(`tasks.phrases`), the others ask a model (`tasks.guidance_models`); all write the same document
(`tasks.guidance_schema`).
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import pairwise
from typing import ClassVar, Protocol

import numpy as np
from pydantic import Field, field_validator, model_validator

from tasks import phrases
from tasks.chat_endpoint import EndpointSettings
from tasks.clip import SAMPLE_RATE, Clip
from tasks.guidance_models import Endpoint, MiniCPM, QwenOmni
from tasks.guidance_schema import (
    TRANSCRIPTION_CHARS,
    Analysis,
    Guidance,
    Shot,
    Sources,
    clean,
    write_guidance,
)
from tasks.guidance_schema import Segment as SegmentSaid
from tasks.people import face_framing
from tasks.phrases import Segment, Signals
from tasks.picture import light
from tasks.prosody import HOP_S, Contours, Voice, contours, voice
from tasks.speech import Speech, SpeechSettings, VoiceDetector
from tasks.stage import Measurement, Stage, StageSettings, Unmeasurable, Value, known_backend

_STILL_WINDOW = 0.02  # window widths a second, the fastest that a crop's window may go and be called still
_MOVE_S = 0.2  # over which the head's speed is taken: less is the face detector's tremble


class GuidanceSettings(StageSettings):
    """backend: "templates", or a model: "endpoint", "qwen2.5-omni", "minicpm-o".

    min_pause_s: seconds of silence at which a segment may end. min_segment_s: what both sides of it have at least.
    max_segments: in a clip, cut at its longest pauses.

    Of models: pictures: that it is shown of a clip, the reference first; there is one a second. short_side: pixels that
    their shorter side is scaled down to. endpoint: of the backend `endpoint`. embeddings: whether what Qwen2.5-Omni
    says is stored as physavatar takes it. remote_code: the hash of the code that comes with MiniCPM-o's weights, which
    says that you trust it.
    """

    operational: ClassVar = {"endpoint": {"base_url", "key_env", "requests"}}

    backend: str = "templates"
    min_pause_s: float = Field(default=0.3, ge=0.05, le=10.0)
    min_segment_s: float = Field(default=1.5, ge=0.1, le=60.0)
    max_segments: int = Field(default=8, ge=1, le=100)
    pictures: int = Field(default=4, ge=1, le=32)
    short_side: int = Field(default=448, ge=56, le=2160)
    endpoint: EndpointSettings | None = None
    embeddings: bool = False
    remote_code: str = Field(default="", pattern="^([0-9a-f]{12})?$")

    @field_validator("backend")
    @classmethod
    def _known(cls, backend: str) -> str:
        return known_backend(backend, BACKENDS)

    @model_validator(mode="after")
    def _of_its_backend(self) -> "GuidanceSettings":
        if (self.endpoint is None) == (self.backend == "endpoint"):
            raise ValueError("`endpoint`, with base_url and model, belongs to the backend `endpoint`, and to it alone")
        if self.embeddings and self.backend != "qwen2.5-omni":
            raise ValueError("embeddings come from the backend `qwen2.5-omni` alone")
        return self


class Guide(Protocol):
    """A guidance backend. No clip changes what the next one gets."""

    def __init__(self, settings: GuidanceSettings) -> None: ...

    @staticmethod
    def version() -> str:
        """Library and weights, as far as they can change a word."""

    @staticmethod
    def check(settings: GuidanceSettings) -> None:
        """Raises tasks.stage.MissingBackend when the backend cannot run."""

    def __call__(self, clip: Clip, signals: Signals) -> tuple[Guidance, Mapping[str, np.ndarray]]:
        """The guidance of a clip, and the stage's arrays; `signals` are what was measured of it."""


class Templates:
    """Templates filled from the signals, in English; what was not measured is not said."""

    def __init__(self, settings: GuidanceSettings) -> None:
        """Nothing to load."""

    @staticmethod
    def version() -> str:
        """All in the stage's own code."""
        return ""

    @staticmethod
    def check(settings: GuidanceSettings) -> None:
        """Nothing to load."""

    def __call__(self, clip: Clip, signals: Signals) -> tuple[Guidance, Mapping[str, np.ndarray]]:
        del clip  # all that is said comes from the signals
        return fill(signals), {}


BACKENDS: dict[str, type[Guide]] = {
    "templates": Templates,
    "endpoint": Endpoint,
    "qwen2.5-omni": QwenOmni,
    "minicpm-o": MiniCPM,
}


class GuidanceStage(Stage[GuidanceSettings]):
    """Analysis, schedule and phrases of a clip.

    Of a picture that `crop` has cut, framing and light are those of what is left. How the body moves is told of the
    whole picture, which `motion` has seen; where camera and head go is not told when the window has followed the face.

    Columns:
        words: of the phrases with their tags, 80 at most.
        language: of the speech as the manifest says, else as a model hears it; "" when neither does.
        speech_type: "speech" or "none"; "singing" only from a backend that can hear it.
        emotion: "calm", "neutral" or "lively", how the voice sounds; "" without one.
        segments: between pauses of speech.
        phrases: "[AUDIO]: ... [IMAGE]: ... [VIDEO]: ...".
    Files:
        guidance.json: the document (tasks.guidance_schema.Guidance).
    Arrays, where `embeddings` asks for them; each has a row for each token of the phrases as the model wrote them:
        mllm_continuous, mllm_tokenised: [tokens, dim] float16, see tasks.networks.qwen_omni.QwenOmni.embeddings.
    """

    name: ClassVar[str] = "guidance"
    version: ClassVar[int] = 2
    backends: ClassVar = {"backend": BACKENDS}
    columns: ClassVar[dict[str, type]] = {
        "words": int,
        "language": str,
        "speech_type": str,
        "emotion": str,
        "segments": int,
        "phrases": str,
    }
    reads: ClassVar[tuple[str, ...]] = ("caption", "language", "transcript")
    uses: ClassVar[tuple[str, ...]] = ("people", "aesthetics", "motion", "identity", "crop", "pose")
    unaligned: ClassVar[tuple[str, ...]] = ("mllm_continuous", "mllm_tokenised")

    def backend_version(self) -> str:
        guide = BACKENDS[self.settings.backend].version()
        libraries = f"{Speech(SpeechSettings()).backend_version()}, scipy {version('scipy')}"
        return f"{guide}, {libraries}" if guide else libraries

    def check(self) -> None:
        Speech(SpeechSettings()).check()
        BACKENDS[self.settings.backend].check(self.settings)

    @cached_property
    def _detector(self) -> VoiceDetector:
        return VoiceDetector()

    @cached_property
    def _guide(self) -> Guide:
        return BACKENDS[self.settings.backend](self.settings)

    def measure(self, clip: Clip) -> Measurement:
        samples = clip.samples()
        heard = samples is not None and len(samples) > 0
        spans = self._detector.spans(samples) if samples is not None and heard else []
        guidance, arrays = self._guide(clip, signals_of(clip, samples if heard else None, spans, self.settings))
        return Measurement(
            {
                "words": guidance.phrases.words,
                "language": guidance.analysis.language,
                "speech_type": guidance.analysis.type,
                "emotion": guidance.analysis.tone,
                "segments": len(guidance.analysis.segments),
                "phrases": guidance.phrases.text,
            },
            arrays,
            files={"guidance.json": write_guidance(guidance)},
        )


def fill(signals: Signals) -> Guidance:
    """The templates' guidance for any signals."""
    said, origins = phrases.phrases_of(signals)
    tone = phrases.tone_of(signals.voice)
    language, transcript = clean(signals.language, 40), clean(signals.transcript, TRANSCRIPTION_CHARS)
    followed = any(s.head_speed is not None for s in signals.segments)
    return Guidance(
        backend="templates",
        analysis=Analysis(
            language=language,
            transcription=transcript,
            type="speech" if signals.spoken else "none",
            tone=tone,
            emotion=phrases.emotion_of(signals.voice),
            intention="",
            segmentation=phrases.division_of(len(signals.segments)),
            segments=tuple(
                SegmentSaid(start_s=s.start_s, end_s=s.end_s, content=phrases.content_of(s)) for s in signals.segments
            ),
        ),
        schedule=tuple(
            Shot(
                start_s=s.start_s,
                end_s=s.end_s,
                expression=phrases.expression_of(s),
                action=phrases.action_of(s),
            )
            for s in signals.segments
        ),
        phrases=said,
        sources=Sources(
            language=("manifest",) if language else (),
            transcription=("manifest",) if transcript else (),
            type=() if signals.loudness_db is None else ("sound",),
            emotion=("sound",) if tone else (),
            segments=() if signals.loudness_db is None else ("sound",),
            schedule=("identity", "sound") if followed else (),
            **origins,
        ),
    )


def signals_of(
    clip: Clip, samples: np.ndarray | None, spans: list[tuple[int, int]], settings: GuidanceSettings
) -> Signals:
    """Put together what is known of a clip.

    samples: [samples] float32 at 16 kHz, or None; spans: where there is speech in them.
    """
    record, found = clip.record, clip.found
    columns: Mapping[str, Mapping[str, Value]] = {stage: found[stage].columns for stage in found}

    def number(stage: str, column: str) -> float | None:
        value = columns.get(stage, {}).get(column)
        return float(value) if isinstance(value, (int, float)) else None

    def text(stage: str, column: str) -> str:
        return str(columns.get(stage, {}).get(column) or "")

    sound = None if samples is None else contours(samples)
    spoken = np.zeros(0 if sound is None else len(sound.pitch_hz), bool)
    for start, end in spans:
        spoken[round(start / SAMPLE_RATE / HOP_S) : round(end / SAMPLE_RATE / HOP_S)] = True
    whole = None if sound is None else voice(sound, spoken)
    arrays = found["identity"].arrays if "identity" in found else {}
    moves = _Head.of(arrays["face_box"], arrays["lips"], record.fps) if "face_box" in arrays else None
    bounds = cut_at_pauses([(a / SAMPLE_RATE, b / SAMPLE_RATE) for a, b in spans], record.duration_s, settings)
    hands = [number("pose", f"{side}_hand_share") for side in ("left", "right")]
    power = 0.0 if samples is None else float(np.mean(np.square(samples, dtype=np.float64)))
    faces, framing = number("identity", "faces"), text("people", "framing")
    brightness, colourfulness = number("aesthetics", "brightness"), number("aesthetics", "colourfulness")
    camera_speed = number("motion", "camera_speed")
    # people, aesthetics, motion and identity have seen the picture before it was cut
    cut = "crop" in found and "mp4" in found["crop"].files
    if cut:
        height = number("crop", "face_height")
        faces, framing = None, "" if height is None else face_framing(height)
        if brightness is not None:
            brightness, colourfulness = _light(clip)
        if (number("crop", "window_speed") or 0.0) > _STILL_WINDOW:
            camera_speed = None
            moves = moves and dataclasses.replace(moves, followed=True)
    return Signals(
        width=record.width,
        height=record.height,
        segments=tuple(_segment(a, b, sound, spoken, whole, moves) for a, b in pairwise(bounds)),
        caption=str(record.metadata.get("caption") or ""),
        language=str(record.metadata.get("language") or ""),
        transcript=str(record.metadata.get("transcript") or ""),
        loudness_db=None if samples is None else 10 * math.log10(max(power, 1e-12)),
        spoken=float(spoken.mean()) if len(spoken) else 0.0,
        voice=whole,
        person_share=number("people", "person_share"),
        framing=framing,
        framing_by="crop" if cut else "people",
        scene=text("people", "scene"),
        faces=None if faces is None else int(faces),
        yaw=number("identity", "yaw"),
        roll=number("identity", "roll"),
        camera_speed=camera_speed,
        subject_speed=number("motion", "subject_speed"),
        brightness=brightness,
        colourfulness=colourfulness,
        light_by="crop" if cut else "aesthetics",
        hands=max((h for h in hands if h is not None), default=None),
    )


def cut_at_pauses(spans_s: list[tuple[float, float]], duration_s: float, settings: GuidanceSettings) -> list[float]:
    """Where the segments of a clip begin and end, in seconds: from 0 to its duration.

    Cut in the middle of pauses between spans of speech, the longest first, as long as every segment keeps its least
    length.
    """
    pauses = [(start - end, (start + end) / 2) for (_, end), (start, _) in pairwise(spans_s)]
    bounds = [0.0, duration_s]
    for length, middle in sorted(pauses, key=lambda p: (-p[0], p[1])):
        at = round(middle, 3)
        if length < settings.min_pause_s or len(bounds) > settings.max_segments:
            break
        if min(abs(at - bound) for bound in bounds) >= settings.min_segment_s and at < duration_s:
            bounds = sorted([*bounds, at])
    return bounds


def _light(clip: Clip) -> tuple[float, float]:
    """Brightness and colourfulness of the clip's picture, the medians over its key frames."""
    seen = [light(image) for _, image in clip.keyframes()]
    if not seen:
        raise Unmeasurable("the clip has no key frame")
    return float(np.median([s.brightness for s in seen])), float(np.median([s.colourfulness for s in seen]))


@dataclass(frozen=True)
class _Head:
    """A face and its lips over time. box: [frames, 4] in the frame's size; opening: [frames]; NaN where not seen.
    followed: whether the picture goes where the face does."""

    box: np.ndarray
    opening: np.ndarray
    fps: int
    followed: bool = False

    @classmethod
    def of(cls, box: np.ndarray, lips: np.ndarray, fps: int) -> "_Head":
        return cls(box.astype(np.float64), lips[:, 0].astype(np.float64), fps)

    def within(self, start_s: float, end_s: float) -> dict[str, float]:
        """What tasks.phrases.Segment says of mouth and head; nothing where less than half the frames show a face."""
        frames = slice(round(start_s * self.fps), round(end_s * self.fps))
        box, opening = self.box[frames], self.opening[frames]
        seen = ~np.isnan(box).any(axis=1)
        step = max(1, round(_MOVE_S * self.fps))
        if len(box) <= step or seen.mean() < 0.5 or np.isnan(opening).all():
            return {}
        size = np.nanmedian(box[:, 2:] - box[:, :2], axis=0)  # of the face
        if not (size > 0).all():
            return {}
        middle = (box[:, :2] + box[:, 2:]) / 2 / size
        speed = np.hypot(*(middle[step:] - middle[:-step]).T) / (step / self.fps)
        edge = max(1, round(len(box) * 0.2))
        first, last = np.flatnonzero(seen)[:edge], np.flatnonzero(seen)[-edge:]
        height = (box[:, 3] - box[:, 1]) / size[1]
        way = np.zeros(2) if self.followed else middle[last].mean(axis=0) - middle[first].mean(axis=0)
        return {
            "mouth": float(np.nanstd(opening)),
            "head_speed": float(np.nanmedian(speed)) if not np.isnan(speed).all() else 0.0,
            "right": float(way[0]),
            "down": float(way[1]),
            "nearer": float(height[last].mean() - height[first].mean()),
        }


def _segment(
    start_s: float,
    end_s: float,
    sound: Contours | None,
    spoken: np.ndarray,
    whole: Voice | None,
    head: _Head | None,
) -> Segment:
    moves = head.within(start_s, end_s) if head else {}
    if sound is None:
        return Segment(start_s, end_s, **moves)
    steps = slice(round(start_s / HOP_S), max(round(start_s / HOP_S) + 1, round(end_s / HOP_S)))
    here = spoken[steps]
    voiced = here & ~np.isnan(sound.pitch_hz[steps])
    louder = higher = None
    if whole is not None and voiced.any():
        everywhere = spoken & ~np.isnan(sound.pitch_hz)
        loudness = sound.loudness_db
        louder = float(np.median(loudness[steps][voiced]) - np.median(loudness[everywhere]))
        higher = 12 * math.log2(float(np.median(sound.pitch_hz[steps][voiced])) / whole.pitch_hz)
    return Segment(start_s, end_s, float(here.mean()) if len(here) else 0.0, louder, higher, **moves)
