"""active-mind as the training loop sees it: network and mask predictor, their data, and what they are to learn."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_manifests.dataset import load
from data_manifests.storage import Storage
from training import flow_matching, phases, whitening
from training.batch import Batch
from training.config import TrainingRecipe
from training.draws import generator
from training.job import Job, Losses
from training.loader import Loader, tiers_within
from training.models import active_mind
from training.models.active_mind import ActiveMind, Conditions
from training.models.mask_predictor import MaskPredictor, mask_loss
from training.models.sizes import ActiveMindSettings, active_mind_settings
from training.parallel import Team, bare
from training.previews import Previews
from training.sample_reader import Sound, sound_of
from training.tracking import Trackers

_NETWORK = "network."


class Prediction(NamedTuple):
    """velocity: as the latents, float32. masks: logits [batch, speakers, frames, rows, columns]; None of samples that
    name no speakers."""

    velocity: Tensor
    masks: Tensor | None


class MindAndMasks(nn.Module):
    """The network, and beside it the predictor that follows the speakers, which reads it and changes nothing in it."""

    def __init__(self, settings: ActiveMindSettings) -> None:
        super().__init__()
        self.network = ActiveMind(settings)
        self.mask_predictor = MaskPredictor(settings.shape.width)

    def forward(self, latents: Tensor, sigma: Tensor, clean: Tensor, conditions: Conditions) -> Prediction:
        if conditions.speaker_mask is None:
            return Prediction(self.network(latents, sigma, clean, conditions).velocity, None)
        middle = len(self.network.blocks) // 2
        output = self.network(latents, sigma, clean, conditions, hidden_at=middle)
        return Prediction(output.velocity, self.mask_predictor(output.hidden, conditions.speaker_mask, 0))


def model_settings(recipe: TrainingRecipe, sound: Sound) -> ActiveMindSettings:
    """The model of a recipe, for latents as the codec gives them. sound: that it is trained on."""
    latents = recipe.data.latents
    window = sound.window(recipe.data.fps)
    return active_mind_settings(recipe.size, latents.channels, latents.dim, window, sound.dim)


def load_trained(out: Path | str, phase: str, averaged: bool = True) -> MindAndMasks:
    """A finished phase's model, on the CPU. averaged: its averaged weights, or those that were trained last.

    out: the folder of the training, or its address.

    Raises PhaseError when the phase has not ended, or its weights cannot be read.
    """
    about = phases.about_weights(out, phase)
    if about is None:
        raise phases.PhaseError(f"{out}: phase {phase} has not ended; train it first")
    name = phases.AVERAGED if averaged else phases.WEIGHTS
    weights = phases.read_weights(f"{phases.weights_folder(out, phase)}/{name}")
    model = MindAndMasks(ActiveMindSettings.model_validate(about["shape"]))
    model.load_state_dict(weights)
    return model.eval()


class ActiveMindLearner:
    """See training.trainer.Learner."""

    def __init__(self, job: Job, team: Team) -> None:
        self._job, self._team = job, team
        self._recipe = job.recipe
        manifest = load(job.manifest)
        self.dataset = hashlib.sha256(manifest.encode()).hexdigest()
        self._cache = f"{job.out}/cache"
        self._settings = model_settings(self._recipe, sound_of(job.manifest, Storage(self._cache)))
        self._previews: Previews | None = None

    def about(self, model: MindAndMasks) -> dict[str, object]:
        return {"shape": model.network.settings.model_dump(mode="json")}

    def model(self, latent_scale: tuple[float, ...] | None = None) -> MindAndMasks:
        recipe, manifest, channels = self._recipe, self._job.manifest, self._settings.channels
        if latent_scale is None and recipe.data.whiten is not None:
            latent_scale = self._team.made_once(lambda: whitening.latent_scale(manifest, recipe, self._cache))
        if latent_scale and len(latent_scale) != channels:
            raise phases.PhaseError(
                f"phase {self._job.phase} starts from weights of {len(latent_scale)} latent channels; the recipe's "
                f"latents have {channels}"
            )
        settings = self._settings.model_copy(update={"latent_scale": latent_scale or ()})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(self._recipe.seed, "weights").initial_seed())
            return MindAndMasks(settings)

    def part_of(self, name: str) -> str:
        return active_mind.part_of(name.removeprefix(_NETWORK))

    def counterpart(self, name: str, part: str) -> str | None:
        equal = active_mind.counterpart(name.removeprefix(_NETWORK), part)
        return _NETWORK + equal if equal is not None else None

    def blocks(self, model: MindAndMasks) -> Sequence[nn.Module]:
        return list(model.network.blocks)

    def units(self, model: MindAndMasks) -> Sequence[nn.Module]:
        return [*model.network.blocks, model.network]  # previews call the network by itself

    def in_float32(self, model: MindAndMasks) -> Sequence[nn.Module]:
        return [*model.network.float32_modules(), model.mask_predictor]

    def recompute(self, model: MindAndMasks) -> None:
        model.network.set_checkpointing(True)

    def loader(self) -> Loader:
        job, data, phase = self._job, self._recipe.data, self._job.settings
        return Loader(
            job.manifest,
            tiers=tiers_within(data.tiers, phase.tier),
            frames=[data.frames],
            batch=data.batch,
            rank=self._team.rank,
            ranks=self._team.size,
            fps=data.fps,
            # each phase has an order of its own
            seed=generator(self._recipe.seed, job.phase, "loader").initial_seed() % 2**31,
            conditions=phase.conditions,
            latents=data.latents,
            text_tokens=data.latents.max_tokens,
            cache=self._cache,
            max_bad=data.max_bad,
        )

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        device, mind = batch.latents.device, bare(model)
        assert isinstance(mind, MindAndMasks)
        data = mind.network.scaled(batch.latents)
        sigmas, noises = [], []
        for epoch, key in zip(batch.epochs, batch.keys, strict=True):
            drawn = generator(self._recipe.seed, self._job.phase, epoch, key)
            sigmas.append(flow_matching.draw_sigma(1, self._recipe.timesteps, drawn))
            noises.append(torch.randn(data.shape[1:], generator=drawn))
        sigma, noise = torch.cat(sigmas).to(device), torch.stack(noises).to(device)
        clean = flow_matching.clean_frames(batch.drop_first, batch.drop_last, data.shape[2])
        conditions = Conditions(
            batch.audio, batch.text, batch.text_mask, batch.drop_audio, batch.drop_text, batch.speaker_mask
        )
        prediction: Prediction = model(flow_matching.noised(data, noise, sigma, clean), sigma, clean, conditions)
        values = flow_matching.squared_errors(prediction.velocity, data, noise, clean)
        if prediction.masks is not None and batch.speaker_mask is not None:
            values = values + mask_loss(prediction.masks, batch.speaker_mask)
        return Losses(values, sigma)

    def work(self, batch: Batch) -> tuple[int, float]:
        patch = self._settings.shape.patch
        count, _, frames, height, width = batch.latents.shape
        speakers = batch.audio.shape[1] if batch.audio.dim() == 5 else 1
        text_tokens = batch.text.shape[1]
        flops = self._settings.flops(frames, height, width, text_tokens, speakers, count)
        tokens = frames * (height // patch) * (width // patch) + speakers * frames + text_tokens
        return count * tokens, float(sum(flops.values()))

    def sample(self, model: nn.Module, step: int, folder: Path, trackers: Trackers | None) -> dict[str, float]:
        assert isinstance(model, MindAndMasks)
        if self._previews is None:
            self._previews = Previews(self._job)
        return self._previews.make(model.network, step, folder, self._team, trackers)
