"""The report of a finished run: one self-contained HTML file that any browser opens, without a network."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_manifests.storage import Storage
from flows.charts import MOST_CATEGORIES, Category, Histogram, categories, histogram
from flows.pages import check_writable, data_uri, render, short
from flows.progress import StepProgress
from tasks.outcome import funnel_label
from tasks.people import FRAMINGS
from tasks.policy import funnel, rejects
from tasks.preview import still
from tasks.run_folder import RunFolder
from tasks.stages import STAGES

if TYPE_CHECKING:
    import pandas as pd

    from tasks.curation import Curation
    from tasks.rules import Rule
    from tasks.work import StepResult

log = logging.getLogger(__name__)

REPORT, TIMES = "report.html", "times.json"

_STILL_SIDE = 120  # pixels, short side of a picture
_KEPT_SHOWN, _DROPPED_SHOWN, _RULES_SHOWN = 24, 8, 12
_MOST_PICTURE_BYTES = 3_000_000  # all together; a third more once they are text in the page
_PROBLEMS_SHOWN = 200
# of a random sample of the paper's clips: active-mind, appendix B
_PAPER_FRAMING = dict(zip(FRAMINGS, (47, 30, 15, 8), strict=True))
_PAPER_SCENE = {"indoor": 45, "outdoor": 55}


@dataclass(frozen=True)
class Bar:
    """One line of the funnel chart. share: percent of the longest. kind: in, left, kept, tier, or lost."""

    label: str
    note: str
    share: float
    kind: str


@dataclass(frozen=True)
class Score:
    """The distribution of one column. demands: of the rules on it, with how many of the measured clips each rejects."""

    name: str
    demands: list[str]
    histogram: Histogram | None
    categories: list[Category]


def write_report(out: str, to: Path | None = None) -> str:
    """Make the report of a run. to: the file for it; in the run's own folder when None. Returns where it is."""
    if to is not None:
        check_writable(to)
    run = RunFolder(out)
    page = build_report(run)
    if to is None:
        run.storage.write_bytes(REPORT, page)
        return f"{run.address}/{REPORT}"
    Storage(str(to.parent)).write_bytes(to.name, page)
    return str(to)


