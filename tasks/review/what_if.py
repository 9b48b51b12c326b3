"""What another policy would decide on the clips of a finished run: both funnels, and the clips that flip.

`with_changes` makes the other recipe, and `compare` applies its policy to the rows of the run. A clip flips when its
verdict, its tier or the use of its audio changes.

All functions here are pure. Nothing is measured or written.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from data_manifests.strict import nearest
from tasks.policy.decide import decide, funnel
from tasks.recipe import Recipe, parse_curation
from tasks.review.funnel import funnel_label
from tasks.review.refusal import Refused
from tasks.review.run_folder import RunFolder
from tasks.stages.registry import STAGES
from tasks.stages.registry import upstream as upstream_of

if TYPE_CHECKING:
    import pandas as pd

MEASURED_BY = "would be measured by "
"""Begins the outcome of a clip that has no row of a stage, but would reach it under the other policy. The name of the
stage follows."""
_OFF = "off"
_FIELDS = ("min", "max", "one_of", "missing", "score", "backend")  # the fields of a rule


class WhatIfError(Refused):
    """A change of the policy cannot be made, or a recipe cannot be compared. The message says why, and what to do."""


@dataclass(frozen=True)
class FunnelChange:
    """One line of both funnels."""

    label: str
    """What is counted. Where a threshold changes, the label has the old one and the new one."""
    clips: tuple[int, int]
    """Number of clips, before and after."""
    hours: tuple[float, float]
    """Hours of these clips, before and after."""


@dataclass(frozen=True)
class WhatIf:
    """What another recipe would change in a run."""

    funnel: list[FunnelChange]
    """Both funnels, line by line."""
    flips: "pd.DataFrame"
    """One row a clip that flips: clip_id, uri, start_s (seconds), before, after, stage, rule, value and threshold.

    `before` and `after` are the outcome in words. Stage, rule, value and threshold are those of the rule that the clip
    fails after the change. If it fails none, they are those of the rule that it failed before. If it failed none there
    either, they are those of the rule that its sound fails.
    """
    other_reasons: int
    """Clips that do not flip but fail another rule, or stop at another stage, than before."""


# ---- another policy ----


def with_changes(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """A recipe with changes of its policy. Each change is WHERE=VALUE:

        not_static.max=0.6            a field of a rule, by the rule's name
        not_static=off                remove this rule
        motion.speed.max=8            the rule on this score; a new rule if there is none
        speech.min=0.5                the rule on this stage, if there is only one
        tiers.hq.hours=50, tiers.hq.speaks.min=0.7, tiers.hq.rank.speech.fraction=2
        on_unusable=drop, near_duplicates.picture_bits=8

    A value is read as YAML, as in a recipe; null removes a field. Raises WhatIfError for a change that cannot be made,
    and RecipeError for a policy that is not valid afterwards.
    """
    section = recipe.model_dump(mode="json", exclude={"run"})
    for change in changes:
        where, equals, text = change.partition("=")
        where = where.strip()
        if not equals or not where or not text.strip():
            raise WhatIfError(f"--set {change}: give WHERE=VALUE, such as {_example(recipe)}")
        mapping, key = _place(section, where, change)
        _put(mapping, key, text.strip(), change)
    return parse_curation(section, "with " + " ".join(f"--set {change}" for change in changes))


def _put(mapping: dict[str, Any], key: str, text: str, change: str) -> None:
    """Set a key of a mapping to a value given as YAML; `off` and null remove the key."""
    if text == _OFF:
        if not isinstance(mapping.get(key), dict):
            where = change.partition("=")[0].strip()
            raise WhatIfError(f"--set {change}: only a whole rule can be off; to remove a field, give {where}=null")
        del mapping[key]
        return
    try:
        mapping[key] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise WhatIfError(f"--set {change}: {text!r} is no value that YAML can read") from None
    if mapping[key] is None:
        del mapping[key]


def _place(section: dict[str, Any], where: str, change: str) -> tuple[dict[str, Any], str]:
    """The mapping of the recipe that a change applies to, and the key in it. where: the change up to its "="."""
    policy: dict[str, Any] = section["policy"]
    head, _, rest = where.partition(".")
    if where == "on_unusable":
        return policy, where
    if head == "tiers" and rest:
        return _tier_place(section, rest, change)
    if head == "near_duplicates":
        if policy["near_duplicates"] is None:
            raise WhatIfError(
                f"--set {change}: the recipe's policy has no near_duplicates, so copies are kept; "
                "write near_duplicates into a recipe and give it with --recipe"
            )
        return (policy["near_duplicates"], rest) if rest else (policy, head)
    for kind in ("rules", "audio"):
        path = where.removeprefix(f"{kind}.")
        found = _in_rules(policy[kind], path)
        if found is not None:
            return found
    return _by_score(section, where, change)


def _in_rules(rules: dict[str, Any], path: str) -> tuple[dict[str, Any], str] | None:
    """The place of a rule, or of a field of a rule, by the rule's name, which may hold dots. None if there is none."""
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
    """The place of a field of the only rule on a score or a stage. A score without a rule gets a new one."""
    policy, measured = section["policy"], section["measure"]
    target, _, key = where.rpartition(".")
    rules = {name: rule for kind in ("rules", "audio") for name, rule in policy[kind].items()}
    stage, _, column = target.partition(".")
    matching = {
        name: rule for name, rule in rules.items() if target in (rule["score"], rule["score"].partition(".")[0])
    }
    if len(matching) == 1:
        return next(iter(matching.values())), key
    if matching:
        raise WhatIfError(f"--set {change}: {target} has {len(matching)} rules; name one: {', '.join(matching)}")
    if stage in measured and column in STAGES[stage].columns:
        name = target if target not in rules else f"{target} by --set"
        policy["rules"][name] = {"score": target, "backend": measured[stage]["backend"], "missing": "pass"}
        return policy["rules"][name], key
    raise WhatIfError(
        f"--set {change}: the recipe has no rule or score {target or where!r}{_hint(where, rules, measured)}"
    )


