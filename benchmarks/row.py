"""A row of `benchmarks.networks`: what a network costs, beside the reference's arithmetic."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tasks.networks.device import device


class NotMeasured(RuntimeError):
    """What keeps a network from being measured here, in a few words."""


class Row(NamedTuple):
    """items: what is counted. seconds: of one item; reference_seconds: by the reference's arithmetic, None where the
    operations are the reference's own."""

    keys: int
    parameters: int
    items: str
    seconds: float
    reference_seconds: float | None


def seconds(work: Callable[[], Any], repeats: int = 2) -> float:
    """The least of several runs, after one that is not counted."""
    clock = time.perf_counter if device().type == "cuda" else time.process_time

    def once() -> float:
        started = clock()
        work()
        if device().type == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    once()
    return min(once() for _ in range(repeats))


def size_of(network: torch.nn.Module) -> tuple[int, int]:
    """Its keys and its parameters."""
    return len(network.state_dict()), sum(value.numel() for value in network.parameters())
