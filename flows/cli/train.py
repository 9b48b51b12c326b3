"""`understudy train`: shards into a trained model."""

from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import error_console, prepare_prefect, print_error, print_failure, refusals
from flows.cli.exit_codes import DONE, FAILED, INTERRUPTED

if TYPE_CHECKING:
    from rich.console import Console

    from flows.parameters import TrainParameters


def train(
    manifest: Annotated[str, typer.Argument(help="A dataset manifest, such as OUT/dataset.json.")],
    recipe: Annotated[str, typer.Option(help="A recipe's YAML file, or the name of a bundled recipe.")],
    out: Annotated[str, typer.Option(help="The folder for checkpoints, weights, curves and samples.")],
    phases: Annotated[str | None, typer.Option(help="Only these, such as warmup,main; all when left out.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of workers; each takes a GPU where there are any.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, such as auto.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log as well.")] = False,
) -> None:
    """Train a recipe's model on a dataset, phase by phase. Run it again to go on from the latest checkpoint.

    Runs the Prefect flow `train` on the server that PREFECT_API_URL names, or on a temporary one.
    Exit code: 0 done, 2 failed, 130 asked to end (Ctrl-C keeps the present step).
    """
    names = phases.split(",") if phases else None
    with refusals():
        from data_manifests.dataset import load
        from training.config import load_training

        load_training(recipe).chosen(names)
        load(manifest)
    error_console().print("starting Prefect, which takes some seconds ...", style="dim", highlight=False)
    prepare_prefect(verbose)
    from flows.parameters import TrainParameters

    parameters = TrainParameters(manifest=manifest, recipe=recipe, out=out, phases=names, workers=workers, ray=ray)
    raise typer.Exit(run(parameters, error_console(), verbose))


def run(parameters: "TrainParameters", console: "Console", verbose: bool = False) -> int:
    """Run the flow with its progress on a console. Returns the exit code."""
    from flows import train as flow_module
    from flows.progress import shown_on
    from training.loop.phases import phase_weights_folder

    try:
        with shown_on(console):
            results = flow_module.train(parameters)
    except flow_module.Interrupted as interrupted:
        console.print(str(interrupted), markup=False, soft_wrap=True)
        return INTERRUPTED
    except flow_module.USER_ERRORS as error:
        print_error(error, console)
        return FAILED
    except Exception as error:
        print_failure(error, verbose, console)
        return FAILED
    for result in results:
        loss = "" if result.loss is None else f", loss {result.loss:.4f}"
        again = f" (went on from step {result.resumed_at})" if result.resumed_at else ""
        folder = phase_weights_folder(parameters.out.rstrip("/"), result.phase)
        print(f"{result.phase}: {result.step} steps{again}{loss}; {folder}")
    return DONE
