"""What a planning language model would say of a clip: an analysis, a schedule of shots, and short phrases.

active-mind has an Analyzer, which listens and looks, and a Planner, which says shot by shot what the person does.
physavatar has one model that describes audio, image and movement in phrases. The embedded backend fills templates from
measurements (tasks.stages.guidance.phrases). The others ask a language model (tasks.stages.guidance.backends). All of
them write the same document (tasks.stages.guidance.schema).
"""

from functools import cached_property
from importlib.metadata import version
from typing import ClassVar

from tasks.media.clip import Clip, Measurement
from tasks.stages import voice_activity
from tasks.stages.base import Stage
from tasks.stages.guidance.backends import BACKENDS, GuidanceBackend
from tasks.stages.guidance.schema import write_guidance
from tasks.stages.guidance.settings import GuidanceSettings
from tasks.stages.guidance.signals import signals_of
from tasks.stages.voice_activity import VoiceDetector


class GuidanceStage(Stage[GuidanceSettings]):
    """Analysis, schedule and phrases of a clip.

    For a clip that `crop` has cropped, framing and light are those of the crop. Body movement is that of the uncropped
    frame, which `motion` has measured. Camera movement and the head's way through the image are not stated where the
    crop's window has followed the face.

    Columns:
        words: of the phrases with their tags, 80 at most.
        language: of the speech, by the manifest, else by a model; "" where neither knows it.
        speech_type: "speech" or "none"; "singing" only from a model.
        emotion: how the voice sounds: "calm", "neutral" or "lively"; "" without a voice.
        segments: number of segments, divided at pauses of speech.
        phrases: "[AUDIO]: ... [IMAGE]: ... [VIDEO]: ...".
    Files:
        guidance.json: the document (tasks.stages.guidance.schema.Guidance).
    Arrays, with the setting `embeddings`; each has a row for each token of the phrases as the model wrote them:
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

    def library_version(self) -> str:
        return f"{voice_activity.version()}, scipy {version('scipy')}"

    def check(self) -> None:
        voice_activity.check()
        super().check()

    @cached_property
    def _detector(self) -> VoiceDetector:
        return VoiceDetector()

    @cached_property
    def _backend(self) -> GuidanceBackend:
        return BACKENDS[self.settings.backend](self.settings)

    def measure(self, clip: Clip) -> Measurement:
        samples = clip.samples()
        if samples is not None and not len(samples):
            samples = None
        spans = [] if samples is None else self._detector.spans(samples)
        guidance, arrays = self._backend(clip, signals_of(clip, samples, spans, self.settings))
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
