"""`understudy calibrate`: compares a rule's threshold with a person's judgement of clips near it.

`ask` writes a page on which a person marks clips. `show_calibration` reads the marks and prints which threshold agrees
best with them.
"""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from data_manifests.strict import nearest
from flows.progress import StepProgress
from flows.report.pages import check_writable, data_uri, write_page
from tasks.policy.rules import Rule
from tasks.review.agreement import Agreement, Bound, agreement, best, borderline, candidates
from tasks.review.preview import still, video
from tasks.review.refusal import Refused
from tasks.review.run_folder import RunFolder
from tasks.stages.registry import STAGES

if TYPE_CHECKING:
    import pandas as pd

_SHORT_SIDE = 240  # pixels, of the videos in the page
_MAX_ROWS = 15  # of the printed table; the present threshold and the best one may come on top
_HEAD = "rule,bound,clip_id,mark"  # the first line of a file of marks
_MARKS = {"good": True, "bad": False}


class CalibrationError(Refused):
    """A rule cannot be calibrated, or marks cannot be read. The message says why, and what to do."""


@dataclass(frozen=True)
class _Threshold:
    """One threshold of a rule of a run."""

    name: str
    """The rule's name, as `what-if --set` takes it."""
    rule: Rule
    bound: Bound
    """Which of the rule's thresholds: its min or its max."""

    @property
    def value(self) -> float:
        value = self.rule.min if self.bound == "min" else self.rule.max
        assert value is not None
        return value


def _threshold(run: RunFolder, name: str, bound: str | None) -> _Threshold:
    """Find a threshold by the rule's name. bound: min or max; may be None if the rule has only one of them."""
    rules = {place.partition(".")[2]: rule for place, rule in run.recipe.policy.all_rules() if place[:5] != "tiers"}
    rules |= {place: rule for place, rule in run.recipe.policy.all_rules() if place[:5] == "tiers"}
    if name not in rules:
        raise CalibrationError(f"the recipe {run.recipe.name} has no rule {name!r}{nearest(name, list(rules))}")
    rule = rules[name]
    bounds = [b for b in ("min", "max") if getattr(rule, b) is not None]
    if not bounds:
        raise CalibrationError(f"the rule {name} ({rule.demand}) has no threshold; name a rule with a min or a max")
    if bound is None and len(bounds) > 1:
        raise CalibrationError(f"the rule {name} has two thresholds ({rule.demand}); give --bound min or --bound max")
    if bound is not None and bound not in bounds:
        raise CalibrationError(f"the rule {name} has no {bound}, only a {bounds[0]} ({rule.demand}); leave --bound out")
    return _Threshold(name, rule, cast(Literal["min", "max"], bound or bounds[0]))


def _values(run: RunFolder, rule: Rule) -> "pd.Series":
    """The score of each clip that the rule judges by, by clip_id; NaN where a clip has none."""
    return run.frame[rule.score].astype("Float64").astype(float)


# ---- the page ----


def default_page(rule: str) -> Path:
    """Where the page is written by default: a file in the current folder, whatever characters the rule's name holds."""
    return Path(f"calibrate-{re.sub('[^A-Za-z0-9._-]+', '-', rule)}.html")


def ask(out: str, name: str, bound: str | None, count: int, page: Path) -> int:
    """Write the page on which a person marks clips. Only one clip's video is held in memory at a time.

    out: address of the run. name: of the rule. bound: min or max; may be None if the rule has only one of them. count:
    how many clips to ask about, if there are as many. page: the file to write.

    Returns: how many clips the page has. Raises CalibrationError, or Refused for a run or a file that cannot be used.
    """
    check_writable(page)
    run = RunFolder(out)
    threshold = _threshold(run, name, bound)
    values = _values(run, threshold.rule)
    chosen = borderline(list(values.index), values.to_numpy(), threshold.bound, threshold.value, count)
    if not chosen:
        raise CalibrationError(
            f"{run.address}: no clip has a value of {threshold.rule.score}, by which the rule {name} decides; "
            "choose another rule"
        )
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
    """What the page shows of each clip: clip_id, a still and a video.

    A clip is shown as the stage saw it. A clip of a stage that remakes clips is shown as the stage made it. A crop by a
    later stage is not shown: it would reveal that the clip has passed, and might cut away what is to be judged.
    """
    stages_so_far = run.stages[: run.stages.index(stage) + 1]
    remade = any(STAGES[name].remakes_clip for name in stages_so_far)
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
    """A person's marks on the clips of one page."""

    bound: str
    """The threshold of the rule that the clips lie near: min or max."""
    good: dict[str, bool]
    """Whether the clip is marked good, by clip_id."""


