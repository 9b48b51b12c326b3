"""Whether a trained active-mind makes puppets do what sound and text say, and keeps who they are: on puppets, sounds
and identities that it never saw, each begun from a reference picture with the mouth closed and the arm at rest.

What is made is read from its pixels by tests.world.puppet_readers, which was fixed before anything was trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tasks.clip import SAMPLE_RATE
from tasks.latent_codec import CODECS, STRIDE_T, LatentCodec, latent_frames
from tasks.latents import LatentsSettings
from tasks.log_mel import frame_windows
from tasks.text_embedding import ENCODERS
from tests.world.puppet_readers import arm_error, colour_error, read_arm, read_gesture, read_mouth, swing
from tests.world.puppets import FPS, FRAMES, GESTURES, Puppet, muted, reference
from training.models.active_mind import ActiveMind, Conditions
from training.sampling import Guidance, first_noise, reference_latent, sample_clip, sigma_steps

UNSEEN = 1_000_003  # a seed that nothing is trained on
HELD_OUT = 500_009  # another, that nothing is measured on but what the sampling is set by
CASES, CHAINS, CHAINED = 40, 24, 10
SEAM = STRIDE_T + 1  # frames that a clip takes over from the one before (active-mind appendix B)


@dataclass(frozen=True)
class Sampler:
    """How videos are sampled.

    steps: of Euler's method. guidance: of text and sound. pseudo_last: how many latent frames beyond the last one the
    reference is positioned.
    """

    latents: LatentsSettings
    steps: int
    guidance: Guidance
    pseudo_last: int

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
        """One clip each: [clips, frames, size, size, 3] uint8, the first frames those it begins with.

        begin: [clips, 1 or 5, size, size, 3] uint8. sounds: [frames, window, mels] each. references: [clips, size,
        size, 3] uint8, who is to be kept to; None for no pseudo last frame.
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
            first_noise(shape, seed),
            sigma_steps(self.steps),
            first,
            None if references is None else torch.stack([reference_latent(self.codec, r) for r in references]),
            self.guidance,
            self.pseudo_last,
        )
        clips = [np.stack(list(self.codec.decode(clip, size, size))) for clip in made.transpose(1, 2).numpy()]
        return np.stack(clips)

    def _latents(self, pictures: np.ndarray) -> Tensor:
        """[latent frames, channels, height, width]."""
        return torch.from_numpy(np.stack([encoded.latent for encoded in self.codec.encode(pictures)]))


@dataclass(frozen=True)
class Figures:
    """mouth: correlation of the opening read from the pixels with the true one, over all frames of all cases, with the
    sound and with silence in its place. amplitude: standard deviation against the truth's.

    gestures: share told right. arm_swing: how far the arm swings to the true swing, once it is where the gesture is
    (tests.world.puppet_readers.swing), of the gestures that swing; those that hold the arm still have no amplitude.
    arm_error, rest_error: root mean square difference from the true pictures where the arm can be, the mean over the
    cases that move and over those that rest.
    """

    mouth: float
    mouth_amplitude: float
    muted: float
    muted_amplitude: float
    gestures: float
    arm_swing: float
    arm_error: float
    rest_error: float


@dataclass(frozen=True)
class Drift:
    """Colour error of skin, shirt and wall by clip of a chain, the mean over the chains, with and without the pseudo
    last frame: [clips] each, a share of the whole range of values."""

    with_reference: np.ndarray
    without: np.ndarray

    @property
    def rises(self) -> tuple[float, float]:
        """From the first to the last clip, with and without."""
        return tuple(float(errors[-1] - errors[0]) for errors in (self.with_reference, self.without))  # type: ignore[return-value]


def unseen(count: int, frames: int = FRAMES, of: int = UNSEEN) -> list[Puppet]:
    return [Puppet.of(of, number, frames=frames) for number in range(count)]


def heard(sound: np.ndarray, frames: int) -> np.ndarray:
    return frame_windows(sound, frames, FPS)


def follow(model: ActiveMind, sampler: Sampler, cases: int = CASES, seed: int = 0, of: int = UNSEEN) -> Figures:
    """What the puppets do with their sound and text, and with silence. of: the puppets' seed."""
    puppets = unseen(cases, of=of)
    references = np.stack([reference(puppet.identity) for puppet in puppets])
    captions = [puppet.caption for puppet in puppets]
    speaking, silent = (
        sampler.clips(model, references[:, None], [heard(s, FRAMES) for s in sounds], captions, references, seed)
        for sounds in ([p.sound for p in puppets], [muted(p.sound) for p in puppets])
    )
    return figures(puppets, speaking, silent)


def figures(puppets: Sequence[Puppet], speaking: np.ndarray, silent: np.ndarray) -> Figures:
    """Of puppets' clips [puppets, frames, size, size, 3], made with their sound, and without."""
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
    """Puppets of many clips, each begun with the last five frames of the one before: the colour error by clip, [clips].

    keep: give the reference picture as pseudo last frame. of: the puppets' seed.
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
    return Drift(*(chain(model, sampler, chains, clips, keep, seed) for keep in (True, False)))
