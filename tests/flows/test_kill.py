"""A run that is killed can be resumed, and then writes the same bytes as an uninterrupted run."""

import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.summary import Summary
from tests.flows.conftest import ROOT, Server

TIMED = ("times.json", "report.html")  # files that depend on how long a run took


def start(footage: Path, out: Path, server: Server, recipe: str, home: Path | None) -> "subprocess.Popen[bytes]":
    """Start `understudy curate`. home: a folder for a temporary Prefect server of its own; None to use `server`."""
    if home and not home.exists():
        server.copy_database(home)  # a server that makes its database anew takes 16 s longer to start
    alone = {k: v for k, v in server.env.items() if k != "PREFECT_API_URL"} | {"PREFECT_HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli.main", "curate", footage, "--recipe", recipe, "--out", out],
        env=alone if home else server.env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def tree(out: Path) -> dict[str, bytes]:
    """The files that a run leaves, without its lock, half-written files, and files that depend on how long it took."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.suffix not in (".lock", ".tmp") and path.name not in (".lock", *TIMED):
            found[str(path.relative_to(out))] = path.read_bytes()
    return found


def kill_when(process: "subprocess.Popen[bytes]", out: Path, files: int) -> bool:
    """Kill a run with SIGKILL once so many files are there. Returns False when the run has ended before."""
    while process.poll() is None:
        if sum(path.is_file() for path in out.rglob("*")) >= files:
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
            _, alive = psutil.wait_procs(family, timeout=20)
            assert not alive, "a process of a killed run is still running"
            return True
        time.sleep(0.02)
    return False


def kill_and_resume(footage: Path, whole: Path, killed: Path, server: Server, kills: int, recipe: str) -> None:
    expected = tree(whole)
    rng = random.Random(7)
    num_killed = 0
    for target in sorted(rng.sample(range(1, len(expected) - 2), kills)):
        home = killed.with_name("home")
        num_killed += kill_when(start(footage, killed, server, recipe, home), killed, target)
    assert num_killed >= kills * 0.6  # a run may pass its target and end between two looks
    assert start(footage, killed, server, recipe, None).wait(300) == 1  # the truncated file is an error
    after = tree(killed)
    assert set(after) == set(expected)
    assert after == expected
    assert not list(killed.rglob("*.tmp"))


def test_a_killed_run_is_resumed_and_writes_the_same_bytes(
    folder_of_footage: Path, curated: tuple[Path, Summary], server: Server, tmp_path: Path
) -> None:
    kill_and_resume(folder_of_footage, curated[0], tmp_path / "killed", server, 1, "tests/three_stages.yaml")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_ten_times_writes_the_same_bytes(
    folder_of_footage: Path, server: Server, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    assert start(folder_of_footage, whole, server, "demo", None).wait(300) == 1
    kill_and_resume(folder_of_footage, whole, tmp_path / "killed", server, 10, "demo")
