"""The report of a finished run: one self-contained HTML file that any browser opens offline."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_manifests.storage import Storage
from flows.progress import StepProgress
from flows.report.charts import MOST_CATEGORIES, Category, Histogram, categories, histogram, percent
from flows.report.pages import data_uri, render, short
from flows.report.times import times_table
from tasks.policy.decide import funnel, rejects
from tasks.review.funnel import funnel_label
from tasks.review.preview import still
from tasks.review.run_folder import RunFolder
from tasks.stages.people.stage import FRAMINGS
from tasks.stages.registry import STAGES

if TYPE_CHECKING:
    import pandas as pd

    from tasks.policy.rules import Rule

log = logging.getLogger(__name__)

REPORT = "report.html"

_STILL_SIDE = 120  # short side of a still, pixels
_MAX_KEPT = 24  # kept clips in the contact sheets, shared out among the tiers
_MAX_DROPPED = 8  # clips in each other contact sheet
_MAX_RULES = 12  # rules with a contact sheet
_MAX_STILL_BYTES = 3_000_000  # all stills together; in the page, as base64, they take a third more
_MAX_PROBLEMS = 200
# percent of a random sample of the paper's clips (active-mind, appendix B)
_PAPER_FRAMING = dict(zip(FRAMINGS, (47, 30, 15, 8), strict=True))
_PAPER_SCENE = {"indoor": 45, "outdoor": 55}


@dataclass(frozen=True)
class Bar:
    """One line of the funnel chart."""

    label: str
    note: str
    """Counts and hours, in words."""
    share: float
    """Length of the bar, percent of the longest bar."""
    kind: str
    """in, left, kept, tier or lost."""


@dataclass(frozen=True)
class ScoreChart:
    """The distribution of one score."""

    name: str
    """stage.column."""
    demands: list[str]
    """What each rule on the score demands, and how many of the measured clips it rejects."""
    histogram: Histogram | None
    """None for a score that is not a number, and when no clip has a value."""
    categories: list[Category]
    """Empty for a score that is a number."""


def write_report(run: RunFolder, to: Path | None = None) -> str:
    """Write the report of a run. Returns its address.

    to: the file to write; report.html in the run's folder when None.
    """
    page = build_report(run)
    if to is None:
        run.storage.write_bytes(REPORT, page)
        return f"{run.address}/{REPORT}"
    Storage(str(to.parent)).write_bytes(to.name, page)
    return str(to)


def build_report(run: RunFolder) -> bytes:
    """Make the page of the report. Returns UTF-8. The same folder gives the same bytes.

    Memory: the run's frame, the numbers and the texts with few values of one more stage at a time, and the page, with
    at most 4 MB of stills and 200 errors.
    """
    rules = list(run.recipe.policy.all_rules())
    judged = _by_score(rules)
    kept = run.decisions["verdict"] == "keep"
    problems = run.problems()
    hours = run.frame["clips.duration_s"] / 3600
    return render(
        "report.html",
        recipe=run.manifest.recipe,
        footage=run.manifest.created_from,
        address=run.address,
        totals=[
            ("footage", _time(_footage_hours(run)), _count(_ok(run), "file")),
            ("clips", _time(hours.sum()), _count(len(run.frame), "clip")),
            ("kept", _time(hours[kept].sum()), _count(int(kept.sum()), "clip")),
            ("errors", str(len(problems)), "not counted as dropped"),
        ],
        funnel=_funnel(run),
        audio=_audio_use(run),
        judged=[_chart(run.frame, name, on) for name, on in judged.items()],
        others=list(_other_scores(run, set(judged))),
        sheets=list(_sheets(run)),
        problems=problems[:_MAX_PROBLEMS],
        more_problems=max(0, len(problems) - _MAX_PROBLEMS),
        composition=_composition(run),
        times=times_table(run),
    )


def _ok(run: RunFolder) -> int:
    return sum(row["status"] == "ok" for row in run.sources)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' if number != 1 else ''}"


# ---- the funnel ----


def _funnel(run: RunFolder) -> list[Bar]:
    """The funnel's bars, from the footage to the tiers. What a step loses comes before the bar of what is left."""
    rows = funnel(run.frame, run.decisions, run.recipe.policy, run.stages).to_dict("records")
    footage = _footage_hours(run)
    most = max(footage, *(row["hours"] for row in rows)) or 1.0
    skipped = run.skipped()
    skipped = skipped[skipped["key"].isin([row["source_id"] for row in run.sources])]
    bars = [Bar("footage", f"{_count(_ok(run), 'file')}, {_time(footage)}", percent(footage, most), "in")]
    for reason, parts in skipped.groupby("reason"):
        hours = float((parts["end_s"] - parts["start_s"]).sum()) / 3600
        note = f"{_count(len(parts), 'part')}, {_time(hours)}"
        bars.append(Bar(f"left out: {reason}", note, percent(hours, most), "lost"))
    for row in rows:
        what, share = row["what"], percent(row["hours"], most)
        note = f"{_count(row['clips'], 'clip')}, {_time(row['hours'])}"
        if what in ("dropped", "error", "pending"):
            if row["clips"]:
                bars.append(Bar(funnel_label(row).strip(), note, share, "lost"))
        elif what != "audio":
            label = {"left": f"after {row['stage']}", "tier": f"tier {row['reason']}"}.get(what, funnel_label(row))
            bars.append(Bar(label, note, share, what))
    return bars


