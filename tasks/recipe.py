"""The `curation` section of a recipe: how footage is cut, what is measured, what is kept and how it is packed."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, SerializeAsAny, model_validator

import data_manifests
from data_manifests.strict import RecipeError, Strict, nearest, read_yaml, unknown_key, validate
from tasks.cutting.clip_plan import ClipSettings
from tasks.cutting.shots import ScenesSettings
from tasks.policy.rules import Policy, Rule
from tasks.shards import ShardSettings
from tasks.stages.base import StageSettings
from tasks.stages.registry import STAGES, settings_type

# Default time limits in seconds, for steps whose unit is not a clip. A source may last hours, a shard be a gigabyte.
_TIME_LIMITS_S = {"sources": 3600.0, "scenes": 4 * 3600.0, "clips": 8 * 3600.0, "shards": 3600.0}
_SECTIONS = ["name", "description", "curation", "training"]


class RunSettings(Strict):
    """How the work is done. Nothing here changes a result."""

    workers: int | None = Field(default=None, ge=1)
    """Worker processes; one for each core when None."""
    time_limit_s: float = Field(default=300.0, gt=0)
    """Seconds that a stage may take for one clip. A clip that takes longer becomes an error."""
    time_limits: dict[str, float] = Field(default={})
    """Other time limits in seconds, by step. A step is a stage, or `sources`, `scenes` or `clips` (for one source), or
    `shards` (for one shard). `scenes` and `clips` done together may take the sum of theirs."""
    keep_frames_mb: int = Field(default=1000, ge=0)
    """Memory of one worker for decoded frames, in megabytes. It holds the frames of one clip, which all stages share,
    or those of the shot that is being cut. Clips of 20 s at 480p take 300 and 400, those of 15 s at 720p 520 and 650.
    With less memory, each stage decodes such a clip anew, and such a source is decoded twice."""

    def time_limit(self, step: str) -> float:
        """Seconds that one unit of a step may take: a source, a clip or a shard."""
        return self.time_limits.get(step, _TIME_LIMITS_S.get(step, self.time_limit_s))


class Recipe(Strict):
    """What a curation does."""

    name: str
    """Name of the recipe."""
    scenes: ScenesSettings = ScenesSettings.model_validate({})
    """How shots are told apart."""
    clips: ClipSettings
    """How clips are cut and encoded."""
    measure: dict[str, SerializeAsAny[StageSettings]]
    """The stages in the order in which they run, cheap ones first, each with its settings."""
    policy: Policy = Policy()
    """Which clips are kept."""
    shards: ShardSettings = ShardSettings()
    """How samples are packed."""
    run: RunSettings = RunSettings()
    """How the work is done."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "Recipe":
        faults = [*self._rule_faults(), *self._near_duplicate_faults(), *self._order_faults(), *self._limit_faults()]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _rule_faults(self) -> Iterator[str]:
        """Faults of the policy's rules and ranks: scores that this recipe does not measure, or that do not fit."""
        for place, rule in self.policy.all_rules():
            if fault := _score_fault(rule.score, self.measure) or _rule_fault(rule, self.measure):
                yield f"policy.{place}: {fault}"
        for tier_name, tier in self.policy.tiers.items():
            for score in tier.rank:
                fault = _score_fault(score, self.measure)
                if not fault and STAGES[_stage(score)].columns[_column(score)] is str:
                    fault = f"{score} is text, which has no order to rank by"
                if fault:
                    yield f"policy.tiers.{tier_name}.rank: {fault}"

    def _near_duplicate_faults(self) -> Iterator[str]:
        rule = self.policy.near_duplicates
        if rule is None:
            return
        if "duplicates" not in self.measure:
            yield "policy.near_duplicates: the recipe does not measure duplicates"
        elif rule.backend != self.measure["duplicates"].backend:
            yield f"policy.near_duplicates: backend: this recipe hashes by {self.measure['duplicates'].backend!r}"

    def _order_faults(self) -> Iterator[str]:
        """Stages that come before a stage whose results they need."""
        order = list(self.measure)
        for at, name in enumerate(order):
            for needed in STAGES[name].needed(self.measure[name]):
                if needed not in order[:at]:
                    yield f"measure.{name}: it needs the results of {needed}; put {needed} before it"

    def _limit_faults(self) -> Iterator[str]:
        steps = [*_TIME_LIMITS_S, *self.measure]
        for step, limit in self.run.time_limits.items():
            if step not in steps:
                yield f"run.time_limits: unknown step {step!r}{nearest(step, steps)}"
            elif not limit > 0:
                yield f"run.time_limits.{step}: {limit:g} s leaves no time at all"

    def networks(self) -> tuple[str, ...]:
        """Names of the published weights that its stages need."""
        needed = (STAGES[name](settings).networks() for name, settings in self.measure.items())
        return tuple(dict.fromkeys(name for names in needed for name in names))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe.

    name_or_path: the name of a bundled recipe, such as "active_mind", or the path of a YAML file.

    Raises RecipeError with one line a fault, which names the file, the key and the nearest match.
    """
    path = recipe_path(str(name_or_path))
    content = read_yaml(path)
    for key in content:
        if key not in _SECTIONS:
            raise RecipeError(f"{path}: {unknown_key(str(key), _SECTIONS)}")
    section = content.get("curation")
    if not isinstance(section, dict):
        raise RecipeError(
            f"{path}: it has no `curation` section with `clips` and `measure`, so there is nothing to curate"
        )
    name = content.get("name", path.stem)
    if not isinstance(name, str) or not name:
        raise RecipeError(f"{path}: name: a recipe's name is text, this is {name!r}")
    if "name" in section:
        raise RecipeError(f"{path}: in curation: name: it belongs at the top of the file, beside `curation`")
    return parse_curation({**section, "name": name}, f"{path}: in curation")


def parse_curation(section: dict[str, Any], where: str) -> Recipe:
    """A recipe from its `curation` section, to which the recipe's `name` has been added.

    where: the section's place, which begins every line of the error message.

    Raises RecipeError with one line a fault.
    """
    # a section that is only named, with nothing below it, has its defaults
    given = {key: value for key, value in section.items() if value is not None}
    if "measure" in given:
        given["measure"] = _stage_settings(given["measure"], f"{where}: measure")
    return validate(Recipe, given, where)


def recipe_hash(recipe: Recipe) -> str:
    """12 hex digits over all that can change a result in a recipe. The order of stages and rules counts."""
    content = recipe.model_dump(mode="json", exclude={"run"})
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def bundled_recipes() -> list[str]:
    """Names of the bundled recipes."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    return Path(data_manifests.__file__).parent


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe, which is given by a bundled recipe's name or by a path.

    Raises RecipeError with the nearest match when a name is not known. A path need not exist.
    """
    path = Path(name)
    # os.path, because pathlib raises an error on names that no file can have
    if path.suffix in (".yaml", ".yml") or os.sep in name or os.path.isfile(name):  # noqa: PTH113
        if not os.path.exists(name) and path.stem in bundled_recipes():  # noqa: PTH110
            raise RecipeError(f"{path}: no such recipe; the bundled one is called {path.stem!r}")
        return path
    if name in bundled_recipes():
        return _folder() / f"{name}.yaml"
    raise RecipeError(
        f"{name}: no recipe of that name comes along with understudy, and there is no such file"
        f"{nearest(name, bundled_recipes())}"
    )


def _stage_settings(content: object, where: str) -> dict[str, StageSettings]:
    """Validate each stage's settings by the stage's own model, so that a wrong key is reported with the right ones."""
    if not isinstance(content, dict):
        raise RecipeError(f"{where}: it must map stages to their settings, such as `motion: {{backend: dis}}`")
    settings: dict[str, StageSettings] = {}
    faults: list[str] = []
    for name, given in content.items():
        if name not in STAGES:
            faults.append(f"{where}.{name}: unknown stage {name!r}{nearest(str(name), list(STAGES))}")
            continue
        try:
            settings[name] = validate(settings_type(STAGES[name]), {} if given is None else given, f"{where}.{name}")
        except RecipeError as error:
            faults.append(str(error))
    if faults:
        raise RecipeError("\n".join(faults))
    return settings


def _score_fault(score: str, measure: dict[str, StageSettings]) -> str:
    """What is wrong with a score that a rule or a rank names; "" when this recipe measures it."""
    stage, column = _stage(score), _column(score)
    if stage not in measure:
        return f"{score}: the recipe does not measure {stage!r}{nearest(stage, list(measure))}"
    columns = list(STAGES[stage].columns)
    if column not in columns:
        return f"{score}: {stage} has no column {column!r}{nearest(column, columns)}"
    return ""


def _rule_fault(rule: Rule, measure: dict[str, StageSettings]) -> str:
    """What is wrong with a rule whose score this recipe measures; "" when nothing is."""
    backend = measure[rule.stage].backend
    if rule.backend != backend:
        return (
            f"its thresholds are for {rule.stage} by {rule.backend!r}, but the recipe measures it by {backend!r}, "
            f"whose scores cannot be compared; give thresholds for {backend!r}, or measure by {rule.backend!r}"
        )
    kind = STAGES[rule.stage].columns[rule.column]
    if rule.one_of is None:
        return (
            "" if kind in (float, int) else f"{rule.score} is {_WORDS[kind]}, which min and max do not fit; use one_of"
        )
    if kind is float:
        return f"{rule.score} is a number of any size, which one_of does not fit; use min and max"
    impossible = [value for value in rule.one_of if type(value) is not kind]
    return f"{rule.score} is {_WORDS[kind]}, and can never be {impossible[0]!r}" if impossible else ""


_WORDS = {str: "text", bool: "true or false", int: "a whole number"}


def _stage(score: str) -> str:
    return score.partition(".")[0]


def _column(score: str) -> str:
    return score.partition(".")[2]
