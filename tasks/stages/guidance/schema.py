"""The guidance document of a clip: active-mind's analysis and schedule, and physavatar's phrases.

Every backend of the stage writes this one JSON document. `read_guidance` validates it: there are no free keys, and
every length is bounded. Analysis and schedule have the parts of active-mind's appendix D.1. The phrases keep the rules
of the prompt in physavatar's figure S3, cited as [S3].

The texts of validation errors are part of the prompts: a language model whose answer is refused gets them to correct
it. A change of such a text changes what the model answers.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from data_manifests.strict import Strict

MAX_WORDS = 80  # [S3] "All content combined must not exceed 80 words"; the three tags count as words
MAX_BYTES = 1_000_000  # of a document, and characters of a model's answer
TRANSCRIPTION_CHARS = 20_000  # characters of a transcription

# [S3] "No filler words, conjunctions, or articles are allowed"
_ARTICLES = "a an the"
_CONJUNCTIONS = (
    "and or but nor yet because although though unless whereas while whether"  # words that are conjunctions only
)
_FILLERS = "um uh er well just really very quite actually basically simply literally"
FORBIDDEN = frozenset(f"{_ARTICLES} {_CONJUNCTIONS} {_FILLERS}".split())
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
# Control and format characters, line separators, lone surrogates.
_UNPRINTED = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")

Tone = Literal["calm", "neutral", "lively", ""]
Origin = Literal["caption", "manifest", "sound", "people", "motion", "identity", "crop", "aesthetics", "pose", "model"]


class GuidanceError(ValueError):
    """A document or an answer that breaks the schema. The message says which one and every fault."""


def words_in(text: str) -> list[str]:
    """The words of a text. The parts of a hyphenated word count as words."""
    return _WORD.findall(text)


def clean(text: str, max_chars: int) -> str:
    """The text as one printable line. Unprintable characters and runs of white space become one space. A longer text is
    cut at the end of a word."""
    line = " ".join(_UNPRINTED.sub(" ", text).split())
    if len(line) <= max_chars:
        return line
    cut = line[: max_chars + 1].rpartition(" ")[0]
    return cut or line[:max_chars]


def _printed(text: str) -> str:
    if _UNPRINTED.search(text):
        raise ValueError("has line breaks or characters that cannot be printed")
    return text


def _concise(phrase: str) -> str:
    words = [word.casefold() for word in words_in(phrase)]
    if not words:
        raise ValueError(f"{phrase!r} has no word")
    banned = sorted(FORBIDDEN & set(words))
    if banned:
        raise ValueError(f"{phrase!r} has {', '.join(map(repr, banned))}: no articles, conjunctions or filler words")
    if set(phrase) & set("?;[]"):
        raise ValueError(f"{phrase!r} is a question, or has ; [ or ], which part phrases from each other")
    return _printed(phrase)


Sentence = Annotated[str, Field(max_length=1000), AfterValidator(_printed)]
Phrase = Annotated[str, Field(max_length=120), AfterValidator(_concise)]
Three = Annotated[tuple[Phrase, ...], Field(min_length=3, max_length=5)]  # [S3] "Limit to 3-5 concise phrases"
Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class _TimedText(Strict):
    start_s: Seconds
    """Seconds from the clip's start."""
    end_s: Seconds
    """Seconds from the clip's start."""

    @model_validator(mode="after")
    def _forward(self) -> "_TimedText":
        if self.end_s <= self.start_s:
            raise ValueError(f"ends at {self.end_s:g} s and starts at {self.start_s:g} s")
        return self


class Segment(_TimedText):
    """One segment of the clip's audio."""

    content: Sentence
    """What is said or heard in it."""
    intention: Sentence = ""
    """What the segment is for; "" where it is not known."""


