"""active-mind in the training loop, on shards of puppets."""

import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tasks.synthetic.puppet_readers import read_mouth
from tasks.synthetic.puppet_shards import LATENTS, make_puppets
from tasks.synthetic.puppets import opening_of
from tests.training.data.loading import Members, loader, npy, repack, take
from tests.training.loop.together import on_two_workers, train_together
from tests.training.new_model import new_model
from training.config import TrainingRecipe
from training.data.buckets import LoaderError
from training.generate.previews import Previews
from training.learners.active_mind import ActiveMindLearner, load_trained
from training.loop import phases
from training.loop.job import Job
from training.loop.parallel import WorkerGroup
from training.loop.tracking import read_metrics
from training.loop.trainer import train_phase

ROOT = Path(__file__).parents[3]
EVERYTHING = ["video", "text", "audio"]


def recipe(steps: int = 2, **run: Any) -> TrainingRecipe:
    phase = {"train": EVERYTHING, "steps": steps}
    settings = {"checkpoint_every": 2, "log_every": 1, "sample_every": 0, "sample_steps": 2, "trackers": [], **run}
    return TrainingRecipe.model_validate(
        {
            "name": "puppets",
            "model": "active_mind",
            "size": "debug",
            "data": {"frames": 9, "fps": 25, "batch": 4, "latents": LATENTS.model_dump(), "whiten": 0.75},
            "optimizer": {"learning_rate": 1e-3},
            "phases": {
                "base": {
                    "weights": dict.fromkeys(EVERYTHING, "new"), **phase, "train": ["video", "text"],
                    "conditions": {"audio": 1.0},
                },
                "warmup": {"weights": {"video": "base", "text": "base", "audio": "base.text"}, **phase},
                "main": {"weights": {"video": "base", "text": "base", "audio": "warmup"}, **phase},
            },
            "run": settings,
        }
    )  # fmt: skip


def mouth(frames: np.ndarray, fps: int, sound: np.ndarray) -> float:
    """How closely the opening of the drawn mouth follows the loudness. 0 is best."""
    return float(-np.abs(read_mouth(frames) - opening_of(sound, len(frames))).mean())


def job(dataset: Path, out: Path, phase: str = "base", **settings: Any) -> Job:
    return Job(recipe(**settings), phase, str(dataset / "dataset.json"), out, ActiveMindLearner, mouth)


@pytest.fixture(scope="module")
def puppets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("puppets")
    make_puppets(folder, 14, frames=17, unusable=0.3)
    return folder


def test_phases_of_the_real_model_start_where_they_should(puppets: Path, tmp_path: Path) -> None:
    outcomes = {
        phase: train_phase(job(puppets, tmp_path, phase), WorkerGroup()) for phase in ("base", "warmup", "main")
    }
    began = {
        phase: {part: at["sha256"] for part, at in outcome.started_from.items()} for phase, outcome in outcomes.items()
    }
    assert began["main"]["video"] == began["warmup"]["video"]
    assert began["main"]["text"] == began["warmup"]["text"]
    assert began["main"]["audio"] != began["warmup"]["audio"]
    base = load_file(Path(phases.phase_weights_folder(tmp_path, "base")) / phases.AVERAGED)
    new = dict(new_model(ActiveMindLearner(job(puppets, tmp_path), WorkerGroup())).named_parameters())
    learner = ActiveMindLearner(job(puppets, tmp_path), WorkerGroup())
    copied = 0
    for name in new:
        if learner.part_of(name) == "audio":
            assert torch.equal(base[name], new[name])  # base does not train it
            copied += learner.counterpart(name, "text") in base
    assert copied >= 40  # nearly all of the audio branch has a counterpart in the text branch
    # the trained model can be loaded from its folder
    model = load_trained(tmp_path, "main")
    main = load_file(Path(phases.phase_weights_folder(tmp_path, "main")) / phases.AVERAGED)
    assert all(torch.equal(value, main[name]) for name, value in model.named_parameters())


