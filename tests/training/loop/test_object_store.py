"""A training whose output is in an object store needs no local folder that survives a kill."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_manifests.storage import Storage
from tasks.execution.run_lock import OutputError
from tests.training.loop.tiny import Tiny, job
from tests.training.loop.together import train_together
from training.loop import checkpoint, phases
from training.loop.launch import launch
from training.loop.parallel import WorkerGroup
from training.loop.phases import PhaseError
from training.loop.tracking import read_metrics
from training.loop.trainer import train_phase

ROOT = Path(__file__).parents[3]


def weights(out: Path | str, phase: str = "base") -> dict[str, bytes]:
    folder = Storage(phases.phase_weights_folder(out, phase))
    return {name: folder.read_bytes(name) for name in folder.files()}


def test_a_training_in_an_object_store_is_the_one_in_a_folder(tmp_path: Path, s3_folder: str) -> None:
    for phase in ("base", "warmup"):
        for out in (tmp_path, s3_folder):
            settings = {"trackers": ["tensorboard"], "sample_every": 5}
            assert launch(job(out, phase, steps=4, **settings)).step == 4
            outcome = launch(job(out, phase, steps=10, **settings))
            assert outcome.done and outcome.resumed_at == 4
    for phase in ("base", "warmup"):
        assert weights(s3_folder, phase) == weights(tmp_path, phase)
        there = Storage(f"{s3_folder}/{phase}")
        assert checkpoint.complete_checkpoints(Storage(f"{there.address}/checkpoints")) == [
            "step-00000009",
            "step-00000010",
        ]
        assert Storage(f"{there.address}/checkpoints").folders() == ["step-00000009", "step-00000010"]
        steps = [row["step"] for row in read_metrics(f"{there.address}/metrics.jsonl") if "loss" in row]
        assert steps == [2, 4, 6, 8, 10]
        assert read_metrics(f"{there.address}/metrics.jsonl", last=2000)[-1]["step"] == 10
        assert 1 <= len(read_metrics(f"{there.address}/metrics.jsonl", last=1000)) < 5
        assert len(there.files("tensorboard")) == 2
        assert there.files("samples/step-00000010") == ["samples/step-00000010/0.txt"]


def test_a_checkpoint_that_a_kill_left_incomplete_in_an_object_store_is_not_used(s3_folder: str) -> None:
    train_phase(job(s3_folder, steps=6), WorkerGroup())
    whole = weights(s3_folder)
    folder = Storage(f"{s3_folder}/base/checkpoints")
    # as if the run had been killed while it wrote the weights and the checkpoint
    Storage(phases.phase_weights_folder(s3_folder, "base")).remove(phases.ABOUT)
    folder.remove("step-00000006/progress.json")
    assert folder.files("step-00000006") and checkpoint.latest(folder) == "step-00000003"
    assert phases.about_weights(s3_folder, "base") is None
    with pytest.raises(PhaseError, match=r"phase warmup starts from .*/base/weights.*: train phase base first"):
        train_phase(job(s3_folder, "warmup"), WorkerGroup())
    assert train_phase(job(s3_folder, steps=6), WorkerGroup()).resumed_at == 3
    assert weights(s3_folder) == whole
    assert checkpoint.complete_checkpoints(folder) == ["step-00000003", "step-00000006"]


@pytest.mark.slow
def test_workers_share_a_checkpoint_in_an_object_store(tmp_path: Path, s3_folder: str) -> None:
    train_phase(job(tmp_path / "one"), WorkerGroup())
    train_together(tmp_path, [job(s3_folder, sharding="fsdp", steps=4)])
    assert train_phase(job(s3_folder), WorkerGroup()).resumed_at == 4
    one = load_file(f"{phases.phase_weights_folder(tmp_path / 'one', 'base')}/{phases.WEIGHTS}")
    for name, value in phases.read_weights(
        f"{phases.phase_weights_folder(s3_folder, 'base')}/{phases.WEIGHTS}"
    ).items():
        torch.testing.assert_close(value, one[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_run_killed_anywhere_goes_on_from_the_object_store(tmp_path: Path, s3_folder: str) -> None:
    train_phase(job(tmp_path, steps=20), WorkerGroup())
    process = subprocess.Popen([sys.executable, "-m", "tests.training.loop.tiny", s3_folder, "20"], cwd=ROOT)
    while process.poll() is None and not Storage(f"{s3_folder}/base/checkpoints").folders():
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.5))  # sometimes in the middle of writing a checkpoint
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert train_phase(job(s3_folder, steps=20), WorkerGroup()).done
    assert weights(s3_folder) == weights(tmp_path)


def test_a_missing_bucket_is_reported_before_any_work(s3_folder: str) -> None:
    class Never(Tiny):
        def losses(self, *_: object) -> None:  # type: ignore[override]
            raise AssertionError("training has begun")

    with pytest.raises(OutputError, match=r"s3://no-such-bucket/x: .*[Bb]ucket does not exist"):
        launch(job("s3://no-such-bucket/x", learner=Never))
    assert os.environ["AWS_ENDPOINT_URL"]
    assert not Storage("s3://no-such-bucket").fs.exists("s3://no-such-bucket")
