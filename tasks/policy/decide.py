"""Decides on every clip: keep or drop, whether its sound is usable, and its tier.

All functions here are pure functions over one frame with a row a clip (see `join`). Nothing is measured or stored, so
that a new threshold costs seconds. A rule has three outcomes, which are kept apart: passed, rejected, could not be
measured. An error is never counted as a rejection or as a pass.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.policy.copies import originals
from tasks.policy.rules import NEAR_DUPLICATE, NO_SOUND, Policy, Rule, Tier

if TYPE_CHECKING:
    import pandas as pd


def join(clips: "pd.DataFrame", tables: Mapping[str, "pd.DataFrame"]) -> "pd.DataFrame":
    """The frame that the policy reads: one row a clip.

    clips: indexed by clip_id, with `duration_s` in seconds, `audio` (the file name of the sound, "" without sound) and
        any other columns to carry along.
    tables: the ledger's rows of each stage, by the stage's name, with `key`, `status`, `error` and the columns that
        the rules read.

    Returns: indexed by clip_id, sorted; columns `clips.<column>` and `<stage>.<column>`. A clip without a row in a
    stage's table has missing values in that stage's columns, `<stage>.status` among them.
    """
    import pandas as pd

    clips = clips.rename_axis(index="clip_id")
    if not clips.index.is_monotonic_increasing:
        clips = clips.sort_index()
    parts = [clips.add_prefix("clips.")]
    for stage, rows in tables.items():
        rows = rows.drop(columns="inputs", errors="ignore").set_index("key").add_prefix(f"{stage}.")
        parts.append(rows.set_axis(clips.index) if rows.index.equals(clips.index) else rows.reindex(clips.index))
    return pd.concat(parts, axis=1)


def decide(frame: "pd.DataFrame", policy: Policy, measured: Sequence[str]) -> "pd.DataFrame":
    """The verdict on every clip of a frame as `join` makes it.

    measured: the stages in the recipe's order. The first objection in that order is the verdict: a stage that has no
        row for the clip yet (pending), a stage that could not measure it (error), or a rule that it fails (drop). Among
        copies without any objection, the one with the lowest clip_id is kept.

    Returns: indexed like `frame`, all columns text:
        verdict: keep, drop, error or pending.
        stage: the stage that decided the verdict, "" for keep.
        rule, value, threshold: the rule behind a drop, such as "moves", "0.02", ">= 0.1"; "" otherwise.
        error: why the clip could not be measured, or which score has no value.
        audio: usable, unusable or none (the clip has no sound); "" while a stage that decides it has not measured.
        audio_rule, audio_value, audio_threshold: the rule that makes the sound unusable.
        tier: the narrowest tier of a kept clip; the wider tiers contain the clip too. "" for all other clips.
    """
    verdicts = _first_objections(frame, policy, measured)
    _keep_one_of_copies(frame, policy, verdicts)
    decisions = verdicts.frame(frame.index)
    for name, column in _audio(frame, policy).items():
        decisions[name] = column
    decisions["tier"] = _tiers(frame, policy, verdicts.undecided())
    return decisions


def alive(frame: "pd.DataFrame", policy: Policy, stages_before: Sequence[str]) -> "pd.Series":
    """Which clips the given stages have measured and let through: [clips] bool, indexed like `frame`.

    A clip that comes out False was rejected, is in error or is not measured yet. The next, more expensive stage must
    not measure it.
    """
    import pandas as pd

    return pd.Series(_first_objections(frame, policy, stages_before).undecided(), index=frame.index)


def rejects(frame: "pd.DataFrame", rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """The result of one rule for each clip of a frame, without regard to other rules.

    Returns: ([clips] bool rejected, [clips] bool without a value). A clip without a value is both if the rule says
    `missing: reject`.
    """
    if rule.score not in frame:
        missing, failed = np.ones(len(frame), bool), np.zeros(len(frame), bool)
    else:
        missing = frame[rule.score].isna().to_numpy()
        failed = ~rule.passing(frame[rule.score]) & ~missing
    return (failed | missing, missing) if rule.missing == "reject" else (failed, missing)


def rule_results(row: Mapping[str, Any], policy: Policy) -> dict[str, dict[str, Any]]:
    """Each rule of the policy, with the clip's value and whether it passed; for the lineage of a sample. Rules on sound
    and rules of tiers are included.

    row: one row of the frame, as a mapping.

    Returns: by the rule's key in the policy; `passed` is None where the score has no value.
    """
    results = {}
    for place, rule in policy.all_rules():
        value = _plain(row.get(rule.score))
        results[place] = {
            "score": rule.score,
            "value": value,
            "min": rule.min,
            "max": rule.max,
            "one_of": rule.one_of,
            "passed": None if value is None else rule.passes(value),
        }
    return results


def funnel(frame: "pd.DataFrame", decisions: "pd.DataFrame", policy: Policy, measured: Sequence[str]) -> "pd.DataFrame":
    """Clips and hours at every step, with reasons. Each clip is in exactly one of kept, dropped, error and pending.

    Returns: columns
        what: "in", "dropped", "error", "pending", "left", "kept", "audio" or "tier".
        stage: the stage of the step.
        reason: the rule with its threshold, the tier, or whether the sound is usable.
        clips, hours: how much footage. A tier includes the narrower tiers within it.
        rule: the rule's name for "dropped", "" otherwise.
    """
    import pandas as pd

    hours = frame["clips.duration_s"].to_numpy(dtype=float, na_value=0.0) / 3600.0
    lines: list[tuple[str, str, str, int, float, str]] = []

    def line(what: str, stage: str, reason: str, mask: np.ndarray, rule: str = "") -> None:
        lines.append((what, stage, reason, int(mask.sum()), float(hours[mask].sum()), rule))

    def decided(column: str, *values: str) -> np.ndarray:
        return decisions[column].isin(values).to_numpy()

    left = np.ones(len(frame), bool)
    line("in", "", "", left)
    dropped, failed, pending = (decided("verdict", verdict) for verdict in ("drop", "error", "pending"))
    for stage in ("clips", *measured):
        here = decided("stage", stage)
        if stage == "clips":
            demands = [(NO_SOUND, "")] if policy.on_unusable == "drop" else []
        else:
            line("pending", stage, "not measured yet", here & pending)
            line("error", stage, "could not be measured", here & failed)
            demands = [(name, f" {r.demand}") for name, r in policy.judged_at(stage)]
            if stage == "duplicates" and policy.near_duplicates is not None:
                demands.append((NEAR_DUPLICATE, ""))
        for name, demand in demands:
            line("dropped", stage, f"{name}{demand}", here & dropped & decided("rule", name), name)
        left &= ~here
        if demands or stage != "clips":
            line("left", stage, "", left)
    kept = decided("verdict", "keep")
    line("kept", "", "", kept)
    for use in ("usable", "unusable", "none"):
        line("audio", "", use, kept & decided("audio", use))
    names = list(policy.tiers)
    for i, name in enumerate(names):
        line("tier", "", name, decided("tier", *names[i:]))
    return pd.DataFrame(lines, columns=["what", "stage", "reason", "clips", "hours", "rule"])


# ---- verdicts ----


class _Verdicts:
    """The verdict on each clip. The first verdict on a clip stands; later ones are ignored."""

    def __init__(self, num_clips: int, undecided: str) -> None:
        """undecided: the verdict on clips without any objection."""
        self._reason = np.zeros(num_clips, np.int16)  # index into _reasons; 0 for a clip without any objection
        self._reasons = [(undecided, "", "", "")]  # verdict, stage, rule, threshold
        self._texts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"value": [], "error": []}

    def undecided(self) -> np.ndarray:
        """[clips] bool: the clips without any objection so far."""
        return self._reason == 0

    def give(
        self, mask: np.ndarray, verdict: str, stage: str = "", rule: str = "", threshold: str = "", **texts: Any
    ) -> None:
        """Give a verdict on the undecided clips of `mask`. texts: `value` or `error`, one text or a column of them."""
        rows: np.ndarray = np.flatnonzero(mask & self.undecided())
        self._reason[rows] = len(self._reasons)
        self._reasons.append((verdict, stage, rule, threshold))
        for name, text in texts.items():
            self._texts[name].append((rows, np.array(text) if isinstance(text, str) else _texts(text.iloc[rows])))

    def column(self, part: int) -> Any:
        """One part of the reason for each clip: 0 the verdict, 1 the stage, 2 the rule, 3 the threshold."""
        return _categories([reason[part] for reason in self._reasons], self._reason)

    def text(self, name: str) -> Any:
        """`value` or `error` for each clip, "" where none was given."""
        import pandas as pd

        column = np.full(len(self._reason), "", dtype=object)
        for rows, texts in self._texts[name]:
            column[rows] = texts
        return pd.array(column, dtype="str")

    def frame(self, index: "pd.Index") -> "pd.DataFrame":
        import pandas as pd

        columns = {name: self.column(part) for part, name in enumerate(("verdict", "stage", "rule"))}
        columns |= {"value": self.text("value"), "threshold": self.column(3), "error": self.text("error")}
        return pd.DataFrame(columns, index=index)


def _first_objections(frame: "pd.DataFrame", policy: Policy, stages: Sequence[str]) -> _Verdicts:
    """Take every clip through the stages in order, up to the first objection."""
    verdicts = _Verdicts(len(frame), "keep")
    has_sound = _has_sound(frame)
    needs_sound = policy.on_unusable == "drop"
    if needs_sound:
        verdicts.give(~has_sound, "drop", "clips", NO_SOUND, "a sound track", value="none")
    for stage in stages:
        measured, ok, errors = _status(frame, stage)
        verdicts.give(~measured, "pending", stage)
        verdicts.give(~ok, "error", stage, error=errors)
        for name, rule in (*policy.rules.items(), *policy.audio.items()):
            if rule.stage != stage:
                continue
            failed, missing = rejects(frame, rule)
            if rule.missing == "error":
                applies = has_sound if name in policy.audio else True
                verdicts.give(missing & applies, "error", stage, name, error=f"{rule.score} has no value for this clip")
            if name in policy.rules or needs_sound:
                verdicts.give(failed, "drop", stage, name, rule.demand, value=frame.get(rule.score, ""))
    return verdicts


def _keep_one_of_copies(frame: "pd.DataFrame", policy: Policy, verdicts: _Verdicts) -> None:
    bounds = policy.near_duplicates
    if bounds is None or "duplicates.picture" not in frame:
        return
    kept = originals(frame, verdicts.undecided(), bounds)
    is_copy = (kept != "").to_numpy()
    verdicts.give(is_copy, "drop", "duplicates", NEAR_DUPLICATE, bounds.demand, value=kept)


def _status(frame: "pd.DataFrame", stage: str) -> tuple[np.ndarray, np.ndarray, Any]:
    """([clips] bool the clip has a row, [clips] bool it was measured without an error, the errors as text)."""
    if f"{stage}.status" not in frame:
        return np.zeros(len(frame), bool), np.zeros(len(frame), bool), ""
    status = frame[f"{stage}.status"]
    return status.notna().to_numpy(), _equals(status, "ok"), frame.get(f"{stage}.error", "")


def _audio(frame: "pd.DataFrame", policy: Policy) -> dict[str, Any]:
    """Whether each clip's sound is usable, and the rule that makes it unusable: the audio columns of `decide`."""
    verdicts = _Verdicts(len(frame), "usable")
    verdicts.give(~_has_sound(frame), "none")
    for name, rule in policy.audio.items():
        failed, missing = rejects(frame, rule)
        unknown = ~_status(frame, rule.stage)[1]
        verdicts.give(unknown | missing if rule.missing == "error" else unknown, "")
        verdicts.give(failed, "unusable", "", name, rule.demand, value=frame.get(rule.score, ""))
    return {
        "audio": verdicts.column(0),
        "audio_rule": verdicts.column(2),
        "audio_value": verdicts.text("value"),
        "audio_threshold": verdicts.column(3),
    }


