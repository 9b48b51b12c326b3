"""Starting a phase, in this process or on several workers with Ray Train."""

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from data_manifests.samples import one_line
from data_manifests.storage import Storage
from tasks.execution.run_lock import OutputError, exclusive
from training.config import TrainingRecipe
from training.loop.job import Job, PhaseResult, TrainingError
from training.loop.stopping import StopFile, passing_stops_on
from training.loop.tracking import MLFLOW_VARIABLES
from training.loop.trainer import train_phase
from training.models.active_mind.config import SIZES

# Ray Train's second version, and no usage statistics
_RAY_SETTINGS = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def launch(job: Job, workers: int = 1, ray: str | None = None) -> PhaseResult:
    """Train a phase to its end, resuming from its latest checkpoint if there is one.

    workers: number of workers. Each has a GPU where the machine or cluster has any.
    ray: address of a Ray cluster ("auto", "ray://..."). The cluster must see the output folder at the same path or
        address. One worker without an address trains in this process, without Ray.

    Raises what training.loop.trainer.train_phase raises; tasks.execution.run_lock.OutputError when another training
    uses the output folder (an object store cannot tell), or the output cannot be written to; TrainingError when workers
    were lost more often than the recipe's training.run.max_failures.
    """
    _check_number(workers, job.recipe)
    out = Storage(str(job.out))
    _try_writing(out)
    with exclusive(out):
        StopFile(job.folder).remove()  # of an earlier run that was killed
        if workers == 1 and ray is None:
            from training.loop.parallel import WorkerGroup, device_here

            return train_phase(job, WorkerGroup(device=device_here()))
        return _on_ray(job, out, workers, ray)


def _check_number(workers: int, recipe: TrainingRecipe) -> None:
    """See that so many workers share a batch evenly, and the model's heads where they share samples. Raises
    TrainingError."""
    sharing, batch, heads = recipe.run.sequence_parallel, recipe.data.batch, SIZES[recipe.size].heads
    if heads % sharing:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise TrainingError(
            f"run.sequence_parallel: {sharing} workers cannot share the {heads} heads of size {recipe.size} evenly; "
            f"it can be {fitting}"
        )
    if workers % sharing or batch % (workers // sharing):
        numbers = [sharing * n for n in range(1, batch + 1) if batch % n == 0]
        nearest = sorted(sorted(numbers, key=lambda n: abs(n - workers))[:2])
        of = f" with {sharing} of them on each sample" if sharing > 1 else ""
        few = " or ".join(map(str, nearest))
        raise TrainingError(f"{workers} workers do not share a batch of {batch} evenly{of}; take {few}")


def _try_writing(out: Storage) -> None:
    """Raise before any work when an object store cannot be written to. For a local folder, its lock does this."""
    if out.is_local:
        return
    try:
        out.write_bytes(".writable", b"")
        out.remove(".writable")
    except OSError as error:
        raise OutputError(f"{out.address}: cannot be written to: {error}; give another --out") from error


def _on_ray(job: Job, out: Storage, workers: int, address: str | None) -> PhaseResult:
    os.environ.update(_RAY_SETTINGS)
    import ray
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    with _connected(address, workers):
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if 0 < gpus < workers:
            raise TrainingError(f"{workers} workers need a GPU each, but there are {gpus}; take {gpus} workers")
        trainer = TorchTrainer(
            _train_on_worker,  # type: ignore[arg-type]
            train_loop_config={"job": replace(job, out=out.root if out.is_local else out.address)},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0),
            run_config=RunConfig(
                # A new name each time: Ray would resume an earlier run of the same name, but the phase resumes from
                # its own checkpoints.
                name=f"{job.phase}-{secrets.token_hex(4)}",
                storage_path=f"{out.root}/.ray",
                storage_filesystem=None if out.is_local else PyFileSystem(FSSpecHandler(out.fs)),
                failure_config=FailureConfig(max_failures=job.recipe.run.max_failures),
            ),
        )
        try:
            result = passing_stops_on(lambda: trainer.fit().return_value, StopFile(job.folder))  # type: ignore[attr-defined]
        except Exception as error:  # Ray wraps the worker's exception in exceptions of several kinds
            raise TrainingError(f"phase {job.phase} failed on Ray: {_innermost(error)}") from error
    if isinstance(result, Exception):
        raise result
    assert isinstance(result, PhaseResult)
    return result


def _train_on_worker(config: dict[str, Any]) -> PhaseResult | TrainingError:
    """The function that Ray runs on each worker."""
    import ray.train
    import ray.train.torch

    from training.loop.parallel import WorkerGroup

    device = ray.train.torch.get_device()
    group = WorkerGroup.of_process_group(device, config["job"].recipe.run.sequence_parallel)
    try:
        return train_phase(
            config["job"],
            group,
            report=lambda values: ray.train.report(values),
            leaving=lambda: ray.train.get_preemption_info() is not None,
        )
    except TrainingError as error:
        # All workers end here, and would again. Returned, so that Ray does not start them again as lost workers.
        return error


@contextlib.contextmanager
def _connected(address: str | None, workers: int) -> Iterator[None]:
    """Connect to a Ray cluster, or start a local one where no address is given. A running connection is kept."""
    import ray

    connects = not ray.is_initialized()
    if connects:
        local: dict[str, Any] = {"num_cpus": workers + 1, "include_dashboard": False}
        try:
            ray.init(
                **({"address": address} if address else local),
                log_to_driver=False,
                logging_level=logging.WARNING,
                runtime_env={"env_vars": workers_environment()},
            )
        except ConnectionError as error:
            raise TrainingError(f"no Ray cluster answers at {address or 'this machine'}: {one_line(error)}") from None
    try:
        yield
    finally:
        if connects:
            ray.shutdown()


def workers_environment() -> dict[str, str]:
    """Environment variables that workers get in addition to the cluster's own.

    They tell where MLflow's runs go, as they do in the process that starts the training.
    """
    return {**_RAY_SETTINGS, **{name: os.environ[name] for name in MLFLOW_VARIABLES if name in os.environ}}


def _innermost(error: BaseException) -> str:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
