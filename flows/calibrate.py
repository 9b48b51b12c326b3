"""`understudy calibrate`: a person marks clips near a rule's threshold; how far the rule agrees, and where it would."""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from data_manifests.strict import nearest
from flows.pages import check_writable, data_uri, write_page
from flows.progress import StepProgress
from tasks.agreement import Agreement, Bound, agreement, best, borderline, candidates
from tasks.preview import still, video
from tasks.rules import Rule
from tasks.run_folder import Refused, RunFolder
from tasks.stages import STAGES

if TYPE_CHECKING:
    import pandas as pd

_SHORT_SIDE = 240  # pixels, of the videos in the page
_ROWS = 15  # of the printed table, beside the present threshold and the best one
_HEAD = "rule,bound,clip_id,mark"  # of a file of marks
_MARKS = {"good": True, "bad": False}


class CalibrationError(Refused):
    """A rule that cannot be calibrated, or marks that cannot be read; one message that says what to do."""


@dataclass(frozen=True)
class _Threshold:
    """A bound of a rule of a run. name: as `what-if --set` takes it."""

    name: str
    rule: Rule
    bound: Bound

    @property
    def value(self) -> float:
        value = self.rule.min if self.bound == "min" else self.rule.max
        assert value is not None
        return value


def _threshold(run: RunFolder, name: str, bound: str | None) -> _Threshold:
    rules = {place.partition(".")[2]: rule for place, rule in run.recipe.policy.all_rules() if place[:5] != "tiers"}
    rules |= {place: rule for place, rule in run.recipe.policy.all_rules() if place[:5] == "tiers"}
    if name not in rules:
        raise CalibrationError(f"{run.recipe.name} has no rule {name!r}{nearest(name, list(rules))}")
    rule = rules[name]
    bounds = [b for b in ("min", "max") if getattr(rule, b) is not None]
    if not bounds:
        raise CalibrationError(f"{name} is {rule.demand}: it has no threshold that could be moved")
    if bound is None and len(bounds) > 1:
        raise CalibrationError(f"{name} has two thresholds ({rule.demand}); say --bound min or --bound max")
    if bound is not None and bound not in bounds:
        raise CalibrationError(f"{name} has no {bound}, only {bounds[0]} ({rule.demand})")
    return _Threshold(name, rule, cast(Literal["min", "max"], bound or bounds[0]))


def _values(run: RunFolder, rule: Rule) -> "pd.Series":
    return run.frame[rule.score].astype("Float64").astype(float)


# ---- the page ----


def default_page(rule: str) -> Path:
    """Where the page goes when nobody says; whatever a rule is called, it is a file in this folder."""
    return Path(f"calibrate-{re.sub('[^A-Za-z0-9._-]+', '-', rule)}.html")


def ask(out: str, name: str, bound: str | None, count: int, page: Path) -> int:
    """Write the page on which a person marks clips. Returns how many there are. One clip's video is held at a time."""
    check_writable(page)
    run = RunFolder(out)
    threshold = _threshold(run, name, bound)
    values = _values(run, threshold.rule)
    chosen = borderline(list(values.index), values.to_numpy(), threshold.bound, threshold.value, count)
    if not chosen:
        raise CalibrationError(f"no clip of {run.address} has a value of {threshold.rule.score} to judge by")
    write_page(
        page,
        "calibrate.html",
        rule=name,
        bound=threshold.bound,
        score=threshold.rule.score,
        storage_key=f"understudy {run.manifest.recipe.hash} {name} {threshold.bound}",
        count=len(chosen),
        clips=_cards(run, chosen, threshold.rule.stage),
    )
    return len(chosen)


def _cards(run: RunFolder, clip_ids: list[str], stage: str) -> Iterator[dict[str, str]]:
    """The clips as the stage has seen them, or made them: one that was cropped later would tell that it has passed, and
    may have lost what is to be judged."""
    seen = run.stages[: run.stages.index(stage) + 1]
    remade = any(STAGES[name].remakes_clip for name in seen)
    progress = StepProgress("clips", len(clip_ids))
    for done, (record, _) in enumerate(run.clips(clip_ids, remade), 1):
        with run.open(record) as clip:
            yield {
                "id": record.clip_id,
                "poster": data_uri(still(clip, _SHORT_SIDE), "image/webp"),
                "video": data_uri(video(clip, _SHORT_SIDE), "video/mp4"),
            }
        progress(done, len(clip_ids), 0)


# ---- the marks ----


@dataclass(frozen=True)
class Marks:
    """A person's marks. bound: of the rule, near which the clips were drawn. good: by clip_id, whether it is."""

    bound: str
    good: dict[str, bool]