def _has_sound(frame: "pd.DataFrame") -> np.ndarray:
    audio = frame["clips.audio"]
    return ~(audio.isna().to_numpy() | _equals(audio, ""))


def _equals(column: "pd.Series", value: str) -> np.ndarray:
    return (column == value).to_numpy(dtype=bool, na_value=False)


# ---- tiers ----


def _tiers(frame: "pd.DataFrame", policy: Policy, kept: np.ndarray) -> Any:
    """The narrowest tier of each kept clip."""
    names = list(policy.tiers)
    depth = np.where(kept, 1, 0).astype(np.int16)  # index into ("", *names)
    inside = kept
    for level, name in enumerate(names[1:], start=2):
        inside = _within(frame, policy.tiers[name], inside)
        depth[inside] = level
    return _categories(["", *names], depth)


def _within(frame: "pd.DataFrame", tier: Tier, candidates: np.ndarray) -> np.ndarray:
    """[clips] bool: the candidates that belong to the tier."""
    inside = candidates.copy()
    for rule in tier.rules.values():
        failed, missing = rejects(frame, rule)
        inside &= ~failed if rule.missing == "pass" else ~(failed | missing)
    if tier.hours is None:
        return inside
    best = np.flatnonzero(inside)[_best(frame[inside], tier.rank, tier.hours)]
    inside[:] = False
    inside[best] = True
    return inside


