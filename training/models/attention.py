"""One joint self-attention over visual, audio and text tokens, and who reads whom in it.

active-mind appendix B: each visual latent frame reads only the five audio and the five text tokens nearest to it in
time, besides all visual tokens. The few audio and text tokens read everything, so that what lies beyond the five
reaches a frame over the next blocks. Sound has a time, one token a latent frame. Text has none of its own, but a plan
is told in the order in which it is played (the Planner's shots): the tokens of a text are spread evenly over the clip.

Several people (appendix B, multi-person): a mask says where in the picture each speaker is. A speaker's audio tokens
and the visual tokens outside of the mask do not read each other; nor do the tokens of two speakers.

Two ways to compute it, with equal results: grouped, for CPUs, never computes what nobody reads; FlexAttention, for
GPUs, in one kernel with the blocks' layout cached by bucket.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.models.sizes import NEAREST


class Heads(NamedTuple):
    """What a branch brings to the attention, each [batch, heads, tokens, head_dim].

    query is None where a branch is only read.
    """

    query: Tensor | None
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Layout:
    """The tokens of a batch, and who reads whom.

    frames: latent frames of the clip. extra: 1 with a pseudo last frame behind them, which reads what the last frame
    reads, else 0. frame_tokens: visual tokens a frame. speakers: each has `frames` audio tokens, one after the other.
    text_count: [batch] int64, tokens of each text; those behind are padding. text_tokens: with padding.
    regions: [batch, speakers, visual tokens] bool, where each speaker is; None: everywhere.
    read_audio: [frames + extra] int64, the first of the five audio tokens that each frame reads. read_text: [batch,
    frames + extra] int64, the first of its five text tokens; of two equally near, the later is read.
    """

    frames: int
    extra: int
    frame_tokens: int
    speakers: int
    text_tokens: int
    text_count: Tensor
    regions: Tensor | None = None
    read_audio: Tensor = field(init=False)
    read_text: Tensor = field(init=False)

    @property
    def video_tokens(self) -> int:
        return (self.frames + self.extra) * self.frame_tokens

    @property
    def audio_tokens(self) -> int:
        return self.speakers * self.frames

    def __post_init__(self) -> None:
        frame = torch.arange(self.frames + self.extra, device=self.text_count.device).clamp(max=self.frames - 1)
        read_audio = (frame - NEAREST // 2).clamp(0, max(self.frames - NEAREST, 0))
        # token j of n stands at (j + 0.5) / n of the clip, frame i of m at (i + 0.5) / m
        count = self.text_count[:, None]
        nearest = torch.div((2 * frame + 1) * count, 2 * self.frames, rounding_mode="floor")
        read_text = torch.minimum((nearest - NEAREST // 2).clamp(min=0), (count - NEAREST).clamp(min=0))
        object.__setattr__(self, "read_audio", read_audio)
        object.__setattr__(self, "read_text", read_text)


def text_times(count: Tensor, tokens: int, frames: int) -> Tensor:
    """Where in a clip of so many latent frames the tokens of a text stand. count: [batch]. Returns: [batch, tokens]."""
    place = torch.arange(tokens, device=count.device, dtype=torch.float64) + 0.5
    return place / count[:, None] * frames - 0.5


def joint_attention(video: Heads, audio: Heads, text: Heads, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """What each token has read, [batch, heads, tokens, head_dim] of each branch; of one without query, no tokens."""
    if video.key.device.type == "cuda":
        return flex_attention(video, audio, text, layout)
    return grouped_attention(video, audio, text, layout)


def grouped_attention(video: Heads, audio: Heads, text: Heads, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Frame by frame: visual tokens read all visual tokens, and their frame's few others beside; exact."""
    assert video.query is not None
    near, allowed = _near(audio, text, layout)
    read = _Beside.apply(video.query, video.key, video.value, *near, allowed)
    if audio.query is None or text.query is None:
        nothing = read[:, :, :0]
        return read, nothing, nothing
    query = torch.cat((audio.query, text.query), dim=2)
    key = torch.cat((video.key, audio.key, text.key), dim=2)
    value = torch.cat((video.value, audio.value, text.value), dim=2)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=_context_mask(layout))
    return (read, *context.split((layout.audio_tokens, layout.text_tokens), dim=2))


