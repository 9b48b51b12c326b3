"""Checkpoints and weights are complete or absent, and no run resumes from a broken or foreign one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_manifests.storage import Storage
from tests.training.loop.tiny import Tiny, job
from training.loop import checkpoint, phases
from training.loop.checkpoint import CheckpointError
from training.loop.job import TrainingError
from training.loop.parallel import WorkerGroup
from training.loop.phases import PhaseError
from training.loop.tracking import read_metrics
from training.loop.trainer import train_phase


def checkpoints(out: Path, phase: str = "base") -> list[str]:
    return sorted(path.name for path in (out / phase / "checkpoints").iterdir())


def weights(out: Path, phase: str, name: str = phases.AVERAGED) -> dict[str, torch.Tensor]:
    return load_file(Path(phases.phase_weights_folder(out, phase)) / name)


def part(name: str) -> str:
    return Tiny(job(Path()), WorkerGroup()).part_of(name)


def test_the_newest_checkpoints_are_kept_and_incomplete_ones_removed(tmp_path: Path) -> None:
    left = tmp_path / "base" / "checkpoints" / ".step-00000002.tmp"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    train_phase(job(tmp_path, steps=10, keep=2, checkpoint_every=3), WorkerGroup())
    assert checkpoints(tmp_path) == ["step-00000009", "step-00000010"]


def test_a_broken_checkpoint_is_named_and_training_resumes_from_the_one_before(tmp_path: Path) -> None:
    train_phase(job(tmp_path, steps=6), WorkerGroup())
    shutil.rmtree(phases.phase_weights_folder(tmp_path, "base"))
    newest = tmp_path / "base" / "checkpoints" / "step-00000006"
    data = newest / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"step-00000006: cannot be read .*; remove it to go on from the one"):
        train_phase(job(tmp_path, steps=6), WorkerGroup())
    (newest / "progress.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"step-00000006: cannot be read"):
        train_phase(job(tmp_path, steps=6), WorkerGroup())
    shutil.rmtree(newest)
    assert train_phase(job(tmp_path, steps=6), WorkerGroup()).resumed_at == 3
    assert [row["step"] for row in read_metrics(tmp_path / "base" / "metrics.jsonl")] == [2, 4, 6]


def test_a_finished_phase_is_not_trained_again_unless_it_is_given_more_steps(tmp_path: Path) -> None:
    train_phase(job(tmp_path / "whole", steps=8), WorkerGroup())
    train_phase(job(tmp_path / "more", steps=5), WorkerGroup())
    before = weights(tmp_path / "more", "base")
    again = train_phase(job(tmp_path / "more", steps=5), WorkerGroup())
    assert again.done and again.resumed_at == again.step == 5
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "more", "base").items())
    assert train_phase(job(tmp_path / "more", steps=8), WorkerGroup()).resumed_at == 5
    for name, value in weights(tmp_path / "whole", "base").items():
        assert torch.equal(value, weights(tmp_path / "more", "base")[name])


def test_a_checkpoint_older_than_a_setting_is_resumed_if_the_setting_has_its_default(tmp_path: Path) -> None:
    mine = job(tmp_path, steps=6)
    train_phase(mine, WorkerGroup())
    for file in (
        Path(phases.phase_weights_folder(tmp_path, "base")) / phases.ABOUT,
        _newest(tmp_path) / "progress.json",
    ):
        about = json.loads(file.read_text())
        del about["settings"]["optimizer"]["decay"], about["settings"]["timesteps"]
        file.write_text(json.dumps(about))
        falling = mine.recipe.optimizer.model_copy(update={"decay": "cosine"})
        other = replace(mine, recipe=mine.recipe.model_copy(update={"optimizer": falling}))
        with pytest.raises(TrainingError, match=r"optimizer.decay: None is now 'cosine'\nphase.steps: None is now 6$"):
            train_phase(other, WorkerGroup())
        assert train_phase(mine, WorkerGroup()).resumed_at == 6
        shutil.rmtree(phases.phase_weights_folder(tmp_path, "base"))


def _newest(out: Path) -> Path:
    return out / "base" / "checkpoints" / checkpoints(out)[-1]


# ---- phases ----


def test_after_warmup_text_and_video_are_back_at_base_and_audio_is_not(tmp_path: Path) -> None:
    outcomes = {phase: train_phase(job(tmp_path, phase), WorkerGroup()) for phase in ("base", "warmup", "main", "hq")}
    ended = {phase: phases.part_hashes(weights(tmp_path, phase), part) for phase in outcomes}
    began = {
        phase: {name: start["sha256"] for name, start in outcome.started_from.items()}
        for phase, outcome in outcomes.items()
    }
    assert began["main"]["video"] == ended["base"]["video"] != ended["warmup"]["video"]
    assert began["main"]["text"] == ended["base"]["text"] != ended["warmup"]["text"]
    assert began["main"]["audio"] == ended["warmup"]["audio"] != ended["base"]["audio"]
    assert began["hq"] == ended["main"]
    # weights.json says the same
    about = phases.about_weights(tmp_path, "main")
    assert about is not None
    assert about["started_from"]["audio"] == {
        "origin": "warmup",
        "sha256": ended["warmup"]["audio"],
        "trained": True,
    }
    assert about["trained"] == dict.fromkeys(("video", "text", "audio"), True)
    assert about["parts"][phases.AVERAGED] == ended["main"]
    assert about["parts"][phases.WEIGHTS] == phases.part_hashes(weights(tmp_path, "main", phases.WEIGHTS), part)
    assert about["recipe"] == {"name": "tiny", "hash": job(tmp_path).recipe.digest()}


def test_audio_begins_as_a_copy_of_text(tmp_path: Path) -> None:
    train_phase(job(tmp_path), WorkerGroup())
    train_phase(job(tmp_path, "warmup", steps=0), WorkerGroup())
    base, began = weights(tmp_path, "base"), weights(tmp_path, "warmup")
    audio = [name for name in began if ".audio." in name]
    assert audio
    for name in audio:
        assert torch.equal(began[name], base[name.replace(".audio.", ".text.")])
        assert not torch.equal(began[name], base[name])


def test_a_phase_whose_origin_is_missing_or_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PhaseError, match=r"phase main starts from .*base/weights.*: train phase base first"):
        train_phase(job(tmp_path, "main"), WorkerGroup())
    train_phase(job(tmp_path, steps=1), WorkerGroup())
    path = Path(phases.phase_weights_folder(tmp_path, "base")) / phases.AVERAGED
    whole = load_file(path)
    save_file({name: value[:3] if name == "head.bias" else value for name, value in whole.items()}, path)
    with pytest.raises(PhaseError, match=r"another model\n.*head.bias is \[3\], the model's head.bias is \[6\]"):
        train_phase(job(tmp_path, "warmup"), WorkerGroup())
    save_file({name: value for name, value in whole.items() if name != "head.bias"}, path)
    with pytest.raises(PhaseError, match=r"another model\n.*has no head.bias"):
        train_phase(job(tmp_path, "warmup"), WorkerGroup())
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(PhaseError, match="it cannot be read"):
        train_phase(job(tmp_path, "warmup"), WorkerGroup())
    assert not (tmp_path / "warmup" / "checkpoints").exists()


def test_a_base_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    train_phase(job(tmp_path, steps=0), WorkerGroup())
    with pytest.raises(PhaseError, match=r"phase warmup starts its video from base, which nothing has trained"):
        train_phase(job(tmp_path, "warmup"), WorkerGroup())
    asked = job(tmp_path, "warmup")
    with pytest.raises(PhaseError, match=r"phase warmup starts its video from base.*; give phase base steps"):
        phases.check_origins(
            job(tmp_path / "nothing yet", steps=0).recipe, ["base", "warmup"], tmp_path / "nothing yet"
        )
    phases.check_origins(asked.recipe, list(asked.recipe.phases), tmp_path / "nothing yet")
    deaf = asked.recipe.phases["warmup"].model_copy(
        update={"weights": dict.fromkeys(("video", "text", "audio"), "base")}
    )
    with pytest.raises(PhaseError, match=r"starts its audio from base.*phase base trains only video, text"):
        phases.check_origins(
            asked.recipe.model_copy(update={"phases": {**asked.recipe.phases, "warmup": deaf}}),
            ["base", "warmup"],
            tmp_path,
        )
    warmup = asked.recipe.phases["warmup"].model_copy(update={"untrained_base": True})
    allowed = asked.recipe.model_copy(update={"phases": {**asked.recipe.phases, "warmup": warmup}})
    train_phase(replace(asked, recipe=allowed), WorkerGroup())
    # the warm-up has trained all parts, but main takes video and text from the base again
    with pytest.raises(PhaseError, match=r"phase main starts its video from base, which nothing has trained"):
        train_phase(job(tmp_path, "main"), WorkerGroup())
    train_phase(job(tmp_path), WorkerGroup())  # now the base is trained
    train_phase(job(tmp_path, "main"), WorkerGroup())


def test_weights_can_come_from_a_file(tmp_path: Path) -> None:
    train_phase(job(tmp_path / "elsewhere"), WorkerGroup())
    file = Path(phases.phase_weights_folder(tmp_path / "elsewhere", "base")) / phases.WEIGHTS
    mine = job(tmp_path / "mine", steps=0)
    base = mine.recipe.phases["base"].model_copy(
        update={"weights": {"video": str(file), "text": "new", "audio": "new"}}
    )
    recipe = mine.recipe.model_copy(update={"phases": {"base": base}})
    train_phase(type(mine)(recipe, "base", mine.manifest, mine.out, mine.learner), WorkerGroup())
    theirs, ours = load_file(file), weights(tmp_path / "mine", "base")
    same = {name for name in ours if torch.equal(ours[name], theirs[name])}
    assert {name for name in ours if part(name) == "video"} <= same
    assert not any(part(name) == "text" for name in same)


def test_weights_are_written_as_safetensors_does(tmp_path: Path) -> None:
    shapes = {"blocks.10.weight": (3, 2), "blocks.9.weight": (5,), "scalar": (), "none": (0, 4), "name é": (1,)}
    made = {name: torch.randn(shape) for name, shape in shapes.items()}
    phases.write_weights(tmp_path, "base", made, made, {})
    save_file(made, tmp_path / "theirs.safetensors")
    ours = Path(phases.phase_weights_folder(tmp_path, "base"), phases.WEIGHTS)
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_parts_hash_covers_every_bit_of_it() -> None:
    own = {"blocks.0.text.weight": torch.ones(2, 3), "head.weight": torch.zeros(3)}
    hashes = phases.part_hashes(own, part)
    changed = {**own, "blocks.0.text.weight": torch.ones(2, 3).index_put_((torch.tensor(0),), torch.tensor(1 + 1e-7))}
    assert phases.part_hashes(changed, part)["text"] != hashes["text"]
    assert phases.part_hashes(changed, part)["video"] == hashes["video"]
    assert phases.part_hashes({**own, "head.weight": -torch.zeros(3)}, part)["video"] != hashes["video"]
    assert phases.part_hashes({**own, "blocks.0.text.weight": torch.ones(3, 2)}, part)["text"] != hashes["text"]


def test_a_row_of_metrics_that_was_cut_off_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 2, "loss": 1.0}) + '\n{"step": 4, "lo')
    assert read_metrics(path) == [{"step": 2, "loss": 1.0}]


def test_only_folders_named_like_checkpoints_are_checkpoints(tmp_path: Path) -> None:
    for name in ("step-00000003", ".step-00000009.tmp", "step-12", "step-0000000x"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(Storage(str(tmp_path))) == "step-00000003"
    checkpoint.remove_incomplete(Storage(str(tmp_path)))
    assert not (tmp_path / ".step-00000009.tmp").exists()
