"""A row of the table of `benchmarks.networks`: the cost of a network, and of its reference."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tasks.networks.device import device


class NotMeasured(RuntimeError):
    """A network cannot be measured here. The message says why, in a few words."""


class Row(NamedTuple):
    """The cost of a network."""

    keys: int
    """Keys of its checkpoint."""
    parameters: int
    """Number of its parameters."""
    items: str
    """What is counted, such as frames of 800x800."""
    seconds: float
    """Seconds for one item."""
    reference_seconds: float | None
    """Seconds for one item by the operations of the published code. None if they are the same operations."""


def seconds(work: Callable[[], Any], repeats: int = 2) -> float:
    """The least seconds of several runs, after a first run that does not count."""
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
    """The number of its keys and of its parameters."""
    return len(network.state_dict()), sum(value.numel() for value in network.parameters())
