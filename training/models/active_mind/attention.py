"""Joint self-attention over visual, audio and text tokens, and its mask.

The mask (active-mind appendix B): a visual token attends to all visual tokens, and to the five audio tokens and five
text tokens nearest in time to its latent frame. Audio and text tokens are few and attend to everything. So audio and
text beyond the nearest five reach a frame through the following blocks.

Time: there is one audio token for each latent frame. A text has no times of its own. Its plan is written in the order
in which it is played (the Planner's shots), so the tokens of a text are spread evenly over the clip.

Several speakers (appendix B, multi-person): a mask says where in the frame each speaker is. A speaker's audio tokens
and the visual tokens outside of that speaker's mask do not attend to each other. Nor do the audio tokens of two
speakers.

Two implementations give equal results. The grouped one, for CPUs, computes no score that the mask removes.
FlexAttention, for GPUs, runs in one kernel and caches the layout of its blocks for each bucket.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.models.active_mind.config import NEAREST
from training.models.sequence_parallel import SequenceGroup

_BLOCK_SIZE = 128  # tokens each way of a block of FlexAttention


class QueryKeyValue(NamedTuple):
    """Query, key and value of one branch, each [batch, heads, tokens, head_dim]."""

    query: Tensor | None
    """None where the branch's tokens are attended to but attend to nothing themselves."""
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class AttentionLayout:
    """The tokens of a batch, and which tokens attend to which.

    The first five fields are the same for every sample of a bucket.
    """

    frames: int
    """Latent frames of the clip."""
    extra: int
    """1 with a pseudo last frame behind the clip, else 0. The pseudo last frame attends to what the last frame attends
    to."""
    frame_tokens: int
    """Visual tokens of a frame."""
    speakers: int
    """Speakers. Each has `frames` audio tokens. The tokens of a speaker stand together. 0: no audio tokens at all."""
    text_tokens: int
    """Text tokens, padding included."""
    text_count: Tensor
    """[batch] int64, tokens of each text without padding."""
    regions: Tensor | None = None
    """[batch, speakers, visual tokens] bool, where each speaker is. None: every speaker is everywhere."""
    first_audio: Tensor = field(init=False)
    """[frames + extra] int64, the first of the five audio tokens that each frame attends to."""
    first_text: Tensor = field(init=False)
    """[batch, frames + extra] int64, the first of the five text tokens that each frame attends to. Ties go to the later
    token."""

    @property
    def video_tokens(self) -> int:
        return (self.frames + self.extra) * self.frame_tokens

    @property
    def audio_tokens(self) -> int:
        return self.speakers * self.frames

    def __post_init__(self) -> None:
        frame = torch.arange(self.frames + self.extra, device=self.text_count.device).clamp(max=self.frames - 1)
        first_audio = (frame - NEAREST // 2).clamp(0, max(self.frames - NEAREST, 0))
        # token j of n stands at (j + 0.5) / n of the clip, frame i of m at (i + 0.5) / m
        count = self.text_count[:, None]
        nearest = torch.div((2 * frame + 1) * count, 2 * self.frames, rounding_mode="floor")
        first_text = torch.minimum((nearest - NEAREST // 2).clamp(min=0), (count - NEAREST).clamp(min=0))
        object.__setattr__(self, "first_audio", first_audio)
        object.__setattr__(self, "first_text", first_text)


def text_times(count: Tensor, tokens: int, frames: int) -> Tensor:
    """Times of text tokens, in latent frames, spread evenly over a clip of `frames` latent frames.

    count: [batch], tokens of each text. tokens: with padding. Returns: [batch, tokens] float64.
    """
    place = torch.arange(tokens, device=count.device, dtype=torch.float64) + 0.5
    return place / count[:, None] * frames - 0.5


def joint_attention(
    video: QueryKeyValue, audio: QueryKeyValue, text: QueryKeyValue, layout: AttentionLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """The attention output of each branch, [batch, heads, tokens, head_dim]. A branch without query has 0 tokens."""
    if video.key.device.type == "cuda":
        return flex_joint_attention(video, audio, text, layout)
    return grouped_joint_attention(video, audio, text, layout)


def shared_joint_attention(
    sequence: SequenceGroup, video: QueryKeyValue, audio: QueryKeyValue, text: QueryKeyValue, layout: AttentionLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """`joint_attention` where this worker has its part of the visual tokens, and gets the output of that part."""
    assert video.query is not None
    frames, batch = layout.frames + layout.extra, len(video.key)
    exchanged = sequence.tokens_to_heads(torch.cat((video.query, video.key, video.value)), frames).split(batch)

    def own_heads(branch: QueryKeyValue) -> QueryKeyValue:
        return QueryKeyValue(*(None if x is None else sequence.own_heads(x) for x in branch))  # type: ignore[arg-type]

    of_video, *others = joint_attention(QueryKeyValue(*exchanged), own_heads(audio), own_heads(text), layout)
    if audio.query is not None:
        others = [sequence.all_heads(out) for out in others]
    return sequence.heads_to_tokens(of_video, frames), others[0], others[1]


def grouped_joint_attention(
    video: QueryKeyValue, audio: QueryKeyValue, text: QueryKeyValue, layout: AttentionLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """`joint_attention`, computed exactly and frame by frame.

    The visual tokens of a frame attend to all visual tokens and to a few audio and text tokens of that frame's own.
    """
    assert video.query is not None
    near, allowed = _near_heads(audio, text, layout)
    video_out = _GroupedAttention.apply(video.query, video.key, video.value, *near, allowed)
    if audio.query is None or text.query is None:
        nothing = video_out[:, :, :0]
        return video_out, nothing, nothing
    query = torch.cat((audio.query, text.query), dim=2)
    key = torch.cat((video.key, audio.key, text.key), dim=2)
    value = torch.cat((video.value, audio.value, text.value), dim=2)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=_context_mask(layout))
    return (video_out, *context.split((layout.audio_tokens, layout.text_tokens), dim=2))


def _near_heads(
    audio: QueryKeyValue, text: QueryKeyValue, layout: AttentionLayout
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The audio and text tokens near each frame.

    Returns: their keys and values, each [batch, heads, frames, near tokens, head_dim], and the attention mask [batch,
    1, frames, tokens of a frame or 1, near tokens] bool.
    """
    batch, heads, _, head_dim = text.key.shape
    device = text.key.device
    all_frames, num_audio = layout.frames + layout.extra, min(NEAREST, layout.frames)
    audio_index = layout.first_audio[:, None] + torch.arange(num_audio, device=device)
    text_index = layout.first_text[:, :, None] + torch.arange(min(NEAREST, layout.text_tokens), device=device)
    text_gather = text_index.flatten(1)[:, None, :, None].expand(-1, heads, -1, head_dim)

    def near(of_audio: Tensor, of_text: Tensor) -> Tensor:
        of_frame = of_text.gather(2, text_gather).unflatten(2, (all_frames, -1))
        if not layout.speakers:
            return of_frame
        by_speaker = of_audio.unflatten(2, (layout.speakers, -1)).index_select(3, audio_index.flatten())
        by_frame = by_speaker.unflatten(3, (all_frames, num_audio)).transpose(2, 3).flatten(3, 4)
        return torch.cat((by_frame, of_frame), dim=3)

    text_allowed = (text_index < layout.text_count[:, None, None])[:, None, :, None]
    tokens = 1
    audio_allowed = torch.ones(batch, 1, all_frames, 1, layout.speakers * num_audio, dtype=torch.bool, device=device)
    if layout.regions is not None:
        tokens = layout.frame_tokens
        by_token = layout.regions.unflatten(2, (all_frames, tokens)).permute(0, 2, 3, 1)
        audio_allowed = by_token.repeat_interleave(num_audio, dim=3)[:, None]
    allowed = torch.cat((audio_allowed, text_allowed.expand(-1, -1, -1, tokens, -1)), dim=-1)
    return (near(audio.key, text.key), near(audio.value, text.value)), allowed


def _context_mask(layout: AttentionLayout) -> Tensor:
    """The attention mask of audio and text tokens: [batch, 1, audio + text tokens, all tokens] bool."""
    count, device = layout.text_count, layout.text_count.device
    is_text = (torch.arange(layout.text_tokens, device=device) < count[:, None])[:, None]
    speaker = torch.arange(layout.speakers, device=device).repeat_interleave(layout.frames)
    same_speaker = (speaker[:, None] == speaker).expand(len(count), -1, -1)
    if layout.regions is None:
        visible = same_speaker.new_ones(1, 1, 1).expand(len(count), layout.audio_tokens, layout.video_tokens)
    else:
        visible = layout.regions.repeat_interleave(layout.frames, dim=1)
    of_audio = torch.cat((visible, same_speaker, is_text.expand(-1, layout.audio_tokens, -1)), dim=2)
    video_and_audio = layout.video_tokens + layout.audio_tokens
    others = same_speaker.new_ones(1, 1, 1).expand(len(count), layout.text_tokens, video_and_audio)
    of_text = torch.cat((others, is_text.expand(-1, layout.text_tokens, -1)), dim=2)
    return torch.cat((of_audio, of_text), dim=1)[:, None]


class _GroupedAttention(torch.autograd.Function):
    """Softmax attention over keys shared by all queries and a few more keys for each group of queries.

    PyTorch's attention kernel computes the shared part. The two parts are merged by their logarithms of summed
    exponentials. The kernel's backward pass is given the output and the logarithm of the sum of both parts together, so
    its gradients are those of the whole attention.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, near_key: Tensor, near_value: Tensor, allowed: Tensor
    ) -> Tensor:
        """query, key, value: [batch, heads, groups x tokens, head_dim]. near_key, near_value: [batch, heads, groups,
        near tokens, head_dim]. allowed: [batch, 1, groups, tokens or 1, near tokens] bool. Returns: as query."""
        shared, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        score = _near_scores(query, near_key, allowed)
        groups = near_key.shape[2]
        log_total = torch.logaddexp(log_sum, score.logsumexp(-1).flatten(2))
        weight = (score - log_total.unflatten(2, (groups, -1))[..., None]).exp()
        near = (weight.to(near_value.dtype) @ near_value).flatten(2, 3)
        exact = log_total.dtype  # float32, or float64 where the query is
        out = torch.addcmul(near.to(exact), shared.to(exact), (log_sum - log_total).exp()[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, near_key, near_value, allowed, out, log_total)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, near_key, near_value, allowed, out, log_total = ctx.saved_tensors
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        to_query, to_key, to_value = kernel(gradient, query, key, value, out, log_total, 0.0, False)
        groups = near_key.shape[2]
        weight = (_near_scores(query, near_key, allowed) - log_total.unflatten(2, (groups, -1))[..., None]).exp()
        by_group, exact = gradient.unflatten(2, (groups, -1)), log_total.dtype
        to_weight = by_group.to(exact) @ near_value.to(exact).transpose(-1, -2)
        common = (gradient.to(exact) * out.to(exact)).sum(-1).unflatten(2, (groups, -1))[..., None]
        to_score = (weight * (to_weight - common) / math.sqrt(query.shape[-1])).to(query.dtype)
        to_query = to_query + (to_score @ near_key).flatten(2, 3)
        to_near_key = to_score.transpose(-1, -2) @ query.unflatten(2, (groups, -1))
        to_near_value = weight.to(gradient.dtype).transpose(-1, -2) @ by_group
        return to_query, to_key, to_value, to_near_key, to_near_value, None


def _near_scores(query: Tensor, near_key: Tensor, allowed: Tensor) -> Tensor:
    """[batch, heads, groups, tokens, near tokens], float32 or float64; -inf where not allowed."""
    by_group = query.unflatten(2, (near_key.shape[2], -1)) / math.sqrt(query.shape[-1])
    score = by_group @ near_key.transpose(-1, -2)
    score = score if score.dtype == torch.float64 else score.float()
    return score.masked_fill(~allowed, -torch.inf)


def flex_joint_attention(
    video: QueryKeyValue, audio: QueryKeyValue, text: QueryKeyValue, layout: AttentionLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """`joint_attention` by FlexAttention. Blocks that hold visual tokens alone need no mask and skip it."""
    branches = [video, audio, text] if audio.query is not None else [video]
    query = torch.cat([branch.query for branch in branches if branch.query is not None], dim=2)
    key = torch.cat((video.key, audio.key, text.key), dim=2)
    value = torch.cat((video.value, audio.value, text.value), dim=2)
    blocks = _blocks(layout.video_tokens, query.shape[2], key.shape[2], query.device)
    out = _flex(query.device.type)(query, key, value, block_mask=_block_mask(blocks, layout))
    sizes = (layout.video_tokens, layout.audio_tokens, layout.text_tokens)
    return out.split(sizes if audio.query is not None else (layout.video_tokens, 0, 0), dim=2)


@lru_cache(maxsize=1)
def _flex(device: str) -> Any:
    from torch.nn.attention import flex_attention as flex

    return torch.compile(flex.flex_attention) if device == "cuda" else flex.flex_attention


@lru_cache(maxsize=64)
def _blocks(video_tokens: int, queries: int, keys: int, device: torch.device) -> Any:
    """The blocks of 128 x 128 token pairs, and which of them need the mask.

    The blocks are made once for each bucket. They follow from the token counts, so the mask of no pair is evaluated.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, columns = -(-queries // _BLOCK_SIZE), -(-keys // _BLOCK_SIZE)
    row_is_video = torch.arange(1, rows + 1, device=device) * _BLOCK_SIZE <= video_tokens
    column_is_video = torch.arange(1, columns + 1, device=device) * _BLOCK_SIZE <= video_tokens
    unmasked = (row_is_video[:, None] & column_is_video)[None, None]

    def counts_and_indices(chosen: Tensor) -> tuple[Tensor, Tensor]:
        chosen_first = chosen.int().argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32), chosen_first.int()

    return BlockMask.from_kv_blocks(
        *counts_and_indices(~unmasked),
        *counts_and_indices(unmasked),
        BLOCK_SIZE=_BLOCK_SIZE,
        seq_lengths=(queries, keys),
    )


def _block_mask(blocks: Any, layout: AttentionLayout) -> Any:
    """The blocks of a bucket with the mask function of a batch."""
    from torch.nn.attention.flex_attention import BlockMask

    return BlockMask(
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
        _mask_function(layout),
    )


def _mask_function(layout: AttentionLayout) -> Any:
    """The mask of one pair of tokens, as FlexAttention asks for it: (batch, head, query, key) -> bool."""
    videos, sounds, frames = layout.video_tokens, layout.audio_tokens, layout.frames
    first_audio, first_text, text_count = layout.first_audio, layout.first_text, layout.text_count
    regions, frame_tokens, last_frame = layout.regions, layout.frame_tokens, layout.frames + layout.extra - 1

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        frame = (query // frame_tokens).clamp(max=last_frame)
        from_video, from_text = query < videos, query >= videos + sounds
        to_video, to_text = key < videos, key >= videos + sounds
        audio_key, text_key = (key - videos).clamp(0, sounds - 1), key - videos - sounds
        audio_query = (query - videos).clamp(0, sounds - 1)
        from_audio, from_word = first_audio[frame], first_text[batch, frame]
        audio_is_near = (audio_key % frames >= from_audio) & (audio_key % frames < from_audio + NEAREST)
        text_is_near = (text_key >= from_word) & (text_key < from_word + NEAREST)
        to_text_allowed = (text_key < text_count[batch]) & (~from_video | text_is_near)
        same_speaker = audio_key // frames == audio_query // frames
        if regions is None:
            to_audio_allowed = from_text | torch.where(from_video, audio_is_near, same_speaker)
            to_video_allowed = to_video
        else:
            last = videos - 1
            inside = regions[batch, audio_key // frames, query.clamp(max=last)]
            to_audio_allowed = from_text | torch.where(from_video, audio_is_near & inside, same_speaker)
            visible = regions[batch, audio_query // frames, key.clamp(max=last)]
            to_video_allowed = from_video | from_text | visible
        return torch.where(to_video, to_video_allowed, torch.where(to_text, to_text_allowed, to_audio_allowed))

    return attends
