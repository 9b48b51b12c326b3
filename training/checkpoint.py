"""Checkpoints: all that a training needs to go on exactly where it was, whole or absent.

Written by torch.distributed.checkpoint, each worker its part, so that any number of workers can read them.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from training.ema import AveragedWeights
from training.parallel import Team

_NAME = re.compile(r"step-(\d{8})")
_PROGRESS = "progress.json"
_UNREADABLE = "{}: cannot be read ({}); remove it to go on from the one before"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be gone on from; the message names it and what to do."""


class Trained:
    """What changes in the course of a training, tensor by tensor: weights, optimizer state, averaged weights."""

    def __init__(self, model: nn.Module, optimizer: optim.Optimizer, averaged: AveragedWeights) -> None:
        self._model, self._optimizer, self._averaged = model, optimizer, averaged

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self._model),
            "optimizer": get_optimizer_state_dict(self._model, self._optimizer),
            "averaged": self._averaged.weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        set_model_state_dict(self._model, state["model"])
        set_optimizer_state_dict(self._model, self._optimizer, state["optimizer"])


def save(folder: Path, step: int, trained: Trained, progress: Mapping[str, Any], keep: int, team: Team) -> Path:
    """Write a checkpoint, on every worker together, and remove all but the newest `keep`.

    It is made beside its place and renamed: a kill at any moment leaves whole checkpoints only. Where one of this step
    is there already, it is left as it is.

    folder: on a file system that all workers share. progress: what goes on beside the tensors, as JSON can say it,
    such as the loader's position; the same on every worker.

    Returns: the checkpoint's folder, step-XXXXXXXX.
    """
    whole, made = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    if team.any(team.leads and whole.exists()):
        return whole
    if team.leads:
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
    team.barrier()
    with _alone_without_a_word():
        dcp.save({"trained": trained}, checkpoint_id=made, no_dist=team.size == 1)
    if team.leads:
        (made / _PROGRESS).write_text(json.dumps(dict(progress), sort_keys=True, indent=1) + "\n")
        for path in [*made.iterdir(), made]:
            _to_disk(path)
        made.rename(whole)
        _to_disk(folder)
        for old in whole_ones(folder)[:-keep]:
            _remove(old)
    team.barrier()
    return whole


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a phase's folder."""
    return next(iter(whole_ones(folder)[-1:]), None)


def whole_ones(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def sweep(folder: Path) -> None:
    """Remove what a killed run left half-written or half-removed. Only for a run that has the folder to itself."""
    for left in folder.glob(".step-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def progress_of(checkpoint: Path) -> dict[str, Any]:
    """What stands beside a checkpoint's tensors. Raises CheckpointError."""
    try:
        progress: dict[str, Any] = json.loads((checkpoint / _PROGRESS).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(_UNREADABLE.format(checkpoint, error)) from None
    return progress


def load(checkpoint: Path, trained: Trained, team: Team) -> None:
    """Let model, optimizer and averaged weights be as they were. Raises CheckpointError."""
    try:
        with _alone_without_a_word():
            dcp.load({"trained": trained}, checkpoint_id=checkpoint, no_dist=team.size == 1)
    except (OSError, RuntimeError, ValueError, dcp.CheckpointException) as error:
        what = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(_UNREADABLE.format(checkpoint, what[-1][:300])) from error


@contextlib.contextmanager
def _alone_without_a_word() -> Iterator[None]:
    """One worker without a process group is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that no moment leaves half of it under its name."""
    aside = checkpoint.with_name(f".{checkpoint.name}.tmp")
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
