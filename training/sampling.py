"""A simple sampler: one clip by Euler's method, from noise along the velocity that the model tells.

Longer videos are chained: the last five frames of a clip are the first of the next. The reference image is behind every
clip as pseudo last frame, and is thrown away afterwards (active-mind section 3.3).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tasks.latent_codec import STRIDE_T, LatentCodec
from training.flow_matching import shifted
from training.models.active_mind import ActiveMind, Conditions
from training.models.mask_predictor import MaskPredictor
from training.models.sizes import PSEUDO_LAST

Velocity = Callable[[Tensor, float], Tensor]  # of latents at a sigma


@dataclass(frozen=True)
class Guidance:
    """How much the text and the sound are followed: at 1 as trained, above more (classifier-free guidance).

    With u the velocity without text and sound, t with the text, a with the sound, ta with both, order tells which is
    added to which, and at different scales the two differ:
        text_then_audio: u + text (t - u) + audio (ta - t), as FantasyTalking, EchoMimicV3, OmniAvatar.
        audio_then_text: u + audio (a - u) + text (ta - a), as MultiTalk, LongCat.
    """

    text: float = 1.0
    audio: float = 1.0
    order: Literal["text_then_audio", "audio_then_text"] = "text_then_audio"

    def shares(self) -> dict[tuple[bool, bool], float]:
        """What the velocities count, by (with text, with audio); those that count nothing are left out."""
        first, second = (self.text, self.audio) if self.order == "text_then_audio" else (self.audio, self.text)
        one = (True, False) if self.order == "text_then_audio" else (False, True)
        shares = {(False, False): 1 - first, one: first - second, (True, True): second}
        return {which: share for which, share in shares.items() if share}


def sigma_steps(steps: int, shift: float = 1.0) -> Tensor:
    """Noise levels to step through, [steps + 1] float64, from 1 to 0: evenly spaced, then shifted once."""
    return shifted(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), shift)


def euler(velocity: Velocity, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Follow a velocity from the first to the last of the noise levels.

    noise: what stands at the first. sigmas: [steps + 1], falling, within 0 to 1. Raises ValueError for others.
    """
    levels = sigmas.tolist()
    if len(levels) < 2 or levels[0] > 1 or levels[-1] < 0 or not all(a > b for a, b in pairwise(levels)):
        raise ValueError(f"noise levels fall from at most 1 to at least 0, in one step or more; these are {levels[:8]}")
    x = noise
    for now, then in pairwise(levels):
        x = x + (then - now) * velocity(x, now)
    return x


@torch.no_grad()
def sample_clip(
    model: ActiveMind,
    conditions: Conditions,
    noise: Tensor,
    sigmas: Tensor,
    first: Tensor | None = None,
    reference: Tensor | None = None,
    guidance: Guidance | None = None,
    pseudo_last: int = PSEUDO_LAST,
    mask_predictor: MaskPredictor | None = None,
) -> Tensor:
    """Latents of one clip, or of several alike at once.

    conditions: their sound is as long as the clip; what they drop stays dropped. noise: [batch, channels, frames,
    height, width] standard normal, drawn by the caller; `first_noise` draws it. sigmas: as `sigma_steps` gives them.
    first: [batch, channels, 1 or more, height, width], clean latents that the clip starts with: of the reference image,
    or of the last five frames of the clip before (two latents).
    reference: [batch, channels, height, width], the reference image, as `reference_latent` encodes it.
    pseudo_last: how many latent frames beyond the last one the reference is positioned.
    mask_predictor: follows the speakers from step to step, from where `conditions.speaker_mask` says that they are in
    the reference, or in the first frame where there is none. Without it they are where that mask says, in each of the
    frames, the reference as the last, or in all of them alike.

    Returns: [batch, channels, frames, height, width], `first` included.
    """
    frames = noise.shape[2]
    given = torch.zeros(noise.shape[2] + (reference is not None), dtype=torch.bool, device=noise.device)
    x = noise
    if first is not None:
        if first.shape[2] >= frames:
            raise ValueError(f"{first.shape[2]} latent frames to start from leave nothing of {frames} to be made")
        given[: first.shape[2]] = True
        x = torch.cat((model.scaled(first), noise[:, :, first.shape[2] :]), dim=2)
    if reference is not None:
        given[frames] = True
        x = torch.cat((x, model.scaled(reference[:, :, None])), dim=2)
    velocity = _Guided(
        model,
        conditions,
        given.expand(len(noise), -1),
        guidance or Guidance(),
        pseudo_last if reference is not None else None,
        mask_predictor,
    )
    return model.unscaled(euler(velocity, x, sigmas)[:, :, :frames])


def first_noise(shape: tuple[int, ...], seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers, float32, drawn on the CPU: the same wherever they are used."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def reference_latent(codec: LatentCodec, image: np.ndarray) -> Tensor:
    """A reference image in place of a clip's last frame. There a latent covers four frames, and some codecs' first
    latent, of a frame by itself, means something else: so this is the second latent of a still video.

    image: [height, width, 3] uint8 RGB. Returns: [channels, height / 8, width / 8] float32.
    """
    return torch.from_numpy(list(codec.encode([image] * (STRIDE_T + 1)))[1].latent)


class _Guided:
    """The model's velocity with guidance; clean frames stand still."""

    def __init__(
        self,
        model: ActiveMind,
        conditions: Conditions,
        clean: Tensor,
        guidance: Guidance,
        pseudo_last: int | None,
        mask_predictor: MaskPredictor | None,
    ) -> None:
        self.model, self.conditions, self.clean, self.pseudo_last = model, conditions, clean, pseudo_last
        self.shares = guidance.shares()
        self.known_mask = conditions.speaker_mask
        self.mask_predictor = mask_predictor if self.known_mask is not None else None
        self.middle = len(model.blocks) // 2

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        level = x.new_full((len(x),), sigma)
        hidden_at = self.middle if self.mask_predictor else None
        total, hidden = torch.zeros_like(x), None
        for (text, audio), share in self.shares.items():
            conditions = replace(
                self.conditions,
                drop_text=self.conditions.drop_text | (not text),
                drop_audio=self.conditions.drop_audio | (not audio),
            )
            output = self.model(x, level, self.clean, conditions, self.pseudo_last, hidden_at)
            total += share * output.velocity
            hidden = output.hidden
        if self.mask_predictor is not None and hidden is not None and self.known_mask is not None:
            # of the last velocity, the one with the most conditions; the next step hears by this step's masks
            logits = self.mask_predictor(hidden, self.known_mask, -1 if self.pseudo_last is not None else 0)
            self.conditions = replace(self.conditions, speaker_mask=logits > 0)
        return total.masked_fill(self.clean[:, None, :, None, None], 0.0)
