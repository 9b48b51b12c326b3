"""Checkpoints: all that a training needs to go on exactly where it was, whole or absent.

Written by torch.distributed.checkpoint, each worker its part, so that any number of workers can read them. On a file
system a checkpoint is made beside its place and renamed. An object store renames nothing: there a checkpoint is one
from the moment that its progress.json is there, which is written last and removed first.
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
from training.ema import AveragedWeights
from training.parallel import Team

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})")
_PROGRESS = "progress.json"
_METADATA = ".metadata"  # what torch.distributed.checkpoint calls its list of the tensors
_UNREADABLE = "{}: cannot be read ({}); remove it to go on from the one before"
_UNANSWERED = "{}: the store does not answer ({}); the checkpoint may well be sound: run it again"
# what reading a file that is not whole, or not there, comes to; all else is the store's
_DAMAGE = (ValueError, FileNotFoundError, EOFError, LookupError, RuntimeError, pickle.UnpicklingError)


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


def save(folder: Storage, step: int, trained: Trained, progress: Mapping[str, Any], keep: int, team: Team) -> None:
    """Write a checkpoint, step-XXXXXXXX, on every worker together, and remove all but the newest `keep`.

    A kill at any moment leaves whole checkpoints only. Where one of this step is there already, it is left as it is.
    Raises CheckpointError where it cannot be written; an old one that cannot be removed is only a warning.

    folder: that all workers share. progress: what goes on beside the tensors, as JSON can say it, such as the loader's
    position; the same on every worker.
    """
    name = f"step-{step:08d}"
    try:
        _write(folder, name, trained, progress, team)
    except (OSError, dcp.CheckpointException) as error:
        raise CheckpointError(
            f"{_place(folder, name)}: cannot be written ({_last_line(error)}); the checkpoints before it stand: run it "
            "again to go on from the newest"
        ) from error
    if team.leads:
        with _only_a_warning(folder, "old checkpoints"):
            for old in whole_ones(folder)[:-keep]:
                with _only_a_warning(folder, old):
                    _remove(folder, old)
    team.barrier()


@contextlib.contextmanager
def _only_a_warning(folder: Storage, what: str) -> Iterator[None]:
    """What cannot be removed now is tried again at the next checkpoint, or swept at the next start."""
    try:
        yield
    except OSError as error:
        _log.warning("%s: %s cannot be removed: %s", folder.address, what, error)


def _write(folder: Storage, name: str, trained: Trained, progress: Mapping[str, Any], team: Team) -> None:
    made = f".{name}.tmp" if folder.is_local else name
    if team.any(team.leads and name in whole_ones(folder)):
        return
    if team.leads:
        folder.remove(made)
    team.barrier()
    with _alone_without_a_word():
        dcp.save({"trained": trained}, checkpoint_id=_place(folder, made), no_dist=team.size == 1)
    if team.leads:
        folder.write_bytes(
            f"{made}/{_PROGRESS}", (json.dumps(dict(progress), sort_keys=True, indent=1) + "\n").encode()
        )
        if folder.is_local:
            here = Path(folder.root, made)
            for path in [*here.iterdir(), here]:
                _to_disk(path)
            here.rename(Path(folder.root, name))
            _to_disk(Path(folder.root))


def latest(folder: Storage) -> str | None:
    """The name of the newest checkpoint in a phase's folder."""
    return next(iter(whole_ones(folder)[-1:]), None)


def whole_ones(folder: Storage) -> list[str]:
    """The names of the checkpoints in a folder, oldest first."""
    names = [name for name in folder.folders() if _NAME.fullmatch(name)]
    return [name for name in names if folder.is_local or f"{name}/{_PROGRESS}" in folder.files(name)]


def sweep(folder: Storage) -> None:
    """Remove what a killed run left half-written or half-removed. Only for a run that has the folder to itself."""
    whole = whole_ones(folder)
    for name in folder.folders():
        if _NAME.fullmatch(name.removeprefix(".").removesuffix(".tmp")) and name not in whole:
            folder.remove(name)


def progress_of(folder: Storage, name: str) -> dict[str, Any]:
    """What stands beside a checkpoint's tensors. Raises CheckpointError."""
    try:
        progress: dict[str, Any] = json.loads(folder.read_bytes(f"{name}/{_PROGRESS}"))
    except (OSError, ValueError) as error:
        raise CheckpointError(_why(folder, name, error)) from None
    return progress


def load(folder: Storage, name: str, trained: Trained, team: Team) -> None:
    """Let model, optimizer and averaged weights be as they were. Raises CheckpointError."""
    folder.fs.invalidate_cache()
    try:
        with _alone_without_a_word():
            dcp.load({"trained": trained}, checkpoint_id=_place(folder, name), no_dist=team.size == 1)
    except (OSError, RuntimeError, ValueError, dcp.CheckpointException) as error:
        raise CheckpointError(_why(folder, name, error)) from error


def _why(folder: Storage, name: str, error: BaseException) -> str:
    """What to do about a checkpoint that could not be read: it is removed only where it is damaged."""
    causes = [error]
    if isinstance(error, dcp.CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
    damaged = folder.is_local or all(_is_damage(folder, name, cause) for cause in causes)
    return (_UNREADABLE if damaged else _UNANSWERED).format(_place(folder, name), _last_line(error))


def _is_damage(folder: Storage, name: str, cause: BaseException) -> bool:
    if not isinstance(cause, AssertionError):
        return isinstance(cause, _DAMAGE)
    # how torch.distributed.checkpoint says that it has no metadata, whatever the reason: so they are read once more
    try:
        for _ in pickletools.genops(folder.read_bytes(f"{name}/{_METADATA}")):
            pass
    except (OSError, ValueError) as error:
        return isinstance(error, _DAMAGE)
    return False  # they are whole: it was the store


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:300]


def _place(folder: Storage, name: str) -> Path | str:
    """A checkpoint as torch.distributed.checkpoint is told of it: by a path, or by an address that fsspec knows."""
    return Path(folder.root, name) if folder.is_local else f"{folder.address}/{name}"


@contextlib.contextmanager
def _alone_without_a_word() -> Iterator[None]:
    """One worker without a process group is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _remove(folder: Storage, name: str) -> None:
    """Remove a checkpoint so that no moment leaves half of it as one."""
    if folder.is_local:
        aside = f".{name}.tmp"
        Path(folder.root, name).rename(Path(folder.root, aside))
        folder.remove(aside)
    else:
        folder.remove(f"{name}/{_PROGRESS}")
        folder.remove(name)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
