"""The FVD network: equal to the reference, and its preprocessing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.networks import i3d
from tasks.weights import store as weights
from tests.parity import arrays, filled, needs_parity, shapes


@pytest.fixture(scope="module")
def network() -> i3d.I3d:
    network = i3d.I3d()
    network.load_state_dict(filled(network.state_dict(), gain=1.6))
    return network.eval().requires_grad_(False)


@needs_parity
def test_logits_equal_the_reference(network: i3d.I3d) -> None:
    known = arrays("metrics/i3d_pytorch.npz")
    videos = torch.from_numpy(known["video_small_28"].repeat(8, 3).repeat(8, 4))
    found = i3d.features(network, videos, batch=1)
    np.testing.assert_allclose(found, known["output"], rtol=1e-4, atol=1e-5 * np.abs(known["output"]).max())


@needs_parity
def test_the_published_keys_are_expected_and_no_others() -> None:
    assert i3d.expected_shapes(Path()) == shapes("metrics/keys_i3d_pytorch_400.json")


def test_a_saved_checkpoint_loads(network: i3d.I3d, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    (tmp_path / "i3d").mkdir()
    path = tmp_path / "i3d" / "rgb_imagenet.pt"
    torch.save(network.state_dict(), path)
    loaded = i3d.load().state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in network.state_dict().items())
    path.write_bytes(b"no checkpoint")
    with pytest.raises(weights.WrongWeights, match=r"rgb_imagenet.pt cannot be read"):
        i3d.load()


@pytest.mark.parametrize(("height", "width"), [(90, 160), (160, 90), (448, 448), (225, 301)])
def test_preprocessing_crops_the_centre_of_any_frame(height: int, width: int) -> None:
    frames = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    frames[:, height // 2 - 2 : height // 2 + 2, width // 2 - 2 : width // 2 + 2] = 255
    found = i3d.prepared(frames)
    assert found.shape == (3, 2, 224, 224)
    assert found.min() == -1
    bright = (found[0, 0] > 0).nonzero().float().mean(0)
    assert (bright - 111.5).abs().max() < 2


def test_a_video_that_is_too_short_is_refused(network: i3d.I3d) -> None:
    with pytest.raises(ValueError, match="8 frames is too short"):
        i3d.features(network, torch.zeros(1, 3, 8, 224, 224))
