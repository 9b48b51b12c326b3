"""A recipe's `training` section: the model, the data, and the phases of the training."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from data_manifests.strict import RecipeError, Strict, nearest, read_yaml, unknown_key, validate
from tasks.networks.latent_geometry import TEMPORAL_STRIDE, usable_frames
from tasks.recipe import recipe_path
from tasks.stages.latents.stage import LatentsSettings
from training.models.active_mind.config import PSEUDO_LAST, SIZES

Probability = Annotated[float, Field(ge=0.0, le=1.0)]

PARTS = ("video", "text", "audio")  # the model's branches; parameters that all branches share belong to video


class ConditionDropout(Strict):
    """How often each condition of a sample is dropped. Each one is drawn independently of the others."""

    text: Probability = 0.1
    """Probability that the text is replaced by the null embedding."""
    audio: Probability = 0.1
    """Probability that the sound is replaced by the null embedding."""
    first_frame: Probability = 0.1
    """Probability that the first latent frame is noisy instead of clean."""
    last_frame: Probability = 0.1
    """Probability that the last latent frame is noisy instead of clean."""


class TimestepSettings(Strict):
    """How the noise level sigma of each sample is drawn, from 0 to 1."""

    sampling: Literal["uniform", "logit_normal"] = "logit_normal"
    """Distribution of sigma: uniform, or the logistic function of a normal variable."""
    mean: float = 0.0
    """Mean of the normal variable. "uniform" ignores it."""
    std: float = Field(default=1.0, gt=0.0)
    """Standard deviation of the normal variable. "uniform" ignores it."""
    shift: float = Field(default=1.0, gt=0.0)
    """Shift of the drawn sigma (training.loop.flow_matching.shift_sigma). Above 1 it moves sigma towards noise."""


class OptimizerSettings(Strict):
    """Settings of AdamW and of its learning rate schedule."""

    learning_rate: float = Field(gt=0.0)
    """Learning rate after the warmup."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moment."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    """Largest norm of all gradients together. A larger norm is scaled down to it."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps at the start of each phase over which the learning rate rises linearly."""
    decay: Literal["none", "cosine"] = "none"
    """What the learning rate does after the warmup. It stays constant ("none"), or it falls along half a cosine to 0 at
    the phase's last step ("cosine")."""

    def share_of_rate(self, step: int, steps: int) -> float:
        """The factor on the learning rate at `step`, counted from 1, in a phase of `steps` steps."""
        rise = min(1.0, step / max(1, self.warmup_steps))
        return rise if self.decay == "none" else rise * 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps))


def _check_address(address: str) -> str:
    if "://" not in address and not Path(address).is_absolute():
        raise ValueError(f"{address!r} is not a full path; workers may work in other folders than this one")
    return address


class DataSettings(Strict):
    """What a training sample is."""

    frames: int = Field(ge=1)
    """Video frames of a sample, 4n + 1."""
    fps: int = Field(ge=1)
    """Frames a second that a clip must have. Other clips are left out."""
    batch: int = Field(ge=1)
    """Samples of an optimizer step, over all workers and accumulated micro-batches."""
    latents: LatentsSettings = LatentsSettings()
    """How video and text are encoded: the settings of the curation's stage `latents`."""
    whiten: float | None = Field(default=None, ge=0.0, le=1.0)
    """How far the latent channels are brought to equal size before noise is added. Each channel is divided by its
    standard deviation, in pixels of the dataset, to this power. At 1 all channels are equally large. Below 1 the
    channels that matter more to the image stay larger. None: latents stay as the codec gives them.

    The deviation is measured once, where a training begins with new weights. A phase that starts from weights takes the
    scale that those were trained with."""
    tiers: list[str] = Field(default=["main", "hq"], min_length=1)
    """Tiers of the dataset, widest first."""
    max_bad: Probability = 0.01
    """Share of samples that may be unreadable before the run stops."""
    denylist: Annotated[str, AfterValidator(_check_address)] | None = None
    """A text file of clip ids, one a line, that are left out. It is a full path or an fsspec address. What follows a
    `#` is a comment. It may change between two runs of the same training."""

    @model_validator(mode="after")
    def _frames_fit_codec(self) -> "DataSettings":
        below = usable_frames(self.frames)
        if below != self.frames:
            above = below + TEMPORAL_STRIDE
            raise ValueError(
                f"frames: the codec takes 4n + 1 frames; take {below} or {above} in place of {self.frames}"
            )
        return self