def build_report(run: RunFolder) -> bytes:
    """The page, UTF-8. The same folder makes the same bytes.

    Held at a time: the run's frame (what the policy decides by), of one stage more the numbers and the words that have
    few values, and the page, with 4 MB of pictures and 200 errors at most.
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
            ("errors", str(len(problems)), "never counted as dropped"),
        ],
        funnel=_funnel(run),
        audio=_audio(run),
        judged=[_score(run.frame, name, on) for name, on in judged.items()],
        others=list(_other_scores(run, set(judged))),
        sheets=list(_sheets(run)),
        problems=problems[:_PROBLEMS_SHOWN],
        more_problems=max(0, len(problems) - _PROBLEMS_SHOWN),
        composition=_composition(run),
        times=_times(run),
    )


def _ok(run: RunFolder) -> int:
    return sum(row["status"] == "ok" for row in run.sources)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' if number != 1 else ''}"


# ---- the funnel ----


def _funnel(run: RunFolder) -> list[Bar]:
    """From the footage to the tiers; what was lost on the way stands before the bar that lacks it."""
    rows = funnel(run.frame, run.decisions, run.recipe.policy, run.stages).to_dict("records")
    footage = _footage_hours(run)
    most = max(footage, *(row["hours"] for row in rows)) or 1.0
    skipped = run.skipped[run.skipped["key"].isin([row["source_id"] for row in run.sources])]
    bars = [Bar("footage", f"{_count(_ok(run), 'file')}, {_time(footage)}", _percent(footage, most), "in")]
    for reason, parts in skipped.groupby("reason"):
        hours = float((parts["end_s"] - parts["start_s"]).sum()) / 3600
        note = f"{_count(len(parts), 'part')}, {_time(hours)}"
        bars.append(Bar(f"left out: {reason}", note, _percent(hours, most), "lost"))
    for row in rows:
        what, share = row["what"], _percent(row["hours"], most)
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


def _percent(part: float, whole: float) -> float:
    return round(100 * part / whole, 2)


def _audio(run: RunFolder) -> list[str]:
    """How the sound of the kept clips may be used."""
    use = run.decisions["audio"][run.decisions["verdict"] == "keep"].astype("str").value_counts()
    words = {"usable": "usable sound", "unusable": "sound not to be used", "none": "no sound"}
    return [f"{_count(int(use[name]), 'clip')} with {word}" for name, word in words.items() if name in use]


# ---- scores ----


def _by_score(rules: Sequence[tuple[str, "Rule"]]) -> "dict[str, list[tuple[str, Rule]]]":
    found: dict[str, list[tuple[str, Rule]]] = {}
    for place, rule in rules:
        name = place.removeprefix("rules.").removeprefix("audio.").replace(".rules.", ".")
        found.setdefault(rule.score, []).append((name, rule))
    return found


def _other_scores(run: RunFolder, judged: set[str]) -> Iterator[Score]:
    """Scores that no rule asks for; of those that are text the ones with a few values, not hashes and sentences."""
    import pandas as pd

    for stage in run.stages:
        names = [column for column in STAGES[stage].columns if f"{stage}.{column}" not in judged]
        found = _values_of(run, stage, names)
        for column, parts in found.items():
            values = pd.concat(parts) if parts else pd.Series(dtype=float)
            if STAGES[stage].columns[column] is not str or values.nunique() < len(values):
                yield _score(values.to_frame(f"{stage}.{column}"), f"{stage}.{column}", [])


def _values_of(run: RunFolder, stage: str, names: Sequence[str]) -> "dict[str, list[pd.Series]]":
    """The values of some columns, by partition; without columns of text that have many."""
    parts: dict[str, list[pd.Series]] = {name: [] for name in names}
    words: dict[str, set[str]] = {name: set() for name in names if STAGES[stage].columns[name] is str}
    for partition in range(run.recipe.shards.partitions):
        table = run.columns(stage, list(parts), partition)
        for name in table:
            values = table[name].dropna()
            if name in words:
                words[name].update(values.unique())
            if len(words.get(name, ())) > MOST_CATEGORIES:
                del parts[name]
            elif len(values):
                parts[name].append(values)
    return parts


def _score(frame: "pd.DataFrame", name: str, rules: "list[tuple[str, Rule]]") -> Score:
    values = frame[name] if name in frame else frame.iloc[:0, 0]
    stage, _, column = name.partition(".")
    number = STAGES[stage].columns[column] in (float, int)
    demands = []
    for rule_name, rule in rules:
        rejected, missing = rejects(frame, rule)
        count = int((rejected & ~missing).sum())
        demands.append(f"{rule_name}: {rule.demand}; rejects {count:,} of {values.count():,}")
    return Score(
        name,
        demands,
        histogram(values, rules) if number else None,
        [] if number else categories(values, rules),
    )


# ---- contact sheets ----


def _sheets(run: RunFolder) -> Iterator[dict[str, Any]]:
    """Kept clips by tier, then dropped ones by rule, then those in error; which ones goes by a hash of the clip_id."""
    decisions = run.decisions
    groups: list[tuple[str, str, list[str]]] = []
    tiers = list(run.recipe.policy.tiers)
    for tier in reversed(tiers):
        of_tier = decisions.index[decisions["tier"] == tier]
        groups.append((f"Kept, tier {tier}", "kept", list(of_tier)))
    dropped = decisions[decisions["verdict"] == "drop"]
    counts = dropped.groupby(["stage", "rule"], observed=True).size().sort_values(ascending=False, kind="stable")
    for stage, rule in list(counts.index)[:_RULES_SHOWN]:
        these = dropped.index[(dropped["stage"] == stage) & (dropped["rule"] == rule)]
        groups.append((f"Dropped by {rule}", "dropped", list(these)))
    groups.append(("In error", "error", list(decisions.index[decisions["verdict"] == "error"])))
    shown = {title: sorted(ids, key=_shuffled)[: _most(kind, len(tiers))] for title, kind, ids in groups}
    stills = _stills(run, [clip_id for ids in shown.values() for clip_id in ids])
    for title, kind, ids in groups:
        if ids:
            cards = [{"id": i, "picture": stills.get(i), **_caption(run, i)} for i in shown[title]]
            yield {"title": title, "kind": kind, "count": len(ids), "cards": cards}


def _most(kind: str, tiers: int) -> int:
    return max(_DROPPED_SHOWN, _KEPT_SHOWN // tiers) if kind == "kept" else _DROPPED_SHOWN


def _shuffled(clip_id: str) -> str:
    return hashlib.sha256(clip_id.encode()).hexdigest()


def _stills(run: RunFolder, clip_ids: list[str]) -> dict[str, str]:
    """A picture of each clip as a data URI, as far as they can be had and there is room for them."""
    stills: dict[str, str] = {}
    room = _MOST_PICTURE_BYTES
    progress = StepProgress("report", len(clip_ids))
    for done, (record, _) in enumerate(run.clips(clip_ids), 1):
        try:
            with run.open(record) as clip:
                picture = still(clip, _STILL_SIDE)
        except Exception as error:  # one clip that cannot be shown is no reason to have no report
            log.warning("%s is not in the report: %s", record.clip_id, error)
        else:
            room -= len(picture)
            if room < 0:
                break
            stills[record.clip_id] = data_uri(picture, "image/webp")
        progress(done, len(clip_ids), 0)
    return stills


def _caption(run: RunFolder, clip_id: str) -> dict[str, str]:
    decision, clip = run.decisions.loc[clip_id], run.frame.loc[clip_id]
    uri = str(clip["clips.uri"])
    reason = ""
    if decision["verdict"] == "drop":
        reason = f"{short(decision['value'])}, wanted {decision['threshold']}"
    elif decision["verdict"] == "error":
        reason = f"{decision['stage']}: {decision['error']}"
    elif decision["audio"] == "unusable":
        reason = f"sound: {decision['audio_rule']} {short(decision['audio_value'])}"
    name = uri.rstrip("/").rsplit("/", 1)[-1]
    return {"uri": uri, "name": name, "time": _clock(clip["clips.start_s"]), "reason": reason}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# ---- composition ----


def _composition(run: RunFolder) -> list[dict[str, Any]]:
    """Framing and scene type of the kept clips beside the paper's shares, all in percent of the clips."""
    kept = run.decisions.index[run.decisions["verdict"] == "keep"]
    if not len(kept) or "people" not in run.stages:
        return []
    told = run.columns("people", ["framing", "scene"]).reindex(kept)
    found = []
    for title, column, paper in (("framing", "framing", _PAPER_FRAMING), ("scene type", "scene", _PAPER_SCENE)):
        if column not in told:
            continue
        counts = told[column].fillna("").value_counts()
        rows: list[tuple[str, int, int | None]] = [(n, int(counts.get(n, 0)), share) for n, share in paper.items()]
        unknown = len(kept) - sum(count for _, count, _ in rows)
        rows += [("not known", unknown, None)] if unknown else []
        lines = [{"name": n, "clips": c, "share": _percent(c, len(kept)), "paper": p} for n, c, p in rows]
        found.append({"title": title, "rows": lines})
    return found


