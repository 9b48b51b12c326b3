"""Where a phase is trained changes nothing of it: this process, or workers of Ray, one of which is killed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from tasks.exclusive import OutputError
from tests.training.tiny import Bad, Dying, job
from training import phases
from training.job import TrainingError
from training.launch import launch
from training.tracking import read_metrics

ROOT = Path(__file__).parents[2]


def same_weights(one: Path, other: Path) -> None:
    for name in (phases.WEIGHTS, phases.AVERAGED):
        ours, theirs = (load_file(phases.weights_folder(out, "base") / name) for out in (one, other))
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6)


def test_one_worker_needs_no_ray(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.training.tiny import job; from training.launch import launch;"
        f"launch(job(Path({str(tmp_path)!r}))); print('ray' in sys.modules, 'prefect' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == "False False"


def test_workers_that_do_not_share_a_batch_evenly_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"3 workers do not share a batch of 8 evenly; take 2 or 4"):
        launch(job(tmp_path), workers=3)


def test_two_trainings_in_one_folder_are_kept_apart(tmp_path: Path) -> None:
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_would_end_the_same_way_again_is_not_tried_again_on_ray(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 2: the loss of s03 is not finite"):
        launch(job(tmp_path, learner=Bad), workers=2)
    epochs = [path.read_text().splitlines() for path in sorted((tmp_path / "base").glob("seen-2-*"))]
    assert [len(lines) for lines in epochs] == [8, 8]  # two steps of four each, once


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_is_lost_too_often_ends_the_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="phase base ended on Ray: "):
        launch(job(tmp_path, learner=Dying, max_failures=0), workers=2)
    assert launch(job(tmp_path)).resumed_at == 3  # and on one worker it goes on
