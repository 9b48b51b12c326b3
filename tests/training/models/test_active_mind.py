"""active-mind: its conditions reach the right tokens and no others, and its sizes count parameters and FLOPs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.training.loop.tiny import recipe
from training.loop import phases
from training.loop.parallel import place_of
from training.models.active_mind.config import SIZES, ActiveMindSettings, Shape, active_mind_settings
from training.models.active_mind.mask_predictor import MaskPredictor, mask_loss
from training.models.active_mind.model import (
    ActiveMind,
    Conditions,
    counterpart,
    part_of,
    regions_of,
)
from training.models.active_mind.modulation import Modulation, RMSNorm, TimestepEmbedder

SMALL = Shape(width=32, depth=2, heads=2, mlp=64, patch=2)
SETTINGS = ActiveMindSettings(shape=SMALL, channels=3, text_dim=7, audio_window=2, audio_features=5)
LARGE = ActiveMindSettings(shape=SIZES["1.3b"].model_copy(update={"depth": 2}), channels=16, text_dim=4096)
FRAMES = 7


def filled(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter random numbers, because a new model's blocks pass their input through."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)


def shut_gates(model: ActiveMind) -> None:
    """Let tokens pass through the blocks unchanged, so that each depends on itself alone."""
    with torch.no_grad():
        for vectors in (2, 5):  # the gates, among shift, scale and gate of the attention and of the MLP
            rows = slice(vectors * SMALL.width, (vectors + 1) * SMALL.width)
            model.noise_level.vectors.weight[rows] = 0
            model.noise_level.vectors.bias[rows] = 0
            for block in model.blocks:
                block.video.modulation.offsets[vectors] = 0  # type: ignore[union-attr, operator]


@pytest.fixture
def model() -> ActiveMind:
    made = ActiveMind(SETTINGS)
    filled(made)
    return made


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditions_of(batch: int = 2, frames: int = FRAMES, speakers: int | None = None, words: int = 4) -> Conditions:
    several = () if speakers is None else (speakers,)
    no = torch.zeros(batch, dtype=torch.bool)
    mask = torch.arange(words + 2) < words
    return Conditions(
        audio=normal(batch, *several, 4 * frames - 3, 2, 5, seed=1),
        text=normal(batch, words + 2, 7, seed=2) * mask[:, None],
        text_mask=mask.expand(batch, -1),
        drop_audio=no,
        drop_text=no,
    )


def latents_of(batch: int = 2, frames: int = FRAMES) -> Tensor:
    return normal(batch, 3, frames, 4, 6, seed=3)


def no_clean(batch: int = 2, frames: int = FRAMES) -> Tensor:
    return torch.zeros(batch, frames, dtype=torch.bool)


def velocity(model: Callable[..., Any], latents: Tensor, conditions: Conditions, **how: object) -> Tensor:
    sigma = torch.full((len(latents),), 0.6)
    clean = how.pop("clean", no_clean(len(latents), latents.shape[2]))
    found: Tensor = model(latents, sigma, clean, conditions, **how).velocity
    return found


@pytest.mark.parametrize("size", [*SIZES])
def test_a_size_counts_its_own_parameters(size: str) -> None:
    settings = active_mind_settings(size, channels=16, text_dim=4096, audio_window=2, audio_features=1280)
    with torch.device("meta"):
        model = ActiveMind(settings)
    assert sum(p.numel() for p in model.parameters()) == settings.parameter_count()
    of_parts = dict.fromkeys(("video", "text", "audio"), 0)
    for name, parameter in model.named_parameters():
        of_parts[part_of(name)] += parameter.numel()
    assert of_parts == settings.parameters_of_parts()


def test_the_debug_size_stays_below_five_million() -> None:
    assert active_mind_settings("debug", channels=768, text_dim=1024).parameter_count() < 5_000_000


def test_an_unknown_size_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no size 'debugg' of active-mind; did you mean 'debug'"):
        active_mind_settings("debugg", 16, 16)


def attention_flops(*shapes: tuple[int, ...], **_: object) -> int:
    (batch, heads, queries, size), (_batch, _heads, keys, _size) = shapes[:2]
    return 4 * batch * heads * queries * keys * size


@pytest.mark.parametrize(
    ("settings", "frames", "height", "width", "words", "speakers", "batch"),
    [
        (SETTINGS, 7, 4, 6, 12, 1, 2),
        (SETTINGS, 3, 4, 4, 3, 2, 3),
        (LARGE, 21, 64, 64, 512, 1, 1),
    ],
)
def test_a_size_counts_its_own_flops(
    settings: ActiveMindSettings, frames: int, height: int, width: int, words: int, speakers: int, batch: int
) -> None:
    with FakeTensorMode():
        model = ActiveMind(settings)
        conditions = Conditions(
            torch.zeros(batch, speakers, 4 * frames - 3, settings.audio_window, settings.audio_features),
            torch.zeros(batch, words, settings.text_dim),
            torch.ones(batch, words, dtype=torch.bool),
            torch.zeros(batch, dtype=torch.bool),
            torch.zeros(batch, dtype=torch.bool),
        )
        latents = torch.zeros(batch, settings.channels, frames, height, width)
        sigma, clean = torch.zeros(batch), torch.zeros(batch, frames, dtype=torch.bool)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        with FlopCounterMode(display=False, custom_mapping={kernel: attention_flops}) as counter, torch.no_grad():
            model(latents, sigma, clean, conditions)
    counted = settings.flops(frames, height, width, words, speakers, batch)
    assert counter.get_total_flops() == sum(counted.values())


def test_sound_and_text_cost_a_tenth_of_the_picture_at_most() -> None:
    for size in ("1.3b", "7b"):
        settings = active_mind_settings(size, 16, 4096, 2, 1280)
        flops = settings.flops(frames=31, height=60, width=104, text_tokens=512)  # 121 frames, 480p
        assert flops["text"] + flops["audio"] < 0.1 * flops["video"]


def test_the_audio_branch_starts_as_the_text_branch(model: ActiveMind, tmp_path: Path) -> None:
    """Through a phase whose weights are {video: base, text: base, audio: base.text}."""
    base = ActiveMind(SETTINGS)
    filled(base, seed=1)
    new, trained = ({name: p.detach() for name, p in made.named_parameters()} for made in (model, base))
    phases.write_weights(tmp_path, "base", {}, trained, {})
    assert recipe().phases["warmup"].weights == {"video": "base", "text": "base", "audio": "base.text"}
    shapes = {name: value.shape for name, value in new.items()}
    with phases.StartingWeights(shapes, "warmup", recipe(), tmp_path, part_of, counterpart) as starting:
        pieces = {name: starting.piece(name, place_of(value)) for name, value in new.items()}
    started = {name: new[name] if piece is None else piece for name, piece in pieces.items()}
    of_audio = [name for name in new if part_of(name) == "audio"]
    own = [name for name in of_audio if counterpart(name, "text") is None]
    assert own == ["audio_in.project.weight", "audio_in.project.bias"]  # its shape depends on the sound's features
    for name in set(of_audio) - set(own):
        assert torch.equal(started[name], trained[counterpart(name, "text") or ""])
        assert not torch.equal(started[name], trained[name]) and not torch.equal(started[name], new[name])
    assert all(torch.equal(started[name], new[name]) for name in own)
    assert all(torch.equal(started[name], trained[name]) for name in set(new) - set(of_audio))
    assert {counterpart(name, "audio") for name in new if part_of(name) == "text"} - {None} == set(of_audio) - set(own)


def test_a_new_model_returns_zeros_and_learns_at_once() -> None:
    torch.manual_seed(0)
    model = ActiveMind(SETTINGS)
    latents, conditions = latents_of(), conditions_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (velocity(model, latents, conditions) - latents).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(float(latents.square().mean()), rel=1e-6)
    assert losses[-1] < 0.3 * losses[0]


def test_every_parameter_learns(model: ActiveMind) -> None:
    conditions = replace(conditions_of(), drop_audio=torch.tensor([True, False]), drop_text=torch.tensor([True, False]))
    velocity(model, latents_of(), conditions).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_without_sound_nothing_of_the_audio_branch_is_in_the_output(model: ActiveMind) -> None:
    mask = torch.ones(2, 2, 1, 4, 6, dtype=torch.bool)
    silent = replace(conditions_of(), audio=None)
    before = [velocity(model, latents_of(), replace(silent, speaker_mask=of)) for of in (None, mask)]
    assert torch.equal(*before)
    heard = velocity(model, latents_of(), conditions_of())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part_of(name) == "audio":
                parameter.normal_(std=3.0)
    assert torch.equal(velocity(model, latents_of(), silent), before[0])
    assert not torch.equal(velocity(model, latents_of(), conditions_of()), heard)


def test_dropped_sound_and_text_are_the_same_whatever_they_were(model: ActiveMind) -> None:
    yes = torch.ones(2, dtype=torch.bool)
    dropped = replace(conditions_of(), drop_audio=yes, drop_text=yes)
    other = replace(
        conditions_of(words=1), drop_audio=yes, drop_text=yes, audio=torch.full_like(dropped.audio, torch.nan)
    )
    found = velocity(model, latents_of(), dropped)
    torch.testing.assert_close(velocity(model, latents_of(), other), found)
    found_at_all = velocity(model, latents_of(), conditions_of())
    assert (found - found_at_all).abs().max() > 1e-3
    empty = replace(conditions_of(), text_mask=torch.zeros(2, 6, dtype=torch.bool))
    torch.testing.assert_close(
        velocity(model, latents_of(), empty), velocity(model, latents_of(), replace(empty, drop_text=yes))
    )
    velocity(model, latents_of(), other).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_sample_does_not_depend_on_its_batch(model: ActiveMind) -> None:
    conditions, latents = conditions_of(3), latents_of(3)
    mask = torch.arange(6) < torch.tensor([[1], [4], [6]])
    conditions = replace(conditions, text=normal(3, 6, 7) * mask[:, :, None], text_mask=mask)
    together = velocity(model, latents, conditions)
    for i, words in enumerate((1, 4, 6)):
        alone = Conditions(
            conditions.audio[i : i + 1],
            conditions.text[i : i + 1, :words],
            mask[i : i + 1, :words],
            conditions.drop_audio[i : i + 1],
            conditions.drop_text[i : i + 1],
        )
        torch.testing.assert_close(velocity(model, latents[i : i + 1], alone)[0], together[i], atol=1e-5, rtol=1e-5)


def test_a_clean_frame_is_steered_as_clean_and_the_others_are_not(model: ActiveMind) -> None:
    shut_gates(model)
    clean = no_clean()
    clean[0, 0] = clean[1, -1] = True
    latents, conditions = latents_of(), conditions_of()
    found, noisy = (velocity(model, latents, conditions, clean=which) for which in (clean, no_clean()))
    still = model(latents, torch.zeros(2), no_clean(), conditions).velocity
    expected = torch.where(clean[:, None, :, None, None], still, noisy)
    torch.testing.assert_close(found, expected)
    assert (still - noisy).abs().amax((1, 3, 4)).min() > 1e-3


def test_a_pseudo_last_frame_stands_beyond_the_clip(model: ActiveMind) -> None:
    latents = torch.cat((latents_of(), normal(2, 3, 1, 4, 6, seed=9)), 2)
    clean = torch.cat((no_clean(), torch.ones(2, 1, dtype=torch.bool)), 1)
    shifts = [velocity(model, latents, conditions_of(), clean=clean, pseudo_last=shift) for shift in (1, 30)]
    assert (shifts[0] - shifts[1])[:, :, :FRAMES].abs().max() > 1e-4
    # pseudo_last=1 has the position of an ordinary next frame, but the sound has no such frame
    with pytest.raises(ValueError, match=r"sound of \[25, 2, 5\].*8 latent frames and this model take \[29, 2, 5\]"):
        velocity(model, latents, conditions_of(), clean=clean)


def test_shapes_that_do_not_fit_are_refused_by_name(model: ActiveMind) -> None:
    with pytest.raises(ValueError, match=r"latents of 3 channels, 5x6: this model takes 3 channels.* that 2 divides"):
        velocity(model, normal(2, 3, FRAMES, 5, 6), conditions_of())
    with pytest.raises(ValueError, match="text of 8 numbers a token: this model takes 7"):
        velocity(model, latents_of(), replace(conditions_of(), text=normal(2, 6, 8)))


def test_patches_go_back_where_they_came_from(model: ActiveMind) -> None:
    """A token's output has the place of its latents: a change in one corner changes that corner alone."""
    shut_gates(model)
    latents, changed = latents_of(), latents_of()
    changed[:, :, 2, 2:4, 4:6] += 1.0
    moved = (velocity(model, changed, conditions_of()) - velocity(model, latents, conditions_of())).abs().amax((0, 1))
    assert (moved[2, 2:4, 4:6] > 1e-4).all()
    moved[2, 2:4, 4:6] = 0
    assert moved.max() == 0


