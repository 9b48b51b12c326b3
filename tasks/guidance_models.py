"""Guidance by language models: three questions on a clip (`tasks.guidance_prompts`), each asked again once when the
answer breaks the schema. What the manifest and the sound itself tell is not left to the model."""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from tasks import guidance_prompts as prompts
from tasks import phrases, remote_code, weights
from tasks.chat import MAX_SOUND_S, Answer, Chat, Turn
from tasks.chat_endpoint import ChatEndpoint
from tasks.clip import Clip
from tasks.guidance_prompts import AnalyzerAnswer, PlannerAnswer
from tasks.guidance_schema import (
    TRANSCRIPTION_CHARS,
    Analysis,
    Guidance,
    GuidanceError,
    Origin,
    Segment,
    Shot,
    Sources,
    clean,
)
from tasks.phrases import Signals
from tasks.stage import Unmeasurable

if TYPE_CHECKING:
    from tasks.guidance import GuidanceSettings

_REPEATED = 8000  # letters of an answer that its repair gets to see

Said = TypeVar("Said")
Arrays = Mapping[str, np.ndarray]
Exchange = tuple[tuple[Turn, ...], Answer]  # what was asked, and what came of it


class Endpoint:
    """The model of an OpenAI-compatible endpoint (tasks.chat_endpoint)."""

    def __init__(self, settings: "GuidanceSettings") -> None:
        assert settings.endpoint is not None
        self._settings, self._endpoint = settings, settings.endpoint
        self._chat = ChatEndpoint(settings.endpoint)

    @staticmethod
    def version() -> str:
        """Nobody can tell what a server runs: its model is known by the name in the settings."""
        return ""

    @staticmethod
    def check(settings: "GuidanceSettings") -> None:
        assert settings.endpoint is not None
        ChatEndpoint(settings.endpoint).check()

    def __call__(self, clip: Clip, signals: Signals) -> tuple[Guidance, Arrays]:
        talk = Interview(self._chat, clip, signals, self._settings, hears=self._endpoint.sound == "wav")
        return talk.guidance(f"endpoint: {self._endpoint.model}"), {}


class QwenOmni:
    """Qwen2.5-Omni's Thinker (tasks.networks.qwen_omni), physavatar's own; with its embeddings where asked."""

    networks: ClassVar[tuple[str, ...]] = ("qwen2.5-omni",)

    def __init__(self, settings: "GuidanceSettings") -> None:
        from tasks.networks import qwen_omni

        self._settings, self._model = settings, qwen_omni.load()

    @staticmethod
    def version() -> str:
        return (
            f"qwen2.5-omni {weights.digest('qwen2.5-omni')}, torch {version('torch')}, "
            f"transformers {version('transformers')}"
        )

    @staticmethod
    def check(settings: "GuidanceSettings") -> None:
        weights.check("qwen2.5-omni")

    def __call__(self, clip: Clip, signals: Signals) -> tuple[Guidance, Arrays]:
        talk = Interview(self._model, clip, signals, self._settings, hears=True)
        guidance = talk.guidance("qwen2.5-omni")
        if not self._settings.embeddings:
            return guidance, {}
        assert talk.directed is not None
        continuous, tokenised = self._model.embeddings(*talk.directed)
        return guidance, {"mllm_continuous": continuous, "mllm_tokenised": tokenised}


class MiniCPM:
    """MiniCPM-o (tasks.networks.minicpm_o), by the code that comes with its weights."""

    networks: ClassVar[tuple[str, ...]] = ("minicpm-o",)

    def __init__(self, settings: "GuidanceSettings") -> None:
        from tasks.networks import minicpm_o

        self._settings, self._model = settings, minicpm_o.load(settings.remote_code)

    @staticmethod
    def version() -> str:
        code = remote_code.digest("minicpm-o")
        return f"minicpm-o {weights.digest('minicpm-o')}, code {code}, transformers {version('transformers')}"

    @staticmethod
    def check(settings: "GuidanceSettings") -> None:
        from tasks.networks import minicpm_o

        weights.check("minicpm-o")
        remote_code.check("minicpm-o", "guidance.remote_code", settings.remote_code)
        minicpm_o.check_imports()

    def __call__(self, clip: Clip, signals: Signals) -> tuple[Guidance, Arrays]:
        talk = Interview(self._model, clip, signals, self._settings, hears=True)
        return talk.guidance("minicpm-o"), {}