def test_samples_have_picture_sound_and_a_measured_sync_gain(puppets: Path, tmp_path: Path) -> None:
    import av

    train_phase(job(puppets, tmp_path, sample_every=2), WorkerGroup())
    assert len(list((tmp_path / "base" / "samples" / "step-00000002").glob("*.mp4"))) == 1
    assert not [row for row in read_metrics(tmp_path / "base" / "metrics.jsonl") if "sync_gain" in row]  # it is deaf
    job_with_sound = job(puppets, tmp_path, "warmup", sample_every=2, trackers=["tensorboard"], samples=2)
    train_phase(job_with_sound, WorkerGroup())
    folder = tmp_path / "warmup" / "samples" / "step-00000002"
    videos, strips = sorted(folder.glob("*.mp4")), sorted(folder.glob("*.png"))
    assert len(videos) == len(strips) == 2
    for video in videos:
        with av.open(str(video)) as container:
            assert len(list(container.decode(video=0))) == 9
        with av.open(str(video)) as container:
            heard = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
            assert np.abs(heard).max() > 0.01
    rows = read_metrics(tmp_path / "warmup" / "metrics.jsonl")
    gains = [row for row in rows if "sync_gain" in row]
    assert [row["step"] for row in gains] == [2]
    row = gains[0]
    assert row["sync_gain"] == pytest.approx(row["sync/true"] - max(row["sync/muted"], row["sync/shifted"]))
    told = {"loss", "grad_norm", "learning_rate", "data_wait", "tokens_per_s", "tflops_per_s", "step_s"}
    assert told <= rows[0].keys()
    assert "mfu" not in rows[0]  # the peak of a CPU is not known
    events = list((tmp_path / "warmup" / "tensorboard").glob("events.out.tfevents.*"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(events[0]))
    shown.Reload()
    assert [point.step for point in shown.Scalars("loss")] == [1, 2]
    by_level = {name for row in rows for name in row if name.startswith("loss/sigma_")}
    assert by_level and {*told, *by_level, "sync_gain", "sync/data"} <= set(shown.Tags()["scalars"])
    assert len(shown.Tags()["images"]) == 2


def make_previews(group: WorkerGroup, job: Job, folder: Path) -> None:
    """Sample the previews of new weights. Writes down how often this worker ran the network, and what was measured."""
    model = new_model(ActiveMindLearner(job, group))
    runs: list[int] = []
    model.network.register_forward_hook(lambda *_: runs.append(1))
    measured = Previews(job).make(model.network, 1, folder, group, None)
    (folder / f"{group.size}-{group.rank}.json").write_text(json.dumps([len(runs), measured]))


def test_workers_share_out_the_samples(puppets: Path, tmp_path: Path) -> None:
    asked = job(puppets, tmp_path, "warmup", samples=3)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    make_previews(WorkerGroup(), asked, tmp_path / "one")
    on_two_workers(tmp_path, make_previews, asked, tmp_path / "two")
    alone, first, second = (
        json.loads((tmp_path / name).read_text()) for name in ("one/1-0.json", "two/2-0.json", "two/2-1.json")
    )
    # 3 clips with 3 sounds each, 2 steps a sample; of 9 samples one worker takes 5, and the other repeats the last
    assert (alone[0], first[0], second[0]) == (18, 10, 10)
    assert first[1] == pytest.approx(alone[1], abs=1e-4) and second[1] == {}
    assert [path.name for path in sorted((tmp_path / "two").glob("*.mp4"))] == [
        path.name for path in sorted((tmp_path / "one").glob("*.mp4"))
    ]


def test_several_speakers_train_with_their_masks(tmp_path: Path) -> None:
    make_puppets(tmp_path / "two", 6, frames=17, two=True)
    train_phase(job(tmp_path / "two", tmp_path / "out", sample_every=2), WorkerGroup())
    faceless = replace(job(tmp_path / "two", tmp_path / "out", "warmup", sample_every=2), probe=lambda *_: None)
    train_phase(faceless, WorkerGroup())
    # a probe that measures nothing, like one that finds no face, is replaced by the one for any video
    told = read_metrics(tmp_path / "out" / "warmup" / "metrics.jsonl")[-1]
    assert 0.8 < told["sync/data"] <= 1 and -1 <= told["sync_gain"] <= 1
    after = load_file(Path(phases.phase_weights_folder(tmp_path / "out", "base")) / phases.WEIGHTS)
    before = dict(new_model(ActiveMindLearner(job(tmp_path / "two", tmp_path), WorkerGroup())).named_parameters())
    assert not torch.equal(after["mask_predictor.token.weight"], before["mask_predictor.token.weight"])


def test_two_workers_train_the_real_model_as_one_does(puppets: Path, tmp_path: Path) -> None:
    train_phase(job(puppets, tmp_path / "one"), WorkerGroup())
    jobs = [job(puppets, tmp_path / sharding, sharding=sharding, sample_every=2) for sharding in ("ddp", "fsdp")]
    train_together(
        tmp_path, [*jobs, job(puppets, tmp_path / "moved", steps=1, sharding="fsdp", activation_checkpointing=True)]
    )
    assert train_phase(job(puppets, tmp_path / "moved", micro_batch=1), WorkerGroup()).resumed_at == 1
    ours = load_file(Path(phases.phase_weights_folder(tmp_path / "one", "base")) / phases.WEIGHTS)
    for name in ("ddp", "fsdp", "moved"):
        theirs = load_file(Path(phases.phase_weights_folder(tmp_path / name, "base")) / phases.WEIGHTS)
        # AdamW's first steps follow the gradient's sign. Where a gradient is near zero, a difference in its last bit
        # can move a weight by a whole step. No other weight may differ.
        moved = torch.cat([(ours[key] - theirs[key]).abs().flatten() for key in ours])
        assert moved.max() <= 4e-3
        assert (moved > 1e-5).float().mean() < 1e-3


def test_two_workers_that_share_every_sample_train_as_one_does(puppets: Path, tmp_path: Path) -> None:
    settings = {"sequence_parallel": 2, "sharding": "fsdp", "activation_checkpointing": True, "sample_every": 2}
    train_phase(job(puppets, tmp_path / "one", sample_every=2), WorkerGroup())
    train_together(tmp_path, [job(puppets, tmp_path / "two", **settings)])
    ours, theirs = (
        load_file(Path(phases.phase_weights_folder(tmp_path / name, "base")) / phases.WEIGHTS)
        for name in ("one", "two")
    )
    moved = torch.cat([(ours[key] - theirs[key]).abs().flatten() for key in ours])
    assert moved.max() <= 4e-3 and (moved > 1e-5).float().mean() < 1e-3  # as above
    (alone, *_), (shared, *_) = (read_metrics(tmp_path / name / "base" / "metrics.jsonl") for name in ("one", "two"))
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


def test_while_the_base_trains_the_audio_branch_is_not_in_its_output(puppets: Path, tmp_path: Path) -> None:
    losses = {}
    for phase in ("base", "warmup"):
        learner = ActiveMindLearner(job(puppets, tmp_path, phase), WorkerGroup())
        model, batch = new_model(learner), next(iter(learner.loader()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
            before = learner.losses(model, batch).values
            for name, parameter in model.named_parameters():
                if learner.part_of(name) == "audio":
                    parameter.add_(0.1)
            losses[phase] = torch.equal(learner.losses(model, batch).values, before)
    assert losses == {"base": True, "warmup": False}


def with_states(members: Members) -> Members:
    """A shard's members with 2 x 6 numbers a frame, like a Whisper's states, in place of log-mel."""
    changed = []
    for info, data in members:
        if info.name.endswith(".log_mel.npy"):
            info.name = info.name.replace(".log_mel.", ".whisper.")
            data = npy(np.load(io.BytesIO(data))[:, ::2, :6])
        changed.append((info, data))
    return changed


def test_sound_as_whisper_hears_it_is_trained_on_and_sampled_from(puppets: Path, tmp_path: Path) -> None:
    shutil.copytree(puppets, tmp_path / "heard")
    repack(tmp_path / "heard", with_states)
    batch = take(loader(tmp_path / "heard", frames=(9,), batch=4), 1)[0]
    assert batch.audio.shape == (4, 9, 2, 6) and batch.audio[batch.audio_usable].any()
    for phase in ("base", "warmup"):
        train_phase(job(tmp_path / "heard", tmp_path, phase, sample_every=2), WorkerGroup())
    settings = load_trained(tmp_path, "warmup").network.settings
    assert (settings.audio_window, settings.audio_features) == (2, 6)
    row = read_metrics(tmp_path / "warmup" / "metrics.jsonl")[-1]
    assert {"sync/true", "sync/muted", "sync/shifted"} <= row.keys()


def speakers_with_states(members: Members) -> Members:
    """As `with_states`, also for the sound of each of several speakers."""
    changed = []
    for info, data in with_states(members):
        if info.name.endswith(".speaker_log_mel.npy"):
            info.name = info.name.replace(".speaker_log_mel.", ".speaker_whisper.")
            data = npy(np.load(io.BytesIO(data))[:, :, ::2, :6])
        changed.append((info, data))
    return changed


def test_each_of_two_speakers_is_heard_by_whisper_as_by_log_mel(tmp_path: Path) -> None:
    make_puppets(tmp_path / "heard", 4, frames=9, two=True, silent=0.0)
    two = {"frames": (9,), "batch": 4}
    by_log_mel = take(loader(tmp_path / "heard", **two), 1)[0]
    repack(tmp_path / "heard", speakers_with_states)
    batch = take(loader(tmp_path / "heard", **two), 1)[0]
    assert batch.keys == by_log_mel.keys and batch.audio.shape == (4, 2, 9, 2, 6)
    assert torch.equal(batch.audio, by_log_mel.audio[..., ::2, :6])
    train_phase(job(tmp_path / "heard", tmp_path, sample_every=2), WorkerGroup())
    settings = load_trained(tmp_path, "base").network.settings
    assert (settings.audio_window, settings.audio_features) == (2, 6)


def test_speakers_use_the_features_of_each_speaker_not_those_of_the_mixed_sound(tmp_path: Path) -> None:
    """Whisper's states of the mixed sound do not tell the speakers apart."""
    make_puppets(tmp_path / "mixed", 4, frames=9, two=True, silent=0.0)
    repack(tmp_path / "mixed", with_states)  # of the mixed sound only
    assert take(loader(tmp_path / "mixed", frames=(9,), batch=4), 1)[0].audio.shape == (4, 2, 9, 4, 80)


@pytest.mark.parametrize(("of_first", "of_others"), [("whisper", "log_mel"), ("log_mel", "whisper")])
def test_samples_with_other_sound_features_than_the_first_are_reported_with_what_they_lack(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, of_first: str, of_others: str
) -> None:
    make_puppets(tmp_path / "heard", 4, frames=9, two=True, silent=0.0)

    def mixed(members: Members) -> Members:
        first = min(info.name for info, _ in members).partition(".")[0]
        kinds = [of_first if info.name.startswith(first) else of_others for info, _ in members]
        return [
            speakers_with_states([member])[0] if kind == "whisper" else member
            for member, kind in zip(members, kinds, strict=True)
        ]

    repack(tmp_path / "heard", mixed)
    loaded = loader(tmp_path / "heard", frames=(9,), batch=1, max_bad=1.0)
    take(loaded, 1)
    told = f"it has no speaker_{of_first}.npy; the dataset's first sample with usable sound has {of_first}"
    assert told in caplog.text and loaded.bad == 3


def test_a_dataset_without_any_sound_to_train_on_is_refused(puppets: Path, tmp_path: Path) -> None:
    shutil.copytree(puppets, tmp_path / "mute")
    repack(tmp_path / "mute", lambda members: [m for m in members if not m[0].name.endswith((".log_mel.npy", ".flac"))])
    with pytest.raises(LoaderError, match=r"such as .* has log_mel\.npy, whisper\.npy, or a flac"):
        ActiveMindLearner(job(tmp_path / "mute", tmp_path), WorkerGroup())


def test_a_sample_without_the_datasets_sound_features_is_counted_and_skipped(puppets: Path, tmp_path: Path) -> None:
    shutil.copytree(puppets, tmp_path / "heard")
    told: list[str] = []

    def but_one(members: Members) -> Members:
        usable = [
            info.name for info, data in members if info.name.endswith(".json") and json.loads(data)["audio"]["usable"]
        ]
        told.append(usable[1].partition(".")[0])
        return [m for m in with_states(members) if m[0].name != f"{told[0]}.whisper.npy"]

    repack(tmp_path / "heard", but_one)
    loaded = loader(tmp_path / "heard", frames=(9,), batch=4, max_bad=0.5)
    seen = {key for batch in take(loaded, 6) for key in batch.keys}
    assert loaded.bad == 1 and len(seen) == 13 and told[0] not in seen


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_change_no_bit_of_the_real_model(puppets: Path, tmp_path: Path) -> None:
    def start(out: Path) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-m", "tests.training.learners.test_active_mind_learner", puppets, out], cwd=ROOT
        )

    assert start(tmp_path / "whole").wait() == 0
    killed, moments = tmp_path / "killed", random.Random(3)
    for step in (3, 8, 13):
        process = start(killed)
        metrics = killed / "base" / "metrics.jsonl"
        while process.poll() is None and max((row["step"] for row in read_metrics(metrics)), default=0) < step:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(killed).wait() == 0
    for name in (phases.WEIGHTS, phases.AVERAGED, phases.ABOUT):
        whole, after = (Path(phases.phase_weights_folder(out, "base")) / name for out in (tmp_path / "whole", killed))
        assert whole.read_bytes() == after.read_bytes()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_phase(job(Path(sys.argv[1]), Path(sys.argv[2]), steps=18), WorkerGroup())
