"""The `train` flow: WebDataset shards in, checkpoints out, one task a phase."""

import base64
import contextlib
import contextvars
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, Field

from data_manifests.dataset import load
from data_manifests.sources import ManifestError
from data_manifests.storage import Storage
from data_manifests.strict import RecipeError
from flows.curves import loss_curve
from flows.leftovers import end_server_with_us
from flows.progress import StepProgress
from tasks.exclusive import OutputError
from tasks.stage import MissingBackend
from training.buckets import LoaderError
from training.checkpoint import CheckpointError
from training.config import load_training
from training.job import Job, Outcome, TrainingError
from training.launch import launch
from training.learner import ActiveMindLearner
from training.loader import tiers_within
from training.phases import PhaseError, weights_folder
from training.previews import lip_probe
from training.sample_reader import check_words
from training.tracking import METRICS, check_mlflow, read_metrics

if TYPE_CHECKING:
    from rich.console import Console

# What a user can mend: shown as one message, without a traceback.
USER_ERRORS = (
    ManifestError,
    RecipeError,
    MissingBackend,
    OutputError,
    LoaderError,
    TrainingError,
    PhaseError,
    CheckpointError,
)
DONE, FAILED, INTERRUPTED = 0, 2, 130

_LOOK_EVERY_S, _ASK_EVERY_S = 1.0, 10.0  # into a folder, and a store, which takes money for each answer
_LAST_ROWS = 8192  # bytes of the metrics that hold the last step's row for certain
_SHOWN_WIDTH = 1600  # pixels of a picture of samples in the UI


class Interrupted(RuntimeError):
    """A training that was asked to end, and kept its last step."""


class TrainParameters(BaseModel):
    """What to train, on what, and where to put it."""

    manifest: str = Field(
        title="Dataset",
        description="Address of a dataset manifest, such as OUT/dataset.json of a curation: an absolute path on the "
        "worker's machine, s3://bucket/key, or any fsspec address.",
        json_schema_extra={"position": 1},
    )
    recipe: str = Field(
        "active_mind",
        title="Recipe",
        description="Name of a recipe that comes along or the path of a YAML file; its `training` section counts.",
        json_schema_extra={"position": 2},
    )
    out: str = Field(
        title="Output folder",
        description="Where checkpoints, weights, curves and samples are kept: an absolute path that all workers see, "
        "s3://bucket/folder, or any fsspec address. Give the same again to go on from the latest checkpoint.",
        json_schema_extra={"position": 3},
    )
    phases: list[str] | None = Field(
        None,
        title="Phases",
        description="Which phases to train; all of the recipe's when left empty. A phase starts from the weights that "
        "earlier phases have left in the output folder.",
        json_schema_extra={"position": 4},
    )
    workers: int = Field(
        1, ge=1, title="Workers", description="How many, each with a GPU where there are any.",
        json_schema_extra={"position": 5},
    )  # fmt: skip
    ray: str | None = Field(
        None,
        title="Ray",
        description="Address of a Ray cluster, such as auto or ray://host:10001. Without it, one worker trains in the "
        "flow's own process, and several on a Ray of their own on this machine.",
        json_schema_extra={"position": 6},
    )


