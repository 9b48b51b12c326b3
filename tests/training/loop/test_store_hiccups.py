"""A training in a store that sometimes does not answer: no checkpoint is lost, and missing metrics end no training."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from data_manifests.storage import Storage
from tests.training.loop.tiny import Bad, Batch, Data, Tiny, job
from training.loop import checkpoint, outputs
from training.loop.checkpoint import CheckpointError
from training.loop.job import TrainingError
from training.loop.parallel import WorkerGroup
from training.loop.tracking import METRICS, read_metrics
from training.loop.trainer import train_phase


class Hiccups(LocalFileSystem):
    """A file system at an address that is not a path. It does not answer a request (get, put or rm, and a path) for
    which `silent` returns True."""

    protocol = "hiccups"
    silent: ClassVar[Callable[[str, str], bool]] = staticmethod(lambda *_: False)

    def _asked(self, operation: str, path: str) -> None:
        if type(self).silent(operation, path):
            raise TimeoutError(f"no answer about {path}")

    def open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        self._asked("get" if mode == "rb" else "put", path)
        return super().open(path, mode, **how)

    def put_file(self, path1: str, path2: str, **how: Any) -> None:
        self._asked("put", path2)
        self.makedirs(self._parent(path2), exist_ok=True)
        super().put_file(path1, path2, **how)

    def rm(self, path: str, **how: Any) -> None:
        self._asked("rm", path)
        super().rm(path, **how)


Silence = Callable[[str, str], None]


@pytest.fixture
def silence() -> Iterator[Silence]:
    """A function that silences an operation on all paths that match a pattern."""
    fsspec.register_implementation(Hiccups.protocol, Hiccups, clobber=True)

    def silence(operation: str, pattern: str) -> None:
        Hiccups.silent = staticmethod(lambda asked, path: asked == operation and bool(re.search(pattern, path)))

    yield silence
    Hiccups.silent = staticmethod(lambda *_: False)


@pytest.fixture
def out(tmp_path: Path, silence: Silence) -> str:
    return f"{Hiccups.protocol}://{tmp_path}/out"


CURVES = r"metrics\.jsonl|/samples/|/tensorboard/"


def test_a_training_goes_on_without_its_curves_and_copies_them_later(
    out: str, silence: Silence, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outputs, "_EVERY_S", 0.0)
    settings = {"trackers": ["tensorboard"], "sample_every": 2}
    silence("put", CURVES)
    assert train_phase(job(out, steps=4, **settings), WorkerGroup()).done
    there = Storage(f"{out}/base")
    assert checkpoint.latest(Storage(f"{out}/base/checkpoints")) == "step-00000004"
    assert there.files() == [] and there.folders("samples") == []
    assert "out/base: the newest metrics and samples cannot be copied there: " in caplog.text

    class Answering(Tiny):
        """The store answers again at the first sample."""

        def sample(self, *given: Any) -> dict[str, float]:
            silence("put", "nothing")
            return super().sample(*given)

    assert train_phase(job(out, steps=8, learner=Answering, **settings), WorkerGroup()).resumed_at == 4
    assert [row["step"] for row in read_metrics(f"{out}/base/{METRICS}") if "loss" in row] == [6, 8]
    assert there.folders("samples") == ["step-00000006", "step-00000008"] and there.files("tensorboard")


def test_a_checkpoint_that_cannot_be_written_ends_a_training_and_is_named(out: str, silence: Silence) -> None:
    train_phase(job(out, steps=3), WorkerGroup())
    silence("put", "step-00000006|metrics")
    with pytest.raises(CheckpointError, match=r"step-00000006: cannot be written .*no answer.*the checkpoints before"):
        train_phase(job(out, steps=9), WorkerGroup())
    silence("put", "step-00000006/progress|metrics")
    with pytest.raises(CheckpointError, match="step-00000006: cannot be written"):
        train_phase(job(out, steps=9), WorkerGroup())
    silence("put", "nothing")
    assert train_phase(job(out, steps=9), WorkerGroup()).resumed_at == 3


def test_the_error_that_ends_a_training_is_raised_and_not_one_of_closing_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class BadlyClosed(Data):
        def __iter__(self) -> Iterator[Batch]:
            try:
                yield from super().__iter__()
            finally:
                raise OSError("the loader cannot be closed")

    class Ended(Bad):
        def loader(self) -> Data:
            return BadlyClosed(self.job, self.group)

    with pytest.raises(TrainingError, match="the loss of s03 is not finite"):
        train_phase(job(tmp_path, learner=Ended, max_skipped=0), WorkerGroup())
    assert "phase base was not closed properly: the loader cannot be closed" in caplog.text


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(
    out: str, silence: Silence, caplog: pytest.LogCaptureFixture
) -> None:
    silence("rm", "step-00000003/progress")
    assert train_phase(job(out, steps=10, keep=1), WorkerGroup()).done
    assert "out/base/checkpoints: step-00000003 cannot be removed: " in caplog.text
    assert checkpoint.complete_checkpoints(Storage(f"{out}/base/checkpoints")) == ["step-00000003", "step-00000010"]


@pytest.mark.parametrize("file", ["progress.json", ".metadata", "__0_0.distcp"])
def test_only_a_damaged_checkpoint_is_to_be_removed(out: str, silence: Silence, file: str) -> None:
    train_phase(job(out, steps=4), WorkerGroup())
    silence("get", f"step-00000004/{re.escape(file)}")
    with pytest.raises(CheckpointError, match=r"step-00000004: the store does not answer .*run it again") as told:
        train_phase(job(out, steps=6), WorkerGroup())
    assert "remove" not in str(told.value)
    silence("get", "nothing")
    checkpoints = Storage(f"{out}/base/checkpoints")
    whole = checkpoints.read_bytes(f"step-00000004/{file}")
    checkpoints.write_bytes(f"step-00000004/{file}", whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"step-00000004: cannot be read .*; remove it"):
        train_phase(job(out, steps=6), WorkerGroup())
    checkpoints.write_bytes(f"step-00000004/{file}", whole)
    assert train_phase(job(out, steps=6), WorkerGroup()).resumed_at == 4


def test_metadata_that_can_be_read_at_the_second_try_are_not_damaged(out: str, silence: Silence) -> None:
    train_phase(job(out, steps=4), WorkerGroup())
    asked = []

    def twice(operation: str, path: str) -> bool:
        asked.extend([path] if operation == "get" and path.endswith(".metadata") else [])
        return path.endswith(".metadata") and len(asked) == 1

    Hiccups.silent = staticmethod(twice)
    with pytest.raises(CheckpointError, match="the store does not answer"):
        train_phase(job(out, steps=6), WorkerGroup())
    assert len(asked) > 1