class Interview:
    """A model asked about one clip.

    Analyzer and director get the reference picture, the clip's first, as the papers have it. The Planner gets pictures
    over the whole clip too: what it plans is learnt together with the picture, and has to be true of it.

    hears: whether the model takes sound; one that does not is told what the manifest and the measurements say of it.
    """

    def __init__(self, chat: Chat, clip: Clip, signals: Signals, settings: "GuidanceSettings", hears: bool) -> None:
        if clip.record.duration_s > MAX_SOUND_S:
            raise Unmeasurable(f"a clip of {clip.record.duration_s:g} s is longer than the {MAX_SOUND_S} s of a talk")
        self._chat, self._signals, self._hears = chat, signals, hears
        self._times = [(segment.start_s, segment.end_s) for segment in signals.segments]
        self._images = _pictures(clip, settings.pictures, settings.short_side)
        self._sound = clip.samples() if hears and signals.loudness_db is not None else None
        self.directed: Exchange | None = None  # on the phrases, once they are there

    def guidance(self, backend: str) -> Guidance:
        """The whole document. Raises GuidanceError where an answer and its repair break the schema."""
        signals, count = self._signals, len(self._times)
        one, some = self._given(1), self._given(len(self._images))
        analysis, _ = self._asked(
            "Analyzer",
            prompts.analyzer(one, self._times),
            1,
            lambda text: prompts.read_analysis(text, count),
            AnalyzerAnswer.model_json_schema(),
        )
        plan, _ = self._asked(
            "Planner",
            prompts.planner(some, self._times, analysis),
            len(self._images),
            lambda text: prompts.read_plan(text, count),
            PlannerAnswer.model_json_schema(),
        )
        said, self.directed = self._asked("phrases", prompts.phrases(one), 1, prompts.read_phrases)
        sounds = signals.loudness_db is not None
        tone = phrases.tone_of(signals.voice)
        language, told_language = _known(signals.language, analysis.language if sounds else "", 40)
        transcript, told_transcript = _known(
            signals.transcript, analysis.transcription if sounds else "", TRANSCRIPTION_CHARS
        )
        model: tuple[Origin, ...] = ("model",)
        heard: tuple[Origin, ...] = ("model", "sound")
        return Guidance(
            backend=clean(backend, 100),
            analysis=Analysis(
                language=language,
                transcription=transcript,
                type=analysis.type if sounds else "none",
                tone=tone,
                emotion=analysis.emotion,
                intention=analysis.intention,
                segmentation=phrases.division_of(count),
                segments=tuple(
                    Segment(start_s=start, end_s=end, content=segment.content, intention=segment.intention)
                    for (start, end), segment in zip(self._times, analysis.segments, strict=True)
                ),
            ),
            schedule=tuple(
                Shot(start_s=start, end_s=end, expression=shot.expression, action=shot.action)
                for (start, end), shot in zip(self._times, plan.shots, strict=True)
            ),
            phrases=said,
            sources=Sources(
                language=told_language,
                transcription=told_transcript,
                type=model if sounds else (),
                emotion=heard if tone else model if analysis.emotion else (),
                intention=model if analysis.intention else (),
                segments=heard if sounds else model,
                schedule=model,
                audio=model,
                image=model,
                video=model,
            ),
        )

    def _given(self, pictures: int) -> str:
        signals = self._signals
        notes = [phrases.emotion_of(signals.voice), *(phrases.content_of(segment) for segment in signals.segments)]
        words = [f"Words: {signals.transcript}"] if signals.transcript.strip() else []
        times = [at for at, _ in self._images[:pictures]]
        sounds = signals.loudness_db is not None
        return prompts.given(times, self._hears, sounds, signals.caption, [*notes, *words])

    def _asked(
        self,
        who: str,
        question: str,
        pictures: int,
        read: Callable[[str], Said],
        schema: Mapping[str, Any] | None = None,
    ) -> tuple[Said, "Exchange"]:
        """What the model says, read; asked once more where it cannot be. Raises GuidanceError."""
        images = tuple(image for _, image in self._images[:pictures])
        turns: tuple[Turn, ...] = (Turn("user", question, images, self._sound),)
        answer = self._chat(turns, schema)
        try:
            return read(answer.text), (turns, answer)
        except GuidanceError as error:
            turns += (Turn("assistant", answer.text[:_REPEATED]), Turn("user", prompts.repair(error)))
            answer = self._chat(turns, schema)
            try:
                return read(answer.text), (turns, answer)
            except GuidanceError as still:
                raise GuidanceError(f"{who}: no usable answer in two: {still}") from None


def _known(manifest: str, said: str, letters: int) -> tuple[str, tuple[Origin, ...]]:
    """What the manifest says, else the model, and which of them."""
    known = clean(manifest, letters)
    if known:
        return known, ("manifest",)
    return said, ("model",) if said else ()


def _pictures(clip: Clip, count: int, short_side: int) -> list[tuple[float, np.ndarray]]:
    """Pictures spread evenly over a clip, the first one first, with their times in seconds; no larger than asked."""
    record = clip.record
    scale = min(1.0, short_side / min(record.width, record.height))
    size = (max(2, round(record.width * scale)), max(2, round(record.height * scale)))
    found = [(frame / record.fps, image) for frame, image in clip.keyframes(size)]
    if not found:
        raise Unmeasurable("the clip has no key frame")
    chosen = np.linspace(0, len(found) - 1, min(count, len(found)))
    return [found[round(k)] for k in chosen]
