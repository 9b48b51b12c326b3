"""Metrics and samples reach their trackers, and a resumed phase continues the same curves."""

import contextlib
import socket
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.weights.missing import MissingBackend
from training.loop.metrics import StepMetrics, peak_flops
from training.loop.parallel import WorkerGroup
from training.loop.tracking import Trackers, check_mlflow, read_metrics


def test_metrics_after_the_step_that_a_run_resumes_from_are_removed(tmp_path: Path) -> None:
    first = Trackers(tmp_path, "main", 0, [], {})
    for step in (2, 4, 6):
        first.scalars(step, {"loss": 1.0 / step})
    first.close("stopped")
    again = Trackers(tmp_path, "main", 4, [], {})
    again.scalars(6, {"loss": 0.5})
    again.close("finished")
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 2, "loss": 0.5},
        {"step": 4, "loss": 0.25},
        {"step": 6, "loss": 0.5},
    ]


def test_metrics_are_in_the_files_once_flushed(tmp_path: Path) -> None:
    def size() -> int:
        return sum(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir())

    trackers = Trackers(tmp_path, "main", 0, ["tensorboard"], {"data": {"fps": 25}})
    trackers.flush()
    before = size()
    trackers.scalars(1, {"loss": 1.0})
    trackers.flush()
    assert size() > before and read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    trackers.close("finished")
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"| data.fps | 25 |" in events.read_bytes()


SETTINGS = {"dataset": "0" * 64, "data": {"frames": 33, "fps": 25}, "phase": {"train": ["video", "text"]}}


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow with its own database."""
    module = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.chdir(tmp_path)  # MLflow writes artifacts here
    before = module.get_tracking_uri()
    module.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield module
    module.set_tracking_uri(before)


def only_run(mlflow: Any) -> Any:
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("understudy").experiment_id])
    return run


def test_a_resumed_phase_continues_its_mlflow_run(mlflow: Any, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"video")
    (tmp_path / "clip.png").write_bytes(b"strip")
    ended: list[str] = []
    for step, end in ((2, "stopped"), (4, "failed"), (6, "finished")):
        trackers = Trackers(tmp_path, "main", step - 2, ["mlflow"], SETTINGS)
        assert only_run(mlflow).info.status == "RUNNING"
        trackers.scalars(step, {"loss": 1.0 / step, "loss/sigma_0.00_0.25": 0.5})
        trackers.sample(step, "clip", tmp_path / "clip.mp4", tmp_path / "clip.png")
        trackers.close(end)  # type: ignore[arg-type]
        ended.append(only_run(mlflow).info.status)
    assert ended == ["KILLED", "FAILED", "FINISHED"]
    run, client = only_run(mlflow), mlflow.MlflowClient()
    assert run.info.run_name == "main"
    assert run.data.params == {
        "dataset": "0" * 64, "data.frames": "33", "data.fps": "25", "phase.train": "['video', 'text']",
    }  # fmt: skip
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(2, 1 / 2), (4, 1 / 4), (6, 1 / 6)]
    assert "loss/sigma_0.00_0.25" in run.data.metrics
    kept = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "samples/step-00000004")]
    assert kept == ["samples/step-00000004/clip.mp4", "samples/step-00000004/clip.png"]


def test_metrics_that_a_database_does_not_take_are_sent_later_and_end_no_training(
    mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def renamed(table: str, name: str) -> None:
        with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
            database.execute(f"ALTER TABLE {table} RENAME TO {name}")

    trackers = Trackers(tmp_path, "main", 0, ["mlflow"], SETTINGS)
    renamed("metrics", "away")
    for step in (1, 2):
        trackers.scalars(step, {"loss": 1.0 / step})
    assert caplog.text.count("MLflow did not take the newest metrics") == 1  # no second attempt yet
    trackers.sample(2, "clip", tmp_path / "nowhere.mp4", tmp_path / "nowhere.png")
    assert "MLflow did not take sample clip of step 2" in caplog.text
    renamed("away", "metrics")
    monkeypatch.setattr("training.loop.tracking._RETRY_S", 0.0)
    trackers.scalars(3, {"loss": 1.0 / 3})
    history = mlflow.MlflowClient().get_metric_history(only_run(mlflow).info.run_id, "loss")
    assert [point.step for point in history] == [1, 2, 3]
    trackers.close("finished")


def test_a_missing_mlflow_run_is_named_with_what_to_do(mlflow: Any, tmp_path: Path) -> None:
    (tmp_path / "mlflow_run").write_text("0" * 32)
    with pytest.raises(MissingBackend, match=r"no run for phase main: .*0{32}.*remove .*mlflow_run to begin a new run"):
        Trackers(tmp_path, "main", 2, ["mlflow"], SETTINGS)


def test_a_server_that_does_not_answer_is_reported_first(mlflow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
    with pytest.raises(MissingBackend, match=rf"MLflow cannot be used: .*{port}.* MLFLOW_TRACKING_URI names, or use"):
        check_mlflow()


def test_a_missing_mlflow_is_reported_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    told = r"mlflow is not installed: pip install 'understudy\[mlflow\]', or use tensorboard"
    with pytest.raises(MissingBackend, match=told):
        check_mlflow()


def test_losses_are_averaged_by_noise_level() -> None:
    metrics = StepMetrics(WorkerGroup())
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])  # the last sample could not be read
    metrics.add(torch.tensor([1.0, 2.0, 6.0, 0.0]), weights, torch.tensor([0.0, 0.2499, 1.0, 0.9]), 10, 1e9)
    metrics.add(torch.tensor([3.0]), torch.ones(1), torch.tensor([0.5]), 10, 1e9)
    metrics.step(2.0)
    metrics.step(4.0)
    read = metrics.read()
    assert read["loss"] == pytest.approx(3.0) and read["grad_norm"] == pytest.approx(3.0)
    by_level = {name: value for name, value in read.items() if name.startswith("loss/")}
    assert by_level == {"loss/sigma_0.00_0.25": 1.5, "loss/sigma_0.50_0.75": 3.0, "loss/sigma_0.75_1.00": 6.0}
    assert "mfu" not in read
    assert metrics.read()["loss"] == 0  # reading has reset the metrics
    assert peak_flops(torch.device("cpu")) is None


def test_excluded_time_does_not_count_to_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 4.0, 8.0, 10.0, 10.0])
    monkeypatch.setattr("training.loop.metrics.time.perf_counter", lambda: next(clock))
    metrics = StepMetrics(WorkerGroup())  # at 0 s
    with metrics.waiting_for_data():  # from 1 to 3
        pass
    with metrics.excluded():  # from 4 to 8
        pass
    metrics.add(torch.ones(1), torch.ones(1), torch.zeros(1), 12, 0.0)
    metrics.step(1.0)
    read = metrics.read()  # at 10
    assert (read["step_s"], read["data_wait"], read["tokens_per_s"]) == (6.0, pytest.approx(2 / 6), 2.0)
