"""A run that is killed goes on where it stopped, and ends with the bytes of an undisturbed one."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
FILES = ["talk_3s.mp4", "cuts_plain.mp4", "fps_2997.mp4", "nobody.mp4", "truncated.mp4"]


@pytest.fixture(scope="module")
def footage(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("footage")
    for name in FILES:
        shutil.copy(world.path(name), folder / name)
    return folder


TELL_TIME = ("times.json", "report.html")  # how long it took is no part of the outcome


def start(footage: Path, out: Path, home: Path, recipe: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "curate", footage, "--recipe", recipe, "--out", out],
        env={**os.environ, "PREFECT_HOME": str(home)}, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
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


def survive(footage: Path, folder: Path, kills: int, recipe: str) -> None:
    whole, killed = folder / "whole", folder / "killed"
    assert start(footage, whole, folder / "home", recipe).wait(300) == 1  # the truncated file is an error
    expected = tree(whole)
    moments = random.Random(7)
    happened = 0
    for target in sorted(moments.sample(range(1, len(expected) - 2), kills)):
        happened += kill_when(start(footage, killed, folder / "home", recipe), killed, target)
    assert happened >= kills * 0.6  # some targets are passed between two looks
    assert start(footage, killed, folder / "home", recipe).wait(300) == 1
    after = tree(killed)
    assert set(after) == set(expected)
    assert after == expected
    assert not list(killed.rglob("*.tmp"))


def test_a_killed_run_goes_on_to_the_same_bytes(footage: Path, tmp_path: Path) -> None:
    survive(footage, tmp_path, kills=1, recipe="tests/three_stages.yaml")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_change_nothing(footage: Path, tmp_path: Path) -> None:
    survive(footage, tmp_path, kills=10, recipe="demo")
