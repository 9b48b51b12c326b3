"""The deployments of prefect.yaml, on a real Prefect server with a real worker."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import ROOT, Server

ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")  # Prefect's states after which nothing follows


@pytest.fixture(scope="module")
def deployed(server: Server) -> Server:
    server.post("/work_pools/", {"name": "curation", "type": "process"})
    server.prefect("deploy", "--all")
    return server


def id_of_curate(deployed: Server) -> str:
    return next(d["id"] for d in deployed.post("/deployments/filter", {}) if d["name"] == "curate")


def test_every_parameter_of_a_deployment_has_a_title_and_a_description(deployed: Server) -> None:
    parameters = {
        "curate": ("CurateParameters", {"manifest", "recipe", "out", "workers", "retry_errors"}),
        "train": ("TrainParameters", {"manifest", "recipe", "out", "phases", "workers", "ray"}),
    }
    deployments = {deployment["name"]: deployment for deployment in deployed.post("/deployments/filter", {})}
    assert set(deployments) == set(parameters)
    for name, (model, names) in parameters.items():
        fields = deployments[name]["parameter_openapi_schema"]["definitions"][model]["properties"]
        assert set(fields) == names
        assert all(field["title"] and len(field["description"]) > 40 for field in fields.values())


def test_a_cron_schedule_creates_runs(deployed: Server) -> None:
    schedules = f"/deployments/{id_of_curate(deployed)}/schedules"
    deployed.post(schedules, [{"schedule": {"cron": "0 3 * * *"}, "active": True}])
    for _ in range(300):
        runs = deployed.post("/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}})
        if runs:
            break
        time.sleep(0.2)
    assert runs


def end(worker: "subprocess.Popen[bytes]") -> None:
    """End a Prefect worker. Its first SIGTERM asks it to end, which it may miss; the second one makes it."""
    worker.terminate()
    try:
        worker.wait(20)
    except subprocess.TimeoutExpired:
        worker.terminate()
        worker.wait(60)


def test_a_triggered_run_completes_and_shows_its_funnel(deployed: Server, world: Any, tmp_path: Path) -> None:
    footage = tmp_path / "footage"
    footage.mkdir()
    (footage / "talk.mp4").write_bytes(world.path("talk_3s.mp4").read_bytes())
    parameters = {
        "manifest": str(footage),
        "recipe": str(ROOT / "tests" / "three_stages.yaml"),
        "out": str(tmp_path / "out"),
    }
    worker = deployed.start("worker", "start", "--pool", "curation")
    try:
        run = deployed.post(
            f"/deployments/{id_of_curate(deployed)}/create_flow_run", {"parameters": {"parameters": parameters}}
        )
        this_run = {"flow_runs": {"id": {"any_": [run["id"]]}, "state": {"type": {"any_": list(ENDS)}}}}
        while not deployed.post("/flow_runs/filter", this_run):
            time.sleep(0.5)
    finally:
        end(worker)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["shards"]
    done = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}, "deployments": {"name": {"any_": ["curate"]}}}
    artifacts = {artifact["key"]: artifact for artifact in deployed.post("/artifacts/filter", done)}
    assert "1 samples in 1 shards" in artifacts["summary"]["data"]
    assert any(row["what"] == "kept" and row["count"] == 1 for row in json.loads(artifacts["funnel"]["data"]))
    tasks = deployed.post("/task_runs/filter", done)
    assert {t["name"].split()[0] for t in tasks} == {"sources", "cut", "measure", "shards"}
    assert {t["state_type"] for t in tasks} == {"COMPLETED"}