def _hint(where: str, rules: Iterable[str], measured: Iterable[str]) -> str:
    """The end of the message about a place that is not there: the nearest rule or score, or all rules.

    Names are compared without the field behind them, which is the same for most.
    """
    target, _, key = where.rpartition(".")
    if key not in _FIELDS:
        target, key = where, ""
    scores = [f"{name}.{column}" for name in measured for column in STAGES[name].columns] if "." in target else []
    near = difflib.get_close_matches(target, [*rules, *scores], n=1)
    if near:
        return f"; did you mean {near[0] + ('.' + key if key else '')!r}?"
    return f"; its rules are {', '.join(rules) or 'none'}"


def _example(recipe: Recipe) -> str:
    """A change that this recipe takes."""
    for name, rule in {**recipe.policy.rules, **recipe.policy.audio}.items():
        for bound in ("min", "max"):
            value = getattr(rule, bound)
            if value is not None:
                return f"{name}.{bound}={value:g}"
    return "on_unusable=drop"


# ---- comparing ----


def compare(run: RunFolder, recipe: Recipe) -> WhatIf:
    """Apply another recipe's policy to the clips of a run.

    A clip is pending at a stage when it would reach that stage for the first time, or when `recipe` measures that stage
    in another way.

    Raises WhatIfError when `recipe` cuts the footage into other clips.
    """
    for section in ("scenes", "clips"):
        if getattr(recipe, section) != getattr(run.recipe, section):
            raise WhatIfError(
                f"{recipe.name} cuts the footage into other clips than {run.address} has (its `{section}` differs); "
                "run `understudy curate` with it to see its result"
            )
    same = _measured_alike(run.recipe, recipe)
    frame, stages = run.frame_for(recipe.policy), list(recipe.measure)
    frame = frame.drop(columns=[c for c in frame.columns if c.partition(".")[0] not in ("clips", *same)])
    decisions = decide(frame, recipe.policy, stages)
    before = funnel(run.frame, run.decisions, run.recipe.policy, run.stages)
    after = funnel(frame, decisions, recipe.policy, stages)
    flips = _flips(run, decisions)
    moved = (run.decisions[["stage", "rule"]].astype("str") != decisions[["stage", "rule"]].astype("str")).any(axis=1)
    return WhatIf(_side_by_side(before, after), flips, int((moved & ~moved.index.isin(flips["clip_id"])).sum()))


def _measured_alike(before: Recipe, after: Recipe) -> list[str]:
    """The stages whose rows can be used for the other recipe: those with the same settings that start from the same
    earlier stages."""
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
    """The lines of both funnels, matched, in the order of the second funnel."""
    sides = [{_key(row): row for row in table.to_dict("records")} for table in (before, after)]
    keys = list(sides[1])
    for at, key in enumerate(sides[0]):
        if key not in sides[1]:  # a line of the first funnel alone follows the line that stood before it
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
    """What identifies a line of a funnel, whatever its threshold."""
    return row["what"], row["stage"], row["rule"] or row["reason"]


def _label(rows: list[Any]) -> str:
    labels = [funnel_label(row) for row in rows if row]
    if len(labels) == 1:
        return f"{labels[0]} ({'new' if rows[1] else 'gone'})"
    before, after = labels
    rule = rows[0]["rule"]
    if before == after or not rule:
        return after
    return f"{before} -> {rows[1]['reason'].removeprefix(rule).strip()}"  # the rule is the same, its threshold is not


def _flips(run: RunFolder, after: "pd.DataFrame") -> "pd.DataFrame":
    """The table of flips, as WhatIf.flips describes it. after: the decisions under the other recipe."""
    import pandas as pd

    before = run.decisions
    outcomes = [_outcome(before), _outcome(after)]
    rows = (outcomes[0] != outcomes[1]).to_numpy()
    table = pd.DataFrame(
        {
            "clip_id": before.index[rows],
            "uri": run.frame["clips.uri"][rows].to_numpy(),
            "start_s": run.frame["clips.start_s"][rows].to_numpy(),
            "before": outcomes[0][rows].to_numpy(),
            "after": outcomes[1][rows].to_numpy(),
        }
    )
    # column of the table -> column of the decisions that it is taken from
    of_clip = {"stage": "stage", "rule": "rule", "value": "value", "threshold": "threshold"}
    of_audio = of_clip | {"rule": "audio_rule", "value": "audio_value", "threshold": "audio_threshold"}
    for column in of_clip:
        texts = []
        for old, new in zip(before[rows].to_dict("records"), after[rows].to_dict("records"), strict=True):
            objections = [(d, names) for names in (of_clip, of_audio) for d in (new, old) if d[names["rule"]]]
            texts.append(objections[0][0][objections[0][1][column]] if objections else "")
        table[column] = pd.array(texts, dtype="str")
    return table


def _outcome(decisions: "pd.DataFrame") -> "pd.Series":
    """The outcome of each clip in words.

    Such as "keep, tier hq", "keep, tier main, sound unusable", "drop" or "would be measured by motion".
    """
    verdict, tier = decisions["verdict"].astype("str"), decisions["tier"].astype("str")
    text = verdict.mask(verdict == "keep", "keep, tier " + tier)
    audio = decisions["audio"].astype("str")
    text = text.mask((verdict == "keep") & (audio == "unusable"), text + ", sound unusable")
    return text.mask(verdict == "pending", MEASURED_BY + decisions["stage"].astype("str"))
