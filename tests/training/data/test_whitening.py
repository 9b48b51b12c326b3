"""Latents are scaled to the size of the noise for the network, and scaled back after sampling."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.stages.latents.codec import CosineCodec
from tasks.synthetic.puppet_shards import LATENTS, make_puppets
from tasks.synthetic.puppets import Puppet
from tests.training.data.loading import Members, repack
from tests.training.new_model import new_model
from training.config import TrainingRecipe, load_training
from training.data.buckets import LoaderError
from training.data.whitening import channel_rms, latent_scale
from training.generate.sampling import initial_noise, reference_latent, sample_clip, sigma_steps
from training.learners.active_mind import ActiveMindLearner, load_trained
from training.loop import phases
from training.loop.job import Job
from training.loop.parallel import WorkerGroup
from training.loop.phases import PhaseError, starting_scale
from training.loop.trainer import train_phase
from training.models.active_mind.model import ActiveMindOutput, Conditions

COUNT = 12


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("puppets")
    make_puppets(folder, COUNT, 4, samples_a_shard=5)
    return folder / "dataset.json"


def recipe(whiten: float | None) -> TrainingRecipe:
    puppets = load_training("puppets")
    return puppets.model_copy(update={"data": puppets.data.model_copy(update={"whiten": whiten})})


def test_deviations_are_those_of_the_dataset(manifest: Path, tmp_path: Path) -> None:
    found = channel_rms(str(manifest), recipe(1.0), str(tmp_path))
    codec = CosineCodec(LATENTS.channels)
    drawn = [encoded.latent for n in range(COUNT) for encoded in codec.encode(Puppet.of(4, n).pictures)]
    ratio = found / np.sqrt(np.square(drawn).mean(axis=(0, 2, 3)))
    # the decoded videos have lost some of their fine colours
    assert np.median(ratio) == pytest.approx(1.0, abs=0.05) and 0.5 < ratio.min() <= ratio.max() < 1.2
    assert found.max() > 5 * found.min()


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_channels_are_left_as_large_as_asked_for(manifest: Path, tmp_path: Path, power: float) -> None:
    std, scale = (of(str(manifest), recipe(power), str(tmp_path)) for of in (channel_rms, latent_scale))
    left = std / np.array(scale)
    assert np.square(left).mean() == pytest.approx(1.0)
    in_the_picture = std * CosineCodec(LATENTS.channels).gains
    np.testing.assert_allclose(left / left[0], (in_the_picture / in_the_picture[0]) ** (1 - power), rtol=1e-4)


@pytest.mark.parametrize("power", [None, 0.75])
def test_the_network_takes_what_it_is_given_by_the_scale_in_its_settings(
    manifest: Path, tmp_path: Path, power: float | None
) -> None:
    learner = ActiveMindLearner(Job(recipe(power), "main", str(manifest), tmp_path, ActiveMindLearner), WorkerGroup())
    model = new_model(learner)
    network = model.network
    latents = next(iter(learner.loader())).latents
    scale = torch.tensor(network.settings.latent_scale or [1.0] * LATENTS.channels)[:, None, None, None]
    assert (scale == 1).all() == (power is None)
    torch.testing.assert_close(network.scaled(latents), latents / scale)
    torch.testing.assert_close(network.unscaled(network.scaled(latents)), latents)
    assert learner.about(model)["shape"] == network.settings.model_dump(mode="json")


def test_a_sampled_clip_is_in_the_codecs_numbers(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a network that knows the clip, sampling returns the clip in the codec's scale."""
    learner = ActiveMindLearner(Job(recipe(0.75), "main", str(manifest), tmp_path, ActiveMindLearner), WorkerGroup())
    network = new_model(learner).network
    codec, puppet = CosineCodec(LATENTS.channels), Puppet.of(4, 1)
    clip = torch.from_numpy(np.stack([e.latent for e in codec.encode(puppet.pictures)], axis=1))[None]
    reference = reference_latent(codec, puppet.pictures[0])[None]
    whole = network.scaled(torch.cat((clip, reference[:, :, None]), dim=2))

    def velocity(x: torch.Tensor, sigma: torch.Tensor, clean: torch.Tensor, *_: object) -> ActiveMindOutput:
        torch.testing.assert_close(x[:, :, clean[0]], whole[:, :, clean[0]])
        return ActiveMindOutput((x - whole) / sigma[0], None)

    monkeypatch.setattr(network, "forward", velocity)
    no = torch.zeros(1, dtype=torch.bool)
    conditions = Conditions(torch.zeros(1, 33, 4, 80), torch.zeros(1, 2, 64), ~no[:, None].expand(1, 2), no, no)
    sampled = sample_clip(
        network, conditions, initial_noise(tuple(clip.shape), 0), sigma_steps(4), clip[:, :, :1], reference
    )
    torch.testing.assert_close(sampled, clip, rtol=1e-4, atol=1e-4)