def read_marks(path: Path, rule: str, bound: str | None) -> Marks:
    """Read a file of marks, a CSV with the columns rule, bound, clip_id and mark.

    rule: the rule that the marks must be for. bound: the bound that they must be for; that of the first mark when None.

    Raises CalibrationError, with a line for each fault in the file.
    """
    good: dict[str, bool] = {}
    faults: list[str] = []
    for number, row in _rows_of_marks(path):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if len(cells) != 4 or cells[1] not in ("min", "max") or cells[3] not in _MARKS:
            faults.append(
                f"{path}:{number}: each line must be {_HEAD}, where bound is min or max, and mark good or bad"
            )
            continue
        bound = bound or cells[1]
        if cells[0] != rule or cells[1] != bound:
            faults.append(
                f"{path}:{number}: this mark is for the rule {cells[0]!r} ({cells[1]}), not for {rule!r} ({bound})"
            )
        elif good.setdefault(cells[2], _MARKS[cells[3]]) != _MARKS[cells[3]]:
            faults.append(f"{path}:{number}: {cells[2]} is marked both good and bad; keep one of the two marks")
    if faults:
        more = [f"and {len(faults) - 10} more"] if len(faults) > 10 else []
        raise CalibrationError("\n".join(faults[:10] + more))
    if not good:
        raise CalibrationError(
            f"{path}: there are no marks in this file; mark clips on the page and download them again"
        )
    assert bound is not None
    return Marks(bound, good)


def _rows_of_marks(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a file of marks, after the first, with their numbers. Raises CalibrationError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read: {error}") from None
    try:
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise CalibrationError(f"{path}: cannot be read as CSV: {error}") from None
    if not rows or ",".join(cell.strip() for cell in rows[0]) != _HEAD:
        raise CalibrationError(f"{path}: the first line must be {_HEAD}, as in the file that the page gives")
    return enumerate(rows[1:], 2)


@dataclass(frozen=True)
class Calibration:
    """How well thresholds agree with a person's marks."""

    table: list[Agreement]
    """One row a threshold, in ascending order. `present` and `best` are among them."""
    present: Agreement
    """The threshold of the recipe."""
    best: Agreement
    """The threshold that agrees best."""
    setting: str
    """The best threshold as `what-if --set` takes it."""


def calibrate(run: RunFolder, name: str, marks: Marks) -> Calibration:
    """Compare all thresholds of a rule that make a difference with a person's marks. name: of the rule.

    Raises CalibrationError when the run lacks a marked clip, or no marked clip has a score.
    """
    threshold = _threshold(run, name, marks.bound)
    values = _values(run, threshold.rule)
    unknown = [clip_id for clip_id in marks.good if clip_id not in values.index]
    if unknown:
        more = f", nor {len(unknown) - 1} more of the marked clips" if len(unknown) > 1 else ""
        raise CalibrationError(
            f"{run.address} has no clip {unknown[0]!r}{more}; give the run that the page was made of"
        )
    judged = values[list(marks.good)].dropna()
    if judged.empty:
        raise CalibrationError(
            f"{run.address}: none of the marked clips has a value of {threshold.rule.score}, by which the rule {name} "
            "decides; make a new page and mark its clips"
        )
    good = np.array([marks.good[clip_id] for clip_id in judged.index])
    scores = judged.to_numpy()
    present = agreement(scores, good, threshold.bound, threshold.value)
    others = [agreement(scores, good, threshold.bound, t) for t in candidates(scores) if t != threshold.value]
    table = sorted([present, *others], key=lambda row: row.threshold)
    found = best(table, threshold.value)
    return Calibration(table, present, found, f"{name}.{threshold.bound}={found.threshold:.12g}")


def show_calibration(out: str, name: str, bound: str | None, marks: Path) -> None:
    """Print precision, recall, F1 and kappa for a range of thresholds, and which threshold agrees best.

    out: address of the run. name, bound: as in `ask`. marks: the file that the page gave.
    """
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
        notes = [note for note, other in (("present", found.present), ("best", found.best)) if other is row]
        figures = [_figure(figure) for figure in (row.precision, row.recall, row.f1, row.kappa)]
        cells = [f"{row.threshold:.12g}", str(kept), str(row.clips - kept), *figures, ", ".join(notes)]
        table.add_row(*cells, style="bold" if notes else None)
    console = Console()
    console.print(table)
    console.print("All figures are those of the marked clips, which lie near the threshold.")
    if found.best is not found.present:
        console.print(f"Next: understudy what-if {out} --set {found.setting}", markup=False, highlight=False)
    else:
        console.print("No other threshold agrees better than the present one.")


def _some(found: Calibration) -> list[Agreement]:
    """Rows spread evenly over the table, and those of the present and the best threshold."""
    if len(found.table) <= _MAX_ROWS:
        return found.table
    spread = np.unique(np.linspace(0, len(found.table) - 1, _MAX_ROWS).round().astype(int))
    return [r for i, r in enumerate(found.table) if i in spread or r is found.present or r is found.best]


def _figure(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.2f}"
