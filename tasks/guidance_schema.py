"""The guidance of a clip: what the Analyzer and the Planner of active-mind say of it, and physavatar's phrases.

One JSON document, whoever wrote it: templates filled from measurements, or a language model. Read with `read_guidance`,
which holds it against the schema: no free keys, bounds on every length.

Analysis and schedule have the parts that active-mind's appendix D.1 shows; the phrases keep the rules of the prompt in
physavatar's figure S3.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from data_manifests.strict import Strict

MAX_WORDS = 80  # [S3] "All content combined must not exceed 80 words"; the three tags are counted too
MAX_BYTES = 1_000_000  # of a whole document
TRANSCRIPTION_CHARS = 20_000

# [S3] "No filler words, conjunctions, or articles are allowed"
_ARTICLES = "a an the"
_CONJUNCTIONS = "and or but nor yet because although though unless whereas while whether"  # that have no other use
_FILLERS = "um uh er well just really very quite actually basically simply literally"
FORBIDDEN = frozenset(f"{_ARTICLES} {_CONJUNCTIONS} {_FILLERS}".split())
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
# what is not printed: control and format characters, lone surrogates, separators of lines
_UNPRINTED = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")

Tone = Literal["calm", "neutral", "lively", ""]
Origin = Literal["caption", "manifest", "sound", "people", "motion", "identity", "crop", "aesthetics", "pose", "model"]


class GuidanceError(ValueError):
    """A guidance that does not keep the schema; the message says where it came from and what is wrong with it."""


def words_in(text: str) -> list[str]:
    """The words of a text; parts of a hyphenated one count each."""
    return _WORD.findall(text)


def clean(text: str, max_chars: int) -> str:
    """One line of printed text: unprinted characters and runs of space become one space; cut at a word's end."""
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


class _Span(Strict):
    """start_s, end_s: seconds from the clip's start."""

    start_s: Seconds
    end_s: Seconds

    @model_validator(mode="after")
    def _forward(self) -> "_Span":
        if self.end_s <= self.start_s:
            raise ValueError(f"ends at {self.end_s:g} s and starts at {self.start_s:g} s")
        return self


class Segment(_Span):
    """A part of the sound. content: what is said or heard in it. intention: what for; "" where nobody can tell."""

    content: Sentence
    intention: Sentence = ""


class Analysis(Strict):
    """The Analyzer's answers, in the order of active-mind's prompts (appendix D.1).

    language: of the speech, as the source's manifest names it; "" when not known. transcription: likewise. type:
    "speech" or "singing"; "none" where no voice is heard. tone: how the voice sounds, in one word; "" without one.
    emotion, intention: in words; "" where nobody can tell. segmentation: how the sound was divided. segments: in order,
    from the clip's start to its end without gaps.
    """

    language: Annotated[str, Field(max_length=40), AfterValidator(_printed)]
    transcription: Annotated[str, Field(max_length=TRANSCRIPTION_CHARS), AfterValidator(_printed)]
    type: Literal["speech", "singing", "none"]
    tone: Tone
    emotion: Sentence
    intention: Sentence
    segmentation: Sentence
    segments: tuple[Segment, ...] = Field(min_length=1, max_length=100)

    @model_validator(mode="after")
    def _without_gaps(self) -> "Analysis":
        if self.segments[0].start_s != 0:
            raise ValueError("segments: the first does not start at 0 s")
        for number, (before, after) in enumerate(zip(self.segments, self.segments[1:], strict=False), 1):
            if before.end_s != after.start_s:
                raise ValueError(f"segments: {number} ends at {before.end_s:g} s, the next starts at {after.start_s:g}")
        return self


class Shot(_Span):
    """A shot of the Planner's schedule: what the person's face and body do in one segment."""

    expression: Sentence
    action: Sentence


class Phrases(Strict):
    """physavatar's concise phrases (figure S3).

    audio: tone, pacing, rhythm, intonation, volume of the voice. image: appearance, expression, pose, outfit, setting.
    video: how posture, gaze and expression change. 3 to 5 of each, 80 words at most with the tags.
    """

    audio: Three
    image: Three
    video: Three

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
    """Where each part came from: stages, the sound itself, the manifest's fields, the caption, or a language model that
    looked and listened; nothing where the part says nothing."""

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
    """Everything said of one clip. backend: who said it. schedule: one shot for each of the analysis' segments."""

    schema_version: Literal[1] = 1
    backend: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_printed)]
    analysis: Analysis
    schedule: tuple[Shot, ...]
    phrases: Phrases
    sources: Sources

    @model_validator(mode="after")
    def _shot_by_shot(self) -> "Guidance":
        times = [(s.start_s, s.end_s) for s in self.analysis.segments]
        if [(s.start_s, s.end_s) for s in self.schedule] != times:
            raise ValueError("schedule: its shots are not at the times of the analysis' segments")
        return self


def read_guidance(data: bytes | str, where: str) -> Guidance:
    """Parse a guidance document.

    where: what to call it in a message. Raises GuidanceError naming it and every key that is at fault.
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
    """As JSON, the same bytes for the same guidance."""
    return guidance.model_dump_json(indent=1).encode() + b"\n"
