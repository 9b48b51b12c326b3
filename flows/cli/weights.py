"""`understudy weights`: list, check and fetch the published weights that backends need."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import print_error
from flows.cli.exit_codes import DONE, FAILED

if TYPE_CHECKING:
    from rich.console import Console

    from tasks.weights.pull import PullProgress

app = typer.Typer(help="List, check and fetch the published weights that backends need.", no_args_is_help=True)

_WIDE = 1000  # columns of a table that goes into a file or a pipe, so that its lines are not broken


@app.command("list")
def list_() -> None:
    """List all published weights: which backends use them, their files, size and licence, and whether they are here."""
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    from tasks.weights.catalogue import CATALOGUE
    from tasks.weights.store import missing, weights_folder

    columns = ("network", "serves", "files", "size", "licence", "weights", "where")
    table = Table(*(Column(column, overflow="fold") for column in columns), box=box.SIMPLE, show_edge=False)
    users = _users()
    for name, entry in CATALOGUE.items():
        folder = weights_folder() / name
        lacking = missing(entry, folder)
        state = "present" if not lacking else "incomplete" if len(lacking) < len(entry.files) else "missing"
        serves = ", ".join(users.get(name, [entry.serves or "-"]))
        files = ", ".join(file.replace("|", " or ") for file in entry.files)
        where = str(folder) if state != "missing" else ", ".join(entry.sources.values())
        table.add_row(name, serves, files, _gigabytes(entry.gigabytes), entry.licence, state, where)
    console = Console()
    if not console.is_terminal:
        console.width = _WIDE
    console.print(table, markup=False, highlight=False)
    console.print(
        f"weights folder: {weights_folder()} (set UNDERSTUDY_WEIGHTS to use another)", markup=False, highlight=False
    )


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Networks; all that are here when left out.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Check all networks that this recipe needs.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Keys and shapes only; do not read whole files.")] = False,
) -> None:
    """Check that weights are here, that they have the keys and shapes that their network takes, and that their bytes
    have not changed.

    Exit code: 0 all fit, 2 some are missing or do not fit.
    """
    from tasks.weights import store as weights
    from tasks.weights.missing import MissingBackend

    failed = False
    chosen = _chosen(names, recipe)
    for name in chosen:
        try:
            weights.check(name)
            faults = [] if quick else weights.verify(name)
            size = sum(path.stat().st_size for path in weights.files(name)) / 1e9
            state = "fits" if weights.published(name).expected_shapes else "is here; its own library reads it"
            about = f"{state}, {_gigabytes(size)}" + ("" if quick else f", {weights.digest(name)}")
        except MissingBackend as error:
            faults = [str(error)]
        failed = failed or bool(faults)
        typer.echo("\n".join(f"{name}: {fault}" for fault in faults) or f"{name}: {about}", err=bool(faults))
    if not chosen:
        typer.echo("nothing to check: " + ("the recipe needs no weights" if recipe else "no weights are here"))
    raise typer.Exit(FAILED if failed else DONE)


@app.command()
def pull(
    names: Annotated[list[str], typer.Argument(help="Networks, by the names that `understudy weights list` shows.")],
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="ADDRESS", help="A file, a zip or a folder: local, https://, hf://, s3://, ..."),
    ] = None,
) -> None:
    """Fetch published weights into the weights folder.

    An interrupted download goes on where it stopped. Weights that do not fit are not kept.

    Exit code: 0 all are here and fit, 2 some do not.
    """
    from rich.console import Console

    from tasks.weights.missing import MissingBackend
    from tasks.weights.pull import PullError
    from tasks.weights.pull import pull as pull_weights
    from tasks.weights.store import published

    if source is not None and len(names) > 1:
        raise typer.BadParameter("--from is the address of one network's weights; name only that network")
    console = Console(stderr=True)
    failed = False
    for name in _chosen(names, None):
        try:
            entry = published(name)
            if entry.notice:
                console.print(f"{name}: {entry.licence}: {entry.notice}", style="yellow", markup=False, soft_wrap=True)
            with _bars(console) as progress:
                folder = pull_weights(name, source, progress)
            typer.echo(f"{name}: in {folder}")
        except (PullError, MissingBackend) as error:
            failed = True
            print_error(error, console)
    raise typer.Exit(FAILED if failed else DONE)


def _users() -> dict[str, list[str]]:
    """The backends that use each network, as "stage: backend"."""
    from tasks.stages.registry import STAGES

    users: dict[str, list[str]] = {}
    for stage in STAGES.values():
        for backends in stage.backends.values():
            for backend_name, backend in backends.items():
                for name in backend.networks:
                    users.setdefault(name, []).append(f"{stage.name}: {backend_name}")
    return users


def _chosen(names: Sequence[str] | None, recipe: str | None) -> list[str]:
    """The networks to work on: those named and those that a recipe needs.

    Without names and recipe, these are all networks whose weights are here, at least in part.

    Ends the command when a name is unknown or the recipe cannot be read.
    """
    from data_manifests.strict import RecipeError, nearest
    from tasks.recipe import load_recipe
    from tasks.weights.catalogue import CATALOGUE
    from tasks.weights.store import missing, weights_folder

    for name in names or ():
        if name not in CATALOGUE:
            typer.echo(f"error: unknown network {name!r}{nearest(name, list(CATALOGUE))}", err=True)
            raise typer.Exit(FAILED)
    try:
        needed = load_recipe(recipe).networks() if recipe else ()
    except RecipeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(FAILED) from None
    if not names and recipe is None:
        return [n for n, entry in CATALOGUE.items() if len(missing(entry, weights_folder() / n)) < len(entry.files)]
    return list(dict.fromkeys((*(names or ()), *needed)))


def _gigabytes(size: float) -> str:
    return f"{size:.2f} GB" if size < 10 else f"{size:.1f} GB"


@contextlib.contextmanager
def _bars(console: "Console") -> Iterator["PullProgress"]:
    """Show a progress bar for each file that is fetched. Yields the function to call with its progress."""
    from rich import progress
    from rich.markup import escape

    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn())
    with progress.Progress(
        *columns, progress.TransferSpeedColumn(), progress.TimeRemainingColumn(), console=console
    ) as bars:
        tasks: dict[str, progress.TaskID] = {}

        def show(file: str, done: int, total: int) -> None:
            if file not in tasks:
                tasks[file] = bars.add_task(escape(file), total=total or None)
            bars.update(tasks[file], completed=done)

        yield show
