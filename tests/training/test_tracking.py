"""Curves and samples reach their trackers, and a phase that goes on goes on in the same curve."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

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


class StandIn(ModuleType):
    """As much of MLflow's interface as is used, with its signatures; it is not among what is installed here."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.told: list[Any] = []

    def set_experiment(self, experiment_name: str) -> None:
        self.told.append(("experiment", experiment_name))

    def start_run(self, run_id: str | None = None, run_name: str | None = None) -> Any:
        self.told.append(("run", run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "abc"))

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.told.append((step, metrics))

    def log_artifact(self, local_path: str, artifact_path: str) -> None:
        self.told.append((artifact_path, Path(local_path).name))

    def end_run(self) -> None:
        self.told.append("ended")


def test_a_phase_goes_on_in_its_own_run_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = StandIn()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for step in (2, 4):
        trackers = Trackers(tmp_path, "main", step - 2, ["mlflow"])
        trackers.scalars(step, {"loss": 0.5})
        trackers.sample(step, "clip", tmp_path / "clip.mp4", tmp_path / "clip.png")
        trackers.close()
    runs = [told for told in mlflow.told if told[0] == "run"]
    assert runs == [("run", None, "main"), ("run", "abc", None)]
    assert (4, {"loss": 0.5}) in mlflow.told
    assert ("samples/step-00000004", "clip.mp4") in mlflow.told


def test_mlflow_is_asked_for_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingBackend, match=r"mlflow is not installed: pip install mlflow, or take tensorboard"):
        check_mlflow()


def test_losses_are_told_by_noise_level() -> None:
    meter = Meter(Team())
    meter.add(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 0.2499, 1.0]), 10, 1e9)
    meter.add(torch.tensor([3.0]), torch.tensor([0.5]), 10, 1e9)
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
    meter.add(torch.ones(1), torch.zeros(1), 12, 0.0)
    meter.step(1.0)
    read = meter.read()  # at 10
    assert (read["step_s"], read["data_wait"], read["tokens_per_s"]) == (6.0, pytest.approx(2 / 6), 2.0)