class TrainingRunSettings(Strict):
    """How the work is done. These settings may differ between two runs of the same training."""

    renamed: ClassVar[Mapping[str, str]] = {"recompute": "activation_checkpointing"}

    micro_batch: int | None = Field(default=None, ge=1)
    """Samples that a worker runs at once. Gradients of several micro-batches are summed. None: the worker's whole share
    of the batch."""
    bf16: bool | None = None
    """Whether matrix products run in bfloat16. Everything else, and sums over workers, stay in float32. None: on GPUs
    only."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """How several workers hold the model. "ddp": each worker holds the whole model. "fsdp" (FSDP2): each worker holds a
    part of every parameter."""
    sequence_parallel: int = Field(default=1, ge=1)
    """How many workers share the visual tokens of a sample, for long or large clips, and for more workers than samples.
    It must divide the number of workers, the model's heads and the visual tokens of a frame."""
    activation_checkpointing: bool = False
    """Whether activations are computed again in the backward pass instead of being kept. It saves memory and costs
    time."""
    compile: bool = False
    """Whether torch.compile compiles the model's blocks."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between two checkpoints."""
    checkpoint_minutes: float = Field(default=30.0, gt=0.0)
    """Minutes after which a checkpoint is made in any case, where steps take long."""
    max_skipped: Probability = 0.02
    """Share of the last 200 batches that may be skipped because their loss or their gradient is not finite. With more
    the training ends."""
    keep: int = Field(default=3, ge=1)
    """How many checkpoints are kept, the newest ones."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two rows of metrics."""
    sample_every: int = Field(default=1000, ge=0)
    """Steps between two rounds of sample videos. 0: no sample videos."""
    samples: int = Field(default=1, ge=1)
    """Sample videos of a round."""
    sample_steps: int = Field(default=20, ge=1)
    """Sampler steps of a sample video."""
    pseudo_last: int = Field(default=PSEUDO_LAST, ge=1)
    """Latent frames between a sample's last frame and the position of the reference image behind it."""
    trackers: list[Literal["tensorboard", "mlflow"]] = Field(default=["tensorboard"])
    """Where metrics go besides metrics.jsonl."""
    max_failures: int = Field(default=3, ge=0)
    """How often lost workers are started again before the training fails."""


def _check_origin(origin: str) -> str:
    if origin.endswith(".safetensors"):
        return origin
    phase, dot, part = origin.partition(".")
    if not phase or (dot and part not in PARTS):
        raise ValueError(
            f"{origin!r} is unknown; give an earlier phase, such as base, a part of one, such as base.text, or a "
            ".safetensors file"
        )
    return origin


_PHASE = r"^[a-z][a-z0-9_-]{0,31}$"  # a phase's name is also the name of its folder


class PhaseSettings(Strict):
    """One phase of training."""

    weights: dict[Literal["video", "text", "audio"], Annotated[str, AfterValidator(_check_origin)]]
    """The weights that each part starts from: "new", the averaged weights of an earlier phase ("base"), another part of
    an earlier phase ("base.text"), or a file ("/models/base.safetensors")."""
    train: list[Literal["video", "text", "audio"]] = Field(min_length=1)
    """The parts that are trained. The weights of the other parts stay as they are."""
    tier: str = "main"
    """Tier of the dataset."""
    steps: int = Field(ge=0)
    """Optimizer steps."""
    learning_rate: float | None = Field(default=None, gt=0.0)
    """Learning rate of this phase. None: the optimizer's."""
    conditions: ConditionDropout = ConditionDropout()
    """How often each condition is dropped."""
    untrained_base: bool = False
    """Whether the phase may start from an earlier phase's weights that nothing has trained yet."""

    @property
    def hears(self) -> bool:
        """Whether there are audio tokens. There are none in a phase that drops all sound and does not train the audio
        branch, as that of the base does."""
        return "audio" in self.train or self.conditions.audio < 1.0


