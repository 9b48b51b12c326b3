"""The lineage of a training sample: its footage, its scores and rules, and the recipe that made it."""

import json
import math
from typing import Annotated, Any

from pydantic import Field

from data_manifests.strict import Strict

Number = Annotated[float, Field(allow_inf_nan=False)]
Scalar = bool | int | Number | str | None  # None: there is no value


class SourceRange(Strict):
    """The source, and the part of it that the clip shows."""

    uri: str
    source_id: str
    """The first 16 hex digits of `sha256`."""
    sha256: str
    """Of the file's bytes, 64 hex digits."""
    start_s: Number
    """Seconds on the source clock, whose zero is where a player starts."""
    end_s: Number
    """Seconds on the source clock."""


class ClipFacts(Strict):
    """The clip's video, and whether it has audio."""

    fps: int = Field(gt=0)
    """Frames a second, constant."""
    frames: int = Field(gt=0)
    """Number of frames."""
    width: int = Field(gt=0)
    """Pixels."""
    height: int = Field(gt=0)
    """Pixels."""
    duration_s: Number = Field(gt=0)
    """frames / fps."""
    has_audio: bool
    """Whether the sample has a `flac` member."""


class AudioUse(Strict):
    """Whether training may use the clip's audio."""

    usable: bool
    reason: str
    """Why it may not be used; empty when it may."""


class Score(Strict):
    """What one stage measured."""

    backend: str
    version: str
    """The backend's version."""
    fingerprint: str
    """Values with different fingerprints cannot be compared."""
    values: dict[str, Scalar]
    """By column."""


class RuleResult(Strict):
    """A rule of the recipe, applied to one score."""

    score: str
    """As "stage.column"."""
    value: Scalar
    min: Number | None = None
    """The least value that passes."""
    max: Number | None = None
    """The largest value that passes."""
    one_of: list[Scalar] | None = None
    """The values that pass."""
    passed: bool | None
    """None when there was no value to judge."""


class RecipeName(Strict):
    """A recipe's name and hash."""

    name: str
    hash: str
    """Over everything in the recipe that can change a result."""


class Lineage(Strict):
    """The `json` member of a sample."""

    clip_id: str
    """Also the key of the sample."""
    source: SourceRange
    clip: ClipFacts
    audio: AudioUse
    metadata: dict[str, str]
    """The fields of the source manifest's row, caption included."""
    scores: dict[str, Score]
    """By stage."""
    rules: dict[str, RuleResult]
    """By the rule's name."""
    tier: str
    """The tier whose shard holds the sample."""
    recipe: RecipeName
    unaligned: list[str] = Field(default=[])
    """Names of the arrays whose first axis is not the clip's frames."""

    def encode(self) -> bytes:
        """Compact ASCII JSON with sorted keys. The same lineage gives the same bytes."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def plain(value: Any) -> Any:
    """Convert a value to what JSON can hold, throughout dictionaries, lists and tuples.

    NumPy's and pandas' scalars become Python's. NaN, infinity and NA become None.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value
