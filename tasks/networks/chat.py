"""The interface of a multimodal chat model: messages in, one answer out.

An HTTP endpoint (tasks.stages.guidance.endpoint) and the models that run on this machine (tasks.networks.qwen_omni,
tasks.networks.minicpm_o) implement it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

MAX_TOKENS = 2048  # of an answer
MAX_SOUND_S = 300  # seconds of audio that the published models accept in one message


@dataclass(frozen=True)
class Message:
    """One message of a chat. Its content is its images, its audio and its text, in this order."""

    role: Literal["user", "assistant"]
    """Whose message it is."""
    text: str
    """The text of the content."""
    images: tuple[np.ndarray, ...] = ()
    """[height, width, 3] uint8 RGB each."""
    sound: np.ndarray | None = None
    """[samples] float32 in -1..1 at 16 kHz; None without audio."""


@dataclass(frozen=True)
class Answer:
    """What the model generated."""

    text: str
    tokens: tuple[int, ...] = ()
    """The text's token ids in the model's vocabulary; () from a model that does not return them."""


class Chat(Protocol):
    """A chat model. It keeps no state: no chat changes the next one."""

    def __call__(self, messages: Sequence[Message], schema: Mapping[str, Any] | None = None) -> Answer:
        """Answer the last message.

        schema: the JSON Schema of an answer in JSON. A model that cannot constrain its output to a schema ignores it.
        """
