"""X-Pose's object level: equal to the reference, and loaded from the published layout."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.networks import xpose
from tasks.networks.xpose.attention import sample_levels
from tasks.networks.xpose.clip_text import prompts
from tasks.networks.xpose.network import Stages, XPose
from tasks.networks.xpose.swin import relative_places
from tasks.stages.pose.state_tokens import choose_states
from tasks.weights import store as weights
from tests import tiny_weights
from tests.noise import xpose_state
from tests.parity import arrays, needs_parity, number, shapes

NETWORK = "xpose"
# Parts that neither the object level nor the prompts need: 110 of the 220 million numbers.
_UNUSED = ("clip_model.visual.", "label_enc.", "transformer.decoder.layers.3.", "transformer.decoder.layers.4.")


def close(found: Any, known: np.ndarray) -> None:
    np.testing.assert_allclose(found, known, rtol=1e-4, atol=1e-5 * float(np.abs(known).max()))


@pytest.fixture(scope="module")
def network() -> XPose:
    """The network with the fill rule's weights, and zeros in the parts that are not tested."""
    with torch.device("meta"):
        empty = XPose()
    network = empty.to_empty(device="cpu").eval().requires_grad_(False)
    network.load_state_dict(
        {
            key: relative_places(7)
            if key.endswith("relative_position_index")
            else torch.zeros(value.shape)
            if key.startswith(_UNUSED)
            else torch.from_numpy(number(key, tuple(value.shape)))
            for key, value in network.state_dict().items()
        }
    )
    return network


@pytest.fixture(scope="module")
def known() -> dict[str, np.ndarray]:
    return arrays("xpose/object_level.npz")


@pytest.fixture(scope="module")
def found(network: XPose, known: dict[str, np.ndarray]) -> Stages:
    image = torch.from_numpy(known["image_small_32x32"]).repeat_interleave(8, 1).repeat_interleave(8, 2)
    with torch.inference_mode():
        return network(image[None], network.classes(torch.from_numpy(known["instance_text_embeddings"])))


# ---- the reference ----


@needs_parity
def test_the_published_keys_are_expected_and_no_others(tmp_path: Path) -> None:
    assert xpose.expected_shapes(tmp_path) == shapes("xpose/keys.json")


@needs_parity
def test_deformable_attention_equals_the_reference() -> None:
    known = arrays("xpose/msdeform.npz")
    value, locations, attention = (
        torch.from_numpy(known[name]) for name in ("value", "sampling_locations", "attention_weights")
    )
    levels = [(int(height), int(width)) for height, width in known["spatial_shapes"]]
    close(sample_levels(value, levels, locations, attention), known["output"])


@needs_parity
def test_text_features_equal_the_reference(network: XPose) -> None:
    known = arrays("xpose/clip_text.npz")
    ids = torch.from_numpy(known["tokens"])
    own = prompts("person", "face", "hand")
    assert (ids[:3, : own.shape[1]] == own).all()
    assert (ids[:3, own.shape[1] :] == 0).all()
    with torch.inference_mode():
        close(network.clip_model(ids), known["text_features"])
        close(network.clip_model(own), known["text_features"][:3])  # tokens after the end change nothing


@needs_parity
def test_backbone_and_encoder_equal_the_reference(found: Stages) -> None:
    known = arrays("xpose/stages.npz")
    for level in range(3):
        close(found.levels[level][0, :8], known[f"backbone{level}_first8ch"])
        close(found.positions[level][::32], known[f"pos{level}_every32ch"])
    close(found.memory[0, ::8], known["memory_every8"])
    close(found.text[0], known["memory_text_3"])


@needs_parity
def test_queries_start_at_the_references_positions(found: Stages, known: dict[str, np.ndarray]) -> None:
    # the closest two scores differ by 5e-5, so neighbours may be exchanged
    ours, theirs = found.proposals.places[0].numpy(), known["twostage_topk_index"]
    assert set(ours) == set(theirs)
    assert np.abs(np.argsort(ours) - np.argsort(theirs)).max() <= 1
    close(found.proposals.logits[0], known["twostage_topk_logit"])


def rows(found: Stages, known: dict[str, np.ndarray]) -> torch.Tensor:
    """The row here of each row of the reference, by the position that both started from."""
    row = {int(place): index for index, place in enumerate(found.proposals.places[0])}
    return torch.tensor([row[int(place)] for place in known["twostage_topk_index"]])


