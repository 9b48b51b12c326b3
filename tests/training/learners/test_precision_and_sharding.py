"""The real model on two workers with the settings of a GPU: bfloat16, FSDP2, micro-batches."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from tasks.synthetic.puppet_shards import make_puppets
from tests.training.learners.test_active_mind_learner import job
from tests.training.loop.together import on_two_workers
from tests.training.new_model import new_model
from training.learners.active_mind import ActiveMindLearner
from training.loop import trainer
from training.loop.job import Job
from training.loop.parallel import WorkerGroup, full_tensor

BASE = {"sharding": "fsdp", "bf16": True, "micro_batch": 1, "activation_checkpointing": True}


@pytest.fixture(scope="module")
def puppets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("puppets")
    make_puppets(folder, 8, frames=9)
    return folder


def held(model: nn.Module) -> int:
    """Numbers of whole gradients that FSDP2 holds on this worker."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
    parameters = [parameter for group in groups if group for parameter in group.fsdp_params]
    whole = [getattr(p, "_unsharded_param", None) for p in parameters]
    gradients = [p.unsharded_accumulated_grad for p in parameters] + [p.grad for p in whole if p is not None]
    return sum(gradient.numel() for gradient in gradients if gradient is not None)


def gradients(group: WorkerGroup, job: Job, path: Path) -> None:
    """Write the gradients of a training's first step, and what is held of them between micro-batches."""
    between: list[int] = []
    sync = trainer.gradient_sync

    @contextlib.contextmanager
    def counted(model: nn.Module, last: bool) -> Iterator[None]:
        with sync(model, last):
            yield
        between.append(held(model))

    with (
        pytest.MonkeyPatch.context() as patch,
        trainer._PhaseRun(job, group, learner := job.learner(job, group), {"dataset": learner.dataset}) as run,
    ):
        patch.setattr(trainer, "gradient_sync", counted)
        share = next(run._batches)
        readable = float(group.sum(share.weight.sum().float()))
        run._accumulate_gradients(share, readable)
        trained = {name: p for name, p in run._model.named_parameters() if p.requires_grad}
        found = {name: full_tensor(p.grad) for name, p in trained.items()}
        blocks = [sum(full_tensor(p).numel() for p in block.parameters()) for block in learner.blocks(run._model)]
    if group.is_leader:
        torch.save({"gradients": found, "between": between, "blocks": blocks}, path)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_of_two_workers_in_bfloat16_are_those_of_one_in_float32(
    puppets: Path, tmp_path: Path, compiled: bool
) -> None:
    gradients(WorkerGroup(), job(puppets, tmp_path / "one", bf16=False), tmp_path / "one.pt")
    two = job(puppets, tmp_path / "two", compile=compiled, **BASE)
    on_two_workers(tmp_path, gradients, two, tmp_path / "two.pt")
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert len(two["between"]) == 2 and max(two["between"]) <= max(two["blocks"])
    assert one["gradients"].keys() == two["gradients"].keys()
    for name, expected in one["gradients"].items():
        assert (two["gradients"][name] - expected).norm() <= 0.05 * expected.norm() + 1e-7, name


@pytest.mark.parametrize(("bf16", "expected"), [(True, torch.bfloat16), (None, torch.float32)])
def test_previews_are_sampled_in_the_precision_of_the_training(
    puppets: Path, tmp_path: Path, bf16: bool | None, expected: torch.dtype
) -> None:
    learner = ActiveMindLearner(job(puppets, tmp_path, bf16=bf16, samples=1), WorkerGroup())
    model, found = new_model(learner), set()
    model.network.blocks[0].video.qkv.register_forward_hook(lambda _module, _inputs, out: found.add(out.dtype))
    learner.sample(model, 1, tmp_path / "samples", None)
    assert found == {expected} and list((tmp_path / "samples").glob("*.mp4"))
