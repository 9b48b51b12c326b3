"""Fixtures of the flows' tests: a Prefect server, footage, finished runs and a browser."""

import contextlib
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from data_manifests.dataset import DatasetManifest
from data_manifests.sources import BadRow, SourceRow
from data_manifests.storage import Storage
from flows.report.times import add_times
from flows.summary import Summary
from tasks.execution.curation import Curation
from tasks.execution.outcome import Outcome
from tasks.execution.worker_pool import WorkerPool
from tasks.recipe import Recipe, load_recipe

FILES = ["talk_3s.mp4", "cuts_plain.mp4", "frozen.mp4", "shake.mp4", "nobody.mp4", "truncated.mp4"]
HOSTILE = "<img src=x onerror=alert(1)>\"'&{{7*7}}.mp4"  # markup and template code, unless it is escaped

Curate = Callable[..., Outcome]
ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    """A Prefect server of the tests' own."""

    api: str
    """Address of its API."""
    env: dict[str, str]
    """Environment for processes that should use it."""

    def prefect(self, *arguments: str, timeout: float = 240) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
            env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.api}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        while True:
            try:
                with urllib.request.urlopen(request) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code != 503:  # it is busy writing; Prefect's own clients ask again, too
                    raise
                time.sleep(0.5)

    def copy_database(self, folder: Path) -> None:
        """Copy the database into a folder, which can then be the home of another server."""
        folder.mkdir(exist_ok=True)
        with (
            contextlib.closing(sqlite3.connect(Path(self.env["PREFECT_HOME"], "prefect.db"))) as ours,
            contextlib.closing(sqlite3.connect(folder / "prefect.db")) as theirs,
        ):
            ours.backup(theirs)

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
            env=self.env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One Prefect server for all tests, since a start takes ten seconds. Flows that run in this process use it, too.

    Its database is empty. To make one takes 20 s, so pytest's cache keeps it for the next session.
    """
    import prefect
    from prefect.logging.handlers import APILogHandler
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    api = f"http://127.0.0.1:{port}/api"
    home = tmp_path_factory.mktemp("prefect")
    kept = request.config.cache.mkdir(f"prefect-{prefect.__version__}") / "empty"
    if kept.exists():
        shutil.copytree(kept, home, dirs_exist_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")} | {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
        "DO_NOT_TRACK": "1",
    }
    running = Server(api, env)
    process = running.start("server", "start", "--port", str(port))
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"{api}/health").read()
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.2)
        else:
            raise AssertionError("the server has not started in four minutes")
        if not kept.exists():
            copy = kept.with_suffix(f".{os.getpid()}")
            running.copy_database(copy)
            copy.rename(kept)
        with temporary_settings({PREFECT_API_URL: api}):
            yield running
            # at its end, this process would look for the server for a minute if logs were left
            APILogHandler().flush()
    finally:
        process.terminate()
        process.wait(120)


FLOW_FILES = ["talk_medium.mp4", "cuts_plain.mp4", "fps_2997.mp4", "nobody.mp4", "truncated.mp4"]


@pytest.fixture(scope="session")
def folder_of_footage(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of generated files: talk, cuts, 29.97 frames a second, nobody, a truncated file, a copy of the first."""
    folder = tmp_path_factory.mktemp("folder of footage")
    for name in FLOW_FILES:
        shutil.copy(world.path(name), folder / name)
    shutil.copy(folder / FLOW_FILES[0], folder / "copy of the first.mp4")
    (folder / "notes.txt").write_text("not footage")
    return folder


@pytest.fixture(scope="session")
def curated(server: Server, folder_of_footage: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """An uninterrupted run of the flow on that folder: its output folder and its summary. Tests must not change it."""
    from flows.curate import curate
    from flows.parameters import CurateParameters

    out = tmp_path_factory.mktemp("curated")
    parameters = CurateParameters(manifest=str(folder_of_footage), recipe="tests/three_stages.yaml", out=str(out))
    return out, curate(parameters)


@pytest.fixture(scope="session")
def curate() -> Iterator[Curate]:
    """Curates files into a folder as the flow does, but without Prefect. Returns the outcome."""
    with WorkerPool(workers=2) as pool:

        def curate(files: list[Path], out: Path, recipe: Recipe, bad_rows: tuple[BadRow, ...] = ()) -> Outcome:
            storage = Storage(str(out))
            rows = [SourceRow(str(file), {}, f"footage.csv:{at}") for at, file in enumerate(files, 2)]
            curation = Curation(recipe, storage, rows, pool)
            totals = curation.run(curation.everything())
            outcome = Outcome(curation, bad_rows)
            plans = [plan for p in range(curation.view.partitions) for plan in outcome.plan_shards(p)]
            outcome.record(DatasetManifest.of(outcome.recipe_name, "footage.csv", outcome.write_shards(plans)))
            add_times(storage, curation.steps.fingerprints, totals)
            return outcome

        yield curate


@pytest.fixture(scope="session")
def footage(world: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of talk, files with faults, a truncated file, and a file with a hostile name."""
    folder = tmp_path_factory.mktemp("footage")
    shutil.copy(world.path("talk_medium.mp4"), folder / HOSTILE)
    return [folder / HOSTILE, *(world.path(name) for name in FILES)]


@pytest.fixture(scope="session")
def finished(curate: Curate, footage: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Outcome]:
    """A finished run of tests/three_stages.yaml: its output folder and its outcome. Tests must not change it."""
    out = tmp_path_factory.mktemp("finished")
    bad = BadRow("footage.csv:9", "no uri", False)
    return str(out), curate(footage, out, load_recipe("tests/three_stages.yaml"), (bad,))


FRAME = """<meta charset=utf-8>
<iframe id=f style="border:0;width:{width}px;height:900px" src="{page}"></iframe><pre></pre>
<script>
f.onload = async () => {{
  const page = f.contentDocument, view = f.contentWindow;
  let result;
  try {{ result = await (async () => {{ {script} }})(); }} catch (error) {{ result = `failed: ${{error}}`; }}
  document.querySelector("pre").textContent = encodeURIComponent(JSON.stringify(result));
}};
</script>"""
Browse = Callable[[Path, int, str], Any]


@pytest.fixture(scope="session")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Browse:
    """Opens a page in Chromium and runs a script in it. Returns what the script returns.

    The width is in pixels. The script sees `page`, the document, and `view`, its window.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("Chromium is not installed")
    folder = tmp_path_factory.mktemp("browser")

    def browse(page: Path, width: int, script: str) -> Any:
        frame = folder / "frame.html"
        frame.write_text(FRAME.format(width=width, page=page.as_uri(), script=script))
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
        options += [
            "--virtual-time-budget=600000",
            "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1400,1000",
        ]
        command = [browser, *options, "--dump-dom", frame.as_uri()]
        for _ in range(5):  # on a busy machine Chromium may print the page before the script has ended
            shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            printed = re.search("<pre>(.+?)</pre>", shown.stdout)
            if printed:
                return json.loads(unquote(printed[1]))
        raise AssertionError(shown.stdout[-2000:] + shown.stderr[-2000:])

    return browse
