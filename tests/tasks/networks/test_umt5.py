"""UMT5's encoder: equal to the reference, in both published layouts, with its tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tasks.media.clip import Clip
from tasks.networks import layouts, umt5
from tasks.stages.latents.stage import Latents, LatentsSettings
from tasks.stages.latents.text_encoder import Umt5Text
from tasks.weights import store as weights
from tasks.weights.missing import MissingBackend
from tests import tiny_weights
from tests.checkpoints import write_shapes
from tests.parity import arrays, listing, needs_parity, shapes

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

NETWORK = "umt5"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> "UMT5EncoderModel":
    return tiny_weights.umt5_network()


@needs_parity
def test_states_equal_the_reference(network: "UMT5EncoderModel") -> None:
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == shapes("wan/keys_tiny_umt5.json")
    known = arrays("wan/tiny_umt5.npz")
    masks = known["attention_mask"].astype(bool)
    ids = [row[mask].tolist() for row, mask in zip(known["input_ids"], masks, strict=True)]
    states = umt5.states(network, ids).numpy()
    np.testing.assert_allclose(states[masks], known["last_hidden_state"][masks], rtol=1e-4, atol=4e-5)
    assert not states[~masks].any()


@needs_parity
def test_the_published_keys_are_expected_and_no_others(folder: Path) -> None:
    known = shapes("wan/keys_umt5_xxl_encoder.json")
    (folder / "text_encoder").mkdir()
    tiny_weights.umt5_tokenizer(folder / "tokenizer" / "tokenizer.json")
    (folder / "text_encoder" / "config.json").write_text(
        json.dumps(listing("wan/keys_umt5_xxl_encoder.json")["config"])
    )
    write_shapes(folder / "text_encoder" / "model.safetensors", known)
    assert umt5.expected_shapes(folder) == known
    weights.check("umt5")
    (folder / "text_encoder" / "model.safetensors").unlink()
    keys = list(known)
    for part in (0, 1):  # in two files, and the embedding under one of its two names
        some = {key: known[key] for key in keys[1:][part::2]}
        write_shapes(folder / "text_encoder" / f"model-0000{part + 1}-of-00002.safetensors", some)
    assert umt5.expected_shapes(folder) == {key: known[key] for key in keys[1:]}
    weights.check("umt5")
    original = {key: known[name] for key, name in listing("wan/map_umt5_xxl_original_to_transformers.json").items()}
    write_shapes(folder / "models_t5_umt5-xxl-enc-bf16.pth", original)
    assert umt5.expected_shapes(folder) == original and len(original) == 242
    weights.check("umt5")


@needs_parity
def test_the_rules_equal_the_published_map() -> None:
    known = listing("wan/map_umt5_xxl_original_to_transformers.json")
    assert {key: layouts.renamed(key, umt5.RULES) for key in known} == known
    names = shapes("wan/keys_umt5_xxl_encoder.json")
    assert {key for key in names if layouts.renamed(key, umt5.RULES) != key} == {"encoder.embed_tokens.weight"}
    config = listing("wan/keys_umt5_xxl_encoder.json")["config"]
    assert {name: config[name] for name in umt5.PUBLISHED} == umt5.PUBLISHED


ORIGINAL = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
    **{f"layer.0.SelfAttention.{name}": f"attn.{name}" for name in "qkvo"},
}


def in_original(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict by the names of the original checkpoint."""
    named = {"token_embedding.weight": state["shared.weight"], "norm.weight": state["encoder.final_layer_norm.weight"]}
    for key, value in state.items():
        if key.startswith("encoder.block."):
            number, _, rest = key.removeprefix("encoder.block.").removesuffix(".weight").partition(".")
            named[f"blocks.{number}.{ORIGINAL[rest]}.weight"] = value
    return named


