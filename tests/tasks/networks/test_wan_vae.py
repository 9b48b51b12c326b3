"""Wan's VAE: equal to the reference, in both published layouts, streaming in both directions."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tasks.media.clip import Clip
from tasks.networks import layouts, wan_vae
from tasks.stages.latents.codec import WanCodec
from tasks.stages.latents.stage import Latents, LatentsSettings
from tasks.weights import store as weights
from tasks.weights.missing import MissingBackend
from tests import tiny_weights
from tests.checkpoints import write_shapes
from tests.parity import arrays, listing, needs_parity, shapes

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

NETWORK = "wan-vae"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae() -> "AutoencoderKLWan":
    return tiny_weights.wan_vae_network()


def pieces(video: Tensor) -> list[Tensor]:
    return [video[:, :, :1], *video[:, :, 1:].split(4, 2)]


def enlarged(video: np.ndarray) -> Tensor:
    return torch.from_numpy(video).repeat_interleave(4, 3).repeat_interleave(4, 4)


def normalised(vae: "AutoencoderKLWan", latent: np.ndarray) -> Iterator[Tensor]:
    mean, std = (torch.tensor(vae.config[name])[None, :, None, None] for name in ("latents_mean", "latents_std"))
    return ((frame - mean) / std for frame in torch.from_numpy(latent).unbind(2))


@needs_parity
def test_latents_and_frames_equal_the_reference(vae: "AutoencoderKLWan") -> None:
    assert {key: tuple(value.shape) for key, value in vae.state_dict().items()} == shapes("wan/keys_tiny_vae.json")
    known = arrays("wan/tiny_vae.npz")
    latents = torch.stack(list(wan_vae.encode(vae, pieces(enlarged(known["video"])))), 2)
    np.testing.assert_allclose(latents, known["latent_normalised"], rtol=1e-4, atol=1.5e-5)
    alone = list(wan_vae.encode(vae, [enlarged(known["video"][:, :, :1])]))
    (expected,) = normalised(vae, known["latent_one_frame"])
    np.testing.assert_allclose(alone[0], expected, rtol=1e-4, atol=1.5e-5)
    np.testing.assert_allclose(alone[0], latents[:, :, 0], rtol=1e-4, atol=1.5e-5)
    for name, latent, step in (
        ("decoded", "latent_mode", 2),
        ("decoded_z_random", "z_random", 2),
        ("decoded_one_frame", "latent_one_frame", 1),
    ):
        decoded = torch.cat(list(wan_vae.decode(vae, normalised(vae, known[latent]))), 2)
        np.testing.assert_allclose(decoded[..., ::step, ::step], known[name], rtol=1e-4, atol=1e-5)


@needs_parity
@pytest.mark.parametrize(
    ("keys", "file"),
    [("keys_vae_diffusers", "diffusion_pytorch_model.safetensors"), ("keys_vae_original", "Wan2.1_VAE.pth")],
)
def test_the_published_keys_are_expected_and_no_others(keys: str, file: str, folder: Path) -> None:
    listed = listing(f"wan/{keys}.json")
    write_shapes(folder / file, shapes(f"wan/{keys}.json"))
    if "config" in listed:
        (folder / "config.json").write_text(json.dumps(listed["config"]))
    assert wan_vae.expected_shapes(folder) == shapes(f"wan/{keys}.json")
    weights.check("wan-vae")


@needs_parity
def test_the_rules_equal_the_published_map() -> None:
    known, rules = listing("wan/map_vae_original_to_diffusers.json"), wan_vae.rules()
    assert {key: layouts.renamed(key, rules) for key in known} == known
    assert {key: layouts.renamed(key, rules) for key in known.values()} == {key: key for key in known.values()}
    assert listing("wan/keys_vae_diffusers.json")["config"] == wan_vae.PUBLISHED


def test_a_stream_gives_the_numbers_of_the_whole_video(vae: "AutoencoderKLWan") -> None:
    video = torch.rand(2, 3, 13, 16, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.inference_mode():
        mode = vae.encode(video).latent_dist.mode()
        whole = torch.stack(list(normalised(vae, mode.numpy())), 2)
        decoded = vae.decode(mode).sample
    latents = torch.stack(list(wan_vae.encode(vae, pieces(video))), 2)
    np.testing.assert_allclose(latents, whole, rtol=1e-5, atol=1e-6)
    streamed = torch.cat(list(wan_vae.decode(vae, latents.unbind(2))), 2)
    np.testing.assert_allclose(streamed, decoded, rtol=1e-4, atol=1e-5)
    # two streams in turn: neither sees the frames of the other
    one, two = (wan_vae.encode(vae, pieces(clip[None])) for clip in video)
    for number, (a, b) in enumerate(zip(one, two, strict=True)):
        np.testing.assert_allclose(torch.cat([a, b]), latents[:, :, number], rtol=1e-4, atol=1e-5)


def test_a_stream_reads_no_further_than_it_writes(vae: "AutoencoderKLWan") -> None:
    read = 0

    def endless() -> Iterator[Tensor]:
        nonlocal read
        while True:
            read += 1
            yield torch.zeros(1, 3, 1 if read == 1 else 4, 8, 8)

    latents = wan_vae.encode(vae, endless())
    frames = wan_vae.decode(vae, latents)
    for number in range(1, 4):
        assert next(frames).shape == (1, 3, 1 if number == 1 else 4, 8, 8)
        assert read == number


def test_both_layouts_load_to_the_same_network(vae: "AutoencoderKLWan", published: Path) -> None:
    weights.check("wan-vae")
    one = wan_vae.load(CPU)
    assert not one.training and not any(parameter.requires_grad for parameter in one.parameters())
    original = {in_original(key): value for key, value in vae.state_dict().items()}
    assert len(original) == len(vae.state_dict()) and not original.keys() & {
        "quant_conv.weight",
        "decoder.conv_in.bias",
    }
    (published / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(original, published / "Wan2.1_VAE.pth")
    weights.check("wan-vae")
    two = wan_vae.load(CPU)
    for (name, a), (_, b), (_, known) in zip(
        one.state_dict().items(), two.state_dict().items(), vae.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b) and torch.equal(a, known), name


def in_original(key: str) -> str:
    """The original's name of a key of the small network, whose decoder blocks have three layers."""
    half, _, rest = key.partition(".")
    if not key.startswith(("encoder.", "decoder.")):
        return {"quant_conv": "conv1", "post_quant_conv": "conv2"}[half] + "." + rest
    for ours, theirs in (
        ("conv_in.", "conv1."),
        ("norm_out.", "head.0."),
        ("conv_out.", "head.2."),
        ("mid_block.resnets.0.", "middle.0."),
        ("mid_block.attentions.0.", "middle.1."),
        ("mid_block.resnets.1.", "middle.2."),
        ("down_blocks.", "downsamples."),
        *((f"up_blocks.{b}.resnets.{r}.", f"upsamples.{3 * b + r}.") for b in range(4) for r in range(2)),
        *((f"up_blocks.{b}.upsamplers.0.", f"upsamples.{3 * b + 2}.") for b in range(3)),
    ):
        if rest.startswith(ours):
            rest = theirs + rest.removeprefix(ours)
            break
    inner = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    layer, _, last = rest.rpartition(".")
    before, _, name = layer.rpartition(".")
    if before:
        name = inner.get(name, name).replace("conv_shortcut", "shortcut")
    return f"{half}.{before}{'.' if before else ''}{name}.{last}"


