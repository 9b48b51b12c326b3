"""active-mind: a diffusion transformer of three branches, video, text and audio (active-mind section 3.3, appendix B).

    tokens of video, audio, text -> blocks, each one joint attention over all -> velocity of the video's latents

The clip's first and last frame are conditions: they stand clean in their places among the noisy ones, and their tokens
are steered as those of noise level 0. A pseudo last frame is one more frame behind the clip, clean, and positioned
farther off in time than it stands.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.models import rope
from training.models.attention import Layout, text_times
from training.models.block import Block, Streams
from training.models.modulation import Linear, Modulation, NoiseLevel, RMSNorm, modulated
from training.models.sizes import FRAMES_PER_LATENT, ActiveMindSettings


@dataclass(frozen=True)
class Conditions:
    """What steers a batch of clips besides its clean frames.

    audio: [batch, frames, window, features] float32, sound by pixel frames (4n + 1 of them); of several speakers
        [batch, speakers, frames, window, features].
    text: [batch, tokens, text_dim] float32. text_mask: [batch, tokens] bool, True for the tokens before the padding.
    drop_audio, drop_text: [batch] bool, whose sound or text is replaced by the null embedding: in training where it
        was dropped or is not usable, in sampling for guidance.
    speaker_mask: [batch, speakers, frames or 1, height, width] bool, where in the picture of latents each speaker is,
        in each frame, a pseudo last frame among them, or in all alike. None: the sound reaches everywhere.
    """

    audio: Tensor
    text: Tensor
    text_mask: Tensor
    drop_audio: Tensor
    drop_text: Tensor
    speaker_mask: Tensor | None = None


class Output(NamedTuple):
    """velocity: as the latents, float32; noise - data (training.flow_matching). hidden: [batch, frames, rows, columns,
    width], visual tokens after the block that was asked for, else None."""

    velocity: Tensor
    hidden: Tensor | None


class Embedder(nn.Module):
    """Features of a condition to tokens, and the one token that stands for its absence."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.project = Linear(features, width)
        self.out = Linear(width, width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, features: Tensor, drop: Tensor) -> Tensor:
        """features: [batch, tokens, features]. drop: [batch] bool. Returns: [batch, tokens, width]."""
        drop = drop[:, None, None]
        # what is dropped may hold anything, and 0 times not-a-number would be none in the gradient
        tokens = self.out(F.gelu(self.project(features.masked_fill(drop, 0.0)), approximate="tanh"))
        return torch.where(drop, self.null.to(tokens.dtype), tokens)