def test_both_layouts_load_to_the_same_network(network: "UMT5EncoderModel", published: Path) -> None:
    weights.check("umt5")
    one = umt5.load(CPU, torch.float32)
    assert not one.training and not any(parameter.requires_grad for parameter in one.parameters())
    assert one.encoder.embed_tokens.weight is one.shared.weight
    torch.save(in_original(network.state_dict()), published / "models_t5_umt5-xxl-enc-bf16.pth")
    for path in (published / "text_encoder").glob("*.safetensors"):
        path.unlink()
    weights.check("umt5")
    two = umt5.load(CPU, torch.float32)
    ids = [[3, 4, 5, 1], [8, 1], [1]]
    known = umt5.states(network, ids)
    assert torch.equal(umt5.states(one, ids), known) and torch.equal(umt5.states(two, ids), known)
    assert umt5.load(CPU).dtype == torch.bfloat16


def test_a_text_gets_the_same_states_in_any_batch(network: "UMT5EncoderModel") -> None:
    drawn = np.random.default_rng(1)
    ids = [[*drawn.integers(3, 101, length).tolist(), 1] for length in drawn.integers(0, 40, 19)]
    together = umt5.states(network, ids)
    assert together.shape == (19, max(map(len, ids)), 32)
    for row, alone in zip(together, ids, strict=True):
        np.testing.assert_allclose(row[: len(alone)], umt5.states(network, [alone])[0], rtol=1e-4, atol=4e-5)
        assert not row[len(alone) :].any()


def test_texts_are_cleaned_truncated_and_get_an_end_token(published: Path) -> None:
    assert umt5.cleaned(" a &amp;amp;\n\t woman’s “red” dress ") == 'a & woman\'s "red" dress'
    tokenizer = umt5.tokenizer()
    assert umt5.tokens(tokenizer, ["a woman", "", "&quot;red\u201d"]) == [[3, 4, 1], [1], [10, 6, 10, 1]]
    (ids,) = umt5.tokens(tokenizer, ["talks " * 600])
    assert len(ids) == 512 and ids[-1] == 1
    assert umt5.tokens(tokenizer, ["a woman in a red dress"], 4) == [[3, 4, 5, 1]]


def test_a_tokenizer_that_is_not_umt5s_is_refused(published: Path) -> None:
    settings = LatentsSettings(text_backend="umt5")
    path = published / "tokenizer" / "tokenizer.json"
    tiny_weights.umt5_tokenizer(path, end=False)
    with pytest.raises(weights.WrongWeights, match=r"tokenizer\.json is not UMT5's"):
        Umt5Text.check(settings)
    path.write_text("{}")
    with pytest.raises(weights.WrongWeights, match="cannot be read as a tokenizer"):
        Umt5Text.check(settings)
    path.unlink()
    with pytest.raises(MissingBackend, match=r"tokenizer/tokenizer\.json.*`hashed`"):
        Umt5Text.check(settings)


def test_the_stage_embeds_a_caption(published: Path, clip_of: Callable[..., Clip]) -> None:
    clip = clip_of("talk_3s.mp4", caption="a woman in a red dress talks")
    options = {"backend": "dct", "short_side": 64, "text_backend": "umt5", "max_tokens": 512}
    stage = Latents(LatentsSettings(**options, dim=32))
    stage.check()
    assert stage.networks() == ("umt5",) and weights.digest("umt5") in stage.backend_version()
    found = stage.measure(clip)
    text = found.arrays["text_embedding"]
    assert found.columns["tokens"] == 8 and text.shape == (8, 32) and text.std() > 0.1
    expected = umt5.states(umt5.load(CPU, torch.float32), [[3, 4, 5, 3, 6, 7, 8, 1]])[0]
    np.testing.assert_allclose(text, expected, atol=0.1)  # bfloat16
    for wrong, message in ({"dim": 256}, "UMT5 gives 32"), ({"dim": 32, "max_tokens": 513}, "max_tokens is 513"):
        with pytest.raises(MissingBackend, match=message):
            Latents(LatentsSettings(**options | wrong)).check()
