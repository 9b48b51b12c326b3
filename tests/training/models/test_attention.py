"""The joint attention: its mask, and that every implementation gives the same numbers."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.models.active_mind import attention
from training.models.active_mind.attention import AttentionLayout, QueryKeyValue

HEADS, SIZE = 2, 8

Attention = Callable[..., tuple[Tensor, ...]]
GROUPED: Attention = attention.grouped_joint_attention
FLEX: Attention = attention.flex_joint_attention


def five_nearest(at: Fraction, times: list[Fraction]) -> set[int]:
    """The five tokens nearest to a time. Ties go to the later token."""
    return set(sorted(range(len(times)), key=lambda j: (abs(times[j] - at), -times[j]))[:5])


def oracle(layout: AttentionLayout) -> Tensor:
    """The mask as the paper defines it, token by token: [batch, tokens, tokens] bool."""
    batch = len(layout.text_count)
    videos, sounds, words = layout.video_tokens, layout.audio_tokens, layout.text_tokens
    may = torch.zeros(batch, videos + sounds + words, videos + sounds + words, dtype=torch.bool)
    for b in range(batch):
        count = int(layout.text_count[b])
        word_times = [Fraction(2 * j + 1, 2 * count) * layout.frames for j in range(count)]
        sound_times = [Fraction(2 * j + 1, 2) for j in range(layout.frames)]

        def there(speaker: int, token: int, b: int = b) -> bool:
            return layout.regions is None or bool(layout.regions[b, speaker, token])

        may[b, :, :videos] = True
        may[b, videos:, videos + sounds : videos + sounds + count] = True
        may[b, videos + sounds :, videos : videos + sounds] = True
        for token in range(videos):
            at = min(token // layout.frame_tokens, layout.frames - 1) + Fraction(1, 2)
            for word in five_nearest(at, word_times):
                may[b, token, videos + sounds + word] = True
            for speaker in range(layout.speakers):
                for sound in five_nearest(at, sound_times):
                    may[b, token, videos + speaker * layout.frames + sound] = there(speaker, token)
        for sound in range(sounds):
            speaker = sound // layout.frames
            own = slice(videos + speaker * layout.frames, videos + (speaker + 1) * layout.frames)
            may[b, videos + sound, own] = True
            for token in range(videos):
                may[b, videos + sound, token] = there(speaker, token)
    return may


def dense(*branches_and_layout: Any) -> tuple[Tensor, ...]:
    video, audio, text, layout = branches_and_layout
    query = torch.cat([h.query for h in (video, audio, text) if h.query is not None], 2)
    key = torch.cat([h.key for h in (video, audio, text)], 2)
    value = torch.cat([h.value for h in (video, audio, text)], 2)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~oracle(layout)[:, None, : query.shape[2]], -torch.inf)
    sizes = (layout.video_tokens, layout.audio_tokens, layout.text_tokens)
    return (scores.softmax(-1) @ value).split(sizes if audio.query is not None else (sizes[0], 0, 0), 2)


def layout_of(
    frames: int, extra: int, tokens: int, speakers: int, counts: list[int], masked: bool, seed: int
) -> AttentionLayout:
    draw = torch.Generator().manual_seed(seed)
    regions = None
    if masked and speakers:
        regions = torch.rand(len(counts), speakers, (frames + extra) * tokens, generator=draw) > 0.5
    return AttentionLayout(frames, extra, tokens, speakers, max(counts) + seed % 3, torch.tensor(counts), regions)


def heads_of(
    layout: AttentionLayout, seed: int, only_video: bool = False, dtype: torch.dtype = torch.float32, size: int = SIZE
) -> list[QueryKeyValue]:
    draw = torch.Generator().manual_seed(seed)
    branches: list[QueryKeyValue] = []
    for tokens in (layout.video_tokens, layout.audio_tokens, layout.text_tokens):
        shape = (len(layout.text_count), HEADS, tokens, size)
        made = [torch.randn(shape, generator=draw, dtype=dtype, requires_grad=True) for _ in range(3)]
        branches.append(QueryKeyValue(None if only_video and branches else made[0], made[1], made[2]))
    return branches


def inputs(branches: list[QueryKeyValue]) -> list[Tensor]:
    return [x for branch in branches for x in branch if x is not None]


def kept(how: Attention, branches: list[QueryKeyValue], layout: AttentionLayout) -> Tensor:
    """The output of all tokens except padding, whose output is not used."""
    out = torch.cat(how(*branches, layout), 2)
    keep = torch.arange(out.shape[2], device=out.device) < layout.video_tokens + layout.audio_tokens
    words = torch.arange(layout.text_tokens, device=out.device) < layout.text_count[:, None]
    keep = torch.cat((keep[: out.shape[2] - layout.text_tokens].expand(len(words), -1), words), 1)
    return out * keep[:, None, :, None] if out.shape[2] > layout.video_tokens else out


def with_gradients(
    how: Attention, branches: list[QueryKeyValue], layout: AttentionLayout, seed: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = kept(how, branches, layout)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1)).to(out.device)
    gradients = torch.autograd.grad((out * weights).sum(), inputs(branches), materialize_grads=True, allow_unused=True)
    return out, gradients


LAYOUTS = st.builds(
    layout_of,
    frames=st.integers(1, 9),
    extra=st.integers(0, 1),
    tokens=st.integers(1, 4),
    speakers=st.integers(0, 3),
    counts=st.lists(st.integers(1, 14), min_size=1, max_size=3),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)


@settings(max_examples=25, deadline=None)
@given(layout=LAYOUTS, seed=st.integers(0, 99), only_video=st.booleans())
def test_grouped_attention_is_dense_masked_attention(layout: AttentionLayout, seed: int, only_video: bool) -> None:
    branches = heads_of(layout, seed, only_video)
    expected, expected_gradients = with_gradients(dense, branches, layout, seed)
    found, gradients = with_gradients(GROUPED, branches, layout, seed)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for gradient, truth in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, truth, atol=1e-5, rtol=1e-5)


@settings(max_examples=8, deadline=None)
@given(layout=LAYOUTS, seed=st.integers(0, 99), only_video=st.booleans())
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_dense_masked_attention(layout: AttentionLayout, seed: int, only_video: bool) -> None:
    """Without gradients, because on a CPU PyTorch's FlexAttention has none."""
    with torch.no_grad():
        branches = heads_of(layout, seed, only_video)
        found, expected = kept(FLEX, branches, layout), kept(dense, branches, layout)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("speakers", "masked"), [(1, False), (2, True)])
