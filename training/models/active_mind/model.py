"""active-mind: a diffusion transformer of three branches, video, text and audio (active-mind section 3.3, appendix B).

    tokens of video, audio, text -> blocks, each one joint attention over all -> velocity of the video's latents

The first and last frame of the clip are conditions. They stand clean in their places among the noisy frames, and their
tokens are modulated as those of noise level 0. A pseudo last frame is one more clean frame behind the clip. Its
position in time is farther away than the next frame's.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tasks.networks.latent_geometry import TEMPORAL_STRIDE, video_frames
from training.models.active_mind import rope
from training.models.active_mind.attention import AttentionLayout, text_times
from training.models.active_mind.block import Block, PerBranch
from training.models.active_mind.config import ActiveMindSettings
from training.models.active_mind.modulation import Linear, Modulation, RMSNorm, TimestepEmbedder, modulated
from training.models.sequence_parallel import SequenceGroup


@dataclass(frozen=True)
class Conditions:
    """The conditions of a batch of clips, besides its clean frames."""

    audio: Tensor | None
    """[batch, frames, window, features] float32, sound of the 4n + 1 pixel frames. Several speakers: [batch, speakers,
    frames, window, features]. None: there are no audio tokens, so that nothing of the audio branch is in the output."""
    text: Tensor
    """[batch, tokens, text_dim] float32."""
    text_mask: Tensor
    """[batch, tokens] bool, True for the tokens before the padding."""
    drop_audio: Tensor
    """[batch] bool, samples whose sound is replaced by the null embedding: in training where it was dropped or is not
    usable, in sampling for classifier-free guidance."""
    drop_text: Tensor
    """[batch] bool, samples whose text is replaced by the null embedding."""
    speaker_mask: Tensor | None = None
    """[batch, speakers, frames or 1, height, width] bool, where each speaker is, in latent pixels. One entry for each
    frame, including a pseudo last frame, or one entry for all frames. None: the sound reaches all visual tokens."""


class ActiveMindOutput(NamedTuple):
    """What the network returns."""

    velocity: Tensor
    """As the latents, float32: noise - data (training.loop.flow_matching)."""
    hidden: Tensor | None
    """[batch, frames, rows, columns, width], visual tokens after block `hidden_at`. None when that is None."""


class Embedder(nn.Module):
    """Features of a condition to tokens. A dropped condition becomes one learnt null token, repeated."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.project = Linear(features, width)
        self.out = Linear(width, width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, features: Tensor, drop: Tensor) -> Tensor:
        """features: [batch, tokens, features]. drop: [batch] bool. Returns: [batch, tokens, width]."""
        drop = drop[:, None, None]
        # a dropped sample may hold not-a-number, which would stay not-a-number in the gradient, even times 0
        tokens = self.out(F.gelu(self.project(features.masked_fill(drop, 0.0)), approximate="tanh"))
        return torch.where(drop, self.null.to(tokens.dtype), tokens)