class TrainingRecipe(Strict):
    """What a training does. Its phases run in the order in which they are written."""

    name: str
    """Name of the recipe."""
    model: Literal["active_mind"]
    """Family of the model."""
    size: str
    """Size of the model, one of training.models.active_mind.config.SIZES."""
    data: DataSettings
    """The dataset, and how batches are made of it."""
    optimizer: OptimizerSettings
    """The steps of the weights, in all phases."""
    timesteps: TimestepSettings = TimestepSettings()
    """How much noise the samples of a batch get."""
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay of the averaged weights at each step."""
    seed: int = 0
    """Seed of everything that is drawn at random."""
    phases: dict[Annotated[str, Field(pattern=_PHASE)], PhaseSettings] = Field(min_length=1)
    """Phases by name."""
    run: TrainingRunSettings = TrainingRunSettings()
    """How the work is done. These settings change nothing in what is learnt, except for rounding."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "TrainingRecipe":
        faults = [] if self.size in SIZES else [f"size: unknown size {self.size!r}{nearest(self.size, list(SIZES))}"]
        earlier: list[str] = []
        for name, phase in self.phases.items():
            for part in PARTS:
                origin = phase.weights.get(part)  # type: ignore[call-overload]
                if origin is None:
                    faults.append(f"phases.{name}.weights: {part} is missing; give new, or an earlier phase")
                elif _is_phase(origin) and origin.partition(".")[0] not in earlier:
                    known = ["new", *earlier]
                    faults.append(f"phases.{name}.weights.{part}: no earlier phase {origin!r}{nearest(origin, known)}")
            if phase.tier not in self.data.tiers:
                unknown = unknown_key(phase.tier, self.data.tiers).replace("key", "tier", 1)
                faults.append(f"phases.{name}.tier: {unknown}")
            earlier.append(name)
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def chosen(self, names: list[str] | None) -> list[str]:
        """The phases of these names, in the recipe's order. All phases when no name is given.

        Raises RecipeError for a name that no phase has.
        """
        for name in names or ():
            if name not in self.phases:
                raise RecipeError(f"phases: {unknown_key(name, list(self.phases)).replace('key', 'phase', 1)}")
        return [name for name in self.phases if not names or name in names]

    def digest(self) -> str:
        """12 hex digits of a hash over all settings that change what is learnt."""
        content = json.dumps(self.model_dump(mode="json", exclude={"name", "run"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


class Adapters(Strict):
    """Low-rank adapters on the layers that are not trained whole (Hu et al. 2022)."""

    rank: int = Field(ge=1)
    """Rank of the two matrices of an adapter."""
    alpha: float = Field(gt=0.0)
    """An adapter's output is multiplied by alpha / rank."""


class PhysicalState(Strict):
    """The loss of the physical state (training.models.physavatar.physical_state_loss)."""

    block: int = Field(ge=1, le=30)
    """The supervised block of the main branch's 30, counted from 1."""
    weight: float = Field(gt=0.0)
    """Weight of this loss. The loss of flow matching has weight 1."""


class PhysAvatarTraining(Strict):
    """The numbers of physavatar's training. Its network cannot be trained here yet."""

    name: str
    """Name of the recipe."""
    model: Literal["physavatar"]
    """Family of the model."""
    data: DataSettings
    """The dataset, and how batches are made of it."""
    optimizer: OptimizerSettings
    """The steps of the weights."""
    adapters: Adapters
    """The adapters of the layers that are not trained whole."""
    physical_state: PhysicalState
    """The loss that supervises the physical state."""


def _is_phase(origin: str) -> bool:
    return origin != "new" and not origin.endswith(".safetensors")


def load_training(name_or_path: str | Path) -> TrainingRecipe:
    """The `training` section of a recipe, given by the path of its YAML file or by the name of a bundled recipe.

    Raises RecipeError with one line for each fault, and for a model that cannot be trained here.
    """
    path = recipe_path(str(name_or_path))
    content: dict[str, Any] = read_yaml(path)
    if content.get("training") is None:
        raise RecipeError(f"{path}: the recipe has no `training` section, so there is nothing to train")
    recipe = _parse_training(path, content)
    if isinstance(recipe, PhysAvatarTraining):
        raise RecipeError(
            f"{path}: in training: model: physavatar cannot be trained yet, its network is missing; take active_mind"
        )
    return recipe


def check_training(name_or_path: str | Path) -> None:
    """Look for faults in a recipe's `training` section, so that they are met before the hours of a curation.

    A recipe need not have that section, and its model need not be one that can be trained here. Raises RecipeError with
    one line for each fault.
    """
    path = recipe_path(str(name_or_path))
    content = read_yaml(path)
    if content.get("training") is not None:
        _parse_training(path, content)


def _parse_training(path: Path, content: dict[str, Any]) -> TrainingRecipe | PhysAvatarTraining:
    section, where = content["training"], f"{path}: in training"
    if not isinstance(section, dict):
        raise RecipeError(f"{where}: it must map settings to values, this is {type(section).__name__}")
    named = {**section, "name": content.get("name", path.stem)}
    if section.get("model") == "physavatar":
        return validate(PhysAvatarTraining, named, where)
    return validate(TrainingRecipe, named, where)
