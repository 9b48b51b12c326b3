"""What a training sample says of itself: from which footage, by which scores and rules, under which recipe."""

import json
import math
from typing import Annotated, Any

from pydantic import Field

from data_manifests.strict import Strict

Number = Annotated[float, Field(allow_inf_nan=False)]
Scalar = bool | int | Number | str | None  # None where there is no value


class SourceRange(Strict):
    """The source, and the part of it that the clip shows.

    sha256: of the file's bytes. source_id: the first 16 hex digits of it. start_s, end_s: seconds on the source's own
    clock, whose zero is where a player starts.
    """

    uri: str
    source_id: str
    sha256: str
    start_s: Number
    end_s: Number


class ClipFacts(Strict):
    """The clip's picture: frames a second (constant), their number, pixels; and whether sound stands beside it."""

    fps: int = Field(gt=0)
    frames: int = Field(gt=0)
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    duration_s: Number = Field(gt=0)
    has_audio: bool


class AudioUse(Strict):
    """Whether training may use the sound; `reason` when not."""

    usable: bool
    reason: str


class Score(Strict):
    """What one stage measured, and with what: values of different fingerprints do not compare."""

    backend: str
    version: str
    fingerprint: str
    values: dict[str, Scalar]


class RuleResult(Strict):
    """A rule of the recipe put to one score. passed: None when there was nothing to judge."""

    score: str
    value: Scalar
    min: Number | None = None
    max: Number | None = None
    one_of: list[Scalar] | None = None
    passed: bool | None


class RecipeName(Strict):
    """The recipe, and the hash over everything in it that changes a result."""

    name: str
    hash: str


class Lineage(Strict):
    """The `json` member of a sample. `metadata` has the fields of the source manifest's row, caption included.

    unaligned: names of those arrays whose first axis is not the clip's frames.
    """

    clip_id: str
    source: SourceRange
    clip: ClipFacts
    audio: AudioUse
    metadata: dict[str, str]
    scores: dict[str, Score]
    rules: dict[str, RuleResult]
    tier: str
    recipe: RecipeName
    unaligned: list[str] = Field(default=[])

    def encode(self) -> bytes:
        """Compact JSON, keys sorted, ASCII: the same bytes for the same lineage."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def plain(value: Any) -> Any:
    """`value` as JSON can say it: NumPy's and pandas' scalars as Python's, what is not a finite number as None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value
