"""The summary of a curation: funnel, errors and work done, in the terminal and in the Prefect UI."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from data_manifests.dataset import DatasetManifest
    from tasks.execution.work import Totals
    from tasks.review.funnel import FunnelLine

_MAX_PROBLEMS = 20  # shown; the others are only counted


class FunnelRow(BaseModel):
    """One line of the funnel."""

    what: str
    """What is counted, in words."""
    count: int
    """Number of manifest rows, sources or clips."""
    hours: float | None
    """Their duration together; None where it is not known."""


class Problem(BaseModel):
    """A manifest row, source or clip that ended in an error. Errors are never counted as dropped."""

    where: str
    """A place in the manifest, an address or a clip_id."""
    reason: str


class Summary(BaseModel):
    """The result of the `curate` flow."""

    out: str
    """Address of the output folder."""
    funnel: list[FunnelRow]
    problems: list[Problem]
    """The first 20 errors."""
    errors: int
    """Number of manifest rows, sources and clips that ended in an error."""
    written: int
    """Number of shards that this run has written."""
    changes: list[str]
    """Lines that say which steps were done anew, and because of which setting or version."""
    new: dict[str, int]
    """Units done in this run, by step."""
    seconds: dict[str, float]
    """Wall time of this run, by step."""
    shards: int
    """Number of shards in the dataset."""
    samples: int
    """Number of samples in the dataset."""
    report: str = ""
    """Address of the report; "" when it could not be written."""


def summarise(
    out: str,
    funnel: Sequence["FunnelLine"],
    problems: Sequence[tuple[str, str]],
    done: "Totals",
    manifest: "DatasetManifest",
    changes: list[str],
    written: int,
    report: str = "",
) -> Summary:
    """Make the summary of a run.

    out: address of the output folder. problems: as tasks.review.funnel.list_problems returns them. done: what this run
    has done, by step. changes: as `Curation.changes` returns them. written: number of shards that this run has written.
    report: address of the report, "" when there is none.
    """
    return Summary(
        out=out,
        funnel=[FunnelRow(what=what, count=count, hours=hours) for what, count, hours in funnel],
        problems=[Problem(where=where, reason=reason) for where, reason in problems[:_MAX_PROBLEMS]],
        errors=len(problems),
        written=written,
        changes=changes,
        new={name: totals.done for name, totals in done.items()},
        seconds={name: round(totals.seconds, 1) for name, totals in done.items()},
        shards=len(manifest.shards),
        samples=sum(shard.samples for shard in manifest.shards),
        report=report,
    )


def funnel_rows(summary: Summary) -> list[dict[str, Any]]:
    """The funnel as rows of a Prefect table artifact."""
    return [{"what": row.what, "count": row.count, "hours": hours_text(row.hours)} for row in summary.funnel]


def summary_markdown(summary: Summary) -> str:
    """The summary as Markdown, for a Prefect artifact."""
    lines = [
        f"**{summary.samples} samples in {summary.shards} shards** in `{summary.out}`",
        "",
        "| | count | hours |",
        "| --- | ---: | ---: |",
        *(f"| {_cell(row.what)} | {row.count} | {hours_text(row.hours)} |" for row in summary.funnel),
        "",
        *([f"Report: `{summary.report}`", ""] if summary.report else []),
        *(f"- {_cell(line)}" for line in summary.changes),
        "",
        "| done in this run | units | seconds |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {count} | {summary.seconds[name]} |" for name, count in summary.new.items()),
    ]
    if summary.problems:
        lines += ["", f"**{summary.errors} errors**, which are not counted as dropped:", ""]
        lines += [f"- {_cell(p.where)}: {_cell(p.reason)}" for p in summary.problems]
        more = summary.errors - len(summary.problems)
        if more:
            lines.append(f"- and {more} more: see `sources.csv` and `clips.parquet`")
    return "\n".join(lines)


def print_funnel(rows: list[FunnelRow]) -> None:
    """Print the funnel as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="funnel", title_justify="left")
    table.add_column("")
    table.add_column("count", justify="right")
    table.add_column("hours", justify="right")
    for row in rows:
        table.add_row(escape(row.what), str(row.count), hours_text(row.hours))
    Console().print(table)


def print_summary(summary: Summary) -> None:
    """Print the summary: the funnel, the errors, the work done, and where the dataset lies."""
    from rich.console import Console

    console = Console()
    print_funnel(summary.funnel)
    for problem in summary.problems:
        console.print(f"error: {problem.where}: {problem.reason}", markup=False, highlight=False, soft_wrap=True)
    if summary.errors > len(summary.problems):
        console.print(f"and {summary.errors - len(summary.problems)} more errors: see sources.csv and clips.parquet")
    new = summary.new | ({"shards": summary.written} if summary.written else {})
    units = {"scenes": "shots of {} sources", "clips": "clips of {} sources"}
    done = ", ".join(units.get(name, f"{{}} {name}").format(count) for name, count in new.items())
    done = done or "nothing; all of it had been done before"
    console.print(f"done in this run: {done}", highlight=False, soft_wrap=True)
    console.print(
        f"{summary.samples} samples in {summary.shards} shards: {summary.out}/dataset.json",
        highlight=False,
        soft_wrap=True,
    )
    report = f"report: {summary.report}" if summary.report else "the report could not be written (-v shows why)"
    console.print(report, markup=False, highlight=False, soft_wrap=True)


def hours_text(hours: float | None) -> str:
    """Hours with three decimals; "" for None."""
    return "" if hours is None else f"{hours:.3f}"


def _cell(text: str) -> str:
    """A text as one line of Markdown. Characters with a meaning there are escaped: names of files may hold them."""
    for mark in "\\`*_|<>[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
