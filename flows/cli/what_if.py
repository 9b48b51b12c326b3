"""`understudy funnel` and `understudy what-if`: a finished run's funnel, alone or beside that of another policy."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.report.pages import check_writable, short
from flows.summary import FunnelRow, hours_text, print_funnel
from tasks.recipe import load_recipe
from tasks.review.run_folder import RunFolder
from tasks.review.what_if import MEASURED_BY, FunnelChange, WhatIf, compare, with_changes

_SHOWN_FLIPS = 25  # the others are only counted


def show_funnel(out: str, as_json: bool) -> None:
    """Print the funnel of a finished run. as_json: as JSON, and not as a table."""
    run = RunFolder(out)
    rows = [FunnelRow(what=what, count=count, hours=hours) for what, count, hours in run.funnel()]
    if as_json:
        print(json.dumps({"out": run.address, "funnel": [row.model_dump() for row in rows]}, indent=1))
    else:
        print_funnel(rows)


def show_what_if(out: str, changes: Sequence[str], recipe: str | None, table: Path | None) -> None:
    """Print both funnels of a run, and the clips that flip.

    changes: as `with_changes` takes them. recipe: its policy replaces the run's. table: a CSV file for all flips.
    """
    if table is not None:
        check_writable(table)
    run = RunFolder(out)
    wanted = load_recipe(recipe) if recipe else run.recipe
    found = compare(run, with_changes(wanted, changes) if changes else wanted)
    _print_funnels(found.funnel)
    _print_flips(found)
    if table is not None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(found.flips.columns)
        writer.writerows(found.flips.itertuples(index=False))
        table.write_bytes(text.getvalue().encode("utf-8", "surrogateescape"))
        print(f"{len(found.flips)} clips that flip: {table}")


def _print_funnels(lines: list[FunnelChange]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="funnel, before -> after", title_justify="left")
    table.add_column("")
    table.add_column("clips", justify="right")
    table.add_column("hours", justify="right")
    for line in lines:
        (clips, clips_after), (hours, hours_after) = line.clips, line.hours
        if clips == clips_after:
            table.add_row(escape(line.label), str(clips), hours_text(hours))
        else:
            clips_text = f"{clips} -> {clips_after} ({clips_after - clips:+d})"
            change = f"{hours_text(hours)} -> {hours_text(hours_after)}"
            table.add_row(escape(line.label), clips_text, change, style="bold")
    Console().print(table)


def _print_flips(found: WhatIf) -> None:
    from rich.console import Console

    console = Console()
    flips = found.flips
    if not len(flips):
        console.print("no clip flips: each keeps its verdict, its tier and the use of its sound")
    if found.other_reasons:
        console.print(f"{found.other_reasons} clips come to the same for another reason")
    if not len(flips):
        return
    counts = flips.groupby(["before", "after"], sort=True).size()
    for (before, after), count in counts.items():
        console.print(f"{count} clips: {before} -> {after}", markup=False, highlight=False, soft_wrap=True)
    waiting = int(flips["after"].str.startswith(MEASURED_BY).sum())
    if waiting:
        note = (
            f"{waiting} of these clips would have to be measured first. Only `understudy curate` shows whether they "
            "are kept, and which clips they push out of a tier that has a limit of hours"
        )
        console.print(note, highlight=False, soft_wrap=True)
    for line in map(_flip, flips.head(_SHOWN_FLIPS).to_dict("records")):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if len(flips) > _SHOWN_FLIPS:
        console.print(f"and {len(flips) - _SHOWN_FLIPS} more: --table FILE.csv writes all of them")


def _flip(row: dict[str, Any]) -> str:
    """A flip in one line."""
    why = f" ({row['rule']}: {short(row['value'])}, wanted {row['threshold']})" if row["rule"] else ""
    name = str(row["uri"]).rsplit("/", 1)[-1]
    return f"  {row['clip_id']}  {name} at {row['start_s']:.2f} s: {row['before']} -> {row['after']}{why}"
