"""The interview of a chat model about one clip: three prompts, and the guidance document from their answers."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from tasks.media.clip import Clip, Unmeasurable
from tasks.networks.chat import MAX_SOUND_S, Answer, Chat, Message
from tasks.stages.guidance import phrases, prompts
from tasks.stages.guidance.prompts import AnalyzerAnswer, PlannerAnswer
from tasks.stages.guidance.schema import (
    TRANSCRIPTION_CHARS,
    Analysis,
    Guidance,
    GuidanceError,
    Origin,
    Phrases,
    PlannedShot,
    Segment,
    Sources,
    clean,
)
from tasks.stages.guidance.settings import GuidanceSettings
from tasks.stages.guidance.signals import Signals

_QUOTED_ANSWER = 8000  # characters of a refused answer that the repair prompt's chat repeats

AnswerT = TypeVar("AnswerT")
Exchange = tuple[tuple[Message, ...], Answer]
"""The messages of a chat, and the model's answer to them."""


class Interview:
    """One clip, and the chat model that is asked about it.

    The Analyzer's and physavatar's prompts show the reference image, the clip's first key frame, as the papers do. The
    Planner's prompt shows key frames over the whole clip: training learns the schedule together with the video, so the
    schedule has to be true of all of it.
    """

    def __init__(self, chat: Chat, clip: Clip, signals: Signals, settings: GuidanceSettings, takes_audio: bool) -> None:
        """takes_audio: whether the model takes audio. Else it is told what manifest and measurements say of the audio.

        Raises Unmeasurable for a clip that is too long or has no key frame.
        """
        if clip.record.duration_s > MAX_SOUND_S:
            raise Unmeasurable(
                f"a clip of {clip.record.duration_s:g} s is longer than the {MAX_SOUND_S} s that the models accept"
            )
        self._chat, self._signals, self._takes_audio = chat, signals, takes_audio
        self._times = [(segment.start_s, segment.end_s) for segment in signals.segments]
        self._images = _images(clip, settings.pictures, settings.short_side)
        self._sound = clip.samples() if takes_audio and signals.loudness_db is not None else None
        self.phrases_exchange: Exchange | None = None
        """The exchange that gave the phrases, once they are there."""

    def guidance(self, backend: str) -> Guidance:
        """Ask all prompts. Raises GuidanceError where an answer and its repair break the schema."""
        count = len(self._times)
        reference, all_images = self._given(1), self._given(len(self._images))
        analysis, _ = self._ask(
            "Analyzer",
            prompts.analyzer(reference, self._times),
            1,
            lambda text: prompts.read_analysis(text, count),
            AnalyzerAnswer.model_json_schema(),
        )
        plan, _ = self._ask(
            "Planner",
            prompts.planner(all_images, self._times, analysis),
            len(self._images),
            lambda text: prompts.read_plan(text, count),
            PlannerAnswer.model_json_schema(),
        )
        short_phrases, self.phrases_exchange = self._ask("phrases", prompts.phrases(reference), 1, prompts.read_phrases)
        return self._document(backend, analysis, plan, short_phrases)

    def _document(self, backend: str, answer: AnalyzerAnswer, plan: PlannerAnswer, short_phrases: Phrases) -> Guidance:
        """The document from the model's answers, in which what manifest and audio tell takes precedence."""
        signals = self._signals
        has_audio = signals.loudness_db is not None
        tone = phrases.tone_of(signals.voice)
        language, language_origin = _known_or_answered(signals.language, answer.language if has_audio else "", 40)
        transcript, transcript_origin = _known_or_answered(
            signals.transcript, answer.transcription if has_audio else "", TRANSCRIPTION_CHARS
        )
        model: tuple[Origin, ...] = ("model",)
        model_and_sound: tuple[Origin, ...] = ("model", "sound")
        return Guidance(
            backend=clean(backend, 100),
            analysis=Analysis(
                language=language,
                transcription=transcript,
                type=answer.type if has_audio else "none",
                tone=tone,
                emotion=answer.emotion,
                intention=answer.intention,
                segmentation=phrases.division_of(len(self._times)),
                segments=tuple(
                    Segment(start_s=start, end_s=end, content=segment.content, intention=segment.intention)
                    for (start, end), segment in zip(self._times, answer.segments, strict=True)
                ),
            ),
            schedule=tuple(
                PlannedShot(start_s=start, end_s=end, expression=shot.expression, action=shot.action)
                for (start, end), shot in zip(self._times, plan.shots, strict=True)
            ),
            phrases=short_phrases,
            sources=Sources(
                language=language_origin,
                transcription=transcript_origin,
                type=model if has_audio else (),
                emotion=model_and_sound if tone else model if answer.emotion else (),
                intention=model if answer.intention else (),
                segments=model_and_sound if has_audio else model,
                schedule=model,
                audio=model,
                image=model,
                video=model,
            ),
        )

    def _given(self, num_images: int) -> str:
        """What a prompt with the first `num_images` images says of them, of the audio and of the caption."""
        signals = self._signals
        notes = [phrases.emotion_of(signals.voice), *(phrases.content_of(segment) for segment in signals.segments)]
        words = [f"Words: {signals.transcript}"] if signals.transcript.strip() else []
        times = [time_s for time_s, _ in self._images[:num_images]]
        has_audio = signals.loudness_db is not None
        return prompts.given(times, self._takes_audio, has_audio, signals.caption, [*notes, *words])

    def _ask(
        self,
        role: str,
        prompt: str,
        num_images: int,
        read: Callable[[str], AnswerT],
        schema: Mapping[str, Any] | None = None,
    ) -> tuple[AnswerT, Exchange]:
        """Ask one prompt. Where the answer breaks the schema, ask once more with the faults.

        role: names the prompt in an error message. read: parses the answer.

        Returns: the parsed answer, and its exchange. Raises GuidanceError.
        """
        images = tuple(image for _, image in self._images[:num_images])
        messages: tuple[Message, ...] = (Message("user", prompt, images, self._sound),)
        answer = self._chat(messages, schema)
        try:
            return read(answer.text), (messages, answer)
        except GuidanceError as error:
            repair = Message("user", prompts.repair(error))
            messages += (Message("assistant", answer.text[:_QUOTED_ANSWER]), repair)
            answer = self._chat(messages, schema)
            try:
                return read(answer.text), (messages, answer)
            except GuidanceError as still:
                raise GuidanceError(f"{role}: no usable answer in two tries: {still}") from None


def _known_or_answered(manifest: str, answered: str, max_chars: int) -> tuple[str, tuple[Origin, ...]]:
    """The manifest's text, or the model's where the manifest has none; and its origin."""
    known = clean(manifest, max_chars)
    if known:
        return known, ("manifest",)
    return answered, ("model",) if answered else ()


def _images(clip: Clip, count: int, short_side: int) -> list[tuple[float, np.ndarray]]:
    """Up to `count` key frames, spread evenly over a clip, the first one included.

    Returns: for each its time in seconds and [height, width, 3] uint8 RGB, scaled down to `short_side` where larger.
    """
    record = clip.record
    scale = min(1.0, short_side / min(record.width, record.height))
    size = (max(2, round(record.width * scale)), max(2, round(record.height * scale)))
    found = [(frame / record.fps, image) for frame, image in clip.keyframes(size)]
    if not found:
        raise Unmeasurable("the clip has no key frame")
    chosen = np.linspace(0, len(found) - 1, min(count, len(found)))
    return [found[round(k)] for k in chosen]
