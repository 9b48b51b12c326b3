"""Curves and samples reach their trackers, and a phase that goes on goes on in the same curve."""

import sys
from pathlib import Path

import pytest
import torch

from tasks.stage import MissingBackend
from training.parallel import Team
from training.speed import Meter, peak_flops
from training.tracking import Trackers, check_mlflow, read_metrics


def test_what_came_after_the_step_gone_on_from_is_taken_out(tmp_path: Path) -> None:
    first = Trackers(tmp_path, "main", 0, [])
    for step in (2, 4, 6):
        first.scalars(step, {"loss": 1.0 / step})
    first.close()
    again = Trackers(tmp_path, "main", 4, [])
    again.scalars(6, {"loss": 0.5})
    again.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 2, "loss": 0.5},
        {"step": 4, "loss": 0.25},
        {"step": 6, "loss": 0.5},
    ]


def test_what_was_shown_is_in_the_files_once_flushed(tmp_path: Path) -> None:
    def size() -> int:
        return sum(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir())

    trackers = Trackers(tmp_path, "main", 0, ["tensorboard"])
    trackers.flush()
    before = size()
    trackers.scalars(1, {"loss": 1.0})
    trackers.flush()
    assert size() > before and read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    trackers.close()


def test_a_phase_goes_on_in_its_own_run_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.chdir(tmp_path)  # where its artifacts go
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "clip.mp4").write_bytes(b"video")
    (tmp_path / "clip.png").write_bytes(b"strip")
    for step in (2, 4):
        trackers = Trackers(tmp_path, "main", step - 2, ["mlflow"])
        trackers.scalars(step, {"loss": 1.0 / step, "loss/sigma_0.00_0.25": 0.5})
        trackers.sample(step, "clip", tmp_path / "clip.mp4", tmp_path / "clip.png")
        trackers.close()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("understudy").experiment_id])
    assert run.info.run_name == "main" and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(2, 0.5), (4, 0.25)]
    assert "loss/sigma_0.00_0.25" in run.data.metrics
    kept = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "samples/step-00000004")]
    assert kept == ["samples/step-00000004/clip.mp4", "samples/step-00000004/clip.png"]


def test_mlflow_is_asked_for_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingBackend, match=r"mlflow is not installed: pip install mlflow, or take tensorboard"):
        check_mlflow()


def test_losses_are_told_by_noise_level() -> None:
    meter = Meter(Team())
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])  # the last one stands in for a sample that could not be read
    meter.add(torch.tensor([1.0, 2.0, 6.0, 0.0]), weights, torch.tensor([0.0, 0.2499, 1.0, 0.9]), 10, 1e9)
    meter.add(torch.tensor([3.0]), torch.ones(1), torch.tensor([0.5]), 10, 1e9)
    meter.step(2.0)
    meter.step(4.0)
    read = meter.read()
    assert read["loss"] == pytest.approx(3.0) and read["grad_norm"] == pytest.approx(3.0)
    by_level = {name: value for name, value in read.items() if name.startswith("loss/")}
    assert by_level == {"loss/sigma_0.00_0.25": 1.5, "loss/sigma_0.50_0.75": 3.0, "loss/sigma_0.75_1.00": 6.0}
    assert "mfu" not in read
    assert meter.read()["loss"] == 0  # it began anew
    assert peak_flops(torch.device("cpu")) is None


def test_time_outside_of_steps_is_not_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 4.0, 8.0, 10.0, 10.0])
    monkeypatch.setattr("training.speed.time.perf_counter", lambda: next(clock))
    meter = Meter(Team())  # at 0 s
    with meter.waiting():  # from 1 to 3
        pass
    with meter.outside():  # from 4 to 8
        pass
    meter.add(torch.ones(1), torch.ones(1), torch.zeros(1), 12, 0.0)
    meter.step(1.0)
    read = meter.read()  # at 10
    assert (read["step_s"], read["data_wait"], read["tokens_per_s"]) == (6.0, pytest.approx(2 / 6), 2.0)
