"""Wan2.1-VACE-1.3B equals the reference and loads from both layouts; and its control video."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tasks.networks import layouts
from tasks.weights import store as weights
from tests.checkpoints import write_shapes
from tests.parity import arrays, filled, listing, needs_parity, shapes
from tests.tiny_weights import wan_vae_network
from training.models.physavatar import wan_vace
from training.models.physavatar.vace_conditioning import control

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel

CPU = torch.device("cpu")
TINY = wan_vace.PUBLISHED | {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 4,
    "rope_max_seq_len": 64,
    "vace_layers": [0, 2],
}
# diffusers' names to the original's, for the parameters of a block
IN_BLOCKS = {
    "scale_shift_table": "modulation",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_in": "before_proj",
    "proj_out": "after_proj",
    **{f"{a}.to_{p}": f"{b}.{p}" for a, b in (("attn1", "self_attn"), ("attn2", "cross_attn")) for p in "qkv"},
    **{f"{a}.to_out.0": f"{b}.o" for a, b in (("attn1", "self_attn"), ("attn2", "cross_attn"))},
    **{f"{a}.norm_{p}": f"{b}.norm_{p}" for a, b in (("attn1", "self_attn"), ("attn2", "cross_attn")) for p in "qk"},
}
ELSEWHERE = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}


@pytest.fixture(scope="module")
def network() -> "WanVACETransformer3DModel":
    from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel

    network = WanVACETransformer3DModel(**TINY)
    network.load_state_dict(filled(network.state_dict()))
    return network.eval().requires_grad_(False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    (tmp_path / "wan-vace").mkdir()
    return tmp_path / "wan-vace"


@pytest.fixture
def published(network: "WanVACETransformer3DModel", folder: Path) -> Path:
    """The small network in diffusers' layout, in two files."""
    state = network.state_dict()
    for part in (0, 1):
        some = {key: state[key] for key in list(state)[part::2]}
        save_file(some, folder / f"diffusion_pytorch_model-0000{part + 1}-of-00002.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanVACETransformer3DModel", **TINY}))
    return folder


def inputs(batch: int = 2) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(5)
    return {
        "hidden_states": torch.randn(batch, 16, 3, 4, 6, generator=drawn),
        "control_hidden_states": torch.randn(batch, 96, 3, 4, 6, generator=drawn),
        "encoder_hidden_states": torch.randn(batch, 7, 32, generator=drawn),
        "timestep": torch.linspace(30.0, 900.0, batch),
    }


def velocity(network: "WanVACETransformer3DModel", given: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = network(**given, **more, return_dict=False)[0]
    return found


def near(found: Tensor, known: np.ndarray) -> None:
    np.testing.assert_allclose(found, known, rtol=1e-4, atol=1e-5 * np.abs(known).max())


@needs_parity
def test_velocity_and_what_leads_to_it_are_the_references(network: "WanVACETransformer3DModel") -> None:
    listed = listing("wan/keys_tiny_vace.json")
    assert listed["config"] == TINY
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == shapes("wan/keys_tiny_vace.json")
    known = arrays("wan/tiny_vace.npz")
    given = {name: torch.from_numpy(known[name]) for name in inputs()}
    seen: dict[str, Tensor] = {}

    def keep(name: str, part: int | None = None) -> Any:
        def hook(module: Any, args: Any, result: Any) -> None:
            seen[name] = result if part is None else result[part]

        return hook

    hooks = [block.register_forward_hook(keep(f"vace{i}_hint", 0)) for i, block in enumerate(network.vace_blocks)]
    embedder = network.condition_embedder
    hooks += [embedder.register_forward_hook(keep(n, i)) for i, n in enumerate(("temb", "timestep_proj", "text_proj"))]
    hooks += [network.rope.register_forward_hook(keep(n, i)) for i, n in enumerate(("rope_cos", "rope_sin"))]
    hooks += [block.register_forward_hook(keep(f"block{i}")) for i, block in enumerate(network.blocks)]
    try:
        near(velocity(network, given), known["output"])
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) == 11
    for name, value in seen.items():
        near(value[:, ::6] if name.startswith(("block", "vace")) else value, known[name])
    scaled = velocity(network, given, control_hidden_states_scale=torch.tensor([0.5, 0.0]))
    near(scaled, known["output_scale_05_0"])


@needs_parity
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_every_published_key_and_shape_is_taken(layout: str, folder: Path) -> None:
    known = shapes(f"wan/keys_vace_1.3b_{layout}.json")
    config = listing("wan/keys_vace_1.3b_diffusers.json")["config"]
    if layout == "original":
        config = {"model_type": "vace", "dim": 1536, "num_heads": 12, "in_dim": 16, "out_dim": 16, "vace_in_dim": 96}
        config |= {"ffn_dim": 8960, "freq_dim": 256, "num_layers": 30, "eps": 1e-6, "vace_layers": [*range(0, 30, 2)]}
    (folder / "config.json").write_text(json.dumps(config))
    write_shapes(folder / "diffusion_pytorch_model.safetensors", known)
    assert len(known) == 1264 and wan_vace.expected_shapes(folder) == known
    weights.check("wan-vace")


@needs_parity
def test_the_rules_are_the_published_map() -> None:
    known = listing("wan/map_vace_1.3b_original_to_diffusers.json")
    assert {key: layouts.renamed(key, wan_vace.RULES) for key in known} == known
    assert [name for name in known.values() if layouts.renamed(name, wan_vace.RULES) != name] == []
    assert listing("wan/keys_vace_1.3b_diffusers.json")["config"] == wan_vace.PUBLISHED


