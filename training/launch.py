"""Starting a phase: in this process, or on several workers by Ray Train."""

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from data_manifests.samples import brief
from data_manifests.storage import Storage
from tasks.exclusive import OutputError, exclusive
from training.job import Job, Outcome, TrainingError
from training.tracking import MLFLOW_WHERE
from training.trainer import train_phase

# Ray Train's second version; nothing is sent to anybody
_RAY_SETTINGS = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def launch(job: Job, workers: int = 1, ray: str | None = None) -> Outcome:
    """Train a phase to its end, or go on with it.

    workers: how many, each with a GPU where there are any. ray: address of a Ray cluster ("auto", "ray://..."), which
    has to see the output folder at the same path or address. One worker without it trains in this process and needs no
    Ray.

    Raises what training.trainer.train_phase raises; tasks.exclusive.OutputError where another training is at work in
    the output folder, which an object store does not tell, or the output cannot be written to; TrainingError when
    workers were lost more often than the recipe's run.max_failures.
    """
    if job.recipe.data.batch % workers:
        fitting = [n for n in range(1, job.recipe.data.batch + 1) if job.recipe.data.batch % n == 0]
        near = sorted(sorted(fitting, key=lambda n: abs(n - workers))[:2])
        few = " or ".join(map(str, near))
        raise TrainingError(f"{workers} workers do not share a batch of {job.recipe.data.batch} evenly; take {few}")
    out = Storage(str(job.out))
    _try_writing(out)
    with exclusive(out):
        if workers == 1 and ray is None:
            from training.parallel import Team, device_here

            return train_phase(job, Team(device=device_here()))
        return _on_ray(job, out, workers, ray)


def _try_writing(out: Storage) -> None:
    """An object store that cannot be written to is known before any work; of a folder its lock has told."""
    if out.is_local:
        return
    try:
        out.write_bytes(".writable", b"")
        out.remove(".writable")
    except OSError as error:
        raise OutputError(f"{out.address}: cannot be written to: {error}; give another --out") from error


def _on_ray(job: Job, out: Storage, workers: int, address: str | None) -> Outcome:
    os.environ.update(_RAY_SETTINGS)
    import ray
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    with _connected(address, workers):
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if 0 < gpus < workers:
            raise TrainingError(f"{workers} workers are to have a GPU each, and there are {gpus}; take {gpus} workers")
        trainer = TorchTrainer(
            _work,  # type: ignore[arg-type]
            train_loop_config={"job": replace(job, out=out.root if out.is_local else out.address)},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0),
            run_config=RunConfig(
                # a name of its own, since Ray would take up an earlier run of the same name: what a phase goes on from
                # are its own checkpoints
                name=f"{job.phase}-{secrets.token_hex(4)}",
                storage_path=f"{out.root}/.ray",
                storage_filesystem=None if out.is_local else PyFileSystem(FSSpecHandler(out.fs)),
                failure_config=FailureConfig(max_failures=job.recipe.run.max_failures),
            ),
        )
        try:
            found = trainer.fit().return_value  # type: ignore[attr-defined]
        except Exception as error:  # of Ray's several kinds, around the worker's own
            raise TrainingError(f"phase {job.phase} ended on Ray: {_innermost(error)}") from error
    if isinstance(found, Exception):
        raise found
    assert isinstance(found, Outcome)
    return found


def _work(config: dict[str, Any]) -> Outcome | TrainingError:
    """What each of Ray's workers does."""
    import ray.train
    import ray.train.torch

    from training.parallel import Team

    device = ray.train.torch.get_device()
    team = Team.of_process_group(device)
    try:
        return train_phase(config["job"], team, lambda values: ray.train.report(values))
    except TrainingError as error:
        # all workers end here together, and would again: no lost worker, so nothing to try once more
        return error


@contextlib.contextmanager
def _connected(address: str | None, workers: int) -> Iterator[None]:
    """A Ray of this process's own where no address is given; one that is there already stays as it is."""
    import ray

    ours = not ray.is_initialized()
    if ours:
        here: dict[str, Any] = {"num_cpus": workers + 1, "include_dashboard": False}
        try:
            ray.init(
                **({"address": address} if address else here),
                log_to_driver=False,
                logging_level=logging.WARNING,
                runtime_env={"env_vars": workers_environment()},
            )
        except ConnectionError as error:
            raise TrainingError(f"no Ray cluster is reached at {address or 'this machine'}: {brief(error)}") from None
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def workers_environment() -> dict[str, str]:
    """What the workers' environment has beside a cluster's own: where curves go is said where a training is started."""
    return {**_RAY_SETTINGS, **{name: os.environ[name] for name in MLFLOW_WHERE if name in os.environ}}


def _innermost(error: BaseException) -> str:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
