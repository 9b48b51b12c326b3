"""The policy section of a recipe: rules on scores, the use of sound, tiers. tasks/policy/decide.py applies it."""

from collections.abc import Iterator
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from data_manifests.strict import Strict

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

NO_SOUND = "sound"  # the built-in rule that drops clips without sound, where the policy needs sound
NEAR_DUPLICATE = "near_duplicate"  # the built-in rule that keeps one of several copies

RuleValue = Annotated[bool | int | float | str, Field(union_mode="smart")]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


def _score_name(score: str) -> str:
    stage, _, column = score.partition(".")
    if not stage or not column:
        raise ValueError(f"{score!r} is not of the form stage.column, such as motion.speed")
    return score


ScoreName = Annotated[str, AfterValidator(_score_name)]


def within(values: Any, min: float | None = None, max: float | None = None) -> Any:
    """Whether values lie within bounds, both included: a bool for one value, as many as there are for an array."""
    low = float("-inf") if min is None else min
    high = float("inf") if max is None else max
    return (values >= low) & (values <= high)


class Rule(Strict):
    """Thresholds on one score. A rule has `min`, `max` or both, or else `one_of`."""

    score: ScoreName
    """The score, as stage.column, such as motion.speed."""
    backend: str
    """The backend that the thresholds were chosen for. Scores of another backend do not compare with them."""
    min: FiniteFloat | None = None
    """The smallest value that passes, in the unit of the score. No lower bound when None."""
    max: FiniteFloat | None = None
    """The largest value that passes, in the unit of the score. No upper bound when None."""
    one_of: list[RuleValue] | None = Field(default=None, min_length=1)
    """The values that pass."""
    missing: Literal["pass", "reject", "error"] = "error"
    """What happens to a clip for which the score has no value, such as the speech of a clip without sound: the clip
    passes, is rejected, or counts as an error."""

    @property
    def stage(self) -> str:
        return self.score.partition(".")[0]

    @property
    def column(self) -> str:
        return self.score.partition(".")[2]

    @property
    def demand(self) -> str:
        """The thresholds as people write them, such as ">= 0.5"."""
        if self.one_of is not None:
            return f"one of {', '.join(map(str, self.one_of))}"
        if self.min is not None and self.max is not None:
            return f"{self.min:g} to {self.max:g}"
        return f">= {self.min:g}" if self.min is not None else f"<= {self.max:g}"

    def passes(self, value: bool | int | float | str) -> bool:
        """Whether one value passes. NaN does not. The caller decides about a missing value (None)."""
        return bool(self._within(value))

    def passing(self, column: "pd.Series") -> "np.ndarray":
        """Which values of a column pass: [rows] bool, False where there is no value."""
        import numpy as np

        if self.one_of is not None:
            return np.asarray(self._within(column).to_numpy(dtype=bool, na_value=False))
        # pandas copies a float column unless the value is np.nan itself
        return np.asarray(self._within(column.to_numpy(dtype=float, na_value=np.nan)))

    def _within(self, values: Any) -> Any:
        """The comparison itself, elementwise: a bool for one value, as many as there are values for an array."""
        if self.one_of is not None:
            return reduce(or_, (values == allowed for allowed in self.one_of))
        return within(values, self.min, self.max)

    @model_validator(mode="after")
    def _demands_something(self) -> "Rule":
        if self.min is None and self.max is None and self.one_of is None:
            raise ValueError(f"the rule on {self.score} demands nothing; give min, max or one_of")
        if self.one_of is not None and (self.min is not None or self.max is not None):
            raise ValueError(f"the rule on {self.score} has bounds and one_of; give one or the other")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"the rule on {self.score} has min {self.min:g} above max {self.max:g}; no clip can pass")
        return self