# ---- a training keeps its first scale ----


def small(dataset: Path, out: Path, phase: str = "base", steps: int = 1, whiten: float | None = 0.75) -> Job:
    """Three phases of a small network. They start from new weights, from the first phase, and from a mix of all."""
    content = recipe(whiten).model_dump(mode="json")
    parts = ["video", "text", "audio"]
    origins = {"base": ["new"] * 3, "main": ["base", "new", "base.text"], "mixed": ["main", "base", "new"]}
    content |= {
        "size": "debug",
        "data": {**content["data"], "frames": 9, "batch": 4, "max_bad": 1.0},
        "optimizer": {"learning_rate": 1e-3},
        "phases": {
            name: {"weights": dict(zip(parts, of, strict=True)), "train": parts, "steps": steps}
            for name, of in origins.items()
        },
        "run": {"trackers": [], "sample_every": 0},
    }
    return Job(TrainingRecipe.model_validate(content), phase, str(dataset), out, ActiveMindLearner)


def scale_of(out: Path, phase: str) -> tuple[float, ...]:
    return tuple(load_trained(out, phase).network.latent_scale.flatten().tolist())


def without_first_shard(manifest: Path, folder: Path) -> Path:
    """A copy of the dataset without its first shard, which the manifest still lists."""
    shutil.copytree(manifest.parent, folder)
    min(folder.rglob("*.tar")).unlink()
    return folder / "dataset.json"


