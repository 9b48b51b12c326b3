"""The commands that look at a finished run: funnel, what-if, calibrate, report, show."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import error_console, refusals

Out = Annotated[str, typer.Argument(help="The output folder of a finished `understudy curate`; local, s3://, ...")]


def funnel(
    out: Out,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how many clips and hours came through each stage of a finished run, and why the others did not."""
    with refusals():
        from flows.cli.what_if import show_funnel

        show_funnel(out, as_json)


def what_if(
    out: Out,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="WHERE=VALUE",
            help="A change of the policy: RULE.FIELD=VALUE (not_static.max=0.6), RULE=off, STAGE.COLUMN.FIELD=VALUE, "
            "tiers.TIER.hours=50, on_unusable=drop. May be given several times.",
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Take the policy of this recipe instead of the run's.")] = None,
    table: Annotated[Path | None, typer.Option(help="Write all clips that flip into this CSV file.")] = None,
) -> None:
    """Show what another policy would make of a finished run, and which clips would flip. Changes nothing."""
    with refusals():
        from flows.cli.what_if import show_what_if

        if not set_ and not recipe:
            raise typer.BadParameter("give --set or --recipe: there is no change to try")
        show_what_if(out, set_ or [], recipe, table)


def calibrate(
    out: Out,
    rule: Annotated[str, typer.Option(help="A rule of the recipe with a min or a max.")],
    bound: Annotated[str | None, typer.Option(help="min or max, where the rule has both.")] = None,
    clips: Annotated[int, typer.Option(min=2, max=500, help="How many clips to ask about.")] = 40,
    page: Annotated[
        Path | None, typer.Option(help="Where to write the page; calibrate-RULE.html when left out.")
    ] = None,
    marks: Annotated[
        Path | None, typer.Option(help="Marks from the page: show what they say of the threshold.")
    ] = None,
) -> None:
    """Have a person judge clips near a rule's threshold. Then show which threshold agrees best.

    The first call, without --marks, makes a page to mark clips on. The second takes the file that the page gives.
    """
    with refusals():
        from flows.cli import calibrate as calibration

        if marks is not None:
            calibration.show_calibration(out, rule, bound, marks)
            return
        page = page or calibration.default_page(rule)
        from flows.progress import shown_on

        with shown_on(error_console()):
            count = calibration.ask(out, rule, bound, clips, page)
        typer.echo(f"{count} clips to mark in {page}; then: understudy calibrate {out} --rule {rule} --marks FILE")


def report(
    out: Out,
    to: Annotated[Path | None, typer.Option(help="The file to write; OUT/report.html when left out.")] = None,
) -> None:
    """Write the report of a finished run, one HTML file: funnel, scores, images of clips, errors and times."""
    with refusals():
        from flows.progress import shown_on
        from flows.report.pages import check_writable
        from flows.report.report import write_report
        from tasks.review.run_folder import RunFolder

        if to is not None:
            check_writable(to)
        with shown_on(error_console()):
            written = write_report(RunFolder(out), to)
        typer.echo(written)


def show(
    out: Out,
    clip: Annotated[str, typer.Argument(help="A clip_id, or the beginning of one.")],
    to: Annotated[Path | None, typer.Option(help="The file to write, .mp4 or .png; CLIP.mp4 when left out.")] = None,
) -> None:
    """Draw what was found in a clip: key points, flow, waveform, lip curve and scores, as a video or an image."""
    with refusals():
        from flows.cli.show import show_clip_of

        typer.echo(show_clip_of(out, clip, to))
