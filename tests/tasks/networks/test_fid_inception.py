"""The FID network: equal to the reference, block by block."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.networks import fid_inception
from tasks.weights import store as weights
from tests.parity import arrays, filled, needs_parity, shapes


@pytest.fixture(scope="module")
def network() -> fid_inception.FidInception:
    network = fid_inception.FidInception()
    network.load_state_dict(filled(network.state_dict(), gain=1.6))
    return network.eval().requires_grad_(False)


@needs_parity
def test_every_block_equals_the_reference(network: fid_inception.FidInception) -> None:
    known = arrays("metrics/fid_inception.npz")
    images = torch.from_numpy(known["image_small"].repeat(8, 2).repeat(8, 3))
    with torch.inference_mode():
        blocks = network.blocks(images)
    slices = {"block0_64_slice": blocks[0][:, ::16, ::4, ::4], "block1_192_slice": blocks[1][:, ::24, ::2, ::2]}
    slices["block2_768_slice"] = blocks[2][:, ::16]
    for name, found in slices.items():
        np.testing.assert_allclose(found, known[name], rtol=1e-4, atol=1e-4, err_msg=name)
    wanted = known["pool3_2048"]
    np.testing.assert_allclose(blocks[3].flatten(1), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    one_by_one = fid_inception.features(network, images, batch=1)
    np.testing.assert_allclose(one_by_one, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@needs_parity
def test_the_published_keys_are_expected_and_no_others() -> None:
    assert fid_inception.expected_shapes(Path()) == shapes("metrics/keys_fid_inception.json")


def test_a_saved_checkpoint_loads(
    network: fid_inception.FidInception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    with pytest.raises(weights.MissingBackend, match=r"pt_inception.*pull fid-inception"):
        fid_inception.load()
    (tmp_path / "fid-inception").mkdir()
    torch.save(network.state_dict(), tmp_path / "fid-inception" / "pt_inception-2015-12-05-6726825d.pth")
    loaded = fid_inception.load().state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in network.state_dict().items())
