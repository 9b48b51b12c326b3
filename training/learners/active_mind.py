"""The learner of active-mind: its network and mask predictor, their data and their loss."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_manifests.dataset import load
from data_manifests.storage import Storage
from tasks.networks.latent_geometry import SPATIAL_STRIDE
from training.config import TrainingRecipe
from training.data import whitening
from training.data.batch import Batch
from training.data.loader import Loader, read_denylist, tiers_within
from training.data.sample_reader import SoundFeatures, sound_features_of
from training.generate.previews import Previews
from training.loop import flow_matching, phases
from training.loop.job import Job, Losses, TrainingError
from training.loop.parallel import WorkerGroup, unwrap
from training.loop.rng import generator_for
from training.loop.tracking import Trackers
from training.models.active_mind import model
from training.models.active_mind.config import ActiveMindSettings, active_mind_settings
from training.models.active_mind.mask_predictor import MaskPredictor, mask_loss
from training.models.active_mind.model import ActiveMind, Conditions

_NETWORK = "network."


class Prediction(NamedTuple):
    """What the network and the mask predictor return."""

    velocity: Tensor
    """As the latents, float32."""
    masks: Tensor | None
    """[batch, speakers, frames, rows, columns], logits of the speakers' masks. None where samples name no speakers."""


class MindAndMasks(nn.Module):
    """The network, and beside it the mask predictor. The predictor passes no gradient to the network."""

    def __init__(self, settings: ActiveMindSettings) -> None:
        super().__init__()
        self.network = ActiveMind(settings)
        self.mask_predictor = MaskPredictor(settings.shape.width)

    def forward(self, latents: Tensor, sigma: Tensor, clean: Tensor, conditions: Conditions) -> Prediction:
        if conditions.speaker_mask is None:
            velocity = self.network(latents, sigma, clean, conditions).velocity
            # Every parameter takes part in every micro-batch, or else workers would exchange different gradients.
            unused = torch.stack([parameter.sum() for parameter in self.mask_predictor.parameters()]).sum()
            return Prediction(velocity + 0.0 * unused, None)
        middle = len(self.network.blocks) // 2
        output = self.network(latents, sigma, clean, conditions, hidden_at=middle)
        return Prediction(output.velocity, self.mask_predictor(output.hidden, conditions.speaker_mask, 0))


def model_settings(recipe: TrainingRecipe, sound: SoundFeatures) -> ActiveMindSettings:
    """The model settings of a recipe, without a latent scale. sound: the features of the dataset's sound."""
    latents = recipe.data.latents
    window = sound.window(recipe.data.fps)
    return active_mind_settings(recipe.size, latents.channels, latents.dim, window, sound.dim)


def load_trained(out: Path | str, phase: str, averaged: bool = True) -> MindAndMasks:
    """A finished phase's model, on the CPU and in eval mode.

    out: the training's output folder, or its address. averaged: load the averaged weights instead of those of the last
    step.

    Raises PhaseError when the phase has not ended, or its weights cannot be read.
    """
    about = phases.about_weights(out, phase)
    if about is None:
        raise phases.PhaseError(f"{out}: phase {phase} has not ended; train it first")
    name = phases.AVERAGED if averaged else phases.WEIGHTS
    weights = phases.read_weights(f"{phases.phase_weights_folder(out, phase)}/{name}")
    model = MindAndMasks(ActiveMindSettings.model_validate(about["shape"]))
    model.load_state_dict(weights)
    return model.eval()