def in_original(key: str) -> str:
    if key == "scale_shift_table":
        return "head.modulation"
    layer, _, last = key.rpartition(".")
    if key.startswith(("blocks.", "vace_blocks.")):
        blocks, number, rest = key.split(".", 2)
        inside = rest if rest in IN_BLOCKS else rest.rpartition(".")[0]
        return f"{blocks}.{number}.{IN_BLOCKS[inside]}{rest.removeprefix(inside)}"
    return f"{ELSEWHERE.get(layer, layer)}.{last}"


def test_both_layouts_load_to_the_same_network(network: "WanVACETransformer3DModel", published: Path) -> None:
    weights.check("wan-vace")
    one, known = wan_vace.load(CPU), velocity(network, inputs())
    assert not one.training and not any(parameter.requires_grad for parameter in one.parameters())
    for path in published.glob("*.safetensors"):
        path.unlink()
    original = {in_original(key): value for key, value in network.state_dict().items()}
    assert len(original) == len(network.state_dict())
    save_file(original, published / "diffusion_pytorch_model.safetensors")
    config = {name: TINY[name] for name in ("text_dim", "freq_dim", "ffn_dim", "num_layers", "vace_layers")}
    (published / "config.json").write_text(json.dumps({"dim": 48, "num_heads": 2, "in_dim": 16, **config}))
    weights.check("wan-vace")
    two = wan_vace.load(CPU)
    assert torch.equal(velocity(one, inputs()), known) and torch.equal(velocity(two, inputs()), known)


def test_half_precision_keeps_what_it_would_spoil(network: "WanVACETransformer3DModel", published: Path) -> None:
    half = wan_vace.load(CPU, torch.bfloat16)
    kept = {key for key, value in half.state_dict().items() if value.dtype == torch.float32}
    spoilt = ("time_embedder", "scale_shift_table", "norm2")  # norm1 and norm3 have no weights
    assert kept == {key for key in half.state_dict() if set(spoilt) & set(key.split("."))} and len(kept) > 20
    assert half.rope.freqs_cos.dtype == network.rope.freqs_cos.dtype
    given = {name: value if name == "timestep" else value.bfloat16() for name, value in inputs().items()}
    found, known = velocity(half, given).float(), velocity(network, inputs())
    assert (found - known).abs().max() < 0.03 * known.abs().max()


def test_a_batch_gives_what_each_gives_alone(network: "WanVACETransformer3DModel") -> None:
    given = inputs(3)
    together = velocity(network, given)
    for number, found in enumerate(together):
        alone = velocity(network, {name: value[number : number + 1] for name, value in given.items()})
        np.testing.assert_allclose(found, alone[0], rtol=1e-4, atol=5e-5)


def test_what_does_not_fit_is_refused(published: Path) -> None:
    (published / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    for refusing in (lambda: weights.check("wan-vace"), lambda: wan_vace.load(CPU)):
        with pytest.raises(weights.WrongWeights, match=r"92 missing \("):
            refusing()
    (published / "config.json").write_text(json.dumps(TINY | {"vace_layers": [1]}))
    with pytest.raises(weights.WrongWeights, match="VACE layers must include layer 0"):
        weights.check("wan-vace")


@needs_parity
def test_control_latents_and_masks_are_the_references() -> None:
    known, vae = arrays("wan/vace_conditioning.npz"), wan_vae_network()

    def enlarged(name: str, times: int) -> Tensor:
        return torch.from_numpy(known[name]).repeat_interleave(times, -1).repeat_interleave(times, -2)

    video, mask = enlarged("video_small", 8), enlarged("mask_small", 4)
    for references, suffix in ((None, ""), (enlarged("reference_small", 8)[None, None], "_with_ref")):
        found = control(vae, video, mask, references)
        np.testing.assert_allclose(found[:, :32], known[f"video_latents{suffix}"], rtol=1e-4, atol=2e-5)
        np.testing.assert_array_equal(found[:, 32:], known[f"mask_channels{suffix}"])


def test_a_control_video_says_what_to_keep_and_what_to_make(network: "WanVACETransformer3DModel") -> None:
    vae, drawn = wan_vae_network(), torch.Generator().manual_seed(2)
    video, mask = torch.rand(2, 3, 5, 16, 32, generator=drawn) * 2 - 1, torch.zeros(2, 1, 5, 16, 32)
    mask[1, ..., 16:] = 0.9
    references = torch.rand(2, 2, 3, 16, 32, generator=drawn) * 2 - 1
    grey = control(vae, torch.zeros_like(video), mask)
    kept, made = control(vae, video, mask)[0], control(vae, video, torch.ones_like(mask))[0]
    assert torch.equal(kept[:16], made[16:32]) and torch.equal(kept[16:32], grey[0, :16])
    assert not kept[32:].any() and made[32:].all()
    found = control(vae, video, mask, references)
    assert found.shape == (2, 96, 4, 2, 4)
    assert torch.equal(found[:, :, 2:], control(vae, video, mask)) and not found[:, 16:, :2].any()
    np.testing.assert_allclose(found[:1], control(vae, video[:1], mask[:1], references[:1]), rtol=1e-4, atol=2e-5)
    assert found[1, 32:, 2:, :, 2:].all() and not found[1, 32:, 2:, :, :2].any()
    # the control video can be trained on: no tensor of the VAE was made in inference mode
    parameter = network.vace_patch_embedding.weight.detach().clone().requires_grad_()
    torch.nn.functional.conv3d(found, parameter, stride=(1, 2, 2)).sum().backward()
    assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    for bad in (
        (video[:, :, :4], mask[:, :, :4], None),
        (video[..., :24], mask[..., :24], None),
        (video, mask[:1], None),
        (video, mask, references[:, :, :, :8]),
    ):
        with pytest.raises(ValueError, match="control video"):
            control(vae, *bad)
