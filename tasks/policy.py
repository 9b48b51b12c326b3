"""The policy: from what the ledger says of each clip to a verdict, its reason, the use of its sound and its tier.

Pure functions over one frame with a row a clip (see `join`); nothing is measured or stored here, so a new threshold
costs seconds. Three outcomes of a rule are kept apart: passed, rejected, could not be measured. An error is never
counted as a rejection, nor as a pass.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.duplicates import copies
from tasks.rules import NEAR_DUPLICATE, NO_SOUND, Policy, Rule, Tier

if TYPE_CHECKING:
    import pandas as pd


def join(clips: "pd.DataFrame", tables: Mapping[str, "pd.DataFrame"]) -> "pd.DataFrame":
    """The frame that the policy reads: one row a clip.

    clips: indexed by clip_id; `duration_s` in seconds, `audio` the name of the sound's file, "" without sound, and
        whatever else should come along.
    tables: for each stage its rows from the ledger, with `key`, `status`, `error` and the columns that rules ask for.

    Returns: indexed by clip_id, sorted; columns `clips.<column>` and `<stage>.<column>`. The status of a clip that a
    stage has no row for is missing.
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

    measured: the stages in the recipe's order. The first thing that speaks against a clip in that order is its verdict:
    a stage that has no row for it yet (pending), a stage that could not measure it (error), or a rule (drop). Of copies
    that nothing speaks against the first by clip_id is kept.

    Returns: indexed like `frame`, all columns text:
        verdict: keep, drop, error or pending. stage: where that was decided, "" for keep.
        rule, value, threshold: the rule behind a drop, such as "moves", "0.02", ">= 0.1"; "" otherwise.
        error: why the clip could not be measured, or what is missing.
        audio: usable, unusable or none (no sound); "" while a stage that decides it has not measured.
        audio_rule, audio_value, audio_threshold: why the sound is unusable.
        tier: the narrowest tier of a kept clip, which the wider ones hold as well; "" for all others.
    """
    fate = _follow(frame, policy, measured)
    _keep_one_of_copies(frame, policy, fate)
    decisions = fate.frame(frame.index)
    for name, column in _audio(frame, policy).items():
        decisions[name] = column
    decisions["tier"] = _tiers(frame, policy, fate.open())
    return decisions


def alive(frame: "pd.DataFrame", policy: Policy, stages_before: Sequence[str]) -> "pd.Series":
    """Which clips the given stages have measured and let through: [clips] bool, indexed like `frame`.

    What comes out false must not reach the next, dearer stage: rejected, in error, or not measured there yet.
    """
    import pandas as pd

    return pd.Series(_follow(frame, policy, stages_before).open(), index=frame.index)


def rejects(frame: "pd.DataFrame", rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """What a rule says of each clip of a frame, whatever others say.

    Returns: ([clips] bool rejected, [clips] bool without a value); both where `missing` says that this is a rejection.
    """
    if rule.score not in frame:
        missing, failed = np.ones(len(frame), bool), np.zeros(len(frame), bool)
    else:
        column = frame[rule.score]
        missing = column.isna().to_numpy()
        if rule.one_of is not None:
            failed = ~column.isin(rule.one_of).to_numpy(dtype=bool, na_value=False) & ~missing
        else:
            values = column.to_numpy(dtype=float, na_value=np.nan)
            failed = np.zeros(len(frame), bool)
            if rule.min is not None:
                failed |= values < rule.min
            if rule.max is not None:
                failed |= values > rule.max
    return (failed | missing, missing) if rule.missing == "reject" else (failed, missing)


def rule_results(row: Mapping[str, Any], policy: Policy) -> dict[str, dict[str, Any]]:
    """For a sample's lineage: each rule, also those of sound and tiers, with the clip's value and whether it passed.

    row: one row of the frame, as a mapping. passed is None where the score has no value.
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
    """Clips and hours at every step, with reasons; each clip in exactly one of kept, dropped, error and pending.

    Returns: columns what ("in", "dropped", "error", "pending", "left", "kept", "audio", "tier"), stage, reason (the
    rule with its threshold, the tier, the use of the sound), clips, hours, rule (its name; "" but for "dropped"). A
    tier counts the narrower ones within it.
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


# ---- judging ----


class _Fate:
    """What has been decided of each clip so far; the first decision stands."""

    def __init__(self, clips: int, untouched: str) -> None:
        self.reason = np.zeros(clips, np.int16)  # index into reasons; 0 while nothing speaks against the clip
        self.reasons = [(untouched, "", "", "")]  # verdict, stage, rule, threshold
        self.texts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"value": [], "error": []}

    def open(self) -> np.ndarray:
        """[clips] bool: those that nothing speaks against yet."""
        return self.reason == 0

    def put(
        self, mask: np.ndarray, verdict: str, stage: str = "", rule: str = "", threshold: str = "", **texts: Any
    ) -> None:
        """Decide on the open clips of `mask`. texts: `value` or `error`, one text for all or a column of texts."""
        rows: np.ndarray = np.flatnonzero(mask & self.open())
        self.reason[rows] = len(self.reasons)
        self.reasons.append((verdict, stage, rule, threshold))
        for name, text in texts.items():
            self.texts[name].append((rows, np.array(text) if isinstance(text, str) else _texts(text.iloc[rows])))

    def column(self, part: int) -> Any:
        """One part of the reasons, for each clip: 0 the verdict, 1 the stage, 2 the rule, 3 the threshold."""
        return _categories([reason[part] for reason in self.reasons], self.reason)

    def text(self, name: str) -> Any:
        import pandas as pd

        column = np.full(len(self.reason), "", dtype=object)
        for rows, texts in self.texts[name]:
            column[rows] = texts
        return pd.array(column, dtype="str")

    def frame(self, index: "pd.Index") -> "pd.DataFrame":
        import pandas as pd

        columns = {name: self.column(part) for part, name in enumerate(("verdict", "stage", "rule"))}
        columns |= {"value": self.text("value"), "threshold": self.column(3), "error": self.text("error")}
        return pd.DataFrame(columns, index=index)


def _follow(frame: "pd.DataFrame", policy: Policy, stages: Sequence[str]) -> _Fate:
    """Take every clip through the stages in order, to the first thing that speaks against it."""
    fate = _Fate(len(frame), "keep")
    has_sound = _has_sound(frame)
    needs_sound = policy.on_unusable == "drop"
    if needs_sound:
        fate.put(~has_sound, "drop", "clips", NO_SOUND, "a sound track", value="none")
    for stage in stages:
        measured, ok, errors = _status(frame, stage)
        fate.put(~measured, "pending", stage)
        fate.put(~ok, "error", stage, error=errors)
        for name, rule in (*policy.rules.items(), *policy.audio.items()):
            if rule.stage != stage:
                continue
            failed, missing = rejects(frame, rule)
            if rule.missing == "error":
                judged = has_sound if name in policy.audio else True
                fate.put(missing & judged, "error", stage, name, error=f"{rule.score} has no value for this clip")
            if name in policy.rules or needs_sound:
                fate.put(failed, "drop", stage, name, rule.demand, value=frame.get(rule.score, ""))
    return fate


def _keep_one_of_copies(frame: "pd.DataFrame", policy: Policy, fate: _Fate) -> None:
    import pandas as pd

    bounds = policy.near_duplicates
    if bounds is None or "duplicates.picture" not in frame:
        return
    rows = np.flatnonzero(fate.open())
    rows = rows[np.argsort(frame.index[rows], kind="stable")]
    some = frame.iloc[rows]
    clips = pd.DataFrame(
        {
            "picture": some["duplicates.picture"],
            "sound": some["duplicates.sound"],
            "duration_s": some["clips.duration_s"],
            "source_id": some.index.str[:16],
        }
    )
    first = copies(clips, bounds.picture_bits, bounds.sound_bits)
    originals = pd.Series("", index=frame.index, dtype="str")
    found = first >= 0
    originals.iloc[rows[found]] = frame.index[rows[first[found]]].to_numpy()
    mask = np.zeros(len(frame), bool)
    mask[rows[found]] = True
    fate.put(mask, "drop", "duplicates", NEAR_DUPLICATE, bounds.demand, value=originals)


def _status(frame: "pd.DataFrame", stage: str) -> tuple[np.ndarray, np.ndarray, Any]:
    """([clips] bool has a row, [clips] bool measured without an error, the errors)."""
    if f"{stage}.status" not in frame:
        return np.zeros(len(frame), bool), np.zeros(len(frame), bool), ""
    status = frame[f"{stage}.status"]
    return status.notna().to_numpy(), _equals(status, "ok"), frame.get(f"{stage}.error", "")


def _audio(frame: "pd.DataFrame", policy: Policy) -> dict[str, Any]:
    """The use of each clip's sound, and the rule that speaks against it."""
    fate = _Fate(len(frame), "usable")
    fate.put(~_has_sound(frame), "none")
    for name, rule in policy.audio.items():
        failed, missing = rejects(frame, rule)
        unknown = ~_status(frame, rule.stage)[1]
        fate.put(unknown | missing if rule.missing == "error" else unknown, "")
        fate.put(failed, "unusable", "", name, rule.demand, value=frame.get(rule.score, ""))
    return {
        "audio": fate.column(0),
        "audio_rule": fate.column(2),
        "audio_value": fate.text("value"),
        "audio_threshold": fate.column(3),
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
    """[clips] bool: the candidates that the tier takes."""
    import pandas as pd

    inside = candidates.copy()
    for rule in tier.rules.values():
        failed, missing = rejects(frame, rule)
        inside &= ~failed if rule.missing == "pass" else ~(failed | missing)
    if tier.hours is None:
        return inside
    some = frame[inside]
    standing = np.zeros(len(some))
    for score, weight in tier.rank.items():
        values = pd.Series(some[score].to_numpy(dtype=float, na_value=np.nan))
        standing += abs(weight) * values.rank(pct=True, ascending=weight > 0).fillna(0.0).to_numpy()
    by_name = np.arange(len(some)) if some.index.is_monotonic_increasing else some.index.argsort().argsort()
    # of equals the first by clip_id; rounded, since equals must not differ in the last bit of a sum
    order = np.lexsort((by_name, -np.round(standing / sum(map(abs, tier.rank.values())), 9)))
    seconds = some["clips.duration_s"].to_numpy(dtype=float)[order]
    taken = order[np.cumsum(seconds) <= tier.hours * 3600.0 + 1e-6]
    rows = np.flatnonzero(inside)[taken]
    inside[:] = False
    inside[rows] = True
    return inside


# ---- columns of text ----


def _categories(texts: list[str], codes: np.ndarray) -> Any:
    """A categorical column from texts, some of them the same, and the index of each row's text."""
    import pandas as pd

    known = list(dict.fromkeys(texts))
    to_known = np.array([known.index(text) for text in texts], np.int16)
    return pd.Categorical.from_codes(to_known[codes], categories=pd.Index(known, dtype="str"))


def _texts(values: "pd.Series") -> np.ndarray:
    """Values as text, numbers with all the digits that tell them apart; "" where there is none."""
    import pyarrow as pa

    texts = pa.array(values, from_pandas=True).cast(pa.string()).fill_null("")
    found: np.ndarray = texts.to_numpy(zero_copy_only=False)
    return found


def _plain(value: Any) -> Any:
    """NumPy's scalars as Python's, what stands for no value as None."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or type(value).__name__ == "NAType" or value != value:
        return None
    return value
