"""A sampler for one clip: Euler's method along the model's velocity, from noise to latents.

Longer videos are chains of clips. The last five frames of a clip are the first frames of the next one. The reference
image stands behind every clip as pseudo last frame, and is dropped after sampling (active-mind section 3.3).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tasks.networks.latent_geometry import TEMPORAL_STRIDE
from tasks.stages.latents.codec import LatentCodec
from training.loop.flow_matching import shift_sigma
from training.models.active_mind.config import PSEUDO_LAST
from training.models.active_mind.mask_predictor import MaskPredictor
from training.models.active_mind.model import ActiveMind, Conditions

Velocity = Callable[[Tensor, float], Tensor]  # (latents, sigma) -> velocity


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Classifier-free guidance (Ho & Salimans 2022) with a scale for the text and one for the sound.

    The model is run with and without each condition, and the velocities are combined. A scale of 1 follows the
    condition as trained. A larger scale follows it more.
    """

    text: float = 1.0
    """Scale of the text."""
    audio: float = 1.0
    """Scale of the sound."""
    order: Literal["text_then_audio", "audio_then_text"] = "text_then_audio"
    """Which condition is added first. The two orders differ when the scales differ. With u the velocity without text
    and sound, t with the text alone, a with the sound alone, ta with both:

        text_then_audio: u + text (t - u) + audio (ta - t), as FantasyTalking, EchoMimicV3, OmniAvatar.
        audio_then_text: u + audio (a - u) + text (ta - a), as MultiTalk, LongCat.
    """

    def shares(self) -> dict[tuple[bool, bool], float]:
        """The factor of each velocity in the sum, by (with text, with audio). Velocities of factor 0 are left out."""
        text_first = self.order == "text_then_audio"
        first, second = (self.text, self.audio) if text_first else (self.audio, self.text)
        shares = {(False, False): 1 - first, (text_first, not text_first): first - second, (True, True): second}
        return {which: share for which, share in shares.items() if share}


def sigma_steps(steps: int, shift: float = 1.0) -> Tensor:
    """The noise levels of a sampler, [steps + 1] float64, from 1 to 0: evenly spaced, then shifted once."""
    return shift_sigma(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), shift)


def euler(velocity: Velocity, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Integrate a velocity from the first to the last noise level by Euler's method.

    noise: the latents at the first noise level. sigmas: [steps + 1], falling, within 0 to 1. Raises ValueError for
    other sigmas.
    """
    levels = sigmas.tolist()
    if len(levels) < 2 or levels[0] > 1 or levels[-1] < 0 or not all(a > b for a, b in pairwise(levels)):
        raise ValueError(f"noise levels fall from at most 1 to at least 0, in one step or more; these are {levels[:8]}")
    x = noise
    for level, next_level in pairwise(levels):
        x = x + (next_level - level) * velocity(x, level)
    return x


@torch.no_grad()
def sample_clip(
    model: ActiveMind,
    conditions: Conditions,
    noise: Tensor,
    sigmas: Tensor,
    first: Tensor | None = None,
    reference: Tensor | None = None,
    guidance: ClassifierFreeGuidance | None = None,
    pseudo_last: int = PSEUDO_LAST,
    mask_predictor: MaskPredictor | None = None,
) -> Tensor:
    """Sample the latents of a batch of clips.

    conditions: their sound is as long as the clip. Conditions that they drop stay dropped.
    noise: [batch, channels, frames, height, width] standard normal, as `initial_noise` draws it.
    sigmas: as `sigma_steps` gives them.
    first: [batch, channels, 1 or more, height, width], clean latents that the clip starts with: of the reference image,
        or of the last five frames of the previous clip (two latents).
    reference: [batch, channels, height, width], the reference image, as `reference_latent` encodes it.
    guidance: None for the conditions as trained, scale 1.
    pseudo_last: latent frames from the last frame to the position of the reference.
    mask_predictor: predicts the speakers' masks again at each step, from the mask of one frame in
        `conditions.speaker_mask`: the reference's, or the first frame's where there is no reference. Without it that
        mask is used as it is. It has an entry for each frame, with the reference as the last one, or one for all
        frames.

    Returns: [batch, channels, frames, height, width], `first` included. Raises ValueError when `first` leaves no frame
    to sample.
    """
    frames = noise.shape[2]
    clean = torch.zeros(noise.shape[2] + (reference is not None), dtype=torch.bool, device=noise.device)
    x = noise
    if first is not None:
        if first.shape[2] >= frames:
            raise ValueError(f"{first.shape[2]} latent frames to start from leave none of {frames} to sample")
        clean[: first.shape[2]] = True
        x = torch.cat((model.scaled(first), noise[:, :, first.shape[2] :]), dim=2)
    if reference is not None:
        clean[frames] = True
        x = torch.cat((x, model.scaled(reference[:, :, None])), dim=2)
    velocity = _GuidedVelocity(
        model,
        conditions,
        clean.expand(len(noise), -1),
        guidance or ClassifierFreeGuidance(),
        pseudo_last if reference is not None else None,
        mask_predictor,
    )
    return model.unscaled(euler(velocity, x, sigmas)[:, :, :frames])


def initial_noise(shape: tuple[int, ...], seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers, float32. They are drawn on the CPU, so that they are the same for every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def reference_latent(codec: LatentCodec, image: np.ndarray) -> Tensor:
    """The latent of a reference image that stands behind a clip.

    A latent frame at that place covers four frames. The first latent of a video covers one frame alone, and for some
    codecs it differs. So this is the second latent of a still video of the image.

    image: [height, width, 3] uint8 RGB. Returns: [channels, height / 8, width / 8] float32.
    """
    return torch.from_numpy(list(codec.encode([image] * (TEMPORAL_STRIDE + 1)))[1].latent)


class _GuidedVelocity:
    """The model's velocity with classifier-free guidance. The velocity of clean frames is 0."""

    def __init__(
        self,
        model: ActiveMind,
        conditions: Conditions,
        clean: Tensor,
        guidance: ClassifierFreeGuidance,
        pseudo_last: int | None,
        mask_predictor: MaskPredictor | None,
    ) -> None:
        self.model, self.conditions, self.clean, self.pseudo_last = model, conditions, clean, pseudo_last
        self.shares = guidance.shares()
        self.known_mask = conditions.speaker_mask
        self.mask_predictor = mask_predictor if self.known_mask is not None else None
        self.middle = len(model.blocks) // 2

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        sigmas = x.new_full((len(x),), sigma)
        hidden_at = self.middle if self.mask_predictor else None
        total, hidden = torch.zeros_like(x), None
        for (text, audio), share in self.shares.items():
            conditions = replace(
                self.conditions,
                drop_text=self.conditions.drop_text | (not text),
                drop_audio=self.conditions.drop_audio | (not audio),
            )
            output = self.model(x, sigmas, self.clean, conditions, self.pseudo_last, hidden_at)
            total += share * output.velocity
            hidden = output.hidden
        if self.mask_predictor is not None and hidden is not None and self.known_mask is not None:
            # `hidden` is of the last velocity, which has the most conditions. The next step uses these masks.
            logits = self.mask_predictor(hidden, self.known_mask, -1 if self.pseudo_last is not None else 0)
            self.conditions = replace(self.conditions, speaker_mask=logits > 0)
        return total.masked_fill(self.clean[:, None, :, None, None], 0.0)