def test_a_checkpoint_that_does_not_fit_is_refused(vae: "AutoencoderKLWan", published: Path) -> None:
    state = vae.state_dict()
    save_file(
        {key: value for key, value in state.items() if key != "quant_conv.bias"} | {"new": state["quant_conv.bias"]},
        published / "diffusion_pytorch_model.safetensors",
    )
    for refusing in (lambda: weights.check("wan-vae"), lambda: wan_vae.load(CPU)):
        with pytest.raises(weights.WrongWeights, match=r"1 missing \(quant_conv.bias\).*1 left over \(new\)"):
            refusing()
    (published / "config.json").write_text(json.dumps({**tiny_weights.WAN_VAE, "z_dim": 48, "is_residual": True}))
    with pytest.raises(weights.WrongWeights, match=r"Wan2\.1.*z_dim 48, is_residual True"):
        weights.check("wan-vae")
    (published / "config.json").write_text(json.dumps({**tiny_weights.WAN_VAE, "base_dim": "wide"}))
    with pytest.raises(weights.WrongWeights, match="does not describe"):
        weights.check("wan-vae")
    (published / "diffusion_pytorch_model.safetensors").unlink()
    (published / "config.json").unlink()
    with pytest.raises(MissingBackend, match=r"Wan2\.1_VAE\.pth.*`dct`"):
        weights.check("wan-vae")
    torch.save({"encoder.conv1.weight": Path("x")}, published / "Wan2.1_VAE.pth")
    with pytest.raises(weights.WrongWeights, match="cannot be read as weights alone"):
        weights.check("wan-vae")


def test_the_codec_pads_and_crops_frames_of_any_size(published: Path) -> None:
    codec = WanCodec(16)
    frames = np.random.default_rng(0).integers(0, 256, (5, 20, 27, 3), np.uint8)
    encoded = list(codec.encode(iter(frames)))
    assert [found.squared_error for found in encoded] == [None, None]
    latents = [found.latent for found in encoded]
    assert all(latent.shape == (16, 3, 4) and latent.dtype == np.float32 for latent in latents)
    decoded = list(codec.decode(latents, 20, 27))
    assert [frame.shape for frame in decoded] == [(20, 27, 3)] * 5 and decoded[0].dtype == np.uint8
    with pytest.raises(ValueError, match="4n \\+ 1, such as 1"):
        list(codec.encode(iter(frames[:4])))
    with pytest.raises(ValueError, match="latent frame 0"):
        next(iter(codec.decode(latents, 20, 33)))
    with pytest.raises(ValueError, match="have 16"):
        WanCodec(48)


def test_the_stage_measures_a_clip(published: Path, clip_of: Callable[..., Clip]) -> None:
    clip = clip_of("talk_3s.mp4")
    stage = Latents(LatentsSettings(backend="wan", short_side=32))
    stage.check()
    assert stage.networks() == ("wan-vae",) and weights.digest("wan-vae") in stage.backend_version()
    found = stage.measure(clip)
    latent = found.arrays["latent"]
    assert found.columns["psnr_db"] is None and found.columns["frames"] == 4 * len(latent) - 3
    assert latent.shape[1:3] == (16, 4) and np.isfinite(latent).all() and latent.std() > 0.1
    assert stage.measure(clip).arrays["latent"].tobytes() == latent.tobytes()
    with pytest.raises(MissingBackend, match="channels is 48"):
        Latents(LatentsSettings(backend="wan", channels=48)).check()