class ActiveMind(nn.Module):
    """The network.

    Its weights are float32. It computes in the type that autocast sets. The timestep embedding, the norms and the
    rotary embedding are always computed in float32.
    """

    def __init__(self, settings: ActiveMindSettings) -> None:
        super().__init__()
        self.settings = settings
        self.latent_scale: Tensor
        shape = settings.shape
        self.video_in = Linear(settings.patch_dim, shape.width)
        self.audio_in = Embedder(settings.audio_dim, shape.width)
        self.text_in = Embedder(settings.text_dim, shape.width)
        self.noise_level = TimestepEmbedder(shape.width)
        self.blocks = nn.ModuleList(Block(shape, last=i == shape.depth - 1) for i in range(shape.depth))
        self.modulation_out = Modulation(2, shape.width)
        self.video_out = Linear(shape.width, settings.patch_dim)
        # it has values also where the parameters are on the meta device
        scale = torch.tensor(settings.latent_scale or (1.0,), device="cpu")
        # the settings hold it, so the checkpoint need not
        self.register_buffer("latent_scale", scale[:, None, None, None], persistent=False)
        self.activation_checkpointing = False
        self.sequence: SequenceGroup | None = None
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if not parameter.is_meta:
                    parameter.copy_(self.new_weight(name))

    def new_weight(self, name: str, generator: torch.Generator | None = None) -> Tensor:
        """The value of a parameter before any training, [as the whole parameter] float32 on the CPU.

        generator: of the random numbers; PyTorch's own when None.
        """
        owner, _, kind = name.rpartition(".")
        module, value = self.get_submodule(owner), torch.empty(self.get_parameter(name).shape, device="cpu")
        if kind == "null":
            return nn.init.normal_(value, std=0.02, generator=generator)
        if isinstance(module, RMSNorm):
            return nn.init.ones_(value)
        if isinstance(module, nn.Linear) and kind == "weight" and owner not in ("noise_level.vectors", "video_out"):
            return nn.init.xavier_uniform_(value, generator=generator)
        return nn.init.zeros_(value)

    def set_activation_checkpointing(self, on: bool) -> None:
        """Whether only the input of each block is kept for the backward pass, and the rest is computed again."""
        self.activation_checkpointing = on

    def set_sequence_group(self, sequence: SequenceGroup | None) -> None:
        """Share the visual tokens of every sample with other workers. All of them then call the model together, with
        the same samples, and get the same output. Raises ValueError when the heads cannot be shared out."""
        heads = self.settings.shape.heads
        if sequence is not None and heads % sequence.size:
            raise ValueError(f"{sequence.size} workers cannot share the {heads} heads of this model evenly")
        self.sequence = sequence
        for block in self.blocks:
            block.sequence = sequence  # type: ignore[assignment]

    def scaled(self, latents: Tensor) -> Tensor:
        """The codec's latents [batch, channels, frames, height, width] as the network takes them."""
        return latents / self.latent_scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """The network's latents as the codec gives them."""
        return latents * self.latent_scale

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        clean: Tensor,
        conditions: Conditions,
        pseudo_last: int | None = None,
        hidden_at: int | None = None,
    ) -> ActiveMindOutput:
        """The velocity of noisy latents.

        latents: [batch, channels, frames, height, width] float32, scaled, noise-free where `clean` is True. sigma:
        [batch], noise level of the noisy frames, 0 to 1. clean: [batch, frames] bool. pseudo_last: when given, the last
        frame is a pseudo last frame, positioned this many latent frames beyond the last frame of the clip. hidden_at:
        index of the block whose visual tokens are returned, from 0.

        Raises ValueError when shapes do not fit each other or the model.
        """
        rows, columns = self._checked(latents, conditions, pseudo_last)
        all_frames = latents.shape[2]
        no_text = conditions.drop_text | ~conditions.text_mask.any(1)
        layout = self._layout(latents, conditions, no_text, rows * columns, pseudo_last)
        video, text = self._visual_tokens(latents), self.text_in(conditions.text, no_text)
        if conditions.audio is None:
            audio = text[:, :0]
        else:
            audio = self.audio_in(_audio_by_latent(conditions.audio), conditions.drop_audio)
        x = PerBranch(video, audio, text)
        noisy, still = self.noise_level(torch.cat((sigma, sigma.new_zeros(1)))).split((len(sigma), 1))
        by_frame = torch.where(clean[:, :, None, None], still[:, None], noisy[:, None])
        timestep_embedding = PerBranch(by_frame, noisy[:, None], noisy[:, None])
        cos_sin = self._rope_cos_sin(layout, rows, columns, pseudo_last)
        hidden = None
        if self.sequence is not None:
            cos, sin = (self.sequence.own_tokens(of, all_frames) for of in cos_sin[0])
            cos_sin = ((cos, sin), *cos_sin[1:])
        for number, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, timestep_embedding, cos_sin, layout, use_reentrant=False)
            else:
                x = block(x, timestep_embedding, cos_sin, layout)
            if number == hidden_at:
                hidden = x.video
        velocity = self.video_out(modulated(x.video, *self.modulation_out(by_frame))).float()
        if self.sequence is not None:
            velocity = self.sequence.all_tokens(velocity, all_frames)
            hidden = None if hidden is None else self.sequence.all_tokens(hidden.detach(), all_frames)
        hidden = None if hidden is None else hidden.unflatten(1, (-1, rows, columns))
        patch = self.settings.shape.patch
        velocity = velocity.unflatten(2, (-1, patch, patch)).unflatten(1, (-1, rows, columns))
        # b t r c k y x -> b k t (r y) (c x)
        return ActiveMindOutput(velocity.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4), hidden)

    def _checked(self, latents: Tensor, conditions: Conditions, pseudo_last: int | None) -> tuple[int, int]:
        """Rows and columns of visual tokens. Raises ValueError."""
        settings, patch = self.settings, self.settings.shape.patch
        _, channels, frames, height, width = latents.shape
        if channels != settings.channels or height % patch or width % patch:
            raise ValueError(
                f"latents of {channels} channels, {height}x{width}: this model takes {settings.channels} channels, and "
                f"a height and width that {patch} divides"
            )
        frames -= pseudo_last is not None
        expected = (settings.audio_window, settings.audio_features)
        audio = None if conditions.audio is None else tuple(conditions.audio.shape[-3:])
        if audio not in (None, (video_frames(frames), *expected)):
            raise ValueError(
                f"sound of {list(audio or ())} [frames, window, features]: {frames} latent frames and this model take "
                f"{[video_frames(frames), *expected]}"
            )
        if conditions.text.shape[-1] != settings.text_dim:
            raise ValueError(
                f"text of {conditions.text.shape[-1]} numbers a token: this model takes {settings.text_dim}"
            )
        rows, columns = height // patch, width // patch
        if self.sequence is not None and rows * columns % self.sequence.size:
            raise ValueError(
                f"{self.sequence.size} workers cannot share the {rows}x{columns} visual tokens of a frame evenly"
            )
        return rows, columns

    def _layout(
        self, latents: Tensor, conditions: Conditions, no_text: Tensor, frame_tokens: int, pseudo_last: int | None
    ) -> AttentionLayout:
        all_frames, patch = latents.shape[2], self.settings.shape.patch
        regions, speakers = None, 0
        if conditions.audio is not None:
            speakers = conditions.audio.shape[1] if conditions.audio.dim() == 5 else 1
        if conditions.speaker_mask is not None and speakers:
            regions = regions_of(
                conditions.speaker_mask, all_frames, latents.shape[3] // patch, latents.shape[4] // patch
            )
            regions = regions.flatten(2)
        return AttentionLayout(
            frames=all_frames - (pseudo_last is not None),
            extra=int(pseudo_last is not None),
            frame_tokens=frame_tokens,
            speakers=speakers,
            text_tokens=conditions.text.shape[1],
            # the null text is one token long, whatever the length of the text that it replaces
            text_count=conditions.text_mask.sum(1).masked_fill(no_text, 1),
            regions=regions,
        )

    def _visual_tokens(self, latents: Tensor) -> Tensor:
        """[batch, channels, frames, height, width] to [batch, frames x rows x columns, width], this worker's part."""
        patch = self.settings.shape.patch
        # b k t (r y) (c x) -> b t r c k y x
        patches = latents.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).permute(0, 2, 3, 5, 1, 4, 6)
        patches = patches.flatten(4).flatten(1, 3)
        if self.sequence is not None:
            patches = self.sequence.own_tokens(patches, latents.shape[2])
        tokens: Tensor = self.video_in(patches)
        return tokens

    def _rope_cos_sin(
        self, layout: AttentionLayout, rows: int, columns: int, pseudo_last: int | None
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        """Cosines and sines of the visual, audio and text tokens."""
        times = torch.arange(layout.frames, device=layout.text_count.device)
        frames = times if pseudo_last is None else torch.cat((times, times[-1:] + pseudo_last))
        positions = (
            rope.grid_positions(frames, rows, columns),
            rope.time_positions(times.repeat(layout.speakers)[None]),
            rope.time_positions(text_times(layout.text_count, layout.text_tokens, layout.frames)),
        )
        head_dim = self.settings.shape.width // self.settings.shape.heads
        return tuple(rope.rope_cos_sin(of_branch, head_dim) for of_branch in positions)


def _audio_by_latent(audio: Tensor) -> Tensor:
    """The sound of the pixel frames that each latent frame covers.

    Latent frame 0 covers frame 0 alone, whose sound is repeated four times, as in physavatar appendix B. Latent frame
    i covers frames 4i - 3 to 4i.

    audio: [batch, (speakers,) frames, window, features]. Returns: [batch, (speakers x) latent frames, 4 x window x
    features].
    """
    audio = audio[:, None] if audio.dim() == 4 else audio
    first = audio[:, :, :1].expand(-1, -1, TEMPORAL_STRIDE - 1, -1, -1)
    return torch.cat((first, audio), dim=2).unflatten(2, (-1, TEMPORAL_STRIDE)).flatten(3).flatten(1, 2)


def regions_of(speaker_mask: Tensor, frames: int, rows: int, columns: int) -> Tensor:
    """The visual tokens of each speaker. A token belongs to a speaker if any pixel of its part of the mask does.

    speaker_mask: [batch, speakers, frames or 1, height, width] bool, of any height and width.

    Returns: [batch, speakers, frames, rows, columns] bool. Raises ValueError for a mask of another number of frames.
    """
    if speaker_mask.dim() != 5 or speaker_mask.shape[2] not in (1, frames):
        raise ValueError(
            f"a speaker mask of {list(speaker_mask.shape)}: for {frames} latent frames it is "
            f"[batch, speakers, {frames} or 1, height, width]"
        )
    speaker_mask = speaker_mask.expand(-1, -1, frames, -1, -1)
    pooled = F.adaptive_max_pool2d(speaker_mask.float().flatten(0, 2), (rows, columns))
    return pooled.unflatten(0, speaker_mask.shape[:3]) > 0


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: text, audio, or video, which includes shared parameters."""
    pieces = name.split(".")
    for part in ("text", "audio"):
        if part in pieces or f"{part}_in" in pieces:
            return part
    return "video"


def counterpart(name: str, part: str) -> str | None:
    """The parameter of the part `part` that corresponds to the parameter `name`.

    Only text and audio correspond to each other. None for the video's parameters, and for the first layer of the text
    and audio embedders, whose shape depends on the condition's features.
    """
    own = part_of(name)
    if {own, part} != {"text", "audio"} or name.startswith(f"{own}_in.project."):
        return None
    return name.replace(f"{own}_in.", f"{part}_in.").replace(f".{own}.", f".{part}.")