def _best(frame: "pd.DataFrame", rank: Mapping[str, float], hours: float) -> np.ndarray:
    """[taken] int64: the rows of the best clips, best first, that together last `hours` at most."""
    import pandas as pd

    standing = np.zeros(len(frame))
    for score, weight in rank.items():
        values = pd.Series(frame[score].to_numpy(dtype=float, na_value=np.nan))
        standing += abs(weight) * values.rank(pct=True, ascending=weight > 0).fillna(0.0).to_numpy()
    by_name = np.arange(len(frame)) if frame.index.is_monotonic_increasing else frame.index.argsort().argsort()
    # Ties go to the lower clip_id. Sums are rounded, since equal clips must not differ in the last bit of a sum.
    order = np.lexsort((by_name, -np.round(standing / sum(map(abs, rank.values())), 9)))
    seconds = frame["clips.duration_s"].to_numpy(dtype=float)[order]
    taken: np.ndarray = order[np.cumsum(seconds) <= hours * 3600.0 + 1e-6]
    return taken


# ---- columns of text ----


def _categories(texts: list[str], codes: np.ndarray) -> Any:
    """A categorical column. texts: may repeat. codes: [rows], the index of each row's text."""
    import pandas as pd

    known = list(dict.fromkeys(texts))
    to_known = np.array([known.index(text) for text in texts], np.int16)
    return pd.Categorical.from_codes(to_known[codes], categories=pd.Index(known, dtype="str"))


def _texts(values: "pd.Series") -> np.ndarray:
    """Values as text, "" for a missing one. Numbers have enough digits to read back as the same number."""
    import pyarrow as pa

    texts = pa.array(values, from_pandas=True).cast(pa.string()).fill_null("")
    found: np.ndarray = texts.to_numpy(zero_copy_only=False)
    return found


def _plain(value: Any) -> Any:
    """NumPy scalars as Python values; None for NaN and pandas.NA."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or type(value).__name__ == "NAType" or value != value:
        return None
    return value
