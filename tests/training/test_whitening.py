"""Channels that are far larger than the noise are brought down to it, and videos come out as the codec has them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.latent_codec import CosineCodec
from tests.world.puppet_shards import LATENTS, make_puppets
from tests.world.puppets import Puppet
from training.config import TrainingRecipe, load_training
from training.job import Job
from training.learner import ActiveMindLearner
from training.models.active_mind import Conditions, Output
from training.parallel import Team
from training.sampling import first_noise, reference_latent, sample_clip, sigma_steps
from training.whitening import channel_std, latent_scale

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
    found = channel_std(str(manifest), recipe(1.0), str(tmp_path))
    codec = CosineCodec(LATENTS.channels)
    drawn = [encoded.latent for n in range(COUNT) for encoded in codec.encode(Puppet.of(4, n).pictures)]
    ratio = found / np.sqrt(np.square(drawn).mean(axis=(0, 2, 3)))
    # what is decoded has lost some of its fine colours
    assert np.median(ratio) == pytest.approx(1.0, abs=0.05) and 0.5 < ratio.min() <= ratio.max() < 1.2
    assert found.max() > 5 * found.min()


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_channels_are_left_as_large_as_asked_for(manifest: Path, tmp_path: Path, power: float) -> None:
    std, scale = (of(str(manifest), recipe(power), str(tmp_path)) for of in (channel_std, latent_scale))
    left = std / np.array(scale)
    assert np.square(left).mean() == pytest.approx(1.0)
    in_the_picture = std * CosineCodec(LATENTS.channels).gains
    np.testing.assert_allclose(left / left[0], (in_the_picture / in_the_picture[0]) ** (1 - power), rtol=1e-4)


@pytest.mark.parametrize("power", [None, 0.75])
def test_the_network_takes_what_it_is_given_by_the_scale_in_its_settings(
    manifest: Path, tmp_path: Path, power: float | None
) -> None:
    learner = ActiveMindLearner(Job(recipe(power), "main", str(manifest), tmp_path, ActiveMindLearner), Team())
    network = learner.model().network
    latents = next(iter(learner.loader())).latents
    scale = torch.tensor(network.settings.latent_scale or [1.0] * LATENTS.channels)[:, None, None, None]
    assert (scale == 1).all() == (power is None)
    torch.testing.assert_close(network.scaled(latents), latents / scale)
    torch.testing.assert_close(network.unscaled(network.scaled(latents)), latents)
    assert learner.about()["shape"] == network.settings.model_dump(mode="json")


def test_a_sampled_clip_is_in_the_codecs_numbers(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a network that knows the answer, sampling gives the clip itself, begun and guided by what was given."""
    learner = ActiveMindLearner(Job(recipe(0.75), "main", str(manifest), tmp_path, ActiveMindLearner), Team())
    network = learner.model().network
    codec, puppet = CosineCodec(LATENTS.channels), Puppet.of(4, 1)
    clip = torch.from_numpy(np.stack([e.latent for e in codec.encode(puppet.pictures)], axis=1))[None]
    reference = reference_latent(codec, puppet.pictures[0])[None]
    whole = network.scaled(torch.cat((clip, reference[:, :, None]), dim=2))

    def velocity(x: torch.Tensor, sigma: torch.Tensor, clean: torch.Tensor, *_: object) -> Output:
        torch.testing.assert_close(x[:, :, clean[0]], whole[:, :, clean[0]])
        return Output((x - whole) / sigma[0], None)

    monkeypatch.setattr(network, "forward", velocity)
    no = torch.zeros(1, dtype=torch.bool)
    conditions = Conditions(torch.zeros(1, 33, 4, 80), torch.zeros(1, 2, 64), ~no[:, None].expand(1, 2), no, no)
    sampled = sample_clip(
        network, conditions, first_noise(tuple(clip.shape), 0), sigma_steps(4), clip[:, :, :1], reference
    )
    torch.testing.assert_close(sampled, clip, rtol=1e-4, atol=1e-4)