def _footage_hours(run: RunFolder) -> float:
    return sum(float(row["duration_s"] or 0) for row in run.sources if row["status"] == "ok") / 3600


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def _audio_use(run: RunFolder) -> list[str]:
    """How many of the kept clips have usable audio, unusable audio and none, in words."""
    use = run.decisions["audio"][run.decisions["verdict"] == "keep"].astype("str").value_counts()
    words = {"usable": "usable audio", "unusable": "unusable audio", "none": "no audio"}
    return [f"{_count(int(use[name]), 'clip')} with {word}" for name, word in words.items() if name in use]


# ---- scores ----


def _by_score(rules: Sequence[tuple[str, "Rule"]]) -> "dict[str, list[tuple[str, Rule]]]":
    """The rules on each score, with their names. rules: as Policy.all_rules gives them."""
    found: dict[str, list[tuple[str, Rule]]] = {}
    for place, rule in rules:
        name = place.removeprefix("rules.").removeprefix("audio.").replace(".rules.", ".")
        found.setdefault(rule.score, []).append((name, rule))
    return found


def _other_scores(run: RunFolder, judged: set[str]) -> Iterator[ScoreChart]:
    """Charts of the scores that no rule reads. Of texts, only those with few values: no hashes, no sentences."""
    import pandas as pd

    for stage in run.stages:
        names = [column for column in STAGES[stage].columns if f"{stage}.{column}" not in judged]
        found = _values_of(run, stage, names)
        for column, parts in found.items():
            values = pd.concat(parts) if parts else pd.Series(dtype=float)
            if STAGES[stage].columns[column] is not str or values.nunique() < len(values):
                yield _chart(values.to_frame(f"{stage}.{column}"), f"{stage}.{column}", [])


def _values_of(run: RunFolder, stage: str, names: Sequence[str]) -> "dict[str, list[pd.Series]]":
    """The values of some columns of a stage, one series a partition. Text columns with many values are left out."""
    parts: dict[str, list[pd.Series]] = {name: [] for name in names}
    texts: dict[str, set[str]] = {name: set() for name in names if STAGES[stage].columns[name] is str}
    for partition in range(run.recipe.shards.partitions):
        table = run.columns(stage, list(parts), partition)
        for name in table:
            values = table[name].dropna()
            if name in texts:
                texts[name].update(values.unique())
            if len(texts.get(name, ())) > MOST_CATEGORIES:
                del parts[name]
            elif len(values):
                parts[name].append(values)
    return parts


def _chart(frame: "pd.DataFrame", name: str, rules: "list[tuple[str, Rule]]") -> ScoreChart:
    values = frame[name] if name in frame else frame.iloc[:0, 0]
    stage, _, column = name.partition(".")
    is_number = STAGES[stage].columns[column] in (float, int)
    demands = []
    for rule_name, rule in rules:
        rejected, missing = rejects(frame, rule)
        count = int((rejected & ~missing).sum())
        demands.append(f"{rule_name}: {rule.demand}; rejects {count:,} of {values.count():,}")
    return ScoreChart(
        name,
        demands,
        histogram(values, rules) if is_number else None,
        [] if is_number else categories(values, rules),
    )


# ---- contact sheets ----


