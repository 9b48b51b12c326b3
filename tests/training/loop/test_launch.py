"""A phase trains the same in this process and on Ray's workers, even if one of them is killed."""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from tasks.execution.run_lock import OutputError
from tests.training.loop.tiny import Bad, Dying, Slow, job
from tests.training.loop.together import train_together
from training.loop import phases
from training.loop.job import TrainingError
from training.loop.launch import launch, workers_environment
from training.loop.parallel import WorkerGroup
from training.loop.stopping import StopFile
from training.loop.tracking import read_metrics
from training.loop.trainer import train_phase

ROOT = Path(__file__).parents[3]
STEPS = 30


def same_weights(one: Path, other: Path) -> None:
    for name in (phases.WEIGHTS, phases.AVERAGED):
        ours, theirs = (load_file(Path(phases.phase_weights_folder(out, "base")) / name) for out in (one, other))
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6)


def test_workers_that_do_not_share_a_batch_evenly_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"3 workers do not share a batch of 8 evenly; take 2 or 4"):
        launch(job(tmp_path), workers=3)
    with pytest.raises(
        TrainingError, match=r"6 workers do not share a batch of 8 evenly with 2 of them on each sample"
    ):
        launch(job(tmp_path, sequence_parallel=2), workers=6)
    with pytest.raises(
        TrainingError, match=r"3 workers cannot share the 4 heads of size debug evenly; it can be 1, 2, 4"
    ):
        launch(job(tmp_path, sequence_parallel=3), workers=6)


def test_a_stop_file_of_an_earlier_run_stops_nothing(tmp_path: Path) -> None:
    StopFile(str(tmp_path / "base")).write()
    assert launch(job(tmp_path)).done


def test_workers_get_the_mlflow_address_and_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    bare = workers_environment()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://curves:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    assert workers_environment() == {**bare, "MLFLOW_TRACKING_URI": "http://curves:5000"}


def test_a_second_training_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(OutputError, match="another run is at work here"):
        launch(job(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_of_ray_that_is_killed_is_replaced_and_nothing_is_lost(tmp_path: Path) -> None:
    launch(job(tmp_path / "one"))
    outcome = launch(job(tmp_path / "two", learner=Dying, sharding="fsdp"), workers=2)
    assert (tmp_path / "two" / "died").exists()
    assert outcome.done and outcome.resumed_at == 3  # the latest checkpoint before step 5
    same_weights(tmp_path / "one", tmp_path / "two")
    assert [row["step"] for row in read_metrics(tmp_path / "two" / "base" / "metrics.jsonl")] == [2, 4, 6, 8, 10]


def start_on_ray(out: Path, workers: int, steps: int = STEPS) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.training.loop.test_launch", out, str(workers), str(steps)]
    return subprocess.Popen(command, cwd=ROOT)


def wait_for(process: "subprocess.Popen[bytes]", out: Path, step: int) -> None:
    while max((row["step"] for row in read_metrics(out / "base" / "metrics.jsonl")), default=0) < step:
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.005)


def kill_at(process: "subprocess.Popen[bytes]", out: Path, step: int) -> None:
    """SIGKILL the run, its Ray and all workers at once, like a power cut."""
    wait_for(process, out, step)
    everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everybody:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    assert process.wait() == -signal.SIGKILL
    psutil.wait_procs(everybody)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_on_ray_that_is_killed_ends_bit_for_bit_as_an_undisturbed_one(tmp_path: Path, workers: int) -> None:
    whole, killed, moved = tmp_path / "whole", tmp_path / "killed", tmp_path / "moved"
    undisturbed = job(whole, steps=STEPS)
    if workers == 1:
        train_phase(undisturbed, WorkerGroup())
    else:
        train_together(tmp_path, [undisturbed])
    kill_at(start_on_ray(killed, workers), killed, random.randrange(4, STEPS - 8))
    shutil.copytree(killed, moved)
    assert start_on_ray(killed, workers).wait() == 0
    for name in (phases.WEIGHTS, phases.AVERAGED):
        ours, theirs = (Path(phases.phase_weights_folder(out, "base"), name).read_bytes() for out in (whole, killed))
        assert ours == theirs
    # on another number of workers too, apart from rounding by another order of sums
    assert launch(job(moved, steps=STEPS)).resumed_at >= 3
    same_weights(whole, moved)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_on_ray_that_is_asked_to_stop_keeps_its_last_step(tmp_path: Path) -> None:
    process = start_on_ray(tmp_path, 2, steps=5000)
    wait_for(process, tmp_path, 4)
    process.terminate()
    assert process.wait(120) == 0
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert 4 <= outcome["step"] < 5000 and not outcome["done"]
    newest = sorted(path.name for path in (tmp_path / "base" / "checkpoints").glob("step-*"))[-1]
    assert newest == f"step-{outcome['step']:08d}"
    assert read_metrics(tmp_path / "base" / "metrics.jsonl")[-1]["step"] == outcome["step"]
    assert not (tmp_path / "base" / "stop").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_of_ray_train_into_an_object_store(tmp_path: Path, s3_folder: str) -> None:
    launch(job(tmp_path, steps=6))
    assert launch(job(s3_folder, steps=6), workers=2).done
    theirs = phases.read_weights(f"{phases.phase_weights_folder(s3_folder, 'base')}/{phases.WEIGHTS}")
    for name, value in load_file(Path(phases.phase_weights_folder(tmp_path, "base"), phases.WEIGHTS)).items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_error_is_not_tried_again_on_ray(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 2: the loss of s03 is not finite"):
        launch(job(tmp_path, learner=Bad, max_skipped=0), workers=2)
    epochs = [path.read_text().splitlines() for path in sorted((tmp_path / "base").glob("seen-2-*"))]
    assert [len(lines) for lines in epochs] == [8, 8]  # two steps of four each, once


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_is_lost_too_often_ends_the_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="phase base failed on Ray: "):
        launch(job(tmp_path, learner=Dying, max_failures=0), workers=2)
    assert launch(job(tmp_path)).resumed_at == 3  # one worker can resume it


if __name__ == "__main__":
    mine = job(Path(sys.argv[1]), learner=Slow, steps=int(sys.argv[3]), log_every=1)
    workers = int(sys.argv[2])
    if workers == 1:  # which would train in this process where no address is given
        import ray

        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    ended = launch(mine, workers, ray="auto" if workers == 1 else None)
    Path(sys.argv[1], "outcome.json").write_text(json.dumps({"step": ended.step, "done": ended.done}))
