"""What came of a curation: the funnel in the terminal and in the Prefect UI."""

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from data_manifests.dataset import DatasetManifest
    from tasks.outcome import Outcome
    from tasks.work import StepResult

_SHOWN_PROBLEMS = 20


class FunnelRow(BaseModel):
    """One line of the funnel. count: sources or clips. hours: their length, where it is known."""

    what: str
    count: int
    hours: float | None


class Problem(BaseModel):
    """A manifest row, source or clip that ended in an error; never counted as dropped."""

    where: str
    reason: str


class Summary(BaseModel):
    """The result of the `curate` flow. errors: manifest rows, sources and clips that ended in one."""

    out: str
    funnel: list[FunnelRow]
    problems: list[Problem]
    errors: int
    written: int  # shards, in this run
    changes: list[str]  # what had to be made anew, and because of which setting
    new: dict[str, int]  # units done in this run, by step
    seconds: dict[str, float]  # by step
    shards: int
    samples: int
    report: str = ""  # the report's address; "" when it could not be written


def summarise(
    outcome: "Outcome",
    results: "dict[str, StepResult]",
    manifest: "DatasetManifest",
    changes: list[str],
    written: int,
    report: str = "",
) -> Summary:
    """Gather what a run found and did."""
    problems = [Problem(where=where, reason=reason) for where, reason in outcome.problems()]
    return Summary(
        out=outcome.curation.storage.address,
        funnel=[FunnelRow(what=what, count=count, hours=hours) for what, count, hours in outcome.funnel()],
        problems=problems[:_SHOWN_PROBLEMS],
        errors=len(problems),
        written=written,
        changes=changes,
        new={name: result.done for name, result in results.items()},
        seconds={name: round(result.seconds, 1) for name, result in results.items()},
        shards=len(manifest.shards),
        samples=sum(shard.samples for shard in manifest.shards),
        report=report,
    )


def funnel_rows(summary: Summary) -> list[dict[str, Any]]:
    """The funnel as a Prefect table artifact takes it."""
    return [{"what": row.what, "count": row.count, "hours": hours_text(row.hours)} for row in summary.funnel]


def to_markdown(summary: Summary) -> str:
    """The summary as a Prefect artifact shows it."""
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
        lines += ["", f"**{summary.errors} errors**, never counted as dropped:", ""]
        lines += [f"- {_cell(p.where)}: {_cell(p.reason)}" for p in summary.problems]
        more = summary.errors - len(summary.problems)
        if more:
            lines.append(f"- and {more} more: see `sources.csv` and `clips.parquet`")
    return "\n".join(lines)


def print_funnel(rows: list[FunnelRow]) -> None:
    """The funnel in the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="what came of it", title_justify="left")
    table.add_column("")
    table.add_column("count", justify="right")
    table.add_column("hours", justify="right")
    for row in rows:
        table.add_row(escape(row.what), str(row.count), hours_text(row.hours))
    Console().print(table)


def print_summary(summary: Summary) -> None:
    """The closing funnel in the terminal."""
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
    done = done or "nothing: no row was missing"
    console.print(f"done in this run: {done}", highlight=False, soft_wrap=True)
    console.print(
        f"{summary.samples} samples in {summary.shards} shards: {summary.out}/dataset.json",
        highlight=False,
        soft_wrap=True,
    )
    report = f"report: {summary.report}" if summary.report else "no report could be written (-v shows why)"
    console.print(report, markup=False, highlight=False, soft_wrap=True)


def hours_text(hours: float | None) -> str:
    """Hours to the thousandth; "" where they are not known."""
    return "" if hours is None else f"{hours:.3f}"


def _cell(text: str) -> str:
    """File names hold anything; a table or a list in Markdown does not."""
    for mark in "\\`*_|<>[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
