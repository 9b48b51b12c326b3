"""A talk with a model that reads, looks and listens, whoever serves it: an endpoint, or weights on this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

MAX_TOKENS = 2048  # of an answer
MAX_SOUND_S = 300  # that the published models hear at once


@dataclass(frozen=True)
class Turn:
    """What one side says. images: [height, width, 3] uint8 RGB each; sound: [samples] float32 in -1..1 at 16 kHz."""

    role: Literal["user", "assistant"]
    text: str
    images: tuple[np.ndarray, ...] = ()
    sound: np.ndarray | None = None


@dataclass(frozen=True)
class Answer:
    """What a model says. tokens: the text's ids in the model's vocabulary, where it tells them."""

    text: str
    tokens: tuple[int, ...] = ()


class Chat(Protocol):
    """A model that answers. No talk changes what the next one gets."""

    def __call__(self, turns: Sequence[Turn], schema: Mapping[str, Any] | None = None) -> Answer:
        """The answer to the last turn. schema: the JSON Schema of an answer in JSON, for who can keep to one."""
