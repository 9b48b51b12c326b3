"""A run that is killed goes on where it stopped, and ends with the bytes of an undisturbed one."""

import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.summary import Summary
from tests.flows.conftest import ROOT, Server

TELL_TIME = ("times.json", "report.html")  # how long it took is no part of the outcome


def start(footage: Path, out: Path, server: Server, recipe: str, home: Path | None) -> "subprocess.Popen[bytes]":
    """The command; where it is given a home, with a temporary server of its own, as on a machine without one."""
    alone = {k: v for k, v in server.env.items() if k != "PREFECT_API_URL"} | {"PREFECT_HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "curate", footage, "--recipe", recipe, "--out", out],
        env=alone if home else server.env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def tree(out: Path) -> dict[str, bytes]:
    """Every file that a run leaves, but for its lock, what is half-written, and what tells the time it took."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.suffix not in (".lock", ".tmp") and path.name not in (".lock", *TELL_TIME):
            found[str(path.relative_to(out))] = path.read_bytes()
    return found


def kill_when(process: "subprocess.Popen[bytes]", out: Path, files: int) -> bool:
    """SIGKILL once this many files are there; False when the run was done before."""
    while process.poll() is None:
        if sum(path.is_file() for path in out.rglob("*")) >= files:
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
            _, alive = psutil.wait_procs(family, timeout=20)
            assert not alive, "something outlives a killed run"
            return True
        time.sleep(0.02)
    return False


def survive(footage: Path, whole: Path, killed: Path, server: Server, kills: int, recipe: str) -> None:
    expected = tree(whole)
    moments = random.Random(7)
    happened = 0
    for target in sorted(moments.sample(range(1, len(expected) - 2), kills)):
        home = killed.with_name("home")
        happened += kill_when(start(footage, killed, server, recipe, home), killed, target)
    assert happened >= kills * 0.6  # some targets are passed between two looks
    assert start(footage, killed, server, recipe, None).wait(300) == 1  # the truncated file is an error
    after = tree(killed)
    assert set(after) == set(expected)
    assert after == expected
    assert not list(killed.rglob("*.tmp"))


def test_a_killed_run_goes_on_to_the_same_bytes(
    folder_of_footage: Path, curated: tuple[Path, Summary], server: Server, tmp_path: Path
) -> None:
    survive(folder_of_footage, curated[0], tmp_path / "killed", server, 1, "tests/three_stages.yaml")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_change_nothing(folder_of_footage: Path, server: Server, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert start(folder_of_footage, whole, server, "demo", None).wait(300) == 1
    survive(folder_of_footage, whole, tmp_path / "killed", server, 10, "demo")
