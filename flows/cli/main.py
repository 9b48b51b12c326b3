"""The `understudy` command. What a command needs is imported inside it, so that `--help` answers at once."""

import os
import sys
from typing import Annotated

import typer

from flows.cli import curate, dataset, review, train, weights
from flows.cli.exit_codes import FAILED

app = typer.Typer(
    help="From raw footage of people to WebDataset shards, and to avatar models that are trained on them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    """Makes `understudy` a group of commands."""


def _models() -> None:
    typer.echo("error: there is no command `models`; did you mean `understudy weights`?", err=True)
    raise typer.Exit(FAILED)


app.command()(curate.curate)
app.command()(train.train)
app.command()(dataset.verify)
app.command()(dataset.sample)
app.command()(review.funnel)
app.command()(review.what_if)
app.command()(review.calibrate)
app.command()(review.report)
app.command()(review.show)
app.add_typer(weights.app, name="weights")
app.command("models", hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(_models)


def main() -> None:
    try:
        app()
    except BrokenPipeError:
        # the reader of our output went away, as in `understudy ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
