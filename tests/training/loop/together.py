"""Two workers in processes of their own, which start once a session: a start takes longer than most trainings here."""

import multiprocessing
import os
import secrets
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training.loop.job import Job
from training.loop.parallel import WorkerGroup
from training.loop.trainer import train_phase


@cache
def _processes() -> list[ProcessPoolExecutor]:
    """One process for each rank. PyTorch keeps what follows from a process's rank, so it must not change."""
    return [ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for _ in range(2)]


def on_two_workers(folder: Path, function: Callable[..., object], *arguments: Any) -> None:
    """Call a function on two workers of one process group, with the group and the arguments.

    folder: where the workers meet. Raises what the function raises.
    """
    meeting = str(folder / f"meeting-{secrets.token_hex(4)}")
    calls = [
        process.submit(_call, rank, meeting, dict(os.environ), function, arguments)
        for rank, process in enumerate(_processes())
    ]
    done, _ = wait(calls, return_when=FIRST_EXCEPTION)
    if any(call.exception() for call in done):  # the other worker may wait for the one that failed
        for executor in _processes():
            for process in list((executor._processes or {}).values()):
                process.kill()
        _processes.cache_clear()
    for call in done:
        call.result()


def _call(
    rank: int, meeting: str, environment: dict[str, str], function: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)  # a fixture may have changed it since this process started
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        function(WorkerGroup.of_process_group(torch.device("cpu")), *arguments)
    finally:
        dist.destroy_process_group()


def train_together(folder: Path, jobs: list[Job]) -> None:
    """Train jobs one after the other, each on both workers."""
    on_two_workers(folder, _train, jobs)


def _train(group: WorkerGroup, jobs: list[Job]) -> None:
    for job in jobs:
        train_phase(job, WorkerGroup.of_process_group(group.device, job.recipe.run.sequence_parallel))