def test_a_resumed_training_keeps_its_scale_where_other_samples_can_be_read(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_phase(small(manifest, out), WorkerGroup())
    began = scale_of(out, "base")
    lost = without_first_shard(manifest, tmp_path / "lost")
    shutil.rmtree(out / "cache")
    job = small(lost, out, steps=2)
    assert latent_scale(str(lost), job.recipe, str(tmp_path / "cache")) != pytest.approx(began, rel=1e-3)
    outcome = train_phase(job, WorkerGroup())
    assert (outcome.resumed_at, outcome.step) == (1, 2) and scale_of(out, "base") == began


def test_phases_share_the_scale_of_the_weights_they_start_from(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_phase(small(manifest, out), WorkerGroup())
    lost = without_first_shard(manifest, tmp_path / "lost")
    train_phase(small(lost, out, "main", whiten=0.25), WorkerGroup())
    train_phase(small(manifest, out, "mixed", whiten=None), WorkerGroup())
    assert scale_of(out, "base") == scale_of(out, "main") == scale_of(out, "mixed")
    assert len(scale_of(out, "base")) == LATENTS.channels


def described(out: Path, phase: str, *scale: object) -> None:
    phases.write_weights(out, phase, {}, {}, {"shape": {"latent_scale": scale}})


def test_weights_of_other_scales_do_not_go_together(manifest: Path, tmp_path: Path) -> None:
    mixed = small(manifest, tmp_path, "mixed").recipe
    assert starting_scale("base", mixed, tmp_path) is None
    described(tmp_path, "base", 0.5, 2.0)
    with pytest.raises(PhaseError, match="train phase main first"):
        starting_scale("mixed", mixed, tmp_path)
    described(tmp_path, "main", 0.5, 2.5)
    with pytest.raises(
        PhaseError, match="phase mixed cannot start: main and base were trained on latents of different"
    ):
        starting_scale("mixed", mixed, tmp_path)
    described(tmp_path, "main", 0.5, 2.0)
    assert starting_scale("mixed", mixed, tmp_path) == (0.5, 2.0)
    with pytest.raises(PhaseError, match=f"weights of 2 latent channels; the recipe's latents have {LATENTS.channels}"):
        train_phase(small(manifest, tmp_path, "mixed"), WorkerGroup())
    for wrong in (0.0, float("inf"), "1"):
        described(tmp_path, "main", 0.5, wrong)
        with pytest.raises(PhaseError, match=r"no weights\.json at .*main/weights says which latent_scale"):
            starting_scale("mixed", mixed, tmp_path)


@pytest.mark.parametrize("whiten", [None, 0.75])
def test_a_file_of_weights_has_its_scale_beside_it(manifest: Path, tmp_path: Path, whiten: float | None) -> None:
    described(tmp_path / "elsewhere", "base", 0.5, 2.0)
    file = tmp_path / "elsewhere" / "base" / "weights" / phases.AVERAGED
    of_all = small(manifest, tmp_path, whiten=whiten).recipe
    base = of_all.phases["base"].model_copy(update={"weights": dict.fromkeys(["video", "text", "audio"], str(file))})
    from_file = of_all.model_copy(update={"phases": {"base": base}})
    assert starting_scale("base", from_file, tmp_path) == (0.5, 2.0)
    (file.parent / phases.ABOUT).unlink()
    if whiten is None:
        assert starting_scale("base", from_file, tmp_path) == ()
    else:
        with pytest.raises(PhaseError, match=r"averaged\.safetensors: no weights\.json at .* says which latent_scale"):
            starting_scale("base", from_file, tmp_path)


# ---- measuring the scale ----


def without_sound(members: Members) -> Members:
    return [
        (info, b"no flac" if info.name.endswith(".flac") else data)
        for info, data in members
        if not info.name.endswith("log_mel.npy")
    ]


def test_latents_are_measured_on_samples_with_unreadable_sound_too(manifest: Path, tmp_path: Path) -> None:
    shutil.copytree(manifest.parent, tmp_path / "mute")
    repack(tmp_path / "mute", without_sound)
    found = [
        channel_rms(str(at), recipe(1.0), str(tmp_path / "cache")) for at in (manifest, tmp_path / "mute/dataset.json")
    ]
    np.testing.assert_array_equal(*found)


def test_broken_samples_are_skipped_and_a_store_that_fails_is_reported(manifest: Path, tmp_path: Path) -> None:
    lost = without_first_shard(manifest, tmp_path / "lost")
    cache = tmp_path / "cache"
    whole = channel_rms(str(manifest), recipe(1.0), str(cache))  # the cache now holds the shards' indexes
    assert (channel_rms(str(lost), recipe(1.0), str(cache)) != whole).any()
    shards = sorted(path.relative_to(manifest.parent) for path in manifest.parent.rglob("*.tar"))
    (tmp_path / "lost" / shards[0]).mkdir()  # reading it fails, as on a broken disk
    for known in (cache, tmp_path / "new"):
        with pytest.raises(LoaderError, match=rf"dataset\.json: {shards[0]}.* cannot be read: .*directory"):
            channel_rms(str(lost), recipe(1.0), str(known))
    (tmp_path / "lost" / shards[0]).rmdir()
    for shard in shards[1:]:
        (tmp_path / "lost" / shard).unlink()
    with pytest.raises(LoaderError, match=f"{COUNT} cannot be read, the first of them {shards[0]}: .*not there"):
        channel_rms(str(lost), recipe(1.0), str(tmp_path / "new"))
