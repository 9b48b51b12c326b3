"""The `train` flow: WebDataset shards in, checkpoints out, one task a phase."""

import contextlib
import contextvars
import io
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from data_manifests.dataset import load
from data_manifests.sources import ManifestError
from data_manifests.storage import Storage
from data_manifests.strict import RecipeError
from flows.curves import loss_curve
from flows.parameters import TrainParameters, check_paths
from flows.progress import StepProgress
from flows.report.pages import data_uri
from flows.server_guard import end_server_with_us
from tasks.execution.run_lock import OutputError
from tasks.weights.missing import MissingBackend
from training.config import TrainingRecipe, load_training
from training.data.buckets import LoaderError
from training.data.loader import tiers_within
from training.data.sample_reader import check_text
from training.generate.previews import lip_probe
from training.learners.active_mind import ActiveMindLearner
from training.loop.checkpoint import CheckpointError
from training.loop.job import Job, PhaseResult, TrainingError
from training.loop.launch import launch
from training.loop.phases import PhaseError, check_origins
from training.loop.tracking import METRICS, check_mlflow, read_metrics

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

_LOCAL_EVERY_S, _REMOTE_EVERY_S = 1.0, 10.0  # a store takes money for each request
_LAST_BYTES = 8192  # of the metrics: enough to hold the last step's row
_SHOWN_WIDTH = 1600  # pixels of a picture of samples in the UI


class Interrupted(RuntimeError):
    """A training was asked to end. Its last step is kept."""


@task(task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def run_phase(name: str, job: Job, workers: int, ray: str | None) -> PhaseResult:
    """Train one phase, from its latest checkpoint where there is one. The UI shows `name`."""
    with _followed(job):
        result = launch(job, workers, ray)
    try:
        _show(job)
    except Exception as error:  # the weights are written, whatever the server says
        get_run_logger().warning("curve and samples are not shown in the UI: %s", error)
    return result


@flow(name="train", description=__doc__)
def train(parameters: TrainParameters) -> list[PhaseResult]:
    """Train the phases of a recipe on a dataset.

    Raises one of USER_ERRORS when the dataset, the recipe, the output or a backend cannot be used, or the training
    cannot go on; Interrupted when it was asked to end.
    """
    end_server_with_us()
    check_paths(parameters)
    recipe = load_training(parameters.recipe)
    chosen = recipe.chosen(parameters.phases)
    _check_tiers(recipe, chosen, parameters.manifest)
    check_text(parameters.manifest, recipe.data.tiers, recipe.data.latents)
    check_origins(recipe, chosen, parameters.out.rstrip("/"))
    if "mlflow" in recipe.run.trackers:
        check_mlflow()
    results: list[PhaseResult] = []
    for name in chosen:
        job = Job(recipe, name, parameters.manifest, parameters.out.rstrip("/"), ActiveMindLearner, lip_probe)
        results.append(run_phase(name, job, parameters.workers, parameters.ray))
        if not results[-1].done:
            raise Interrupted(f"phase {name} was asked to end; step {results[-1].step} is kept: run it again to go on")
    try:
        create_markdown_artifact(markdown=phases_markdown(results), key="training", description="What came of this run")
    except Exception as error:
        get_run_logger().warning("the summary is not shown in the UI: %s", error)
    return results


def _check_tiers(recipe: TrainingRecipe, phases: Sequence[str], manifest: str) -> None:
    """See that the dataset has a tier for each phase. Raises TrainingError."""
    tiers = load(manifest).tiers
    for name in phases:
        tier = recipe.phases[name].tier
        # a small corpus may be good enough that all of it is in a narrower tier
        if not tiers.keys() & {*tiers_within(recipe.data.tiers, tier)}:
            raise TrainingError(
                f"{manifest} has no tier {tier}, which phase {name} trains on; it has {', '.join(sorted(tiers))}. "
                "Name the other phases alone, or give this one another tier in the recipe"
            )


def phases_markdown(results: list[PhaseResult]) -> str:
    """The phases of a run as a table: how far they came, and what each part of the model started from."""
    lines = ["| phase | steps | went on from | loss | video | text | audio |", "|---|---|---|---|---|---|---|"]
    for result in results:
        parts = [
            f"{start['origin']} `{start['sha256'][:8]}`"
            for start in (result.started_from[part] for part in ("video", "text", "audio"))
        ]
        loss = "" if result.loss is None else f"{result.loss:.4f}"
        cells = [result.phase, str(result.step), str(result.resumed_at), loss, *parts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _followed(job: Job) -> Iterator[None]:
    """Show the progress of a phase, wherever its workers are: by the metrics that they log into the output folder."""
    total, metrics = job.settings.steps, f"{job.folder}/{METRICS}"
    every_s = _LOCAL_EVERY_S if Storage(job.folder).is_local else _REMOTE_EVERY_S
    ended = threading.Event()
    seen = _last_step(metrics)
    show = StepProgress(job.phase, total, seen)

    def look() -> None:
        nonlocal seen
        while not ended.wait(every_s):
            step = _last_step(metrics)
            if step > seen:
                seen = step
                show(step, total, 0)

    # the context says which flow run the progress belongs to
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
        return max((int(row["step"]) for row in read_metrics(metrics, last=_LAST_BYTES)), default=0)
    except OSError:  # a store that does not answer just now
        return 0


def _show(job: Job) -> None:
    """Show the loss curve and the newest samples of a phase as images. Their addresses hold the data: the UI needs no
    access to the output folder."""
    folder = Storage(job.folder)
    rows = [row for row in read_metrics(f"{job.folder}/{METRICS}") if "loss" in row]
    if rows:
        curve = loss_curve([(row["step"], row["loss"]) for row in rows], f"{job.phase}: loss by step")
        folder.write_bytes("loss.svg", curve.encode())
        create_image_artifact(
            image_url=data_uri(curve.encode(), "image/svg+xml"),
            key=f"loss-{_key(job)}",
            description=f"Loss of {job.phase}",
        )
    newest = [f"samples/{name}" for name in folder.folders("samples") if name.startswith("step-")][-1:]
    for picture in [name for step in newest for name in folder.files(step) if name.endswith(".png")]:
        stem = picture.removesuffix(".png")
        create_image_artifact(
            image_url=data_uri(_shrunk(folder.read_bytes(picture)), "image/jpeg"),
            key=f"samples-{_key(job)}",
            description=f"{stem.rpartition('/')[2]} of {job.phase}; the video: {job.folder}/{stem}.mp4",
        )


def _key(job: Job) -> str:
    return job.phase.replace("_", "-")


def _shrunk(picture: bytes) -> bytes:
    """A picture as JPEG, no wider than the UI shows it."""
    from PIL import Image

    buffer = io.BytesIO()
    image: Any = Image.open(io.BytesIO(picture)).convert("RGB")
    if image.width > _SHOWN_WIDTH:
        image = image.resize((_SHOWN_WIDTH, max(1, image.height * _SHOWN_WIDTH // image.width)))
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
