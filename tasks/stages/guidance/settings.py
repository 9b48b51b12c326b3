"""The settings of the stage `guidance`."""

from typing import ClassVar

from pydantic import Field, model_validator

from tasks.stages.base import StageSettings
from tasks.stages.guidance.endpoint import EndpointSettings

BACKENDS = ("templates", "endpoint", "qwen2.5-omni", "minicpm-o")
"""The names of the backends. tasks.stages.guidance.backends has a class for each."""


class GuidanceSettings(StageSettings):
    """How a clip is divided into segments, which backend writes the guidance, and what a model is shown."""

    operational: ClassVar = {"endpoint": {"base_url", "key_env", "requests"}}

    choices: ClassVar = {"backend": BACKENDS}

    backend: str = "templates"
    """What writes the guidance. "templates" fills sentences from measurements. The others ask a language model:
    "endpoint", "qwen2.5-omni" and "minicpm-o"."""
    min_pause_s: float = Field(default=0.3, ge=0.05, le=10.0)
    """Seconds of silence. A clip is divided at pauses of this length or longer."""
    min_segment_s: float = Field(default=1.5, ge=0.1, le=60.0)
    """Seconds. A division that would leave a shorter segment is not made."""
    max_segments: int = Field(default=8, ge=1, le=100)
    """Segments of a clip, at most. The longest pauses divide it."""
    pictures: int = Field(default=4, ge=1, le=32)
    """Models only. Key frames of the clip that the Planner's model is shown, the first one included. A clip has one key
    frame a second."""
    short_side: int = Field(default=448, ge=56, le=2160)
    """Models only. Pixels. Images with a longer short side are scaled down to it."""
    endpoint: EndpointSettings | None = None
    """The server of the backend "endpoint"; None with any other."""
    embeddings: bool = False
    """With the backend "qwen2.5-omni": store the embeddings of its phrases, which physavatar takes as condition."""
    remote_code: str = Field(default="", pattern="^([0-9a-f]{12})?$")
    """With the backend "minicpm-o": the hash of the code that comes with its weights. It says that you trust that
    code."""

    @model_validator(mode="after")
    def _of_its_backend(self) -> "GuidanceSettings":
        if (self.endpoint is None) == (self.backend == "endpoint"):
            raise ValueError("`endpoint`, with base_url and model, belongs to the backend `endpoint`, and to it alone")
        if self.embeddings and self.backend != "qwen2.5-omni":
            raise ValueError("embeddings come from the backend `qwen2.5-omni` alone")
        return self