class Tier(Strict):
    """A selection among the clips of the tier before it. A clip is in the tier if it passes all the tier's rules and,
    where `hours` is given, ranks among the best."""

    rules: dict[str, Rule] = Field(default={})
    """Further rules, by name. A clip whose score has no value fails, unless the rule says `missing: pass`."""
    hours: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Hours of footage to take, the best clips first. All clips that pass the rules when None."""
    rank: dict[ScoreName, FiniteFloat] = Field(default={})
    """The weight of each score in the ranking: clips are ranked by the weighted mean of their percentiles. A negative
    weight means that less is better. A clip without a value for a score has percentile 0 in
    it."""

    @model_validator(mode="after")
    def _hours_need_an_order(self) -> "Tier":
        if self.hours is not None and not self.rank:
            raise ValueError(f"hours: the best {self.hours:g} hours by what? give rank, such as motion.speed: 1.0")
        if self.rank and self.hours is None:
            raise ValueError("rank has no effect without hours; give hours, or leave rank out")
        unused = [score for score, weight in self.rank.items() if weight == 0]
        if unused:
            raise ValueError(f"rank: {unused[0]} has weight 0, which has no effect; leave it out")
        return self


class NearDuplicates(Strict):
    """By how many bits the hashes of two clips may differ (tasks.stages.duplicates) for them to count as copies.

    Copies are looked for in the whole corpus, over all partitions. Of several copies, the clip with the lowest clip_id
    is kept. A clip_id begins with the digest of its source, so neither the order of the manifest nor the number of
    partitions changes which clip is kept. Footage that is added later can change it, if its digest is lower.
    """

    backend: str
    """The backend that the bounds were chosen for. Hashes of another backend do not compare."""
    picture_bits: int = Field(ge=0, le=128)
    """Bits of the picture hash that may differ, of 256."""
    sound_bits: int = Field(ge=0, le=64)
    """Bits of the sound hash that may differ, of 128."""

    @property
    def demand(self) -> str:
        return f"no other within {self.picture_bits} bits of picture and {self.sound_bits} of sound"


class Policy(Strict):
    """Which clips are kept, whether their sound is usable, and which tiers they belong to."""

    rules: dict[str, Rule] = Field(default={})
    """The rules by name. A clip is kept if it passes all of them."""
    near_duplicates: NearDuplicates | None = None
    """When two clips count as copies. Of several copies that pass the rules, the one with the lowest clip_id is kept.
    All copies are kept when None."""
    audio: dict[str, Rule] = Field(default={})
    """The rules on sound, by name. A clip's sound is usable if it passes all of them."""
    on_unusable: Literal["keep", "drop"] = "keep"
    """What happens to a clip without usable sound: `keep` keeps it without its sound, `drop` drops it."""
    tiers: dict[str, Tier] = Field(default={"main": Tier()}, min_length=1)
    """The tiers by name, widest first. Each lies within the one before it. The first holds every kept clip."""

    @model_validator(mode="after")
    def _names_are_clear(self) -> "Policy":
        first, tier = next(iter(self.tiers.items()))
        if tier.rules or tier.hours is not None:
            raise ValueError(
                f"tiers.{first}: the first tier holds every clip that is kept; put its rules under policy.rules, "
                "or add a narrower tier after it"
            )
        twice = sorted(set(self.rules) & set(self.audio))
        if twice:
            raise ValueError(f"{twice[0]} names a rule under rules and one under audio; give them different names")
        if NO_SOUND in self.rules or NO_SOUND in self.audio:
            raise ValueError(f"the name {NO_SOUND!r} is reserved for clips without sound; give the rule another name")
        if NEAR_DUPLICATE in self.rules or NEAR_DUPLICATE in self.audio:
            raise ValueError(f"the name {NEAR_DUPLICATE!r} is reserved for copies of clips; give the rule another name")
        return self

    def all_rules(self) -> Iterator[tuple[str, Rule]]:
        """Every rule with its key in the policy, such as "tiers.hq.rules.synced"."""
        yield from ((f"rules.{name}", rule) for name, rule in self.rules.items())
        yield from ((f"audio.{name}", rule) for name, rule in self.audio.items())
        for tier_name, tier in self.tiers.items():
            yield from ((f"tiers.{tier_name}.rules.{name}", rule) for name, rule in tier.rules.items())

    def columns(self) -> dict[str, list[str]]:
        """The columns of each stage's table that the decision needs, besides `status` and `error`."""
        scores = [rule.score for _, rule in self.all_rules()] + [s for t in self.tiers.values() for s in t.rank]
        if self.near_duplicates is not None:
            scores += ["duplicates.picture", "duplicates.sound"]
        needed: dict[str, list[str]] = {}
        for score in dict.fromkeys(scores):
            stage, _, column = score.partition(".")
            needed.setdefault(stage, []).append(column)
        return needed

    def judged_at(self, stage: str) -> list[tuple[str, Rule]]:
        """The rules that can drop a clip once `stage` has measured it."""
        rules = [*self.rules.items(), *(self.audio.items() if self.on_unusable == "drop" else ())]
        return [(name, rule) for name, rule in rules if rule.stage == stage]
