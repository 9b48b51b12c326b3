"""A recipe's `curation` section: how footage is cut, what is measured, what is kept and how it is packed."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import Field, SerializeAsAny, model_validator

import data_manifests
from data_manifests.strict import RecipeError, Strict, nearest, read_yaml, unknown_key, validate
from tasks.clips import ClipSettings
from tasks.rules import Policy, Rule
from tasks.scenes import ScenesSettings
from tasks.shards import ShardSettings
from tasks.stage import StageSettings
from tasks.stages import STAGES, settings_type

# Seconds for one unit of the steps whose unit is not a clip: a source may be hours long, a shard a gigabyte.
_TIME_LIMITS_S = {"sources": 3600.0, "scenes": 4 * 3600.0, "clips": 8 * 3600.0, "shards": 3600.0}
_SECTIONS = ["name", "description", "curation", "training"]


class RunSettings(Strict):
    """How the work is done; nothing here changes a result.

    workers: worker processes; all cores when None. time_limit_s: seconds that a stage may take over one clip, before
    the clip is given up as an error. time_limits: others, by step: a stage, or sources, scenes, clips (for one source;
    scenes and clips together take the sum of theirs) and shards (for one shard). keep_frames_mb: memory of a worker for
    the decoded frames of one clip, which all stages then share, or of the shot that is being cut: 300 and 400 for clips
    of 20 s at 480p, 520 and 650 for 15 s at 720p. A clip that takes more is decoded by each stage anew, a source twice.
    """

    workers: int | None = Field(default=None, ge=1)
    time_limit_s: float = Field(default=300.0, gt=0)
    time_limits: dict[str, float] = Field(default={})
    keep_frames_mb: int = Field(default=1000, ge=0)

    def time_limit(self, step: str) -> float:
        """Seconds that one unit of a step may take."""
        return self.time_limits.get(step, _TIME_LIMITS_S.get(step, self.time_limit_s))


class Recipe(Strict):
    """What a curation does. measure: the stages in the order they run, cheap ones first, each with its settings."""

    name: str
    scenes: ScenesSettings = ScenesSettings.model_validate({})
    clips: ClipSettings
    measure: dict[str, SerializeAsAny[StageSettings]]
    policy: Policy = Policy()
    shards: ShardSettings = ShardSettings()
    run: RunSettings = RunSettings()

    @model_validator(mode="after")
    def _parts_fit(self) -> "Recipe":
        faults = [
            f"policy.{place}: {fault}"
            for place, rule in self.policy.all_rules()
            if (fault := _score_fault(rule.score, self.measure) or _rule_fault(rule, self.measure))
        ]
        for tier_name, tier in self.policy.tiers.items():
            for score in tier.rank:
                fault = _score_fault(score, self.measure)
                if not fault and STAGES[_stage(score)].columns[_column(score)] is str:
                    fault = f"{score} is text, which has no order to rank by"
                if fault:
                    faults.append(f"policy.tiers.{tier_name}.rank: {fault}")
        copies = self.policy.near_duplicates
        if copies is not None:
            if "duplicates" not in self.measure:
                faults.append("policy.near_duplicates: the recipe does not measure duplicates")
            elif copies.backend != self.measure["duplicates"].backend:
                faults.append(
                    f"policy.near_duplicates: backend: this recipe hashes by {self.measure['duplicates'].backend!r}"
                )
        order = list(self.measure)
        faults += [
            f"measure.{name}: it starts from what {needed} finds; put {needed} before it"
            for at, name in enumerate(order)
            for needed in STAGES[name].needed(self.measure[name])
            if needed not in order[:at]
        ]
        steps = [*_TIME_LIMITS_S, *self.measure]
        for step, limit in self.run.time_limits.items():
            if step not in steps:
                faults.append(f"run.time_limits: unknown step {step!r}{nearest(step, steps)}")
            elif not limit > 0:
                faults.append(f"run.time_limits.{step}: {limit:g} s leaves no time at all")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def networks(self) -> tuple[str, ...]:
        """The published weights that its stages need, by name."""
        needed = (STAGES[name](settings).networks() for name, settings in self.measure.items())
        return tuple(dict.fromkeys(name for names in needed for name in names))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read the recipe of a YAML file, or one that comes along by its name, such as "active_mind".

    Raises RecipeError with a line for each fault, naming the file, the key and the nearest match.
    """
    path = find_recipe(str(name_or_path))
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
    return recipe_of({**section, "name": name}, f"{path}: in curation")


