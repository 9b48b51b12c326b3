"""RAFT: equal to the reference, in both published namings, and the stage `motion` with it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.media.clip import Clip
from tasks.networks import raft
from tasks.stages.backend import Resources
from tasks.stages.motion import optical_flow
from tasks.stages.motion.stage import Motion, MotionSettings
from tasks.weights import store as weights
from tests import tiny_weights
from tests.parity import arrays, listing, needs_parity, shapes

NETWORK = "raft"


@pytest.fixture(scope="module")
def network() -> raft.Raft:
    network = raft.Raft()
    network.load_state_dict(tiny_weights.raft_state())
    return network.eval().requires_grad_(False)


@needs_parity
def test_flow_equals_the_reference(network: raft.Raft) -> None:
    known = arrays("raft/raft_large.npz")
    pair = torch.from_numpy(np.stack([known["image1"], known["image2"]]))
    with torch.inference_mode():
        images = pair.float()
        features = network.features(images)
        states = network.iterate(images[:1], features[:1], features[1:], 12)
    for name, image in (("fmap1_slice", 0), ("fmap2_slice", 1)):
        np.testing.assert_allclose(features[image, ::16], known[name][0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(states[-1][1], known["flow_low_12"], rtol=1e-4, atol=1e-3)
    with torch.inference_mode():
        first, last = (network.upsampled(*states[index]) for index in (0, -1))
    np.testing.assert_allclose(last, known["flow_up_12"], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(first[..., ::4, ::4], known["flow_up_first"], rtol=1e-4, atol=1e-4)


@needs_parity
def test_both_published_namings_are_expected(network: raft.Raft, folder: Path) -> None:
    princeton = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert princeton == shapes("raft/keys_princeton.json")
    renamed = {raft.to_torchvision(key): shape for key, shape in princeton.items()}
    assert renamed == shapes("raft/keys_torchvision_raft_large.json")
    assert {key: raft.to_torchvision(key) for key in princeton} == listing("raft/map_princeton_to_torchvision.json")


def test_both_namings_load_to_the_same_network(network: raft.Raft, folder: Path) -> None:
    state = network.state_dict()
    torch.save({f"module.{key}": value for key, value in state.items()}, folder / "raft-things.pth")
    weights.check("raft")
    one = raft.load().state_dict()
    (folder / "raft-things.pth").unlink()
    renamed = {raft.to_torchvision(key): value for key, value in state.items()}
    torch.save(renamed, folder / "raft_large_C_T_SKHT_V2-ff5fadd5.pth")
    weights.check("raft")
    other = raft.load().state_dict()
    assert all(torch.equal(one[key], value) and torch.equal(other[key], value) for key, value in state.items())


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_difference(network: raft.Raft, folder: Path) -> None:
    state = {raft.to_torchvision(key): value for key, value in network.state_dict().items()}
    del state["mask_predictor.conv.bias"]
    torch.save(state | {"extra": torch.zeros(1)}, folder / "raft_large_C_T_SKHT_V2-ff5fadd5.pth")
    with pytest.raises(weights.WrongWeights, match=r"1 missing \(mask_predictor.conv.bias\); 1 left over \(extra\)"):
        weights.check("raft")
    with pytest.raises(weights.WrongWeights, match=r"update_block.mask.2.bias.*extra"):
        raft.load()


def test_a_batch_of_pairs_gets_the_flow_of_each_alone(network: raft.Raft) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 96, 150), np.uint8))
    together = raft.flows(network, images, iterations=3)
    assert together.shape == (3, 2, 96, 150)
    for index in range(3):
        alone = raft.flows(network, images[index : index + 2], iterations=3)[0]
        np.testing.assert_allclose(together[index], alone, atol=1e-3)


def test_the_motion_stage_runs_on_weights_from_disk(
    network: raft.Raft, folder: Path, clip_of: Callable[..., Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(network.state_dict(), folder / "raft-things.pth")
    stage = Motion(MotionSettings(backend="raft", short_side=64, rate_hz=1))
    stage.check()
    clip = clip_of("silent.mp4", short_side=128)
    monkeypatch.setattr(optical_flow.RaftFlow, "resources", Resources(batch=2))
    columns = stage.measure(clip).columns
    assert all(np.isfinite(value) for value in columns.values())  # type: ignore[arg-type]
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 96, 3), np.uint8)
    in_twos = list(stage._backend.flows(images))
    monkeypatch.setattr(optical_flow.RaftFlow, "resources", Resources(batch=8))
    np.testing.assert_allclose(np.stack(in_twos), np.stack(list(stage._backend.flows(images))), atol=1e-3)
