"""Workers together: what they agree on, and in which precision they compute and add up."""

import os
import secrets
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.parallel import Team, full, local, spread


class Block(nn.Module):
    """Notes the type in which each of its weights was met."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.met: dict[str, torch.dtype] = {}
        for name, module in (("linear", self.linear), ("norm", self.norm)):
            module.register_forward_pre_hook(lambda m, _, name=name: self.met.update({name: m.weight.dtype}))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(x))
        return out


def worker(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    team = Team.of_process_group(torch.device("cpu"))
    assert team.leads == (rank == 0)
    assert team.any(rank == 1) and not team.any(False)
    assert team.gather(f"of {rank}") == ["of 0", "of 1"]
    assert team.sum(torch.tensor([1.0, rank])).tolist() == [2.0, 1.0]
    team.barrier()
    made: list[int] = []
    assert team.made_once(lambda: made.append(rank) or f"by {rank}") == "by 0"
    assert made == [0] * (rank == 0)  # the others have not even tried
    with pytest.raises(LookupError, match="of 0"):
        team.made_once(lambda: {}[f"of {rank}"])

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    alone = nn.Sequential(Block(), Block())
    alone.load_state_dict(model.state_dict())
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    blocks = list(model)
    spread(model, team, "fsdp", True, blocks, norms)
    data = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        model(data[2 * rank : 2 * rank + 2]).float().square().sum().backward()
        (alone(data).float().square().sum() / 2).backward()
    for block in blocks:
        assert block.met == {"linear": torch.bfloat16, "norm": torch.float32}
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert ours.dtype == ours.grad.dtype == torch.float32
        assert local(ours).numel() < theirs.numel()  # each worker holds a part
        torch.testing.assert_close(full(ours), theirs)  # the weights themselves are never rounded
        torch.testing.assert_close(full(ours.grad), theirs.grad, rtol=0.05, atol=0.05)
    dist.barrier()
    os._exit(0)  # all is asserted; the interpreter's end sometimes aborts in a thread that FSDP leaves behind


def test_bf16_travels_and_multiplies_but_norms_sums_and_weights_stay_float32(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path / secrets.token_hex(4)),), nprocs=2)
