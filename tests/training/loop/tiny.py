"""A model of some hundred parameters and endless data, to test the training loop."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.config import TrainingRecipe, TrainingRunSettings
from training.loop.job import Job, Losses
from training.loop.launch import launch
from training.loop.parallel import WorkerGroup
from training.loop.rng import generator_for
from training.loop.tracking import Trackers

DIM, SAMPLES = 6, 23


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.video, self.text, self.audio = (nn.Linear(DIM, DIM) for _ in range(3))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.tanh(self.video(x)) * torch.sigmoid(self.text(x)) + self.audio(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(DIM, DIM)
        self.seldom = nn.Linear(DIM, DIM)  # no sample uses it

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass
class Batch:
    keys: list[str]
    epochs: list[int]
    data: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.keys, self.epochs, self.data.to(device), self.weight.to(device))

    def __len__(self) -> int:
        return len(self.keys)

    def split(self, size: int) -> list["Batch"]:
        pieces = [slice(at, at + size) for at in range(0, len(self), size)]
        return [Batch(self.keys[at], self.epochs[at], self.data[at], self.weight[at]) for at in pieces]


@dataclass
class Data:
    """Samples, in another order each epoch. Taken samples are written to a file if the output is a local folder."""

    job: Job
    group: WorkerGroup
    unreadable: tuple[str, ...] = ()
    taken: int = 0

    def __iter__(self) -> Iterator[Batch]:
        batch = self.job.recipe.data.batch
        while True:
            numbers = range(self.taken + self.group.rank, self.taken + batch, self.group.size)
            places = [(number // SAMPLES, number % SAMPLES) for number in numbers]
            orders = {epoch: torch.randperm(SAMPLES, generator=generator_for("order", epoch)) for epoch, _ in places}
            keys = [f"s{int(orders[epoch][place]):02d}" for epoch, place in places]
            self.taken += batch
            if (notes := Path(self.job.folder)).is_dir():
                with (notes / f"seen-{self.group.size}-{self.group.rank}").open("a") as file:
                    file.writelines(f"{epoch} {key}\n" for (epoch, _), key in zip(places, keys, strict=True))
            values = torch.stack([torch.randn(DIM, generator=generator_for(key)) for key in keys])
            weight = torch.tensor([float(key not in self.unreadable) for key in keys])
            yield Batch(keys, [epoch for epoch, _ in places], values, weight)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


@dataclass
class Tiny:
    """The learner of the tiny model. Its loss depends on noise drawn for each sample."""

    job: Job
    group: WorkerGroup
    dataset: str = "0" * 64
    bad_key: str = ""
    unreadable: tuple[str, ...] = ()
    pause_s: float = 0.0

    def model(self, latent_scale: tuple[float, ...] | None = None) -> nn.Module:
        with torch.device("meta"):
            return Model()

    def new_weight(self, model: nn.Module, name: str) -> Tensor:
        shape = model.get_parameter(name).shape
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        return (torch.rand(shape, generator=generator_for(self.job.recipe.seed, name)) - 0.5) / 2

    def part_of(self, name: str) -> str:
        return next((part for part in ("text", "audio") if f".{part}." in name), "video")

    def counterpart(self, name: str, part: str) -> str | None:
        return name.replace(f".{self.part_of(name)}.", f".{part}.") if ".audio." in name else None

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)  # type: ignore[arg-type]

    def units(self, model: nn.Module) -> list[nn.Module]:
        return self.blocks(model)

    def enable_activation_checkpointing(self, model: nn.Module) -> None:
        raise NotImplementedError

    def loader(self) -> Data:
        if "://" not in self.job.folder:
            Path(self.job.folder).mkdir(parents=True, exist_ok=True)
        return Data(self.job, self.group, self.unreadable)

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        time.sleep(self.pause_s)
        drawn = [
            generator_for(self.job.recipe.seed, self.job.phase, epoch, key)
            for epoch, key in zip(batch.epochs, batch.keys, strict=True)
        ]
        sigma = torch.stack([torch.rand((), generator=g) for g in drawn])
        noise = torch.stack([torch.randn(DIM, generator=g) for g in drawn])
        noised = (1 - sigma[:, None]) * batch.data + sigma[:, None] * noise
        values = (model(noised).float() - (noise - batch.data)).square().mean(1)
        if self.bad_key in batch.keys:
            values = values * torch.tensor([float("inf") if key == self.bad_key else 1.0 for key in batch.keys])
        return Losses(values, sigma)

    def work(self, batch: Batch) -> tuple[int, float]:
        return len(batch.keys) * DIM, 1.0

    def about(self, model: nn.Module) -> dict[str, Any]:
        return {"shape": {"dim": DIM}}

    def sample(self, model: nn.Module, step: int, folder: Path, trackers: Trackers | None) -> dict[str, float]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.group.rank}.txt").write_text(str(float(model(torch.ones(1, DIM)).sum())))
        return {"sync_gain": 0.5}


def recipe(steps: int = 10, batch: int = 8, **run: Any) -> TrainingRecipe:
    """A recipe with the paper's four phases."""
    everything = ["video", "text", "audio"]
    phases = {
        "base": {"weights": dict.fromkeys(everything, "new"), "train": ["video", "text"]},
        "warmup": {"weights": {"video": "base", "text": "base", "audio": "base.text"}, "train": everything},
        "main": {"weights": {"video": "base", "text": "base", "audio": "warmup"}, "train": everything},
        "hq": {"weights": dict.fromkeys(everything, "main"), "train": everything, "learning_rate": 1e-3},
    }
    settings = {"trackers": [], "checkpoint_every": 3, "keep": 2, "log_every": 2, "sample_every": 0, **run}
    return TrainingRecipe.model_validate(
        {
            "name": "tiny",
            "model": "active_mind",
            "size": "debug",
            "data": {"frames": 33, "fps": 25, "batch": batch},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 3, "max_grad_norm": 0.5},
            "ema": 0.9,
            "phases": {name: {**phase, "steps": steps} for name, phase in phases.items()},
            "run": TrainingRunSettings.model_validate(settings),
        }
    )


def job(out: Path | str, phase: str = "base", learner: Any = Tiny, **settings: Any) -> Job:
    return Job(recipe(**settings), phase, "nowhere.json", out, learner)


class Slow(Tiny):
    """Slow enough to be killed during training."""

    def __init__(self, job: Job, group: WorkerGroup) -> None:
        super().__init__(job, group, pause_s=0.02)


class Bad(Tiny):
    """The loss of one sample is not finite."""

    def __init__(self, job: Job, group: WorkerGroup) -> None:
        super().__init__(job, group, bad_key="s03")


class Holes(Tiny):
    """Some samples cannot be read."""

    def __init__(self, job: Job, group: WorkerGroup) -> None:
        super().__init__(job, group, unreadable=("s01", "s04", "s09", "s16", "s22"))


class Dying(Tiny):
    """The last worker kills itself during step 5, once."""

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        died = Path(self.job.out, "died")
        self.losses_taken = getattr(self, "losses_taken", 0) + 1
        if self.losses_taken == 5 and self.group.rank == self.group.size - 1 and not died.exists():
            died.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(model, batch)


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch(job(sys.argv[1], learner=Slow, steps=int(sys.argv[2])))
    assert not {"ray", "prefect"} & set(sys.modules)  # one worker needs neither
