"""`understudy curate`: footage into shards."""

from typing import Annotated

import typer

from flows.cli.console import (
    end_soon_after_interrupt,
    error_console,
    prepare_prefect,
    print_error,
    print_failure,
    refusals,
)
from flows.cli.exit_codes import DONE, DONE_WITH_ERRORS, FAILED


def curate(
    manifest: Annotated[str, typer.Argument(help="A manifest (CSV, JSONL, Parquet) or a folder; local, s3://, ...")],
    recipe: Annotated[str, typer.Option(help="A recipe's YAML file, or the name of a bundled recipe.")],
    out: Annotated[str, typer.Option(help="The folder for ledger, clips and shards; local, s3://, ...")],
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes; one a core when left out.")] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Do again what ended in an error.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log as well.")] = False,
) -> None:
    """Turn footage into WebDataset shards, with every clip accounted for.

    Runs the Prefect flow `curate` on the server that PREFECT_API_URL names, or on a temporary one.
    Exit code: 0 done, 1 done but some sources or clips ended in errors, 2 failed.
    """
    _refuse_early(manifest, recipe)
    console = error_console()
    console.print("starting Prefect, which takes some seconds ...", style="dim", highlight=False)
    prepare_prefect(verbose)
    from flows import curate as flow_module
    from flows.parameters import CurateParameters
    from flows.progress import shown_on
    from flows.summary import print_summary

    parameters = CurateParameters(manifest=manifest, recipe=recipe, out=out, workers=workers, retry_errors=retry_errors)
    end_soon_after_interrupt()
    try:
        with shown_on(console):
            summary = flow_module.curate(parameters)
    except flow_module.USER_ERRORS as error:
        print_error(error)
        raise typer.Exit(FAILED) from None
    except Exception as error:
        print_failure(error, verbose)
        raise typer.Exit(FAILED) from None
    print_summary(summary)
    raise typer.Exit(DONE_WITH_ERRORS if summary.errors else DONE)


def _refuse_early(manifest: str, recipe: str) -> None:
    """Say at once what is wrong with a recipe or a manifest, before the seconds that Prefect takes to start."""
    with refusals():
        from data_manifests.sources import read_sources
        from tasks.execution.footage import no_footage
        from tasks.recipe import load_recipe
        from tasks.weights.store import require
        from training.config import check_training

        require(load_recipe(recipe).networks())
        check_training(recipe)
        if next(read_sources(manifest), None) is None:
            raise no_footage(manifest)