@task(task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def train_phase(name: str, job: Job, workers: int, ray: str | None) -> Outcome:
    """Train one phase, from its latest checkpoint where there is one. `name` is for the UI."""
    with _followed(job):
        outcome = launch(job, workers, ray)
    try:
        _show(job)
    except Exception as error:  # the weights are written, whatever the server says
        get_run_logger().warning("curve and samples are not shown in the UI: %s", error)
    return outcome


@flow(name="train", description=__doc__)
def train(parameters: TrainParameters) -> list[Outcome]:
    """Train the phases of a recipe on a dataset.

    Raises one of USER_ERRORS when the dataset, the recipe, the output or a backend cannot be used, or the training
    cannot go on; Interrupted when it was asked to end.
    """
    end_server_with_us()
    _check_paths(parameters)
    recipe = load_training(parameters.recipe)
    chosen = recipe.chosen(parameters.phases)
    tiers = load(parameters.manifest).tiers
    for name in chosen:
        tier = recipe.phases[name].tier
        # a small corpus may be good enough that all of it is in a narrower tier
        if not tiers.keys() & {*tiers_within(recipe.data.tiers, tier)}:
            raise TrainingError(
                f"{parameters.manifest} has no tier {tier}, which phase {name} trains on; it has "
                f"{', '.join(sorted(tiers))}. Name the other phases alone, or give this one another tier in the recipe"
            )
    check_words(parameters.manifest, recipe.data.tiers, recipe.data.latents)
    if "mlflow" in recipe.run.trackers:
        check_mlflow()
    outcomes: list[Outcome] = []
    for name in chosen:
        job = Job(recipe, name, parameters.manifest, parameters.out.rstrip("/"), ActiveMindLearner, lip_probe)
        outcomes.append(train_phase(name, job, parameters.workers, parameters.ray))
        if not outcomes[-1].done:
            raise Interrupted(f"phase {name} was asked to end; step {outcomes[-1].step} is kept: run it again to go on")
    try:
        create_markdown_artifact(markdown=to_markdown(outcomes), key="training", description="What came of this run")
    except Exception as error:
        get_run_logger().warning("the summary is not shown in the UI: %s", error)
    return outcomes


def run(parameters: TrainParameters, console: "Console", verbose: bool = False) -> int:
    """What `understudy train` does: run the flow with progress on a console. Returns the exit code: 0 done, 2 failed,
    130 asked to end."""
    from flows.progress import in_terminal

    try:
        with in_terminal(console):
            outcomes = train(parameters)
    except Interrupted as interrupted:
        console.print(str(interrupted), markup=False, soft_wrap=True)
        return INTERRUPTED
    except USER_ERRORS as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return FAILED
    except Exception as error:
        if verbose:
            console.print_exception()
        hint = "" if verbose else " (-v shows where)"
        console.print(f"failed: {type(error).__name__}: {error}{hint}", style="red", markup=False, soft_wrap=True)
        return FAILED
    for outcome in outcomes:
        loss = "" if outcome.loss is None else f", loss {outcome.loss:.4f}"
        again = f" (went on from step {outcome.resumed_at})" if outcome.resumed_at else ""
        folder = weights_folder(parameters.out.rstrip("/"), outcome.phase)
        print(f"{outcome.phase}: {outcome.step} steps{again}{loss}; {folder}")
    return DONE


def to_markdown(outcomes: list[Outcome]) -> str:
    """The phases of a run as a table: how far they came, and what each part of the model started from."""
    lines = ["| phase | steps | went on from | loss | video | text | audio |", "|---|---|---|---|---|---|---|"]
    for outcome in outcomes:
        parts = [
            f"{start['origin']} `{start['sha256'][:8]}`"
            for start in (outcome.started_from[part] for part in ("video", "text", "audio"))
        ]
        loss = "" if outcome.loss is None else f"{outcome.loss:.4f}"
        cells = [outcome.phase, str(outcome.step), str(outcome.resumed_at), loss, *parts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _followed(job: Job) -> Iterator[None]:
    """Progress of a phase, wherever its workers are: by what they log into the output folder."""
    total, metrics = job.settings.steps, f"{job.folder}/{METRICS}"
    every_s = _LOOK_EVERY_S if Storage(job.folder).is_local else _ASK_EVERY_S
    show = StepProgress(job.phase, total)
    ended = threading.Event()
    seen = 0

    def look() -> None:
        nonlocal seen
        while not ended.wait(every_s):
            step = _last_step(metrics)
            if step > seen:
                seen = step
                show(step, total, 0)

    # the run that progress belongs to is known by the context
    follower = threading.Thread(target=contextvars.copy_context().run, args=(look,), daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()
        show(max(seen, _last_step(metrics)), total, 0)


def _last_step(metrics: str) -> int:
    try:
        return max((int(row["step"]) for row in read_metrics(metrics, last=_LAST_ROWS)), default=0)
    except OSError:  # a store that does not answer just now
        return 0


def _show(job: Job) -> None:
    """Curve and newest samples of a phase, as pictures in the UI."""
    folder = Storage(job.folder)
    rows = [row for row in read_metrics(f"{job.folder}/{METRICS}") if "loss" in row]
    if rows:
        curve = loss_curve([(row["step"], row["loss"]) for row in rows], f"{job.phase}: loss by step")
        folder.write_bytes("loss.svg", curve.encode())
        create_image_artifact(
            image_url=_address("svg+xml", curve.encode()), key=f"loss-{_key(job)}", description=f"Loss of {job.phase}"
        )
    newest = [f"samples/{name}" for name in folder.folders("samples") if name.startswith("step-")][-1:]
    for picture in [name for step in newest for name in folder.files(step) if name.endswith(".png")]:
        stem = picture.removesuffix(".png")
        create_image_artifact(
            image_url=_address("jpeg", _small(folder.read_bytes(picture))),
            key=f"samples-{_key(job)}",
            description=f"{stem.rpartition('/')[2]} of {job.phase}; the video: {job.folder}/{stem}.mp4",
        )


def _key(job: Job) -> str:
    return job.phase.replace("_", "-")


def _address(kind: str, data: bytes) -> str:
    """An address that holds the picture itself: the UI needs no access to the output folder."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _small(picture: bytes) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    image: Any = Image.open(io.BytesIO(picture)).convert("RGB")
    if image.width > _SHOWN_WIDTH:
        image = image.resize((_SHOWN_WIDTH, max(1, image.height * _SHOWN_WIDTH // image.width)))
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _check_paths(parameters: TrainParameters) -> None:
    """A deployed run's own folder does not last."""
    for name in ("manifest", "out"):
        path = getattr(parameters, name)
        if runtime.deployment.id and "://" not in path and not Path(path).is_absolute():
            raise OutputError(f"{name} {path!r}: a deployed run needs an absolute path or an address such as s3://...")
