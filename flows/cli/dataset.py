"""`understudy verify` and `understudy sample`: check a dataset, and make footage or puppets to try things on."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import error_console, print_error, refusals
from flows.cli.exit_codes import DONE, DONE_WITH_ERRORS, FAILED


def verify(
    manifest: Annotated[str, typer.Argument(help="A dataset manifest, such as OUT/dataset.json, or its folder.")],
    quick: Annotated[bool, typer.Option("--quick", help="Checksums and counts only; do not open samples.")] = False,
) -> None:
    """Check a dataset: every shard's checksum, count and hours, every sample's files.

    Exit code: 0 all sound, 1 on any fault, 2 where there is no dataset.
    """
    from data_manifests.dataset import verify as verify_dataset

    named = manifest if manifest.endswith(".json") else f"{manifest.rstrip('/')}/dataset.json"
    with refusals():
        report = verify_dataset(named, deep=not quick)
    for fault in report.faults:
        typer.echo(fault, err=True)
    typer.echo(str(report))
    raise typer.Exit(DONE_WITH_ERRORS if report.faults else DONE)


def sample(
    folder: Annotated[Path, typer.Argument(help="Where to write the files and truth.csv.")],
    group: Annotated[
        list[str] | None, typer.Option(help="Only these groups (demo, talk, cuts, timing, broken, faults).")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these files.")] = None,
    puppets: Annotated[
        int | None, typer.Option(min=1, help="Shards of so many puppets to train on, in place of footage.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the puppets.")] = 0,
) -> None:
    """Make footage of talking people with known truth: cuts, flashes with beeps, faults, awkward and broken files."""
    from flows.progress import StepProgress, shown_on
    from tasks.synthetic import make

    console = error_console()
    try:
        with shown_on(console):
            progress = StepProgress("sample")
            if puppets is not None:
                from tasks.synthetic.puppet_shards import make_puppets

                make_puppets(folder, puppets, seed, progress=lambda done, total: progress(done, total, 0))
                typer.echo(f"{puppets} puppets in {folder / 'dataset.json'}")
                return
            made = make(folder, names=only, groups=group, progress=lambda _name, done, total: progress(done, total, 0))
    except (ValueError, OSError) as error:
        print_error(error, console)
        raise typer.Exit(FAILED) from None
    typer.echo(f"{len(made)} files and their truth.csv in {folder}")