def test_flex_attention_on_a_gpu_has_the_gradients_of_dense_masked_attention(speakers: int, masked: bool) -> None:
    layout = layout_of(9, 1, 64, speakers, [3, 40], masked, 1)
    branches = heads_of(layout, 1, size=64)
    expected, expected_gradients = with_gradients(dense, branches, layout, 1)
    on_gpu = [QueryKeyValue(*(x.detach().cuda().requires_grad_() for x in h)) for h in branches]  # type: ignore[union-attr]
    regions = None if layout.regions is None else layout.regions.cuda()
    moved = replace(layout, text_count=layout.text_count.cuda(), regions=regions)
    found, gradients = with_gradients(attention.joint_attention, on_gpu, moved, 1)
    torch.testing.assert_close(found.cpu(), expected, atol=5e-3, rtol=0)
    for gradient, truth in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.cpu(), truth, atol=2e-2, rtol=2e-2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_spares_the_mask_where_only_visual_tokens_meet() -> None:
    layout = layout_of(5, 0, 60, 1, [3, 9], False, 0)
    blocks = attention._blocks(layout.video_tokens, 314, 314, torch.device("cpu"))
    assert blocks.full_kv_num_blocks.flatten().tolist() == [2, 2, 0]  # 300 visual tokens fill two blocks of 128
    assert blocks.kv_num_blocks.flatten().tolist() == [1, 1, 3]
    branches = [QueryKeyValue(*(x.detach() for x in h if x is not None)) for h in heads_of(layout, 0)]
    torch.testing.assert_close(
        torch.cat(FLEX(*branches, layout), 2)[:, :, :305],
        torch.cat(dense(*branches, layout), 2)[:, :, :305],
        atol=1e-5,
        rtol=0,
    )
    assert attention._blocks(layout.video_tokens, 314, 314, torch.device("cpu")) is blocks


def test_gradients_are_those_of_finite_differences() -> None:
    layout = layout_of(3, 1, 2, 2, [2, 7], True, 3)
    branches = heads_of(layout, 0, dtype=torch.float64)

    def attend(*tensors: Tensor) -> Tensor:
        made = [QueryKeyValue(*tensors[i : i + 3]) for i in (0, 3, 6)]
        return torch.cat(GROUPED(*made, layout), 2)[:, :, : layout.video_tokens]

    assert torch.autograd.gradcheck(attend, inputs(branches), fast_mode=True)


def test_a_frame_reads_two_audio_tokens_before_and_behind_it_and_five_at_the_ends() -> None:
    layout = layout_of(9, 1, 1, 1, [1], False, 0)
    assert layout.first_audio.tolist() == [0, 0, 0, 1, 2, 3, 4, 4, 4, 4]


def test_a_long_text_is_read_in_the_order_of_the_clip_and_a_short_one_whole() -> None:
    layout = layout_of(10, 0, 1, 1, [100, 4], False, 0)
    assert layout.first_text[0].tolist() == [3, 13, 23, 33, 43, 53, 63, 73, 83, 93]
    assert layout.first_text[1].tolist() == [0] * 10


def test_half_precision_keeps_its_precision() -> None:
    layout = layout_of(4, 0, 3, 1, [6], False, 0)
    branches = heads_of(layout, 0)
    half = [QueryKeyValue(*(x.detach().bfloat16().requires_grad_() for x in h)) for h in branches]  # type: ignore[union-attr]
    exact, found = GROUPED(*branches, layout), GROUPED(*half, layout)
    for truth, value in zip(exact, found, strict=True):
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.float(), truth, atol=0.05, rtol=0)