# ---- time ----


def add_times(storage: Storage, curation: "Curation", results: "Mapping[str, StepResult]") -> None:
    """Add the time that a run took to what its folder says of earlier ones, by step and fingerprint.

    The one file in the folder, beside the report that shows it, whose bytes differ from run to run.
    """
    if not results:
        return
    times = read_times(storage)
    for name, result in results.items():
        made = curation.step[name].fingerprint
        known = times.get(name, {})
        before = known if known.get("fingerprint") == made else {"units": 0, "seconds": 0.0}
        times[name] = {
            "fingerprint": made,
            "units": before["units"] + result.done,
            "seconds": round(before["seconds"] + result.seconds, 3),
        }
    storage.write_bytes(TIMES, json.dumps(times, indent=1).encode() + b"\n")


def read_times(storage: Storage) -> dict[str, dict[str, Any]]:
    """What `add_times` has kept; {} where there is no such file, or none of ours."""
    try:
        content = json.loads(storage.read_bytes(TIMES))
        times = {
            str(name): {"fingerprint": str(t["fingerprint"]), "units": int(t["units"]), "seconds": float(t["seconds"])}
            for name, t in content.items()
        }
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return times


def _times(run: RunFolder) -> list[dict[str, Any]]:
    """Time by step, and what a stage's rejections cost: stages that reject much for little time are to come first."""
    times = read_times(run.storage)
    rows = []
    for name, fingerprint in run.steps.items():
        time = times.get(name)
        if time is None or time["fingerprint"] != fingerprint or not time["units"]:
            continue
        measured = dropped = 0
        if name in run.stages:
            measured = int(run.frame[f"{name}.status"].notna().sum())
            dropped = int(((run.decisions["verdict"] == "drop") & (run.decisions["stage"] == name)).sum())
        each = time["seconds"] / time["units"]
        rows.append(
            time
            | {
                "name": name,
                "each": each,
                "rejected": _percent(dropped, measured) if measured else None,
                "cost": each * measured / dropped if dropped else None,
            }
        )
    most = max((row["seconds"] for row in rows), default=0.0) or 1.0
    return [row | {"share": _percent(row["seconds"], most)} for row in rows]
