"""The `understudy` command. What a command needs is imported inside it, so that `--help` answers at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows import models

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="From raw footage of people to WebDataset shards that avatar models train on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(models.app, name="models")

DONE, DONE_WITH_ERRORS, FAILED, INTERRUPTED = 0, 1, 2, 130
_GRACE_S = 5.0


Out = Annotated[str, typer.Argument(help="The output folder of a finished `understudy curate`; local, s3://, ...")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"understudy {version('understudy')}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Keeps `understudy COMMAND` a group, however many commands there are."""


@app.command()
def curate(
    manifest: Annotated[str, typer.Argument(help="A manifest (CSV, JSONL, Parquet) or a folder; local, s3://, ...")],
    recipe: Annotated[str, typer.Option(help="A recipe's YAML file, or the name of one that comes along.")],
    out: Annotated[str, typer.Option(help="The folder for ledger, clips and shards; local, s3://, ...")],
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes; all cores when left out.")] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Try again what ended in an error.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log as well.")] = False,
) -> None:
    """Turn footage into WebDataset shards, with every clip accounted for.

    Runs the Prefect flow `curate` on the server that PREFECT_API_URL names, or on a temporary one.
    Exit code: 0 done, 1 done but some sources or clips ended in errors, 2 failed.
    """
    from rich.console import Console

    console = Console(stderr=True)
    _refuse_early(console, manifest, recipe)
    console.print("starting ...", style="dim")
    _prepare_prefect(verbose)
    from flows import curate as flow_module
    from flows.progress import in_terminal
    from flows.summary import print_summary

    parameters = flow_module.CurateParameters(
        manifest=manifest, recipe=recipe, out=out, workers=workers, retry_errors=retry_errors
    )
    _end_soon_after_interrupt()
    try:
        with in_terminal(console):
            summary = flow_module.curate(parameters)
    except flow_module.USER_ERRORS as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED) from None
    except Exception as error:
        if verbose:
            console.print_exception()
        hint = "" if verbose else " (-v shows where)"
        console.print(f"failed: {type(error).__name__}: {error}{hint}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED) from None
    print_summary(summary)
    raise typer.Exit(DONE_WITH_ERRORS if summary.errors else DONE)


@app.command()
def train(
    manifest: Annotated[str, typer.Argument(help="A dataset manifest, such as OUT/dataset.json.")],
    recipe: Annotated[str, typer.Option(help="A recipe's YAML file, or the name of one that comes along.")],
    out: Annotated[str, typer.Option(help="The folder for checkpoints, weights, curves and samples.")],
    phases: Annotated[str | None, typer.Option(help="Only these, such as warmup,main; all when left out.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="How many, each with a GPU where there are any.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, such as auto.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log as well.")] = False,
) -> None:
    """Train a recipe's model on a dataset, phase by phase; again, to go on from the latest checkpoint.

    Runs the Prefect flow `train` on the server that PREFECT_API_URL names, or on a temporary one.
    Exit code: 0 done, 2 failed, 130 asked to end (Ctrl-C keeps the present step).
    """
    from rich.console import Console

    from data_manifests.dataset import load
    from data_manifests.sources import ManifestError
    from data_manifests.strict import RecipeError
    from training.config import load_training

    console = Console(stderr=True)
    names = phases.split(",") if phases else None
    try:
        load_training(recipe).chosen(names)
        load(manifest)
    except (RecipeError, ManifestError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED) from None
    console.print("starting ...", style="dim")
    _prepare_prefect(verbose)
    from flows.train import TrainParameters, run

    parameters = TrainParameters(manifest=manifest, recipe=recipe, out=out, phases=names, workers=workers, ray=ray)
    raise typer.Exit(run(parameters, console, verbose))


@app.command()
def verify(
    manifest: Annotated[str, typer.Argument(help="A dataset manifest, such as OUT/dataset.json, or its folder.")],
    quick: Annotated[bool, typer.Option("--quick", help="Checksums and counts only; do not open samples.")] = False,
) -> None:
    """Check a dataset: every shard's checksum, count and hours, every sample's files.

    Exit code: 0 all sound, 1 on any fault, 2 where there is no dataset.
    """
    from data_manifests.dataset import NoDataset
    from data_manifests.dataset import verify as verify_dataset

    named = manifest if manifest.endswith(".json") else f"{manifest.rstrip('/')}/dataset.json"
    try:
        report = verify_dataset(named, deep=not quick)
    except NoDataset as error:
        _errors().print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED) from None
    for fault in report.faults:
        typer.echo(fault, err=True)
    typer.echo(str(report))
    raise typer.Exit(DONE_WITH_ERRORS if report.faults else DONE)


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(help="Where to write the files and truth.csv.")],
    group: Annotated[
        list[str] | None, typer.Option(help="Only these groups (demo, talk, cuts, timing, broken, faults).")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these files.")] = None,
    puppets: Annotated[
        int | None, typer.Option(min=1, help="Shards of so many puppets to train on, in place of footage.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the puppets; another seed, other puppets.")] = 0,
) -> None:
    """Make footage of talking people with known truth: cuts, flashes with beeps, faults, awkward and broken files."""
    from rich.console import Console

    from flows.progress import StepProgress, in_terminal
    from tests.world import make

    console = Console(stderr=True)
    try:
        with in_terminal(console):
            bar = StepProgress("sample")
            if puppets is not None:
                from tests.world.puppet_shards import make_puppets

                make_puppets(folder, puppets, seed, progress=lambda done, total: bar(done, total, 0))
                typer.echo(f"{puppets} puppets in {folder / 'dataset.json'}")
                return
            made = make(folder, names=only, groups=group, progress=lambda _name, done, total: bar(done, total, 0))
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED) from None
    typer.echo(f"{len(made)} files and their truth.csv in {folder}")