def recipe_of(section: dict[str, Any], where: str) -> Recipe:
    """A recipe from its `curation` section and its name. Raises RecipeError with a line for each fault."""
    # a section that is only named, with nothing under it, has its defaults
    given = {key: value for key, value in section.items() if value is not None}
    if "measure" in given:
        given["measure"] = _measure(given["measure"], f"{where}: measure")
    return validate(Recipe, given, where)


def recipe_hash(recipe: Recipe) -> str:
    """12 hex digits over everything in the recipe that can change a result, the order of stages and rules included."""
    content = recipe.model_dump(mode="json", exclude={"run"})
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def bundled() -> list[str]:
    """Names of the recipes that come along."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    return Path(data_manifests.__file__).parent


def find_recipe(name: str) -> Path:
    """The YAML file of a recipe that comes along, or of a path. Raises RecipeError with the nearest match."""
    path = Path(name)
    # of os.path, since pathlib's raise on names that no file can have
    if path.suffix in (".yaml", ".yml") or os.sep in name or os.path.isfile(name):  # noqa: PTH113
        if not os.path.exists(name) and path.stem in bundled():  # noqa: PTH110
            raise RecipeError(f"{path}: no such recipe; the one that comes along is called {path.stem!r}")
        return path
    if name in bundled():
        return _folder() / f"{name}.yaml"
    raise RecipeError(f"{name}: no recipe of that name comes along, and no such file is here{nearest(name, bundled())}")


def _measure(content: object, where: str) -> dict[str, StageSettings]:
    """The settings of each stage, by its own model, so that a wrong key is told with the right ones."""
    if not isinstance(content, dict):
        raise RecipeError(f"{where}: a mapping from stages to their settings, such as `motion: {{backend: dis}}`")
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
    """What is wrong with a score that a rule or a rank asks for; "" when this recipe measures it."""
    stage, column = _stage(score), _column(score)
    if stage not in measure:
        return f"{score}: the recipe does not measure {stage!r}{nearest(stage, list(measure))}"
    columns = list(STAGES[stage].columns)
    if column not in columns:
        return f"{score}: {stage} has no column {column!r}{nearest(column, columns)}"
    return ""


def _rule_fault(rule: Rule, measure: dict[str, StageSettings]) -> str:
    backend = measure[rule.stage].backend
    if rule.backend != backend:
        return (
            f"its thresholds are for {rule.stage} by {rule.backend!r}, but the recipe measures it by {backend!r}, "
            f"whose scores do not compare; give thresholds for {backend!r}, or measure by {rule.backend!r}"
        )
    kind = STAGES[rule.stage].columns[rule.column]
    if rule.one_of is None:
        return (
            "" if kind in (float, int) else f"{rule.score} is {_WORDS[kind]}, which min and max do not fit; use one_of"
        )
    if kind is float:
        return f"{rule.score} is a number of any size, which one_of does not fit; use min and max"
    strange = [value for value in rule.one_of if type(value) is not kind]
    return f"{rule.score} is {_WORDS[kind]}, and can never be {strange[0]!r}" if strange else ""


_WORDS = {str: "text", bool: "true or false", int: "a whole number"}


def _stage(score: str) -> str:
    return score.partition(".")[0]


def _column(score: str) -> str:
    return score.partition(".")[2]