def read_marks(path: Path, rule: str, bound: str | None) -> Marks:
    """The marks on a rule's clips. bound: where the user names one. Raises CalibrationError with a line for each
    fault."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read: {error}") from None
    good: dict[str, bool] = {}
    faults: list[str] = []
    try:
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise CalibrationError(f"{path}: cannot be read as CSV: {error}") from None
    if not rows or ",".join(cell.strip() for cell in rows[0]) != _HEAD:
        raise CalibrationError(f"{path}: its first line is to be {_HEAD}, as the page gives it")
    for number, row in enumerate(rows[1:], 2):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if len(cells) != 4 or cells[1] not in ("min", "max") or cells[3] not in _MARKS:
            faults.append(f"{path}:{number}: a line is {_HEAD}, with min or max, and good or bad")
            continue
        bound = bound or cells[1]
        if cells[0] != rule or cells[1] != bound:
            theirs, ours = f"{cells[0]!r} ({cells[1]})", f"{rule!r} ({bound})"
            faults.append(f"{path}:{number}: this is a mark for {theirs}, not for {ours}")
        elif good.setdefault(cells[2], _MARKS[cells[3]]) != _MARKS[cells[3]]:
            faults.append(f"{path}:{number}: {cells[2]} is marked good and bad")
    if faults:
        more = [f"and {len(faults) - 10} more"] if len(faults) > 10 else []
        raise CalibrationError("\n".join(faults[:10] + more))
    if not good:
        raise CalibrationError(f"{path}: there is no mark in it")
    assert bound is not None
    return Marks(bound, good)


@dataclass(frozen=True)
class Calibration:
    """How thresholds agree with a person's marks.

    table: by threshold, ascending; the present one and the best one are in it. setting: what `--set` takes.
    """

    table: list[Agreement]
    present: Agreement
    best: Agreement
    setting: str


def calibrate(run: RunFolder, name: str, marks: Marks) -> Calibration:
    """Put a range of thresholds of a rule to a person's marks. Raises CalibrationError."""
    threshold = _threshold(run, name, marks.bound)
    values = _values(run, threshold.rule)
    strange = [clip_id for clip_id in marks.good if clip_id not in values.index]
    if strange:
        more = f", nor {len(strange) - 1} more of the marks" if len(strange) > 1 else ""
        raise CalibrationError(f"{run.address} has no clip {strange[0]!r}{more}")
    judged = values[list(marks.good)].dropna()
    if judged.empty:
        raise CalibrationError(f"none of the marked clips has a value of {threshold.rule.score}")
    good = np.array([marks.good[clip_id] for clip_id in judged.index])
    numbers = judged.to_numpy()
    present = agreement(numbers, good, threshold.bound, threshold.value)
    others = [agreement(numbers, good, threshold.bound, t) for t in candidates(numbers) if t != threshold.value]
    table = sorted([present, *others], key=lambda row: row.threshold)
    found = best(table, threshold.value)
    return Calibration(table, present, found, f"{name}.{threshold.bound}={found.threshold:.12g}")


def show_calibration(out: str, name: str, bound: str | None, marks: Path) -> None:
    """Print precision, recall, F1 and kappa for a range of thresholds, and which agrees best."""
    from rich.console import Console
    from rich.table import Table

    found = calibrate(RunFolder(out), name, read_marks(marks, name, bound))
    good = found.present.kept_good + found.present.dropped_good
    table = Table(title=f"{name}: {found.present.clips} clips marked, {good} of them good", title_justify="left")
    for column in ("threshold", "kept", "dropped", "precision", "recall", "F1", "kappa"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in _some(found):
        kept = row.kept_good + row.kept_bad
        notes = [word for word, it in (("present", found.present), ("best", found.best)) if it is row]
        figures = [_figure(figure) for figure in (row.precision, row.recall, row.f1, row.kappa)]
        cells = [f"{row.threshold:.12g}", str(kept), str(row.clips - kept), *figures, ", ".join(notes)]
        table.add_row(*cells, style="bold" if notes else None)
    console = Console()
    console.print(table)
    console.print("Precision and recall are those among the marked clips, which lie near the threshold.")
    if found.best is not found.present:
        console.print(f"Try: understudy what-if {out} --set {found.setting}", markup=False, highlight=False)
    else:
        console.print("No other threshold agrees better than the present one.")


def _some(found: Calibration) -> list[Agreement]:
    """Rows spread over the table, with the present and the best one."""
    if len(found.table) <= _ROWS:
        return found.table
    spread = np.unique(np.linspace(0, len(found.table) - 1, _ROWS).round().astype(int))
    return [r for i, r in enumerate(found.table) if i in spread or r is found.present or r is found.best]


def _figure(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.2f}"
