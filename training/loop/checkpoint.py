"""Checkpoints: everything that a training needs to go on exactly where it was. A checkpoint is complete or absent.

torch.distributed.checkpoint writes them, each worker its part, so that any number of workers can read them. On a file
system a checkpoint is written under another name and renamed when it is complete. An object store cannot rename. There
a checkpoint is complete once its progress.json exists, which is written last and removed first.
"""

import contextlib
import json
import logging
import os
import pickle
import pickletools
import re
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

from data_manifests.storage import Storage
from training.loop.ema import ExponentialMovingAverage
from training.loop.parallel import WorkerGroup

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})")
_PROGRESS = "progress.json"
_METADATA = ".metadata"  # torch.distributed.checkpoint's list of the tensors
_STATE_KEY = "trained"  # of the tensors in torch.distributed.checkpoint's files
_UNREADABLE = "{}: cannot be read ({}); remove it to go on from the one before"
_UNANSWERED = "{}: the store does not answer ({}); the checkpoint may well be sound: run it again"
# errors of reading a file that is incomplete or missing; all others come from the store
_DAMAGE = (ValueError, FileNotFoundError, EOFError, LookupError, RuntimeError, pickle.UnpicklingError)


class CheckpointError(RuntimeError):
    """A checkpoint that the training cannot go on from; the message names it and what to do."""


class TrainingState:
    """The tensors that change during training: weights, optimizer state, averaged weights."""

    def __init__(self, model: nn.Module, optimizer: optim.Optimizer, averaged: ExponentialMovingAverage) -> None:
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


def save(
    folder: Storage, step: int, state: TrainingState, progress: Mapping[str, Any], keep: int, group: WorkerGroup
) -> None:
    """Write the checkpoint step-XXXXXXXX and remove all but the newest `keep`. Every worker calls it.

    A kill at any moment leaves complete checkpoints only. An existing checkpoint of this step stays as it is.

    folder: shared by all workers. progress: JSON values that are kept beside the tensors, such as the loader's state;
    the same on every worker.

    Raises CheckpointError when it cannot be written. An old checkpoint that cannot be removed is only a warning.
    """
    name = f"step-{step:08d}"
    try:
        _write(folder, name, state, progress, group)
    except (OSError, dcp.CheckpointException) as error:
        raise CheckpointError(
            f"{_checkpoint_id(folder, name)}: cannot be written ({_last_line(error)}); the checkpoints before it are "
            "complete: run it again to go on from the newest"
        ) from error
    if group.is_leader:
        with _warn_if_not_removed(folder, "old checkpoints"):
            for old in complete_checkpoints(folder)[:-keep]:
                with _warn_if_not_removed(folder, old):
                    _remove(folder, old)
    group.barrier()


@contextlib.contextmanager
def _warn_if_not_removed(folder: Storage, what: str) -> Iterator[None]:
    """The next checkpoint, or the next start, tries again to remove it."""
    try:
        yield
    except OSError as error:
        _log.warning("%s: %s cannot be removed: %s", folder.address, what, error)


def _write(folder: Storage, name: str, state: TrainingState, progress: Mapping[str, Any], group: WorkerGroup) -> None:
    writing_to = f".{name}.tmp" if folder.is_local else name
    if group.any(group.is_leader and name in complete_checkpoints(folder)):
        return
    if group.is_leader:
        folder.remove(writing_to)
    group.barrier()
    with _no_warning_about_one_worker():
        dcp.save({_STATE_KEY: state}, checkpoint_id=_checkpoint_id(folder, writing_to), no_dist=group.size == 1)
    if group.is_leader:
        folder.write_bytes(
            f"{writing_to}/{_PROGRESS}", (json.dumps(dict(progress), sort_keys=True, indent=1) + "\n").encode()
        )
        if folder.is_local:
            path = Path(folder.root, writing_to)
            for written in [*path.iterdir(), path]:
                _sync_to_disk(written)
            path.rename(Path(folder.root, name))
            _sync_to_disk(Path(folder.root))


def latest(folder: Storage) -> str | None:
    """The name of the newest complete checkpoint in a phase's folder. None if there is none."""
    return next(iter(complete_checkpoints(folder)[-1:]), None)


def complete_checkpoints(folder: Storage) -> list[str]:
    """The names of the complete checkpoints in a folder, oldest first."""
    names = [name for name in folder.folders() if _NAME.fullmatch(name)]
    return [name for name in names if folder.is_local or f"{name}/{_PROGRESS}" in folder.files(name)]


def remove_incomplete(folder: Storage) -> None:
    """Remove what a killed run left half-written or half-removed. No other run may use the folder meanwhile."""
    complete = complete_checkpoints(folder)
    for name in folder.folders():
        if _NAME.fullmatch(name.removeprefix(".").removesuffix(".tmp")) and name not in complete:
            folder.remove(name)


def read_progress(folder: Storage, name: str) -> dict[str, Any]:
    """The JSON values kept beside a checkpoint's tensors. Raises CheckpointError."""
    try:
        progress: dict[str, Any] = json.loads(folder.read_bytes(f"{name}/{_PROGRESS}"))
    except (OSError, ValueError) as error:
        raise CheckpointError(_explain(folder, name, error)) from None
    return progress


def load(folder: Storage, name: str, state: TrainingState, group: WorkerGroup) -> None:
    """Restore model, optimizer and averaged weights from a checkpoint. Raises CheckpointError."""
    folder.fs.invalidate_cache()
    try:
        with _no_warning_about_one_worker():
            dcp.load({_STATE_KEY: state}, checkpoint_id=_checkpoint_id(folder, name), no_dist=group.size == 1)
    except (OSError, RuntimeError, ValueError, dcp.CheckpointException) as error:
        raise CheckpointError(_explain(folder, name, error)) from error


def _explain(folder: Storage, name: str, error: BaseException) -> str:
    """Why a checkpoint could not be read, and what to do. Only a damaged checkpoint is to be removed."""
    causes = [error]
    if isinstance(error, dcp.CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
    damaged = folder.is_local or all(_is_damage(folder, name, cause) for cause in causes)
    return (_UNREADABLE if damaged else _UNANSWERED).format(_checkpoint_id(folder, name), _last_line(error))


def _is_damage(folder: Storage, name: str, cause: BaseException) -> bool:
    if not isinstance(cause, AssertionError):
        return isinstance(cause, _DAMAGE)
    # torch.distributed.checkpoint fails an assertion when it has no metadata, for any reason: read them once more
    try:
        for _ in pickletools.genops(folder.read_bytes(f"{name}/{_METADATA}")):
            pass
    except (OSError, ValueError) as error:
        return isinstance(error, _DAMAGE)
    return False  # the metadata are complete, so the store had failed


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:300]


def _checkpoint_id(folder: Storage, name: str) -> Path | str:
    """A checkpoint's path, or its fsspec address, as torch.distributed.checkpoint takes it."""
    return Path(folder.root, name) if folder.is_local else f"{folder.address}/{name}"


@contextlib.contextmanager
def _no_warning_about_one_worker() -> Iterator[None]:
    """torch.distributed.checkpoint warns when there is no process group. A single worker has none on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _remove(folder: Storage, name: str) -> None:
    """Remove a checkpoint so that it looks complete at no moment while it is half removed."""
    if folder.is_local:
        aside = f".{name}.tmp"
        Path(folder.root, name).rename(Path(folder.root, aside))
        folder.remove(aside)
    else:
        folder.remove(f"{name}/{_PROGRESS}")
        folder.remove(name)


def _sync_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
