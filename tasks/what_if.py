"""What another policy would make of clips that are measured already: the funnel beside the present one, and who flips.

Pure functions over what a finished run holds; nothing is measured or written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from data_manifests.strict import nearest
from tasks.outcome import funnel_label
from tasks.policy import decide, funnel
from tasks.recipe import Recipe, recipe_of
from tasks.run_folder import Refused, RunFolder
from tasks.stages import STAGES
from tasks.stages import upstream as upstream_of

if TYPE_CHECKING:
    import pandas as pd

MEASURED_BY = "would be measured by "  # of a clip that a policy lets come to a stage for the first time
_OFF = "off"
_FIELDS = ("min", "max", "one_of", "missing", "score", "backend")  # of a rule


class WhatIfError(Refused):
    """A change that cannot be made, or compared; the message says which and what could be."""


@dataclass(frozen=True)
class FunnelChange:
    """One line of both funnels. label: what is counted, with the threshold before and after where that changes."""

    label: str
    clips: tuple[int, int]
    hours: tuple[float, float]


@dataclass(frozen=True)
class WhatIf:
    """funnel: both funnels, line by line. flips: one row a clip whose verdict, tier or use of sound would change."""

    funnel: list[FunnelChange]
    flips: "pd.DataFrame"


# ---- another policy ----


def changed(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """The recipe with changes to its policy, each `WHERE=VALUE`:

        not_static.max=0.6            a field of a rule, by the rule's name
        not_static=off                without this rule
        motion.speed.max=8            the rule on this score, or a new one where there is none
        speech.min=0.5                the rule on this stage, where there is only one
        tiers.hq.hours=50, tiers.hq.speaks.min=0.7, tiers.hq.rank.speech.fraction=2
        on_unusable=drop, near_duplicates.picture_bits=8

    A value is read as in a recipe's YAML; null takes a field away. Raises WhatIfError, or RecipeError from the rules'
    own validation.
    """
    section = recipe.model_dump(mode="json", exclude={"run"})
    for change in changes:
        where, equals, text = change.partition("=")
        where = where.strip()
        if not equals or not where or not text.strip():
            raise WhatIfError(f"--set {change}: give WHERE=VALUE, such as {_example(recipe)}")
        holder, key = _place(section, where, change)
        _put(holder, key, text.strip(), change)
    return recipe_of(section, "with " + " ".join(f"--set {change}" for change in changes))


def _put(holder: dict[str, Any], key: str, text: str, change: str) -> None:
    if text == _OFF:
        if not isinstance(holder.get(key), dict):
            raise WhatIfError(f"--set {change}: only a rule as a whole can be off; {key}=null takes a bound away")
        del holder[key]
        return
    try:
        holder[key] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise WhatIfError(f"--set {change}: {text!r} is no value that YAML can read") from None
    if holder[key] is None:
        del holder[key]


def _place(section: dict[str, Any], where: str, change: str) -> tuple[dict[str, Any], str]:
    """The mapping that `where` leads into, and the key in it."""
    policy: dict[str, Any] = section["policy"]
    head, _, rest = where.partition(".")
    if where == "on_unusable":
        return policy, where
    if head == "tiers" and rest:
        return _tier_place(section, rest, change)
    if head == "near_duplicates":
        if policy["near_duplicates"] is None:
            raise WhatIfError(f"--set {change}: the recipe keeps near duplicates; it has no near_duplicates to change")
        return (policy["near_duplicates"], rest) if rest else (policy, head)
    for kind in ("rules", "audio"):
        path = where.removeprefix(f"{kind}.")
        found = _in_rules(policy[kind], path)
        if found is not None:
            return found
    return _by_score(section, where, change)


def _in_rules(rules: dict[str, Any], path: str) -> tuple[dict[str, Any], str] | None:
    """A rule of these by its name, or a field of it; names may hold dots themselves."""
    if path in rules:
        return rules, path
    name, _, key = path.rpartition(".")
    return (rules[name], key) if name in rules else None


def _tier_place(section: dict[str, Any], path: str, change: str) -> tuple[dict[str, Any], str]:
    tiers: dict[str, Any] = section["policy"]["tiers"]
    name, _, rest = path.partition(".")
    if name not in tiers:
        raise WhatIfError(f"--set {change}: no tier {name!r}{nearest(name, list(tiers))}")
    tier = tiers[name]
    if rest == "hours":
        return tier, rest
    if rest.startswith("rank."):
        return tier["rank"], rest.removeprefix("rank.")
    found = _in_rules(tier["rules"], rest.removeprefix("rules."))
    if found is None:
        known = ["hours", *(f"rank.{score}" for score in tier["rank"]), *(f"{rule}.max" for rule in tier["rules"])]
        raise WhatIfError(f"--set {change}: tier {name} has no {rest!r}{nearest(rest, known)}")
    return found


def _by_score(section: dict[str, Any], where: str, change: str) -> tuple[dict[str, Any], str]:
    """The one rule on a score or on a stage; a new one on a score that has none."""
    policy, measured = section["policy"], section["measure"]
    target, _, key = where.rpartition(".")
    rules = {name: rule for kind in ("rules", "audio") for name, rule in policy[kind].items()}
    stage, _, column = target.partition(".")
    on = {name: rule for name, rule in rules.items() if target in (rule["score"], rule["score"].partition(".")[0])}
    if len(on) == 1:
        return next(iter(on.values())), key
    if on:
        raise WhatIfError(f"--set {change}: {target} has {len(on)} rules; name one: {', '.join(on)}")
    if stage in measured and column in STAGES[stage].columns:
        name = target if target not in rules else f"{target} by --set"
        policy["rules"][name] = {"score": target, "backend": measured[stage]["backend"], "missing": "pass"}
        return policy["rules"][name], key
    known = [f"{name}.{key}" if key in _FIELDS else name for name in rules]
    known += [f"{name}.{column}.max" for name in measured for column in STAGES[name].columns] if column else []
    hint = nearest(where, known)
    if hint.startswith("; known"):  # only the rules, not each column of each stage
        hint = f"; its rules are {', '.join(rules) or 'none'}"
    raise WhatIfError(f"--set {change}: the recipe has no rule or score {target or where!r}{hint}")


def _example(recipe: Recipe) -> str:
    for name, rule in {**recipe.policy.rules, **recipe.policy.audio}.items():
        for bound in ("min", "max"):
            value = getattr(rule, bound)
            if value is not None:
                return f"{name}.{bound}={value:g}"
    return "on_unusable=drop"


# ---- what it would make of the run ----


def compare(run: RunFolder, recipe: Recipe) -> WhatIf:
    """What `recipe` would make of the clips of a run. Raises WhatIfError when it cuts the footage into other clips.

    A clip that would come to a stage for the first time, or to one that `recipe` measures in another way, is pending
    there.
    """
    for section in ("scenes", "clips"):
        if getattr(recipe, section) != getattr(run.recipe, section):
            raise WhatIfError(
                f"{recipe.name} cuts the footage into other clips than {run.address} has (its `{section}` differs); "
                "curate with it to see what comes of that"
            )
    same = _measured_alike(run.recipe, recipe)
    frame, stages = run.frame_for(recipe.policy), list(recipe.measure)
    frame = frame.drop(columns=[c for c in frame.columns if c.partition(".")[0] not in ("clips", *same)])
    decisions = decide(frame, recipe.policy, stages)
    before = funnel(run.frame, run.decisions, run.recipe.policy, run.stages)
    after = funnel(frame, decisions, recipe.policy, stages)
    return WhatIf(_side_by_side(before, after), _flips(run, decisions))


def _measured_alike(before: Recipe, after: Recipe) -> list[str]:
    """The stages whose rows serve the other recipe: with the same settings, starting from the same earlier stages."""
    same: list[str] = []
    for name, settings in after.measure.items():
        upstream = upstream_of(after.measure, name)
        if (
            before.measure.get(name) == settings
            and upstream_of(before.measure, name) == upstream
            and set(upstream) <= set(same)
        ):
            same.append(name)
    return same


def _side_by_side(before: "pd.DataFrame", after: "pd.DataFrame") -> list[FunnelChange]:
    """The lines of both funnels in the order of the second, each with its counterpart."""
    sides = [{_key(row): row for row in table.to_dict("records")} for table in (before, after)]
    keys = list(sides[1])
    for at, key in enumerate(sides[0]):
        if key not in sides[1]:  # gone: where it stood
            earlier = [k for k in list(sides[0])[:at] if k in keys]
            keys.insert(keys.index(earlier[-1]) + 1 if earlier else 0, key)
    lines = []
    for key in keys:
        rows = [side.get(key) for side in sides]
        clips = [row["clips"] if row else 0 for row in rows]
        hours = [row["hours"] if row else 0.0 for row in rows]
        if any(clips) or key[0] in ("in", "kept", "tier", "dropped"):
            lines.append(FunnelChange(_label(rows), (clips[0], clips[1]), (hours[0], hours[1])))
    return lines


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["what"], row["stage"], row["rule"] or row["reason"]


def _label(rows: list[Any]) -> str:
    labels = [funnel_label(row) for row in rows if row]
    if len(labels) == 1:
        return f"{labels[0]} ({'new' if rows[1] else 'gone'})"
    before, after = labels
    rule = rows[0]["rule"]
    if before == after or not rule:
        return after
    return f"{before} -> {rows[1]['reason'].removeprefix(rule).strip()}"


def _flips(run: RunFolder, after: "pd.DataFrame") -> "pd.DataFrame":
    """Columns: clip_id, uri, start_s, before, after, stage, rule, value, threshold (what speaks against the clip on the
    side where something does, the later one of two; what speaks against its sound, where nothing else does)."""
    import pandas as pd

    before = run.decisions
    described = [_describe(before), _describe(after)]
    rows = (described[0] != described[1]).to_numpy()
    table = pd.DataFrame(
        {
            "clip_id": before.index[rows],
            "uri": run.frame["clips.uri"][rows].to_numpy(),
            "start_s": run.frame["clips.start_s"][rows].to_numpy(),
            "before": described[0][rows].to_numpy(),
            "after": described[1][rows].to_numpy(),
        }
    )
    decided = {"stage": "stage", "rule": "rule", "value": "value", "threshold": "threshold"}
    sound = decided | {"rule": "audio_rule", "value": "audio_value", "threshold": "audio_threshold"}
    for column in decided:
        texts = []
        for old, new in zip(before[rows].to_dict("records"), after[rows].to_dict("records"), strict=True):
            judged = [(d, names) for names in (decided, sound) for d in (new, old) if d[names["rule"]]]
            texts.append(judged[0][0][judged[0][1][column]] if judged else "")
        table[column] = pd.array(texts, dtype="str")
    return table


def _describe(decisions: "pd.DataFrame") -> "pd.Series":
    """A clip's outcome in words: "keep, tier hq", "keep, tier main, sound unusable", "drop", "pending at motion"."""
    verdict, tier = decisions["verdict"].astype("str"), decisions["tier"].astype("str")
    text = verdict.mask(verdict == "keep", "keep, tier " + tier)
    audio = decisions["audio"].astype("str")
    text = text.mask((verdict == "keep") & (audio == "unusable"), text + ", sound unusable")
    return text.mask(verdict == "pending", MEASURED_BY + decisions["stage"].astype("str"))