class ActiveMindLearner:
    """Implements training.loop.job.Learner, which documents the methods."""

    def __init__(self, job: Job, group: WorkerGroup) -> None:
        self._job, self._group = job, group
        self._recipe = job.recipe
        manifest = load(job.manifest)
        self.dataset = hashlib.sha256(manifest.encode()).hexdigest()
        self._cache = f"{job.out}/cache"
        self._settings = model_settings(self._recipe, sound_features_of(job.manifest, Storage(self._cache)))
        self._previews: Previews | None = None

    def about(self, model: MindAndMasks) -> dict[str, object]:
        return {"shape": model.network.settings.model_dump(mode="json")}

    def model(self, latent_scale: tuple[float, ...] | None = None) -> MindAndMasks:
        recipe, manifest, channels = self._recipe, self._job.manifest, self._settings.channels
        if latent_scale is None and recipe.data.whiten is not None:
            latent_scale = self._group.run_on_leader(lambda: whitening.latent_scale(manifest, recipe, self._cache))
        if latent_scale and len(latent_scale) != channels:
            raise phases.PhaseError(
                f"phase {self._job.phase} starts from weights of {len(latent_scale)} latent channels; the recipe's "
                f"latents have {channels}"
            )
        settings = self._settings.model_copy(update={"latent_scale": latent_scale or ()})
        with torch.device("meta"):
            made = MindAndMasks(settings)
        made.network.set_sequence_group(self._group.sequence)
        return made

    def new_weight(self, model: MindAndMasks, name: str) -> Tensor:
        generator = generator_for(self._recipe.seed, "weights", name)
        if name.startswith(_NETWORK):
            return model.network.new_weight(name.removeprefix(_NETWORK), generator)
        return model.mask_predictor.new_weight(name.removeprefix("mask_predictor."), generator)

    def part_of(self, name: str) -> str:
        return model.part_of(name.removeprefix(_NETWORK))

    def counterpart(self, name: str, part: str) -> str | None:
        other = model.counterpart(name.removeprefix(_NETWORK), part)
        return _NETWORK + other if other is not None else None

    def blocks(self, model: MindAndMasks) -> Sequence[nn.Module]:
        return list(model.network.blocks)

    def units(self, model: MindAndMasks) -> Sequence[nn.Module]:
        return [*model.network.blocks, model.network]  # the network is a unit, because previews call it by itself

    def enable_activation_checkpointing(self, model: MindAndMasks) -> None:
        model.network.set_activation_checkpointing(True)

    def loader(self) -> Loader:
        job, data, phase = self._job, self._recipe.data, self._job.settings
        denylist = data.denylist
        # read once, since a file that is edited meanwhile would give workers other data
        denied = self._group.run_on_leader(lambda: read_denylist(denylist)) if denylist else frozenset[str]()
        return Loader(
            job.manifest,
            tiers=tiers_within(data.tiers, phase.tier),
            frames=[data.frames],
            batch=data.batch,
            rank=self._group.data_rank,
            ranks=self._group.data_size,
            fps=data.fps,
            # each phase has its own order
            seed=generator_for(self._recipe.seed, job.phase, "loader").initial_seed() % 2**31,
            conditions=phase.conditions,
            latents=data.latents,
            text_tokens=data.latents.max_tokens,
            cache=self._cache,
            max_bad=data.max_bad,
            denied=denied,
        )

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        device, unwrapped = batch.latents.device, unwrap(model)
        assert isinstance(unwrapped, MindAndMasks)
        self._check_shares(batch)
        data = unwrapped.network.scaled(batch.latents)
        sigmas, noises = [], []
        for epoch, key in zip(batch.epochs, batch.keys, strict=True):
            generator = generator_for(self._recipe.seed, self._job.phase, epoch, key)
            sigmas.append(flow_matching.draw_sigma(1, self._recipe.timesteps, generator))
            noises.append(torch.randn(data.shape[1:], generator=generator))
        sigma, noise = torch.cat(sigmas).to(device), torch.stack(noises).to(device)
        clean = flow_matching.clean_frames(batch.drop_first, batch.drop_last, data.shape[2])
        audio = batch.audio if self._job.settings.hears else None
        conditions = Conditions(
            audio, batch.text, batch.text_mask, batch.drop_audio, batch.drop_text, batch.speaker_mask
        )
        prediction: Prediction = model(flow_matching.add_noise(data, noise, sigma, clean), sigma, clean, conditions)
        values = flow_matching.squared_errors(prediction.velocity, data, noise, clean)
        if prediction.masks is not None and batch.speaker_mask is not None:
            values = values + mask_loss(prediction.masks, batch.speaker_mask)
        return Losses(values, sigma)

    def _check_shares(self, batch: Batch) -> None:
        """Raise TrainingError, on all workers, when workers cannot share this batch's visual tokens evenly."""
        patch, workers = self._settings.shape.patch, self._group.sequence_parallel
        rows, columns = (size // patch for size in batch.latents.shape[3:])
        if rows * columns % workers:
            heads = self._settings.shape.heads
            fitting = [str(n) for n in range(1, heads + 1) if rows * columns % n == 0 and heads % n == 0]
            height, width = (size * SPATIAL_STRIDE for size in batch.latents.shape[3:])
            raise TrainingError(
                f"clips of {width}x{height} have {rows}x{columns} visual tokens a frame, which {workers} workers "
                f"cannot share evenly; for them run.sequence_parallel can be {', '.join(fitting)}"
            )

    def work(self, batch: Batch) -> tuple[int, float]:
        patch = self._settings.shape.patch
        count, _, frames, height, width = batch.latents.shape
        speakers = (batch.audio.shape[1] if batch.audio.dim() == 5 else 1) if self._job.settings.hears else 0
        text_tokens = batch.text.shape[1]
        flops = self._settings.flops(frames, height, width, text_tokens, speakers, count)
        tokens = frames * (height // patch) * (width // patch) + speakers * frames + text_tokens
        workers = self._group.sequence_parallel
        return count * tokens // workers, sum(flops.values()) / workers

    def sample(self, model: nn.Module, step: int, folder: Path, trackers: Trackers | None) -> dict[str, float]:
        assert isinstance(model, MindAndMasks)
        if self._previews is None:
            self._previews = Previews(self._job)
        return self._previews.make(model.network, step, folder, self._group, trackers)