def _sheets(run: RunFolder) -> Iterator[dict[str, Any]]:
    """The contact sheets: kept clips by tier, dropped clips by rule, and clips in error.

    A hash of the clip_id chooses the clips of a sheet.
    """
    decisions = run.decisions
    groups: list[tuple[str, str, list[str]]] = []
    tiers = list(run.recipe.policy.tiers)
    for tier in reversed(tiers):
        of_tier = decisions.index[decisions["tier"] == tier]
        groups.append((f"Kept, tier {tier}", "kept", list(of_tier)))
    dropped = decisions[decisions["verdict"] == "drop"]
    counts = dropped.groupby(["stage", "rule"], observed=True).size().sort_values(ascending=False, kind="stable")
    for stage, rule in list(counts.index)[:_MAX_RULES]:
        of_rule = dropped.index[(dropped["stage"] == stage) & (dropped["rule"] == rule)]
        groups.append((f"Dropped by {rule}", "dropped", list(of_rule)))
    groups.append(("In error", "error", list(decisions.index[decisions["verdict"] == "error"])))
    shown = {title: sorted(ids, key=_hash)[: _max_clips(kind, len(tiers))] for title, kind, ids in groups}
    stills = _stills(run, [clip_id for ids in shown.values() for clip_id in ids])
    for title, kind, ids in groups:
        if ids:
            cards = [{"id": i, "still": stills.get(i), **_caption(run, i)} for i in shown[title]]
            yield {"title": title, "kind": kind, "count": len(ids), "cards": cards}


def _max_clips(kind: str, num_tiers: int) -> int:
    return max(_MAX_DROPPED, _MAX_KEPT // num_tiers) if kind == "kept" else _MAX_DROPPED


def _hash(clip_id: str) -> str:
    return hashlib.sha256(clip_id.encode()).hexdigest()


def _stills(run: RunFolder, clip_ids: list[str]) -> dict[str, str]:
    """Stills of clips as data URIs, by clip_id.

    Clips that cannot be read are left out. When all stills together reach the limit of bytes, the remaining clips have
    none.
    """
    stills: dict[str, str] = {}
    bytes_left = _MAX_STILL_BYTES
    progress = StepProgress("report", len(clip_ids))
    for done, (record, _) in enumerate(run.clips(clip_ids), 1):
        try:
            with run.open(record) as clip:
                image = still(clip, _STILL_SIDE)
        except Exception as error:  # the report is written without the clips that cannot be shown
            log.warning("the report has no still of %s: %s", record.clip_id, error)
        else:
            bytes_left -= len(image)
            if bytes_left < 0:
                break
            stills[record.clip_id] = data_uri(image, "image/webp")
        progress(done, len(clip_ids), 0)
    return stills


def _caption(run: RunFolder, clip_id: str) -> dict[str, str]:
    """What stands below a clip's still: its source, its time in the source, and the reason of its verdict."""
    decision, clip = run.decisions.loc[clip_id], run.frame.loc[clip_id]
    uri = str(clip["clips.uri"])
    reason = ""
    if decision["verdict"] == "drop":
        reason = f"{short(decision['value'])}, wanted {decision['threshold']}"
    elif decision["verdict"] == "error":
        reason = f"{decision['stage']}: {decision['error']}"
    elif decision["audio"] == "unusable":
        reason = f"audio: {decision['audio_rule']} {short(decision['audio_value'])}"
    name = uri.rstrip("/").rsplit("/", 1)[-1]
    return {"uri": uri, "name": name, "time": _clock(clip["clips.start_s"]), "reason": reason}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# ---- composition ----


def _composition(run: RunFolder) -> list[dict[str, Any]]:
    """Framing and scene type of the kept clips beside the paper's figures, all in percent of the clips."""
    kept = run.decisions.index[run.decisions["verdict"] == "keep"]
    if not len(kept) or "people" not in run.stages:
        return []
    values = run.columns("people", ["framing", "scene"]).reindex(kept)
    parts = []
    for title, column, paper in (("framing", "framing", _PAPER_FRAMING), ("scene type", "scene", _PAPER_SCENE)):
        if column not in values:
            continue
        counts = values[column].fillna("").value_counts()
        rows: list[tuple[str, int, int | None]] = [(n, int(counts.get(n, 0)), share) for n, share in paper.items()]
        unknown = len(kept) - sum(count for _, count, _ in rows)
        rows += [("not known", unknown, None)] if unknown else []
        lines = [{"name": n, "clips": c, "share": percent(c, len(kept)), "paper": p} for n, c, p in rows]
        parts.append({"title": title, "rows": lines})
    return parts
