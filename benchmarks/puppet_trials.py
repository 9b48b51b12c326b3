"""Trials of a trained active-mind on puppets: does it do what sound and text say, and does it keep the identity?

Puppets, sounds and identities are new to the model. Each video starts from a reference image with the mouth closed and
the arm at rest. Figures are read from the pixels by tasks.synthetic.puppet_readers, whose rules were fixed before any
training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tasks.media.clip import SAMPLE_RATE
from tasks.networks.latent_geometry import TEMPORAL_STRIDE, latent_frames
from tasks.networks.log_mel import frame_windows
from tasks.stages.latents.codec import CODECS, LatentCodec
from tasks.stages.latents.stage import LatentsSettings
from tasks.stages.latents.text_encoder import ENCODERS
from tasks.synthetic.puppet_readers import arm_error, colour_error, read_arm, read_gesture, read_mouth, swing
from tasks.synthetic.puppets import FPS, FRAMES, GESTURES, Puppet, muted, reference
from training.generate.sampling import ClassifierFreeGuidance, initial_noise, reference_latent, sample_clip, sigma_steps
from training.models.active_mind.model import ActiveMind, Conditions

UNSEEN = 1_000_003  # seed of puppets that no model is trained on
HELD_OUT = 500_009  # seed of other such puppets, used only to choose the settings of the sampler
CASES, CHAINS, CHAINED = 40, 24, 10  # puppets to follow; chains of clips; clips in a chain
SEAM = TEMPORAL_STRIDE + 1  # frames that a clip takes over from the clip before (active-mind, appendix B)


@dataclass(frozen=True)
class Sampler:
    """How videos are sampled."""

    latents: LatentsSettings
    """How frames and texts are encoded."""
    steps: int
    """Steps of Euler's method."""
    guidance: ClassifierFreeGuidance
    """Guidance by text and sound."""
    pseudo_last: int
    """Latent frames from the last frame of the clip to the position of the reference."""

    @cached_property
    def codec(self) -> LatentCodec:
        return CODECS[self.latents.backend](self.latents.channels)

    def clips(
        self,
        model: ActiveMind,
        begin: np.ndarray,
        sounds: Sequence[np.ndarray],
        captions: Sequence[str],
        references: np.ndarray | None,
        seed: int,
    ) -> np.ndarray:
        """Sample one clip for each entry of `begin`.

        begin: [clips, 1 or 5, size, size, 3] uint8 RGB, the first frames.
        sounds: [frames, window, mels] each, the log-mel windows. captions: the texts.
        references: [clips, size, size, 3] uint8 RGB, the identities to keep; None for no pseudo last frame.
        seed: of the noise.

        Returns: [clips, frames, size, size, 3] uint8 RGB. The first frames are those of `begin`.
        """
        text = ENCODERS[self.latents.text_backend](self.latents.dim, self.latents.max_tokens).encode(captions)
        count, frames, size = len(begin), len(sounds[0]), begin.shape[2]
        no = torch.zeros(count, dtype=torch.bool)
        conditions = Conditions(
            audio=torch.from_numpy(np.stack(sounds)).float(),
            text=torch.from_numpy(text.embeddings),
            text_mask=torch.from_numpy(text.mask),
            drop_audio=no,
            drop_text=no,
        )
        first = torch.stack([self._latents(pictures) for pictures in begin]).transpose(1, 2)
        shape = (count, self.codec.channels, latent_frames(frames), *first.shape[3:])
        made = sample_clip(
            model,
            conditions,
            initial_noise(shape, seed),
            sigma_steps(self.steps),
            first,
            None if references is None else torch.stack([reference_latent(self.codec, r) for r in references]),
            self.guidance,
            self.pseudo_last,
        )
        clips = [np.stack(list(self.codec.decode(clip, size, size))) for clip in made.transpose(1, 2).numpy()]
        return np.stack(clips)

    def _latents(self, pictures: np.ndarray) -> Tensor:
        """The latents of some frames: [latent frames, channels, height, width]."""
        return torch.from_numpy(np.stack([encoded.latent for encoded in self.codec.encode(pictures)]))


@dataclass(frozen=True)
class Figures:
    """How well videos follow sound and text.

    The opening of the mouth is read from the pixels and compared with the true one, over all frames of all cases.
    """

    mouth: float
    """Correlation of the opening with the true one."""
    mouth_amplitude: float
    """Standard deviation of the opening, divided by that of the true one."""
    muted: float
    """As `mouth`, with silence in place of the sound."""
    muted_amplitude: float
    """As `mouth_amplitude`, with silence in place of the sound."""
    gestures: float
    """Share of the cases with the right gesture."""
    arm_swing: float
    """How far the arm swings, relative to the true swing, after it has reached the gesture
    (tasks.synthetic.puppet_readers.swing). Only of gestures that swing; the others have no amplitude."""
    arm_error: float
    """Root mean square difference from the true frames in the region where the arm can be: mean over the cases whose
    arm moves."""
    rest_error: float
    """The same: mean over the cases whose arm rests."""