class Analysis(Strict):
    """The Analyzer's answers, in the order of active-mind's prompts (appendix D.1)."""

    language: Annotated[str, Field(max_length=40), AfterValidator(_printed)]
    """The language of the speech, as the source's manifest or the model names it; "" where it is not known."""
    transcription: Annotated[str, Field(max_length=TRANSCRIPTION_CHARS), AfterValidator(_printed)]
    """The words that are spoken, by the manifest or the model; "" where they are not known."""
    type: Literal["speech", "singing", "none"]
    """What the voice does; "none" without a voice."""
    tone: Tone
    """How the voice sounds, in one word; "" without a voice."""
    emotion: Sentence
    """The speaker's emotional state; "" where it is not known."""
    intention: Sentence
    """What the speaker wants; "" where it is not known."""
    segmentation: Sentence
    """How the audio was divided into segments."""
    segments: tuple[Segment, ...] = Field(min_length=1, max_length=100)
    """In order, from the clip's start to its end without gaps."""

    @model_validator(mode="after")
    def _without_gaps(self) -> "Analysis":
        if self.segments[0].start_s != 0:
            raise ValueError("segments: the first does not start at 0 s")
        for number, (before, after) in enumerate(zip(self.segments, self.segments[1:], strict=False), 1):
            if before.end_s != after.start_s:
                raise ValueError(f"segments: {number} ends at {before.end_s:g} s, the next starts at {after.start_s:g}")
        return self


class PlannedShot(_TimedText):
    """A shot of the Planner's schedule, for one segment."""

    expression: Sentence
    """What the person's face does."""
    action: Sentence
    """What the person's head, hands and body do."""


class Phrases(Strict):
    """physavatar's concise phrases (figure S3): 3 to 5 of each kind, and at most 80 words with the tags."""

    audio: Three
    """Tone, pacing, rhythm, intonation and volume of the voice."""
    image: Three
    """Appearance, expression, pose, outfit and setting of the person."""
    video: Three
    """How posture, gaze and expression change."""

    @property
    def text(self) -> str:
        """The fixed format: "[AUDIO]: one; two; three [IMAGE]: ... [VIDEO]: ..."."""
        parts = {"AUDIO": self.audio, "IMAGE": self.image, "VIDEO": self.video}
        return " ".join(f"[{tag}]: {'; '.join(phrases)}" for tag, phrases in parts.items())

    @property
    def words(self) -> int:
        return len(words_in(self.text))

    @model_validator(mode="after")
    def _short(self) -> "Phrases":
        if self.words > MAX_WORDS:
            raise ValueError(f"{self.words} words, {MAX_WORDS} are allowed")
        return self


class Sources(Strict):
    """Where each part of the document came from: a stage, the audio itself ("sound"), the manifest, the caption, or a
    language model ("model"). () for a part that says nothing."""

    language: tuple[Origin, ...] = ()
    transcription: tuple[Origin, ...] = ()
    type: tuple[Origin, ...] = ()
    emotion: tuple[Origin, ...] = ()
    intention: tuple[Origin, ...] = ()
    segments: tuple[Origin, ...] = ()
    schedule: tuple[Origin, ...] = ()
    audio: tuple[Origin, ...] = ()
    image: tuple[Origin, ...] = ()
    video: tuple[Origin, ...] = ()


class Guidance(Strict):
    """The guidance document of one clip."""

    schema_version: Literal[1] = 1
    backend: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_printed)]
    """The backend that wrote it, with the model's name for an endpoint."""
    analysis: Analysis
    schedule: tuple[PlannedShot, ...]
    """One shot for each segment of the analysis, at its times."""
    phrases: Phrases
    sources: Sources

    @model_validator(mode="after")
    def _shot_by_shot(self) -> "Guidance":
        times = [(s.start_s, s.end_s) for s in self.analysis.segments]
        if [(s.start_s, s.end_s) for s in self.schedule] != times:
            raise ValueError("schedule: its shots are not at the times of the analysis' segments")
        return self


def read_guidance(data: bytes | str, where: str) -> Guidance:
    """Parse and validate a guidance document.

    where: its name in error messages. Raises GuidanceError with this name and every key that is at fault.
    """
    if len(data) > MAX_BYTES:
        raise GuidanceError(f"{where}: {len(data):,} bytes, {MAX_BYTES:,} are allowed")
    try:
        return Guidance.model_validate_json(data)
    except ValidationError as error:
        faults = [(".".join(map(str, f["loc"])) or "document", f["msg"]) for f in error.errors()[:20]]
        lines = [
            f"{where}: {clean(key, 200)}: {clean(text.removeprefix('Value error, '), 300)}" for key, text in faults
        ]
        raise GuidanceError("\n".join(lines)) from None


def write_guidance(guidance: Guidance) -> bytes:
    """The document as JSON. The same guidance gives the same bytes."""
    return guidance.model_dump_json(indent=1).encode() + b"\n"
