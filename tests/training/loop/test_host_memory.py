"""A worker never holds more of the model than its share and one block, from its start on."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.training.loop.tiny import Tiny, job
from tests.training.loop.together import on_two_workers
from training.loop import phases, trainer
from training.loop.job import Job
from training.loop.parallel import WorkerGroup, full_tensor
from training.loop.trainer import train_phase

WIDTH, DEPTH = 1024, 48
BLOCK = 4 * 3 * WIDTH * (WIDTH + 1)  # bytes


class WideBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.video, self.text, self.audio = (nn.Linear(WIDTH, WIDTH) for _ in range(3))


class Wide(Tiny):
    """A model of 600 MB."""

    def model(self, latent_scale: tuple[float, ...] | None = None) -> nn.Module:
        with torch.device("meta"):
            made = nn.Module()
            made.blocks = nn.ModuleList(WideBlock() for _ in range(DEPTH))
            return made


class Peak:
    """The largest anonymous memory of this process, in bytes above that at the start. Files in the page cache, which
    the system can drop, do not count."""

    def __enter__(self) -> "Peak":
        self.base = self.bytes = self._now()
        self._ended = threading.Event()
        self._watching = threading.Thread(target=self._watch)
        self._watching.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self.bytes = max(self.bytes, self._now())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watching.join()

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no RssAnon")


class Prepared(Exception):
    """The model has its weights."""


def prepare(group: WorkerGroup, job: Job, out: Path) -> None:
    """Prepare a phase up to its optimizer, which lives on the GPU where there is one. Writes the peak and a weight."""
    taken: list[Any] = []

    def ready(run: Any) -> None:
        taken.append(dict(run._model.named_parameters()))
        raise Prepared

    train_phase(replace(job, phase="base", out=out / "imports", learner=Tiny), group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._PhaseRun, "_prepare_optimizer", ready)
        with Peak() as peak, pytest.raises(Prepared):
            trainer._PhaseRun(job, group, job.learner(job, group), {})
    last: Tensor = full_tensor(taken[0][f"blocks.{DEPTH - 1}.audio.weight"].detach())
    if group.is_leader:
        save_file({"last": last.contiguous()}, out / "last.safetensors")
    (out / f"{group.size}-{group.rank}.json").write_text(json.dumps(peak.bytes - peak.base))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("origin", [pytest.param("new", marks=pytest.mark.slow), "base.text"])
def test_a_worker_starts_with_its_share_and_one_block(tmp_path: Path, origin: str) -> None:
    mine = job(tmp_path, "base" if origin == "new" else "warmup", learner=Wide, sharding="fsdp")
    if origin != "new":
        names = [
            f"blocks.{k}.{part}.{kind}"
            for k in range(DEPTH)
            for part in ("video", "text")
            for kind in ("weight", "bias")
        ]
        weights = {name: torch.full((WIDTH, WIDTH) if "weight" in name else (WIDTH,), 0.5) for name in names}
        phases.write_weights(tmp_path, "base", {}, weights, {"shape": {}})
    on_two_workers(tmp_path, prepare, mine, tmp_path)
    share = DEPTH * BLOCK / 2
    for rank in range(2):
        assert json.loads((tmp_path / f"2-{rank}.json").read_text()) <= 1.2 * share + BLOCK
    last = load_file(tmp_path / "last.safetensors")["last"]
    learner = Wide(mine, WorkerGroup())
    expected = learner.new_weight(learner.model(), f"blocks.{DEPTH - 1}.audio.weight")
    assert torch.equal(last, expected if origin == "new" else torch.full_like(last, 0.5))