@dataclass(frozen=True)
class Drift:
    """The error in the colours of skin, shirt and wall, by clip of a chain: mean over the chains, as a share of the
    whole range of values."""

    with_reference: np.ndarray
    """[clips], with the pseudo last frame."""
    without: np.ndarray
    """[clips], without it."""

    @property
    def rises(self) -> tuple[float, float]:
        """The rise of the error from the first to the last clip, with and without the pseudo last frame."""
        kept, without = (float(errors[-1] - errors[0]) for errors in (self.with_reference, self.without))
        return kept, without


def unseen(count: int, frames: int = FRAMES, of: int = UNSEEN) -> list[Puppet]:
    """Puppets that no model is trained on. of: their seed."""
    return [Puppet.of(of, number, frames=frames) for number in range(count)]


def heard(sound: np.ndarray, frames: int) -> np.ndarray:
    """The log-mel windows of a sound, as the model takes them: [frames, window, mels]."""
    return frame_windows(sound, frames, FPS)


def follow(model: ActiveMind, sampler: Sampler, cases: int = CASES, seed: int = 0, of: int = UNSEEN) -> Figures:
    """Sample videos of puppets with their sound, and with silence, and measure them. of: the puppets' seed."""
    puppets = unseen(cases, of=of)
    references = np.stack([reference(puppet.identity) for puppet in puppets])
    captions = [puppet.caption for puppet in puppets]
    speaking, silent = (
        sampler.clips(model, references[:, None], [heard(s, FRAMES) for s in sounds], captions, references, seed)
        for sounds in ([p.sound for p in puppets], [muted(p.sound) for p in puppets])
    )
    return figures(puppets, speaking, silent)


def figures(puppets: Sequence[Puppet], speaking: np.ndarray, silent: np.ndarray) -> Figures:
    """Measure videos of puppets.

    speaking, silent: [puppets, frames, size, size, 3] uint8 RGB, sampled with the puppets' sound and with silence.
    """
    truth = np.stack([puppet.opening for puppet in puppets])
    mouths, closed = (np.stack([read_mouth(clip) for clip in clips]) for clips in (speaking, silent))
    arms, true_arms = np.stack([read_arm(clip) for clip in speaking]), np.stack([p.arm for p in puppets])
    errors = np.array([arm_error(clip, p.pictures) for clip, p in zip(speaking, puppets, strict=True)])
    moves = np.ptp(true_arms, axis=1) > 0
    swings = np.array([GESTURES[puppet.gesture].swing > 0 for puppet in puppets])
    return Figures(
        mouth=_correlation(mouths, truth),
        mouth_amplitude=float(mouths.std() / truth.std()),
        muted=_correlation(closed, truth),
        muted_amplitude=float(closed.std() / truth.std()),
        gestures=float(np.mean([read_gesture(c) == p.gesture for c, p in zip(speaking, puppets, strict=True)])),
        arm_swing=swing(arms[swings], true_arms[swings]),
        arm_error=float(errors[moves].mean()),
        rest_error=float(errors[~moves].mean()),
    )


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1]) if one.std() > 0 else 0.0


def chain(
    model: ActiveMind,
    sampler: Sampler,
    chains: int = CHAINS,
    clips: int = CHAINED,
    keep: bool = True,
    seed: int = 0,
    of: int = UNSEEN,
) -> np.ndarray:
    """Sample chains of clips, each of which starts with the last five frames of the clip before.

    chains: number of chains. clips: clips in a chain. keep: whether to give the reference image as pseudo last frame.
    of: the puppets' seed.

    Returns: [clips], the colour error of each clip, mean over the chains.
    """
    step = FRAMES - SEAM
    puppets = unseen(chains, FRAMES + step * (clips - 1), of)
    references = np.stack([reference(puppet.identity) for puppet in puppets])
    captions = [puppet.caption for puppet in puppets]
    each = SAMPLE_RATE // FPS
    begin, errors = references[:, None], []
    for number in range(clips):
        at = number * step * each
        sounds = [heard(puppet.sound[at : at + FRAMES * each], FRAMES) for puppet in puppets]
        made = sampler.clips(model, begin, sounds, captions, references if keep else None, seed + number)
        errors.append(np.mean([colour_error(c, r).mean() for c, r in zip(made, references, strict=True)]))
        begin = made[:, -SEAM:]
    return np.array(errors)


def drift(model: ActiveMind, sampler: Sampler, chains: int = CHAINS, clips: int = CHAINED, seed: int = 0) -> Drift:
    """Sample chains with and without the pseudo last frame, and measure them."""
    return Drift(*(chain(model, sampler, chains, clips, keep, seed) for keep in (True, False)))
