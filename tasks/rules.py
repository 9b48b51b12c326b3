"""The policy as a recipe gives it: rules put to scores, the use of sound, tiers. What they decide: tasks/policy.py."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from data_manifests.strict import Strict

NO_SOUND = "sound"  # the built-in rule by which a policy that needs sound drops clips without any
NEAR_DUPLICATE = "near_duplicate"  # the built-in rule that keeps one of several copies

Scalar = Annotated[bool | int | float | str, Field(union_mode="smart")]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


def _score_name(score: str) -> str:
    stage, _, column = score.partition(".")
    if not stage or not column:
        raise ValueError(f"{score!r} is not of the form stage.column, such as motion.speed")
    return score


ScoreName = Annotated[str, AfterValidator(_score_name)]


class Rule(Strict):
    """A demand on one score.

    min, max: the bounds, which themselves pass. one_of: the values that pass. missing: what becomes of a clip for which
    the score has no value (speech without sound): it passes, is rejected, or counts as not measurable.
    """

    score: ScoreName
    backend: str = Field(description="The backend that the bounds are meant for; scores of another do not compare.")
    min: FiniteFloat | None = None
    max: FiniteFloat | None = None
    one_of: list[Scalar] | None = Field(default=None, min_length=1)
    missing: Literal["pass", "reject", "error"] = "error"

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
        """Whether a value is within the bounds, or one of those that pass."""
        if self.one_of is not None:
            return value in self.one_of
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)  # type: ignore[operator]

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
    """A narrower selection among the clips of the tier before it.

    rules: further demands; a clip whose score has no value is in only by `missing: pass`. hours with rank: the best so
    many hours, by the weighted mean of the clip's percentile in each score; a negative weight where less is better, and
    a score without value ranks last.
    """

    rules: dict[str, Rule] = Field(default={})
    hours: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    rank: dict[ScoreName, FiniteFloat] = Field(default={})

    @model_validator(mode="after")
    def _hours_need_an_order(self) -> "Tier":
        if self.hours is not None and not self.rank:
            raise ValueError(f"hours: the best {self.hours:g} hours by what? give rank, such as motion.speed: 1.0")
        if self.rank and self.hours is None:
            raise ValueError("rank has no effect without hours")
        unused = [score for score, weight in self.rank.items() if weight == 0]
        if unused:
            raise ValueError(f"rank: {unused[0]} has weight 0; leave it out")
        return self


class NearDuplicates(Strict):
    """How much two clips may differ to count as one: bits of their hashes, of 256 and of 128 (tasks.duplicates).

    Copies are looked for in the whole corpus, over all partitions, and the one of the lowest clip_id is kept. A clip_id
    begins with the digest of its source, so that neither the order of the manifest nor the number of partitions
    changes which one that is; footage that comes later does, where its digest is lower.
    """

    backend: str = Field(description="The backend that the bounds are meant for; hashes of another do not compare.")
    picture_bits: int = Field(ge=0, le=128)
    sound_bits: int = Field(ge=0, le=64)

    @property
    def demand(self) -> str:
        return f"no other within {self.picture_bits} bits of picture and {self.sound_bits} of sound"


class Policy(Strict):
    """Which clips stay, what use their sound has, and which tiers they belong to.

    rules: all must pass for a clip to be kept. near_duplicates: of the clips that pass and are copies of each other the
    first by clip_id is kept; all of them when None. audio: all must pass for its sound to be usable. on_unusable: what
    becomes of a clip whose sound is not usable or absent. tiers: widest first; each lies within the one before it, and
    the first has every clip that is kept.
    """

    rules: dict[str, Rule] = Field(default={})
    near_duplicates: NearDuplicates | None = None
    audio: dict[str, Rule] = Field(default={})
    on_unusable: Literal["keep", "drop"] = "keep"
    tiers: dict[str, Tier] = Field(default={"main": Tier()}, min_length=1)

    @model_validator(mode="after")
    def _names_are_clear(self) -> "Policy":
        first, tier = next(iter(self.tiers.items()))
        if tier.rules or tier.hours is not None:
            raise ValueError(
                f"tiers.{first}: the widest tier has every clip that is kept; put its rules under policy.rules, "
                "or add a narrower tier after it"
            )
        twice = sorted(set(self.rules) & set(self.audio))
        if twice:
            raise ValueError(f"{twice[0]} names a rule under rules and one under audio; give them different names")
        if NO_SOUND in self.rules or NO_SOUND in self.audio:
            raise ValueError(f"the name {NO_SOUND!r} is kept for clips without sound; give the rule another name")
        if NEAR_DUPLICATE in self.rules or NEAR_DUPLICATE in self.audio:
            raise ValueError(f"the name {NEAR_DUPLICATE!r} is kept for copies of a clip; give the rule another name")
        return self

    def all_rules(self) -> Iterator[tuple[str, Rule]]:
        """Every rule with the key it stands under."""
        yield from ((f"rules.{name}", rule) for name, rule in self.rules.items())
        yield from ((f"audio.{name}", rule) for name, rule in self.audio.items())
        for tier_name, tier in self.tiers.items():
            yield from ((f"tiers.{tier_name}.rules.{name}", rule) for name, rule in tier.rules.items())

    def columns(self) -> dict[str, list[str]]:
        """The columns that deciding needs from each stage's table, besides `status` and `error`."""
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