class ActiveMind(nn.Module):
    """The network. Weights are in float32; it computes in the type that autocast or FSDP give it, but noise level,
    norms and rotations always in float32."""

    def __init__(self, settings: ActiveMindSettings) -> None:
        super().__init__()
        self.settings = settings
        self.latent_scale: Tensor
        shape = settings.shape
        self.video_in = Linear(settings.patch_dim, shape.width)
        self.audio_in = Embedder(settings.audio_dim, shape.width)
        self.text_in = Embedder(settings.text_dim, shape.width)
        self.noise_level = NoiseLevel(shape.width)
        self.blocks = nn.ModuleList(Block(shape, last=i == shape.depth - 1) for i in range(shape.depth))
        self.modulation_out = Modulation(2, shape.width)
        self.video_out = Linear(shape.width, settings.patch_dim)
        scale = torch.tensor(settings.latent_scale or (1.0,))
        self.register_buffer("latent_scale", scale[:, None, None, None], persistent=False)  # it is in the settings
        self.checkpointing = False
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedder in (self.audio_in, self.text_in):
            nn.init.normal_(embedder.null, std=0.02)
        for layer in (self.noise_level.vectors, self.video_out):
            nn.init.zeros_(layer.weight)

    def set_checkpointing(self, on: bool) -> None:
        """Whether to keep only what goes into each block, and compute the rest again for the gradients."""
        self.checkpointing = on

    def float32_modules(self) -> list[nn.Module]:
        """Modules whose weights lose by being rounded to bfloat16."""
        return [module for module in self.modules() if isinstance(module, NoiseLevel | Modulation | RMSNorm)]

    def scaled(self, latents: Tensor) -> Tensor:
        """A codec's latents [batch, channels, frames, height, width] as the network takes them."""
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
    ) -> Output:
        """The velocity of noisy latents.

        latents: [batch, channels, frames, height, width] float32, scaled, clean where `clean` says so. sigma:
        [batch], noise level of the others, 0 to 1. clean: [batch, frames] bool. pseudo_last: when given, the last of
        the frames is a pseudo last frame, positioned so many latent frames beyond the last of the clip. hidden_at:
        block, from 0.

        Raises ValueError when shapes do not fit each other or the model.
        """
        rows, columns = self._checked(latents, conditions, pseudo_last)
        no_text = conditions.drop_text | ~conditions.text_mask.any(1)
        layout = self._layout(latents, conditions, no_text, rows * columns, pseudo_last)
        x = Streams(
            self._visual_tokens(latents),
            self.audio_in(_sound_by_latent(conditions.audio), conditions.drop_audio),
            self.text_in(conditions.text, no_text),
        )
        noisy, still = self.noise_level(torch.cat((sigma, sigma.new_zeros(1)))).split((len(sigma), 1))
        by_frame = torch.where(clean[:, :, None, None], still[:, None], noisy[:, None])
        level = Streams(by_frame, noisy[:, None], noisy[:, None])
        turns = self._turns(layout, rows, columns, pseudo_last)
        hidden = None
        for number, block in enumerate(self.blocks):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, level, turns, layout, use_reentrant=False)
            else:
                x = block(x, level, turns, layout)
            if number == hidden_at:
                hidden = x.video.unflatten(1, (-1, rows, columns))
        velocity = self.video_out(modulated(x.video, *self.modulation_out(by_frame)))
        patch = self.settings.shape.patch
        velocity = velocity.float().unflatten(2, (-1, patch, patch)).unflatten(1, (-1, rows, columns))
        # b t r c k y x -> b k t (r y) (c x)
        return Output(velocity.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4), hidden)

    def _checked(self, latents: Tensor, conditions: Conditions, pseudo_last: int | None) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        settings, patch = self.settings, self.settings.shape.patch
        _, channels, frames, height, width = latents.shape
        if channels != settings.channels or height % patch or width % patch:
            raise ValueError(
                f"latents of {channels} channels, {height}x{width}: this model takes {settings.channels} channels, and "
                f"a height and width that {patch} divides"
            )
        frames -= pseudo_last is not None
        sound, expected = conditions.audio.shape[-3:], (settings.audio_window, settings.audio_features)
        if tuple(sound) != (FRAMES_PER_LATENT * (frames - 1) + 1, *expected):
            raise ValueError(
                f"sound of {list(sound)} [frames, window, features]: {frames} latent frames and this model take "
                f"{[FRAMES_PER_LATENT * (frames - 1) + 1, *expected]}"
            )
        if conditions.text.shape[-1] != settings.text_dim:
            raise ValueError(
                f"text of {conditions.text.shape[-1]} numbers a token: this model takes {settings.text_dim}"
            )
        return height // patch, width // patch

    def _layout(
        self, latents: Tensor, conditions: Conditions, no_text: Tensor, frame_tokens: int, pseudo_last: int | None
    ) -> Layout:
        all_frames, patch = latents.shape[2], self.settings.shape.patch
        regions = None
        if conditions.speaker_mask is not None:
            regions = regions_of(
                conditions.speaker_mask, all_frames, latents.shape[3] // patch, latents.shape[4] // patch
            )
            regions = regions.flatten(2)
        return Layout(
            frames=all_frames - (pseudo_last is not None),
            extra=int(pseudo_last is not None),
            frame_tokens=frame_tokens,
            speakers=conditions.audio.shape[1] if conditions.audio.dim() == 5 else 1,
            text_tokens=conditions.text.shape[1],
            # the null text is one token long, however long the text was that it stands for
            text_count=conditions.text_mask.sum(1).masked_fill(no_text, 1),
            regions=regions,
        )

    def _visual_tokens(self, latents: Tensor) -> Tensor:
        """[batch, channels, frames, height, width] to [batch, frames x rows x columns, width]."""
        patch = self.settings.shape.patch
        # b k t (r y) (c x) -> b t r c k y x
        patches = latents.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).permute(0, 2, 3, 5, 1, 4, 6)
        tokens: Tensor = self.video_in(patches.flatten(4).flatten(1, 3))
        return tokens

    def _turns(
        self, layout: Layout, rows: int, columns: int, pseudo_last: int | None
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        times = torch.arange(layout.frames, device=layout.text_count.device)
        frames = times if pseudo_last is None else torch.cat((times, times[-1:] + pseudo_last))
        words = text_times(layout.text_count, layout.text_tokens, layout.frames)
        positions = (
            rope.grid_positions(frames, rows, columns),
            rope.time_positions(times.repeat(layout.speakers)[None]),
            rope.time_positions(words),
        )
        head_dim = self.settings.shape.width // self.settings.shape.heads
        return tuple(rope.rotation(at, head_dim) for at in positions)


def _sound_by_latent(audio: Tensor) -> Tensor:
    """Sound of the pixel frames that each latent frame covers: latent 0 covers frame 0, which counts four times, as in
    physavatar appendix B; latent i covers frames 4i - 3 to 4i.

    audio: [batch, (speakers,) frames, window, features]. Returns: [batch, (speakers x) latent frames, 4 x window x
    features].
    """
    audio = audio[:, None] if audio.dim() == 4 else audio
    first = audio[:, :, :1].expand(-1, -1, FRAMES_PER_LATENT - 1, -1, -1)
    return torch.cat((first, audio), dim=2).unflatten(2, (-1, FRAMES_PER_LATENT)).flatten(3).flatten(1, 2)


def regions_of(speaker_mask: Tensor, frames: int, rows: int, columns: int) -> Tensor:
    """Where each speaker is, by visual tokens: those in which some of the mask lies.

    speaker_mask: [batch, speakers, frames or 1, height, width] bool, of any height and width.

    Returns: [batch, speakers, frames, rows, columns] bool. Raises ValueError for a mask of other frames.
    """
    if speaker_mask.dim() != 5 or speaker_mask.shape[2] not in (1, frames):
        raise ValueError(
            f"a speaker mask of {list(speaker_mask.shape)}: for {frames} latent frames it is "
            f"[batch, speakers, {frames} or 1, height, width]"
        )
    speaker_mask = speaker_mask.expand(-1, -1, frames, -1, -1)
    pooled = F.adaptive_max_pool2d(speaker_mask.float().flatten(0, 2), (rows, columns))
    return pooled.unflatten(0, speaker_mask.shape[:3]) > 0


def start_audio_as_text(model: ActiveMind) -> None:
    """Make the audio branch a copy of the text branch, but for what first meets the sound (appendix B)."""
    weights = model.state_dict()
    for name, value in weights.items():
        origin = counterpart(name, "text") if part_of(name) == "audio" else None
        if origin is not None:
            value.copy_(weights[origin])


def part_of(name: str) -> str:
    """The part of the model that a parameter of this name belongs to: video (with what is shared), text or audio."""
    pieces = name.split(".")
    for part in ("text", "audio"):
        if part in pieces or f"{part}_in" in pieces:
            return part
    return "video"


def counterpart(name: str, part: str) -> str | None:
    """The name of a text or audio parameter's equal in the other of the two; None where it has none: what first meets
    the sound or the text, and what is the video's."""
    own = part_of(name)
    if {own, part} != {"text", "audio"} or name.startswith(f"{own}_in.project."):
        return None
    return name.replace(f"{own}_in.", f"{part}_in.").replace(f".{own}.", f".{part}.")
