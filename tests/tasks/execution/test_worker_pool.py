"""A unit that fails costs only itself. A fault of the machine stops the run. No worker outlives its run."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_manifests.storage import StoreError, store_access
from tasks.execution.worker_pool import WorkerPool


def behave(kind: str) -> str:
    if kind == "raises":
        raise ValueError("a broken\nfile")
    if kind == "hangs":
        time.sleep(3600)
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "disk full":
        raise OSError(errno.ENOSPC, "No space left on device")
    return kind.upper()


def test_a_unit_that_raises_hangs_or_dies_costs_only_itself() -> None:
    units = ["a", "raises", "b", "hangs", "c", "dies", *"defgh"]
    with WorkerPool(workers=2) as pool:
        results = {r.key: r for r in pool.map(behave, zip(units, units, strict=True), time_limit_s=3)}
    assert set(results) == set(units)
    assert {unit for unit, result in results.items() if not result.error} == set("abcdefgh")
    assert all(results[unit].result == unit.upper() for unit in "abcdefgh")
    assert results["raises"].error == "ValueError: a broken file"
    assert results["hangs"].error == "took longer than 3 s"
    assert "process died" in results["dies"].error


def test_a_full_disk_stops_the_run_instead_of_blaming_the_units() -> None:
    with pytest.raises(StoreError, match="No space left"), WorkerPool(workers=2) as pool:
        list(pool.map(behave, [("1", "a"), ("2", "disk full"), ("3", "b")], time_limit_s=30))
    with pytest.raises(StoreError, match="cannot write x"), store_access("write x"):
        raise PermissionError(errno.EACCES, "denied")


def test_the_worker_pool_draws_units_no_faster_than_they_are_done() -> None:
    drawn = 0

    def endless():
        nonlocal drawn
        while True:
            drawn += 1
            yield str(drawn), "x"

    with WorkerPool(workers=2) as pool:
        results = pool.map(behave, endless(), time_limit_s=30)
        for _ in range(20):
            next(results)
        results.close()
    assert drawn <= 20 + 2 * 2 + 2


def test_no_worker_outlives_a_killed_run(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\nfrom tasks.execution.worker_pool import WorkerPool\n"
        "if __name__ == '__main__':\n"
        "    with WorkerPool(workers=2) as pool:\n"
        "        for result in pool.map(time.sleep, enumerate([0, 0, 600, 600]), 3600):\n"
        "            print('done', flush=True)\n"
    )
    root = Path(__file__).parents[3]
    run = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert run.stdout and run.stdout.readline() == "done\n"
    workers = psutil.Process(run.pid).children(recursive=True)
    assert workers
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
