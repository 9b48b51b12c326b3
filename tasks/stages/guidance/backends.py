"""The backends of the stage `guidance`: templates, and three language models.

The models get three prompts for each clip (tasks.stages.guidance.interview). What the manifest and the audio themselves
tell is never replaced by a model's answer.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.metadata import version
from typing import ClassVar

import numpy as np

from tasks.media.clip import Clip
from tasks.stages.backend import Backend, Resources
from tasks.stages.guidance import phrases
from tasks.stages.guidance.endpoint import ChatEndpoint
from tasks.stages.guidance.interview import Interview
from tasks.stages.guidance.schema import (
    TRANSCRIPTION_CHARS,
    Analysis,
    Guidance,
    PlannedShot,
    Segment,
    Sources,
    clean,
)
from tasks.stages.guidance.settings import GuidanceSettings
from tasks.stages.guidance.signals import Signals
from tasks.weights import remote_code
from tasks.weights import store as weights

Arrays = Mapping[str, np.ndarray]


class GuidanceBackend(Backend, ABC):
    """A backend of the stage `guidance`."""

    @abstractmethod
    def __init__(self, settings: GuidanceSettings) -> None: ...

    @abstractmethod
    def __call__(self, clip: Clip, signals: Signals) -> tuple[Guidance, Arrays]:
        """Write the guidance of a clip.

        signals: what was measured of the clip.

        Returns: the document, and the stage's arrays. Raises GuidanceError, and Unmeasurable, from models.
        """


class TemplateBackend(GuidanceBackend):
    """English sentences and phrases from templates, filled with the signals. What was not measured is not stated."""

    resources: ClassVar[Resources] = Resources(memory_gb=0.2)

    def __init__(self, settings: GuidanceSettings) -> None:
        del settings

    def __call__(self, clip: Clip, signals: Signals) -> tuple[Guidance, Arrays]:
        del clip
        return fill_templates(signals), {}


class EndpointBackend(GuidanceBackend):
    """A model behind an OpenAI-compatible endpoint (tasks.stages.guidance.endpoint). Its resources are those of the
    client, without the server's."""

    resources: ClassVar[Resources] = Resources(memory_gb=0.2)

    def __init__(self, settings: GuidanceSettings) -> None:
        assert settings.endpoint is not None
        self._settings, self._endpoint = settings, settings.endpoint
        self._chat = ChatEndpoint(settings.endpoint)

    @classmethod
    def check(cls, settings: GuidanceSettings) -> None:
        assert settings.endpoint is not None
        ChatEndpoint(settings.endpoint).check()

    def __call__(self, clip: Clip, signals: Signals) -> tuple[Guidance, Arrays]:
        interview = Interview(self._chat, clip, signals, self._settings, takes_audio=self._endpoint.sound == "wav")
        return interview.guidance(f"endpoint: {self._endpoint.model}"), {}


class QwenOmniBackend(GuidanceBackend):
    """Qwen2.5-Omni's Thinker (tasks.networks.qwen_omni), the model that physavatar uses.

    With the setting `embeddings` it stores the embeddings of the phrases' tokens too.
    """

    networks: ClassVar[tuple[str, ...]] = ("qwen2.5-omni",)
    resources: ClassVar[Resources] = Resources(gpu=1.0, memory_gb=20.0)
    """Memory by the size of its weights, not measured: 18 GB for the Thinker in bfloat16, in which it computes (part of
    the catalogue's 22.4 GB), and an allowance of 2 GB for libraries, the key-value cache and activations."""

    def __init__(self, settings: GuidanceSettings) -> None:
        from tasks.networks import qwen_omni

        self._settings, self._model = settings, qwen_omni.load()

    @classmethod
    def version(cls) -> str:
        return (
            f"qwen2.5-omni {weights.digest('qwen2.5-omni')}, torch {version('torch')}, "
            f"transformers {version('transformers')}"
        )

    def __call__(self, clip: Clip, signals: Signals) -> tuple[Guidance, Arrays]:
        interview = Interview(self._model, clip, signals, self._settings, takes_audio=True)
        guidance = interview.guidance("qwen2.5-omni")
        if not self._settings.embeddings:
            return guidance, {}
        assert interview.phrases_exchange is not None
        continuous, tokenised = self._model.embeddings(*interview.phrases_exchange)
        return guidance, {"mllm_continuous": continuous, "mllm_tokenised": tokenised}


class MiniCPMBackend(GuidanceBackend):
    """MiniCPM-o (tasks.networks.minicpm_o), which runs by the code that comes with its weights."""

    networks: ClassVar[tuple[str, ...]] = ("minicpm-o",)
    resources: ClassVar[Resources] = Resources(gpu=1.0, memory_gb=19.3)
    """Memory by the size of its weights, not measured: the catalogue's 17.3 GB in bfloat16, in which it computes, and
    an allowance of 2 GB for libraries, the key-value cache and activations."""

    def __init__(self, settings: GuidanceSettings) -> None:
        from tasks.networks import minicpm_o

        self._settings, self._model = settings, minicpm_o.load(settings.remote_code)

    @classmethod
    def version(cls) -> str:
        code = remote_code.digest("minicpm-o")
        return f"minicpm-o {weights.digest('minicpm-o')}, code {code}, transformers {version('transformers')}"

    @classmethod
    def check(cls, settings: GuidanceSettings) -> None:
        from tasks.networks import minicpm_o

        super().check(settings)
        remote_code.check("minicpm-o", "guidance.remote_code", settings.remote_code)
        minicpm_o.check_imports()

    def __call__(self, clip: Clip, signals: Signals) -> tuple[Guidance, Arrays]:
        interview = Interview(self._model, clip, signals, self._settings, takes_audio=True)
        return interview.guidance("minicpm-o"), {}


def fill_templates(signals: Signals) -> Guidance:
    """The guidance document that the templates write."""
    short_phrases, origins = phrases.phrases_of(signals)
    tone = phrases.tone_of(signals.voice)
    language, transcript = clean(signals.language, 40), clean(signals.transcript, TRANSCRIPTION_CHARS)
    face_followed = any(segment.head_speed is not None for segment in signals.segments)
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
                Segment(start_s=s.start_s, end_s=s.end_s, content=phrases.content_of(s)) for s in signals.segments
            ),
        ),
        schedule=tuple(
            PlannedShot(
                start_s=s.start_s,
                end_s=s.end_s,
                expression=phrases.expression_of(s),
                action=phrases.action_of(s),
            )
            for s in signals.segments
        ),
        phrases=short_phrases,
        sources=Sources(
            language=("manifest",) if language else (),
            transcription=("manifest",) if transcript else (),
            type=() if signals.loudness_db is None else ("sound",),
            emotion=("sound",) if tone else (),
            segments=() if signals.loudness_db is None else ("sound",),
            schedule=("identity", "sound") if face_followed else (),
            **origins,
        ),
    )


BACKENDS: dict[str, type[GuidanceBackend]] = {
    "templates": TemplateBackend,
    "endpoint": EndpointBackend,
    "qwen2.5-omni": QwenOmniBackend,
    "minicpm-o": MiniCPMBackend,
}