def test_checkpointing_changes_no_gradient(model: ActiveMind) -> None:
    def gradients() -> list[Tensor]:
        model.zero_grad()
        velocity(model, latents_of(), conditions_of()).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.set_activation_checkpointing(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_it_compiles_without_breaks() -> None:
    model = ActiveMind(SETTINGS.model_copy(update={"shape": SMALL.model_copy(update={"depth": 1})}))
    filled(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        velocity(compiled, latents_of(), conditions_of()),
        velocity(model, latents_of(), conditions_of()),
        atol=1e-5,
        rtol=1e-5,
    )


def test_noise_level_and_norms_stay_exact_in_half_precision(model: ActiveMind) -> None:
    level = model.noise_level(torch.tensor([0.123, 0.124]))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.noise_level(torch.tensor([0.123, 0.124])), level, atol=0, rtol=0)
        found = velocity(model, latents_of(), conditions_of())
    assert found.dtype == torch.float32
    exact = velocity(model, latents_of(), conditions_of())
    assert (found - exact).norm() < 0.05 * exact.norm()
    # weights may be rounded, too, except those of the noise level and the norms
    exact_modules = [m for m in model.modules() if isinstance(m, TimestepEmbedder | Modulation | RMSNorm)]
    kept = {id(p) for module in exact_modules for p in module.parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data if id(parameter) in kept else parameter.data.bfloat16()
    assert (velocity(model, latents_of(), conditions_of()) - exact).norm() < 0.05 * exact.norm()


def test_a_speakers_sound_reaches_the_speakers_region_only_wherever_it_moves() -> None:
    model = ActiveMind(SETTINGS.model_copy(update={"shape": SMALL.model_copy(update={"depth": 1})}))
    filled(model)
    mask = torch.zeros(2, 2, FRAMES, 4, 6, dtype=torch.bool)
    for frame in range(FRAMES):  # the second speaker walks from right to left, behind the first one
        mask[:, 0, frame, :, 2:4] = True
        at = 2 * (2 - frame // 2) if frame < 6 else 0
        mask[:, 1, frame, :, at : at + 2] = True
    mask[:, 1] &= ~mask[:, 0]
    conditions = replace(conditions_of(speakers=2), speaker_mask=mask)
    other = conditions.audio.clone()
    other[:, 1] += 1.0
    moved = velocity(model, latents_of(), replace(conditions, audio=other)) - velocity(model, latents_of(), conditions)
    heard = mask[:, 1].any(2).any(2)
    assert heard.tolist() == [[True, True, False, False, True, True, True]] * 2
    second = mask[:, 1, None].expand_as(moved)
    assert moved[~second].abs().max() == 0
    by_frame = (moved.abs() * second).amax((1, 3, 4))
    assert (by_frame[heard] > 1e-4).all()


def test_regions_may_move_from_frame_to_frame() -> None:
    mask = torch.zeros(1, 1, 3, 4, 4, dtype=torch.bool)
    mask[0, 0, 0, 0, 0] = mask[0, 0, 1, 3, 0] = True
    assert regions_of(mask, 3, 2, 2)[0, 0].tolist() == [
        [[True, False], [False] * 2],
        [[False] * 2, [True, False]],
        [[False] * 2] * 2,
    ]
    assert regions_of(mask[:, :, :1], 3, 2, 2)[0, 0, 2].tolist() == [[True, False], [False, False]]
    with pytest.raises(ValueError, match=r"a speaker mask of \[1, 1, 3, 4, 4\]: for 4 latent frames"):
        regions_of(mask, 4, 2, 2)


def test_the_mask_predictor_learns_to_follow_speakers() -> None:
    """Two speakers of different looks move. Their tokens are noisy copies of their looks."""
    torch.manual_seed(0)
    predictor = MaskPredictor(16)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=1e-2)

    def scene(seed: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        looks = torch.randn(8, 3, 16, generator=draw)
        who = torch.zeros(8, 4, 4, 4, dtype=torch.long)
        for frame in range(4):
            who[:, frame, frame, :2], who[:, frame, :2, 3] = 1, 2
        hidden = looks[torch.arange(8)[:, None, None, None], who] + 0.3 * torch.randn(8, 4, 4, 4, 16, generator=draw)
        return hidden, torch.stack((who == 1, who == 2), 1)

    for step in range(150):
        hidden, truth = scene(step)
        mask_loss(predictor(hidden, truth, 0), truth).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    hidden, truth = scene(1000)
    found = predictor(hidden, truth[:, :, :1], 0) > 0
    assert torch.equal(found, predictor(hidden, truth, 0) > 0)  # later frames of the mask are not used
    overlap = (found & truth).sum((2, 3, 4)) / (found | truth).sum((2, 3, 4))
    assert overlap.mean() > 0.9


def test_the_mask_predictor_leaves_the_model_alone(model: ActiveMind) -> None:
    predictor = MaskPredictor(SMALL.width)
    out = model(latents_of(), torch.full((2,), 0.6), no_clean(), conditions_of(), hidden_at=0)
    assert out.hidden.shape == (2, FRAMES, 2, 3, 32)
    mask = torch.zeros(2, 1, FRAMES, 4, 6, dtype=torch.bool)
    mask[:, :, :, 0, 0] = True
    mask_loss(predictor(out.hidden, mask, 0), mask).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in predictor.parameters())
