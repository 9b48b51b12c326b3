"""Workers that share the visual tokens of a sample compute what one worker computes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.loop.together import on_two_workers
from tests.training.models.test_active_mind import FRAMES, SETTINGS, conditions_of, filled, latents_of, no_clean
from training.loop.parallel import WorkerGroup
from training.models.active_mind.model import ActiveMind, Conditions


def two_speakers() -> Conditions:
    mask = torch.zeros(2, 2, FRAMES, 4, 8, dtype=torch.bool)
    mask[:, 0, :, :, :3] = mask[:, 1, :3, :, 4:] = mask[:, 1, 3:, 2:, 5:] = True
    return replace(conditions_of(speakers=2), speaker_mask=mask)


def run(model: ActiveMind, conditions: Conditions, checkpointing: bool) -> dict[str, Tensor]:
    """The output of one forward pass, and all gradients of a loss over it."""
    model.zero_grad()
    model.set_activation_checkpointing(checkpointing)
    clean = no_clean()
    clean[:, 0] = True
    latents = torch.cat((latents_of(), latents_of()[..., :2]), dim=-1)
    out = model(latents, torch.tensor([0.3, 0.8]), clean, conditions, hidden_at=0)
    weights = torch.randn(out.velocity.shape, generator=torch.Generator().manual_seed(7))
    (out.velocity * weights).sum().backward()
    assert out.hidden is not None
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"velocity": out.velocity.detach(), "hidden": out.hidden.detach(), **gradients}


def compare(group: WorkerGroup, bf16: bool) -> None:
    shared = WorkerGroup.of_process_group(torch.device("cpu"), sequence_parallel=2)
    assert (shared.rank, shared.data_rank, shared.data_size) == (group.rank, 0, 1)
    model = ActiveMind(SETTINGS)
    filled(model)
    for conditions in (conditions_of(), two_speakers()):
        for checkpointing in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                model.set_sequence_group(None)
                alone = run(model, conditions, checkpointing)
                model.set_sequence_group(shared.sequence)
                together = run(model, conditions, checkpointing)
            assert alone.keys() == together.keys()
            for name, value in together.items():
                found = value if name in ("velocity", "hidden") else shared.sum(value) / 2
                bound = 0.05 if bf16 else 1e-5
                assert (found - alone[name]).norm() <= bound * alone[name].norm(), name


@pytest.mark.parametrize("bf16", [False, True])
def test_outputs_and_gradients_are_those_of_one_worker(tmp_path: Path, bf16: bool) -> None:
    on_two_workers(tmp_path, compare, bf16)


def refused(group: WorkerGroup) -> None:
    shared = WorkerGroup.of_process_group(torch.device("cpu"), sequence_parallel=2)
    model = ActiveMind(SETTINGS)
    model.set_sequence_group(shared.sequence)
    with pytest.raises(ValueError, match="2 workers cannot share the 1x3 visual tokens of a frame evenly"):
        model(latents_of()[..., :2, :], torch.tensor([0.3, 0.8]), no_clean(), conditions_of())
    odd = ActiveMind(SETTINGS.model_copy(update={"shape": SETTINGS.shape.model_copy(update={"heads": 1})}))
    with pytest.raises(ValueError, match="2 workers cannot share the 1 heads of this model evenly"):
        odd.set_sequence_group(shared.sequence)


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    on_two_workers(tmp_path, refused)