@app.command()
def funnel(
    out: Out,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how many clips and hours came through each stage of a finished run, and why the others did not."""
    with _refusals():
        from flows.what_if import show_funnel

        show_funnel(out, as_json)


@app.command()
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
    with _refusals():
        from flows.what_if import show_what_if

        if not set_ and not recipe:
            raise typer.BadParameter("what if what? give --set or --recipe")
        show_what_if(out, set_ or [], recipe, table)


@app.command()
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
    """Have a person judge clips near a rule's threshold; then show which threshold agrees best.

    First without --marks, which makes a page to mark clips on; then with the file that the page gives.
    """
    with _refusals():
        from flows import calibrate as calibration

        if marks is not None:
            calibration.show_calibration(out, rule, bound, marks)
            return
        page = page or calibration.default_page(rule)
        from flows.progress import in_terminal

        with in_terminal(_errors()):
            count = calibration.ask(out, rule, bound, clips, page)
        typer.echo(f"{count} clips to mark in {page}; then: understudy calibrate {out} --rule {rule} --marks FILE")


@app.command()
def report(
    out: Out,
    to: Annotated[Path | None, typer.Option(help="The file to write; OUT/report.html when left out.")] = None,
) -> None:
    """Write the report of a finished run, one HTML file: funnel, scores, pictures of clips, errors and times."""
    with _refusals():
        from flows.progress import in_terminal
        from flows.report import write_report

        with in_terminal(_errors()):
            written = write_report(out, to)
        typer.echo(written)


@app.command()
def show(
    out: Out,
    clip: Annotated[str, typer.Argument(help="A clip_id, or the beginning of one.")],
    to: Annotated[Path | None, typer.Option(help="The file to write, .mp4 or .png; CLIP.mp4 when left out.")] = None,
) -> None:
    """Draw what was found in a clip: key points, flow, waveform, lip curve and scores in one film or picture."""
    with _refusals():
        from flows.show import show_clip_of

        typer.echo(show_clip_of(out, clip, to))


def _errors() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """End with one message and no traceback on what the user can mend."""
    from data_manifests.strict import RecipeError
    from tasks.ledger import LedgerError
    from tasks.run_folder import Refused

    try:
        yield
    except BrokenPipeError:
        raise  # for main
    except (Refused, RecipeError, LedgerError, OSError) as error:
        _errors().print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED) from None


def _refuse_early(console: "Console", manifest: str, recipe: str) -> None:
    """Say at once what is wrong with a recipe or a manifest, not after the seconds that Prefect takes to start."""
    from data_manifests.sources import ManifestError, read_sources
    from data_manifests.strict import RecipeError
    from tasks.recipe import load_recipe
    from tasks.stage import MissingBackend
    from tasks.weights import require

    try:
        require(load_recipe(recipe).networks())
        next(read_sources(manifest), None)
    except (RecipeError, ManifestError, MissingBackend) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED) from None


def _end_soon_after_interrupt() -> None:
    """On Ctrl-C keep what is done, and end within seconds; a second one ends at once.

    The terminal interrupts Prefect's temporary server as well, and Prefect's client would ask it in vain for a minute.
    Whatever moment this ends at, a rerun goes on from the last row that was kept.
    """

    def end() -> None:
        os.write(2, b"\ninterrupted; run the same command again to go on from here\n")
        os._exit(INTERRUPTED)

    def interrupt(_signal: int, _frame: object) -> None:
        if timer.is_alive():
            end()
        timer.start()
        raise KeyboardInterrupt

    timer = threading.Timer(_GRACE_S, end)
    timer.daemon = True
    signal.signal(signal.SIGINT, interrupt)


def _prepare_prefect(verbose: bool) -> None:
    """Settings that must stand before Prefect is imported; what the user has set already stays."""
    defaults = {
        # a temporary server on a busy machine has taken half a minute to start
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # what a user can mend is said once, by us, and without a traceback
        "PREFECT_LOGGING_LEVEL": "INFO" if verbose else "CRITICAL",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "tasks,training",
        # what threads of the loader say belongs to no run that Prefect would know of
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def main() -> None:
    try:
        app()
    except BrokenPipeError:
        # the reader of our output went away, as in `understudy ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