def _near(audio: Heads, text: Heads, layout: Layout) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Keys and values that each frame reads beside the visual ones, [batch, heads, frames, read, head_dim], and which
    of them each token may read, [batch, 1, frames, tokens of a frame or 1, read] bool."""
    batch, heads, _, size = text.key.shape
    device = text.key.device
    all_frames, few = layout.frames + layout.extra, min(NEAREST, layout.frames)
    from_audio = layout.read_audio[:, None] + torch.arange(few, device=device)
    of_text = layout.read_text[:, :, None] + torch.arange(min(NEAREST, layout.text_tokens), device=device)
    from_text = of_text.flatten(1)[:, None, :, None].expand(-1, heads, -1, size)

    def near(of_audio: Tensor, of_text: Tensor) -> Tensor:
        read = of_audio.unflatten(2, (layout.speakers, -1)).index_select(3, from_audio.flatten())
        read = read.unflatten(3, (all_frames, few)).transpose(2, 3).flatten(3, 4)
        return torch.cat((read, of_text.gather(2, from_text).unflatten(2, (all_frames, -1))), dim=3)

    words = (of_text < layout.text_count[:, None, None])[:, None, :, None]
    tokens = 1
    sound = torch.ones(batch, 1, all_frames, 1, layout.speakers * few, dtype=torch.bool, device=device)
    if layout.regions is not None:
        tokens = layout.frame_tokens
        heard = layout.regions.unflatten(2, (all_frames, tokens)).permute(0, 2, 3, 1)
        sound = heard.repeat_interleave(few, dim=3)[:, None]
    allowed = torch.cat((sound, words.expand(-1, -1, -1, tokens, -1)), dim=-1)
    return (near(audio.key, text.key), near(audio.value, text.value)), allowed


def _context_mask(layout: Layout) -> Tensor:
    """What audio and text tokens read: [batch, 1, audio + text tokens, all tokens] bool."""
    count, device = layout.text_count, layout.text_count.device
    words = (torch.arange(layout.text_tokens, device=device) < count[:, None])[:, None]
    speaker = torch.arange(layout.speakers, device=device).repeat_interleave(layout.frames)
    same = (speaker[:, None] == speaker).expand(len(count), -1, -1)
    if layout.regions is None:
        seen = same.new_ones(1, 1, 1).expand(len(count), layout.audio_tokens, layout.video_tokens)
    else:
        seen = layout.regions.repeat_interleave(layout.frames, dim=1)
    of_audio = torch.cat((seen, same, words.expand(-1, layout.audio_tokens, -1)), dim=2)
    others = same.new_ones(1, 1, 1).expand(len(count), layout.text_tokens, layout.video_tokens + layout.audio_tokens)
    of_text = torch.cat((others, words.expand(-1, layout.text_tokens, -1)), dim=2)
    return torch.cat((of_audio, of_text), dim=1)[:, None]


class _Beside(torch.autograd.Function):
    """Softmax attention over keys that all queries read and, beside them, a few of each group's own.

    The large part runs in PyTorch's attention kernel; the two parts are joined by their log sums of exponentials, and
    going back, the kernel is given the sums of the whole, which makes its gradients those of the whole.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, near_key: Tensor, near_value: Tensor, allowed: Tensor
    ) -> Tensor:
        """query, key, value: [batch, heads, groups x tokens, head_dim]. near_key, near_value: [batch, heads, groups,
        read, head_dim]. allowed: [batch, 1, groups, tokens or 1, read] bool. Returns: as query."""
        read, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        score = _near_scores(query, near_key, allowed)
        groups = near_key.shape[2]
        log_total = torch.logaddexp(log_sum, score.logsumexp(-1).flatten(2))
        share = (score - log_total.unflatten(2, (groups, -1))[..., None]).exp()
        beside = (share.to(near_value.dtype) @ near_value).flatten(2, 3)
        exact = log_total.dtype  # float32, or float64 where the query is
        read = torch.addcmul(beside.to(exact), read.to(exact), (log_sum - log_total).exp()[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, near_key, near_value, allowed, read, log_total)
        return read

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, near_key, near_value, allowed, read, log_total = ctx.saved_tensors
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        to_query, to_key, to_value = backward(gradient, query, key, value, read, log_total, 0.0, False)
        groups = near_key.shape[2]
        share = (_near_scores(query, near_key, allowed) - log_total.unflatten(2, (groups, -1))[..., None]).exp()
        by_group, exact = gradient.unflatten(2, (groups, -1)), log_total.dtype
        change = by_group.to(exact) @ near_value.to(exact).transpose(-1, -2)
        common = (gradient.to(exact) * read.to(exact)).sum(-1).unflatten(2, (groups, -1))[..., None]
        to_score = (share * (change - common) / math.sqrt(query.shape[-1])).to(query.dtype)
        to_query = to_query + (to_score @ near_key).flatten(2, 3)
        to_near_key = to_score.transpose(-1, -2) @ query.unflatten(2, (groups, -1))
        to_near_value = share.to(gradient.dtype).transpose(-1, -2) @ by_group
        return to_query, to_key, to_value, to_near_key, to_near_value, None


def _near_scores(query: Tensor, near_key: Tensor, allowed: Tensor) -> Tensor:
    """[batch, heads, groups, tokens, read], float32 or better; -inf where not allowed."""
    by_group = query.unflatten(2, (near_key.shape[2], -1)) / math.sqrt(query.shape[-1])
    score = by_group @ near_key.transpose(-1, -2)
    score = score if score.dtype == torch.float64 else score.float()
    return score.masked_fill(~allowed, -torch.inf)


def flex_attention(video: Heads, audio: Heads, text: Heads, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """As grouped_attention, by FlexAttention: blocks of visual tokens alone need no mask and are not asked for one."""
    branches = [video, audio, text] if audio.query is not None else [video]
    query = torch.cat([branch.query for branch in branches if branch.query is not None], dim=2)
    key = torch.cat((video.key, audio.key, text.key), dim=2)
    value = torch.cat((video.value, audio.value, text.value), dim=2)
    blocks = _blocks(layout.video_tokens, query.shape[2], key.shape[2], query.device)
    read = _flex(query.device.type)(query, key, value, block_mask=_with_rule(blocks, layout))
    sizes = (layout.video_tokens, layout.audio_tokens, layout.text_tokens)
    return read.split(sizes if audio.query is not None else (layout.video_tokens, 0, 0), dim=2)


@lru_cache(maxsize=1)
def _flex(device: str) -> Any:
    from torch.nn.attention import flex_attention as flex

    return torch.compile(flex.flex_attention) if device == "cuda" else flex.flex_attention


@lru_cache(maxsize=64)
def _blocks(video_tokens: int, queries: int, keys: int, device: torch.device) -> Any:
    """Which blocks of 128 x 128 need a mask: made once for each bucket, without asking for a single pair of tokens."""
    from torch.nn.attention.flex_attention import BlockMask

    size = 128
    rows, columns = -(-queries // size), -(-keys // size)
    row_is_video = torch.arange(1, rows + 1, device=device) * size <= video_tokens
    column_is_video = torch.arange(1, columns + 1, device=device) * size <= video_tokens
    whole = (row_is_video[:, None] & column_is_video)[None, None]

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        first = chosen.int().argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32), first.int()

    return BlockMask.from_kv_blocks(*listed(~whole), *listed(whole), BLOCK_SIZE=size, seq_lengths=(queries, keys))


def _with_rule(blocks: Any, layout: Layout) -> Any:
    """The bucket's blocks with this batch's rule of who reads whom."""
    from torch.nn.attention.flex_attention import BlockMask

    videos, sounds, frames = layout.video_tokens, layout.audio_tokens, layout.frames
    read_audio, read_text, text_count, regions = layout.read_audio, layout.read_text, layout.text_count, layout.regions
    frame_tokens, last_frame = layout.frame_tokens, layout.frames + layout.extra - 1

    def may_read(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        frame = (query // frame_tokens).clamp(max=last_frame)
        from_video, from_text = query < videos, query >= videos + sounds
        to_video, to_text = key < videos, key >= videos + sounds
        sound, word = (key - videos).clamp(0, sounds - 1), key - videos - sounds
        own_sound = (query - videos).clamp(0, sounds - 1)
        first_sound, first_word = read_audio[frame], read_text[batch, frame]
        heard = (sound % frames >= first_sound) & (sound % frames < first_sound + NEAREST)
        reads_word = (word < text_count[batch]) & (~from_video | ((word >= first_word) & (word < first_word + NEAREST)))
        same = sound // frames == own_sound // frames
        if regions is None:
            reads_sound = from_text | torch.where(from_video, heard, same)
            reads_video = to_video
        else:
            last = videos - 1
            there = regions[batch, sound // frames, query.clamp(max=last)]
            reads_sound = from_text | torch.where(from_video, heard & there, same)
            seen = regions[batch, own_sound // frames, key.clamp(max=last)]
            reads_video = from_video | from_text | seen
        return torch.where(to_video, reads_video, torch.where(to_text, reads_word, reads_sound))

    ruled = BlockMask(
        blocks.seq_lengths,
        blocks.kv_num_blocks,
        blocks.kv_indices,
        blocks.full_kv_num_blocks,
        blocks.full_kv_indices,
        blocks.q_num_blocks,
        blocks.q_indices,
        blocks.full_q_num_blocks,
        blocks.full_q_indices,
        blocks.BLOCK_SIZE,
        may_read,
    )
    return ruled
