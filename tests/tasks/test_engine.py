import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tasks.engine import Engine, StoreError, store_access


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


def test_a_bad_unit_costs_only_itself() -> None:
    units = ["a", "raises", "b", "hangs", "c", "dies", *"defgh"]
    with Engine(workers=2) as engine:
        outcomes = {o.unit: o for o in engine.map(behave, units, time_limit_s=3)}
    assert set(outcomes) == set(units)
    assert {u for u, o in outcomes.items() if not o.error} == set("abcdefgh")
    assert all(outcomes[u].result == u.upper() for u in "abcdefgh")
    assert outcomes["raises"].error == "ValueError: a broken file"
    assert outcomes["hangs"].error == "took longer than 3 s"
    assert "process died" in outcomes["dies"].error


def test_a_full_disk_stops_the_run_instead_of_blaming_the_units() -> None:
    with pytest.raises(StoreError, match="No space left"), Engine(workers=2) as engine:
        list(engine.map(behave, ["a", "disk full", "b"], time_limit_s=30))
    with pytest.raises(StoreError, match="cannot write x"), store_access("write x"):
        raise PermissionError(errno.EACCES, "denied")


def test_units_are_drawn_no_faster_than_they_are_done() -> None:
    drawn = 0

    def endless():
        nonlocal drawn
        while True:
            drawn += 1
            yield "x"

    with Engine(workers=2) as engine:
        outcomes = engine.map(behave, endless(), time_limit_s=30)
        for _ in range(20):
            next(outcomes)
        outcomes.close()
    assert drawn <= 20 + 2 * 2 + 2


def test_no_worker_outlives_a_killed_run(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\nfrom tasks.engine import Engine\n"
        "if __name__ == '__main__':\n"
        "    with Engine(workers=2) as engine:\n"
        "        for outcome in engine.map(time.sleep, [0, 0, 600, 600], 3600):\n"
        "            print('done', flush=True)\n"
    )
    root = Path(__file__).parents[2]
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
