"""Several workers: communication, and the precision in which they compute and add gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.training.loop.together import on_two_workers
from training.loop.parallel import WorkerGroup, full_tensor, local_tensor, parallelize, place_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        product = self.linear(x)
        assert product.dtype == torch.bfloat16
        out: Tensor = self.norm(product.float())
        return out


def communicate(group: WorkerGroup) -> None:
    rank = group.rank
    assert group.is_leader == (rank == 0)
    assert group.any(rank == 1) and not group.any(False)
    assert group.gather(f"of {rank}") == ["of 0", "of 1"]
    assert group.sum(torch.tensor([1.0, rank])).tolist() == [2.0, 1.0]
    group.barrier()
    made: list[int] = []
    assert group.run_on_leader(lambda: made.append(rank) or f"by {rank}") == "by 0"
    assert made == [0] * (rank == 0)  # the other workers have not called it
    with pytest.raises(LookupError, match="of 0"):
        group.run_on_leader(lambda: {}[f"of {rank}"])


def compare_with_one_worker(group: WorkerGroup) -> None:
    rank = group.rank
    torch.manual_seed(0)
    alone = nn.Sequential(Block(), Block())
    with torch.device("meta"):
        model = nn.Sequential(Block(), Block())

    def fill(made: nn.Module) -> None:
        for name, parameter in made.named_parameters():
            local_tensor(parameter).copy_(alone.get_parameter(name)[place_of(parameter)])

    parallelize(model, group, "fsdp", list(model), fill)
    data = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        model(data[2 * rank : 2 * rank + 2]).float().square().sum().backward()
        (alone(data).float().square().sum() / 2).backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert ours.dtype == ours.grad.dtype == torch.float32
        assert local_tensor(ours).numel() < theirs.numel()  # each worker holds a part
        torch.testing.assert_close(full_tensor(ours), theirs)  # the stored weights are never rounded
        torch.testing.assert_close(full_tensor(ours.grad), theirs.grad, rtol=0.05, atol=0.05)


def test_workers_communicate(tmp_path: Path) -> None:
    on_two_workers(tmp_path, communicate)


def test_with_bf16_gradient_sums_and_stored_weights_stay_float32(tmp_path: Path) -> None:
    on_two_workers(tmp_path, compare_with_one_worker)