@needs_parity
def test_object_tokens_scores_and_boxes_equal_the_reference(found: Stages, known: dict[str, np.ndarray]) -> None:
    row = rows(found, known)
    close(found.proposals.boxes[0, row], known["reference0"])
    close(found.reference[0, row], known["reference1"])
    close(found.after.tokens[0, row][::3], known["object_tokens_hs1_norm"])
    close(found.before.tokens[0, row][::9], known["object_tokens_pre_norm"])
    tokens = found.after.tokens[0, row]
    close(torch.stack([tokens.mean(1), tokens.abs().sum(1)], 1), known["object_tokens_row_stats"])
    for objects, name, box in (
        (found.before, "pre_norm", "boxes_layer1"),
        (found.after, "hs1", "boxes_layer1_from_hs"),
    ):
        close(objects.logits[0, row], known[f"class_logits_{name}"])
        close(objects.boxes[0, row], known[box])
    best = found.before.logits[0, row].amax(1)
    assert set(best.topk(50).indices.tolist()) == set(known["top50"].tolist())


@needs_parity
def test_a_frames_state_tokens_equal_the_papers(found: Stages, known: dict[str, np.ndarray]) -> None:
    state = choose_states(*(values[0].numpy() for values in found.after), min_score=0.1)
    body, face, *hands = known["vector1024_from_hs1"].reshape(4, 256)
    close(state.tokens[:2], np.stack([body, face]))
    # the reference orders the hands by score, this code by side
    x = known["boxes_layer1_from_hs"][known["top_idx_hand"], 0]
    left, right = (hands[int(k)] for k in np.argsort(-x))
    close(state.tokens[2:], np.stack([left, right]))


# ---- a checkpoint in the published layout ----


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return xpose_state()


def write(path: Path, state: dict[str, torch.Tensor]) -> None:
    tiny_weights.xpose(path.parent, state)


def test_a_batch_of_frames_gets_the_outputs_of_each_alone(state: dict[str, torch.Tensor], folder: Path) -> None:
    write(folder / "unipose_swint.pth", state)
    weights.check("xpose")
    network = xpose.load(torch.device("cpu"))
    assert sum(value.numel() for value in network.network.parameters()) < 56e6
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (xpose.BATCH + 1, 70, 101, 3), np.uint8))
    together = network(frames)
    queries = 9 * 13 + 5 * 7 + 3 * 4 + 2 * 2  # fewer than 900: every position is a query
    assert [tuple(values.shape[1:]) for values in together] == [(queries, 256), (queries, 3), (queries, 4)]
    for index in (0, xpose.BATCH):
        alone = network(frames[index : index + 1])
        for values, own in zip(together, alone, strict=True):
            np.testing.assert_allclose(values[index], own[0], rtol=1e-3, atol=1e-3)
    assert not np.allclose(together.tokens[0], together.tokens[1], atol=0.1)


@pytest.mark.slow
def test_half_precision_gives_nearly_the_numbers_of_single_precision(
    state: dict[str, torch.Tensor], folder: Path
) -> None:
    write(folder / "unipose_swint.pth", state)
    # so wide that positions at its border are masked
    frame = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 70, 424, 3), np.uint8))
    memories = []
    for dtype in (torch.float32, torch.bfloat16):
        network = xpose.load(torch.device("cpu"), dtype)
        assert all(torch.isfinite(values).all() for values in network(frame))
        with torch.inference_mode():
            memories.append(network.network(network._normalised(frame), network.classes).memory.float().flatten())
    assert torch.corrcoef(torch.stack(memories))[0, 1] > 0.99


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_difference(
    state: dict[str, torch.Tensor], folder: Path
) -> None:
    key = "transformer.encoder.fusion_layers.3.gamma_v"
    write(folder / "unipose_swint.pth", {name: value for name, value in state.items() if name != key})
    for loads in (lambda: weights.check("xpose"), lambda: xpose.load(torch.device("cpu"))):
        with pytest.raises(weights.WrongWeights, match=rf"1 missing \({key}\)"):
            loads()


def test_a_pickle_that_asks_for_other_objects_than_tensors_is_never_run(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "exploded",))

    (folder / "unipose_swint.pth").write_bytes(pickle.dumps({"model": Bomb()}, protocol=2))
    with pytest.raises(weights.WrongWeights, match="cannot be read as weights alone"):
        weights.check("xpose")
    assert not (folder / "exploded").exists()


def test_frames_are_scaled_to_the_published_size() -> None:
    assert xpose.input_size(512, 512) == (800, 800)
    assert xpose.input_size(1280, 720) == (1333, 750)
    assert xpose.input_size(720, 1280) == (750, 1333)
    assert xpose.input_size(640, 480, 256) == (341, 256)
    assert xpose.input_size(3000, 400, 256) == (427, 57)
