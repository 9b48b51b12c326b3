"""The weights depend on the recipe and the data, not on kills or the number of workers."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_manifests.storage import Storage
from tests.training.loop.tiny import DIM, SAMPLES, Bad, Batch, Data, Holes, Model, Slow, Tiny, job
from tests.training.loop.together import train_together
from tests.training.new_model import new_model
from training.loop import checkpoint, phases, trainer
from training.loop.job import Job, Losses, TrainingError
from training.loop.parallel import WorkerGroup
from training.loop.skipped import SkippedBatches
from training.loop.tracking import read_metrics
from training.loop.trainer import train_phase

ROOT = Path(__file__).parents[3]


def files(out: Path, phase: str = "base") -> dict[str, bytes]:
    folder = Path(phases.phase_weights_folder(out, phase))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def weights(out: Path, phase: str = "base", name: str = phases.WEIGHTS) -> dict[str, torch.Tensor]:
    return load_file(Path(phases.phase_weights_folder(out, phase)) / name)


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


# ---- kills ----


def start(out: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "tests.training.loop.tiny", out, "60"], cwd=ROOT)


def wait_for_step(process: "subprocess.Popen[bytes]", out: Path, step: int) -> None:
    while process.poll() is None:
        rows = read_metrics(out / "base" / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.005)


def survive(tmp_path: Path, kills: int, seed: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_phase(job(whole, learner=Slow, steps=60), WorkerGroup())
    moments = random.Random(seed)
    happened = 0
    for step in sorted(moments.sample(range(2, 56), kills)):
        process = start(killed)
        wait_for_step(process, killed, step)
        time.sleep(moments.uniform(0, 0.08))  # sometimes in the middle of writing a checkpoint
        process.send_signal(signal.SIGKILL)
        happened += process.wait() == -signal.SIGKILL
        for there in (killed / "base" / "checkpoints").glob("step-*"):
            assert (there / "progress.json").exists() and (there / ".metadata").exists()
    assert happened == kills
    assert start(killed).wait() == 0
    assert files(killed) == files(whole)
    rows = [row["step"] for row in read_metrics(killed / "base" / "metrics.jsonl")]
    assert rows == list(range(2, 61, 2))


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path: Path) -> None:
    survive(tmp_path, kills=1, seed=time.time_ns() % 1000)


@pytest.mark.slow
def test_eight_kills_change_no_weight(tmp_path: Path) -> None:
    survive(tmp_path, kills=8, seed=5)


def test_a_run_that_is_asked_to_stop_keeps_its_last_step(tmp_path: Path) -> None:
    class Asked(Tiny):
        def losses(self, model: torch.nn.Module, batch: Batch) -> Losses:
            if Path(self.job.folder, "checkpoints", "step-00000004").exists():
                os.kill(os.getpid(), signal.SIGTERM)
            return super().losses(model, batch)

    train_phase(job(tmp_path / "whole"), WorkerGroup())
    before = signal.getsignal(signal.SIGTERM)
    outcome = train_phase(job(tmp_path / "out", learner=Asked, checkpoint_every=4), WorkerGroup())
    assert not outcome.done and outcome.step == 5  # asked during step 5
    assert signal.getsignal(signal.SIGTERM) is before
    again = train_phase(job(tmp_path / "out"), WorkerGroup())
    assert again.done and again.resumed_at == 5
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_checkpoint_is_made_once_when_a_machine_will_be_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "LOOK_EVERY_S", 0.0)
    asked = iter([False, False, True])
    done = train_phase(job(tmp_path, checkpoint_every=100, keep=100), WorkerGroup(), leaving=lambda: next(asked))
    assert done.done
    made = checkpoint.complete_checkpoints(Storage(str(tmp_path / "base" / "checkpoints")))
    assert made == ["step-00000003", "step-00000010"]


# ---- workers ----


def test_two_workers_learn_what_one_learns_and_any_number_goes_on(tmp_path: Path) -> None:
    train_phase(job(tmp_path / "one"), WorkerGroup())
    train_together(
        tmp_path,
        [
            job(tmp_path / "ddp", sharding="ddp", micro_batch=2),
            job(tmp_path / "fsdp", sharding="fsdp", micro_batch=2, sample_every=4),
            job(tmp_path / "two then one", sharding="fsdp", steps=4),
        ],
    )
    moved = train_phase(job(tmp_path / "two then one", steps=7), WorkerGroup())
    assert (moved.resumed_at, moved.step) == (4, 7)
    train_together(tmp_path, [job(tmp_path / "two then one", sharding="ddp", steps=10)])
    for name in ("ddp", "fsdp", "two then one"):
        assert_close(weights(tmp_path / name), weights(tmp_path / "one"))
        assert_close(weights(tmp_path / name, name=phases.AVERAGED), weights(tmp_path / "one", name=phases.AVERAGED))
    notes = (tmp_path / "two then one" / "base").glob("seen-*")
    counts = Counter(line for note in notes for line in note.read_text().splitlines())
    assert len(counts) == 80 and set(counts.values()) == {1}  # 10 steps of 8, in several epochs
    assert sum(line.startswith("0 ") for line in counts) == SAMPLES
    # samples use the averaged weights, complete on every worker
    model = Model()
    model.load_state_dict(weights(tmp_path / "fsdp", name=phases.AVERAGED))
    expected = model(torch.ones(1, DIM)).sum().item()
    for rank in range(2):
        sampled = (tmp_path / "fsdp" / "base" / "samples" / "step-00000010" / f"{rank}.txt").read_text()
        assert float(sampled) == pytest.approx(expected, abs=1e-5)


def test_micro_batches_give_the_same_weights_as_the_whole_batch(tmp_path: Path) -> None:
    train_phase(job(tmp_path / "whole"), WorkerGroup())
    train_phase(job(tmp_path / "pieces", micro_batch=3), WorkerGroup())
    assert_close(weights(tmp_path / "pieces"), weights(tmp_path / "whole"))
    rows = [read_metrics(tmp_path / name / "base" / "metrics.jsonl") for name in ("whole", "pieces")]
    for one, other in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_unreadable_samples_do_not_count_however_a_batch_is_shared(tmp_path: Path) -> None:
    """An unreadable sample is not a sample of loss 0. The mean is over the samples that could be read."""
    train_phase(job(tmp_path / "one", learner=Holes, steps=3, log_every=1), WorkerGroup())
    train_phase(job(tmp_path / "pieces", learner=Holes, steps=3, log_every=1, micro_batch=3), WorkerGroup())
    train_together(tmp_path, [job(tmp_path / "two", learner=Holes, steps=3, log_every=1)])
    for other in ("pieces", "two"):
        assert_close(weights(tmp_path / other), weights(tmp_path / "one"))
        rows = [read_metrics(tmp_path / name / "base" / "metrics.jsonl") for name in ("one", other)]
        for here, there in zip(*rows, strict=True):
            assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
            assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4)
    # the first step, computed directly
    learner = Holes(job(tmp_path, steps=3), WorkerGroup())
    batch = next(iter(learner.loader()))
    assert 0 < batch.weight.sum() < 8
    model = new_model(learner)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learner.part_of(name) in ("video", "text"))
    loss = (learner.losses(model, batch).values * batch.weight).sum() / batch.weight.sum()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert rows[0][0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert rows[0][0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_compiled_blocks_learn_the_same(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    train_phase(job(tmp_path / "plain", steps=3), WorkerGroup())
    counters.clear()
    train_phase(job(tmp_path / "compiled", steps=3, compile=True), WorkerGroup())
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]
    assert_close(weights(tmp_path / "compiled"), weights(tmp_path / "plain"), 1e-5)


# ---- what stops it ----


def test_too_many_losses_that_are_not_finite_stop_before_the_step_and_name_their_samples(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 2: the loss of s03 is not finite"):
        train_phase(job(tmp_path, learner=Bad, micro_batch=2, checkpoint_every=1, max_skipped=0), WorkerGroup())
    (row,) = [row for row in read_metrics(tmp_path / "base" / "metrics.jsonl") if "skipped" in row]
    assert row == {"step": 2, "skipped": ["s03"]}
    assert [path.name for path in (tmp_path / "base" / "checkpoints").iterdir()] == ["step-00000001"]
    assert not Path(phases.phase_weights_folder(tmp_path, "base")).exists()
    whole = train_phase(job(tmp_path, checkpoint_every=1), WorkerGroup())
    assert whole.done and whole.resumed_at == 1


def test_a_gradient_that_is_not_finite_stops_the_training_too(tmp_path: Path) -> None:
    class Steep(Tiny):
        def losses(self, model: torch.nn.Module, batch: Batch) -> Losses:
            values, sigmas = super().losses(model, batch)
            return Losses(values + torch.sqrt(values - values.detach()), sigmas)

    with pytest.raises(TrainingError, match=r"step 1: the gradient is not finite, over s\d\d, s\d\d"):
        train_phase(job(tmp_path, learner=Steep, max_skipped=0), WorkerGroup())


def test_batches_that_are_not_finite_are_skipped_counted_and_named(tmp_path: Path) -> None:
    class GoodData(Data):
        def __iter__(self) -> Iterator[Batch]:
            yield from (batch for batch in super().__iter__() if "s03" not in batch.keys)

    class Good(Tiny):
        def loader(self) -> Data:
            return GoodData(self.job, self.group)

    train_phase(job(tmp_path / "good", learner=Good), WorkerGroup())
    settings = {"learner": Bad, "max_skipped": 1.0, "log_every": 1}
    train_phase(job(tmp_path / "whole", **settings), WorkerGroup())
    assert files(tmp_path / "whole")[phases.WEIGHTS] == files(tmp_path / "good")[phases.WEIGHTS]
    rows = read_metrics(tmp_path / "whole" / "base" / "metrics.jsonl")
    named = [row for row in rows if "skipped" in row]
    assert len(named) == rows[-1]["skipped_batches"] > 1
    assert all(row["skipped"] == ["s03"] for row in named)
    # a run that went on from a checkpoint has counted them once
    train_phase(job(tmp_path / "two runs", steps=4, **settings), WorkerGroup())
    train_phase(job(tmp_path / "two runs", **settings), WorkerGroup())
    assert files(tmp_path / "two runs") == files(tmp_path / "whole")


def test_their_share_is_that_of_the_latest_batches() -> None:
    skipped = SkippedBatches(0.02)
    assert not any(skipped.add(step) for step in (10, 20, 30, 40))  # 4 of 200
    kept = SkippedBatches(0.02)
    kept.load_state_dict(skipped.state_dict())
    assert kept.add(41) and skipped.add(41)
    assert not kept.add(1000) and kept.total == 6


def test_a_checkpoint_is_made_after_so_many_minutes(tmp_path: Path) -> None:
    settings = {"checkpoint_every": 100, "steps": 6, "keep": 100}
    train_phase(job(tmp_path / "seldom", **settings), WorkerGroup())
    train_phase(job(tmp_path / "often", learner=Slow, checkpoint_minutes=0.02 / 60, **settings), WorkerGroup())
    made = [
        len(checkpoint.complete_checkpoints(Storage(str(tmp_path / name / "base" / "checkpoints"))))
        for name in ("seldom", "often")
    ]
    assert made == [1, 6]


def test_a_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    train_phase(job(tmp_path, steps=4), WorkerGroup())
    other = job(tmp_path)
    changed = other.recipe.model_copy(update={"seed": 1, "ema": 0.5})
    with pytest.raises(TrainingError, match=r"(?s)other settings.*ema: 0\.9 is now 0\.5\nseed: 0 is now 1"):
        train_phase(type(other)(changed, "base", "nowhere.json", tmp_path, Tiny), WorkerGroup())

    class Curated(Tiny):
        """Its dataset was curated anew."""

        def __init__(self, job: Job, group: WorkerGroup) -> None:
            super().__init__(job, group, dataset="1" * 64)

    with pytest.raises(TrainingError, match=r"another dataset than .* is now; give another output folder"):
        train_phase(job(tmp_path, learner=Curated), WorkerGroup())
    train_phase(job(tmp_path, steps=4, keep=5), WorkerGroup())  # run settings may change


# ---- what is learnt ----


def test_clipping_warm_up_and_average_are_as_the_formulas_say(tmp_path: Path) -> None:
    """One step of AdamW from known weights. The first update is the learning rate times the gradient's sign."""
    train_phase(job(tmp_path, steps=1), WorkerGroup())
    learner = Tiny(job(tmp_path), WorkerGroup())
    began = dict(new_model(learner).named_parameters())
    model, averaged = weights(tmp_path), weights(tmp_path, name=phases.AVERAGED)
    rate = 1e-2 / 3  # the first of three steps of warm-up
    moved = torch.cat([(model[n] - (1 - 0.01 * rate) * began[n].detach()).flatten() for n in model if "head" in n])
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, rate), rtol=1e-3, atol=1e-7)
    decay = 2 / 11  # (1 + 1) / (10 + 1) is below the recipe's 0.9
    for name in model:
        torch.testing.assert_close(averaged[name], decay * began[name].detach() + (1 - decay) * model[name])


def test_parts_that_are_not_trained_stay_as_they_were(tmp_path: Path) -> None:
    train_phase(job(tmp_path), WorkerGroup())
    began = dict(new_model(Tiny(job(tmp_path), WorkerGroup())).named_parameters())
    after = weights(tmp_path)
    same = {name for name in after if torch.equal(after[name], began[name])}
    assert same == {name for name in after if ".audio." in name}  # base trains video and text
