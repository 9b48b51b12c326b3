"""prefect.yaml on a real server, with a real worker."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    api: str
    env: dict[str, str]

    def prefect(self, *arguments: str, timeout: float = 240) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
            env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.api}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
            env=self.env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    api = f"http://127.0.0.1:{port}/api"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")} | {
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
        "DO_NOT_TRACK": "1",
    }
    running = Server(api, env)
    process = running.start("server", "start", "--port", str(port))
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{api}/health").read()
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.5)
        running.prefect("work-pool", "create", "--type", "process", "curation")
        running.prefect("deploy", "--all")
        yield running
    finally:
        process.terminate()
        process.wait(30)


def test_the_forms_explain_themselves(server: Server) -> None:
    asked = {
        "curate": ("CurateParameters", {"manifest", "recipe", "out", "workers", "retry_errors"}),
        "train": ("TrainParameters", {"manifest", "recipe", "out", "phases", "workers", "ray"}),
    }
    deployments = {deployment["name"]: deployment for deployment in server.post("/deployments/filter", {})}
    assert set(deployments) == set(asked)
    for name, (model, names) in asked.items():
        fields = deployments[name]["parameter_openapi_schema"]["definitions"][model]["properties"]
        assert set(fields) == names
        assert all(field["title"] and len(field["description"]) > 40 for field in fields.values())


def test_a_schedule_really_makes_runs(server: Server) -> None:
    server.prefect("deployment", "schedule", "create", "curate/curate", "--cron", "0 3 * * *")
    for _ in range(120):
        runs = server.post("/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}})
        if runs:
            break
        time.sleep(0.5)
    assert runs


def test_a_triggered_run_completes_and_shows_its_funnel(server: Server, world: Any, tmp_path: Path) -> None:
    footage = tmp_path / "footage"
    footage.mkdir()
    (footage / "talk.mp4").write_bytes(world.path("talk_3s.mp4").read_bytes())
    parameters = {
        "manifest": str(footage),
        "recipe": str(ROOT / "tests" / "three_stages.yaml"),
        "out": str(tmp_path / "out"),
    }
    worker = server.start("worker", "start", "--pool", "curation")
    try:
        server.prefect(
            "deployment", "run", "curate/curate", "--params", json.dumps({"parameters": parameters}), "--watch"
        )
    finally:
        worker.terminate()
        worker.wait(30)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["shards"]
    artifacts = {artifact["key"]: artifact for artifact in server.post("/artifacts/filter", {})}
    assert "1 samples in 1 shards" in artifacts["summary"]["data"]
    assert any(row["what"] == "kept" and row["count"] == 1 for row in json.loads(artifacts["funnel"]["data"]))
    tasks = server.post("/task_runs/filter", {})
    assert {t["name"].split()[0] for t in tasks} == {
        "sources",
        "scenes",
        "clips",
        "people",
        "motion",
        "speech",
        "shards",
    }
    assert {t["state_type"] for t in tasks} == {"COMPLETED"}
