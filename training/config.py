"""A recipe's `training` section: the model, the data, and the phases that it is trained through."""

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from data_manifests.strict import RecipeError, Strict, nearest, read_yaml, unknown_key, validate
from tasks.latents import LatentsSettings
from tasks.recipe import find_recipe
from training.models.sizes import PSEUDO_LAST, SIZES

Probability = Annotated[float, Field(ge=0.0, le=1.0)]

PARTS = ("video", "text", "audio")  # the branches of the model; what they share counts to video


class Conditions(Strict):
    """How often each condition of a sample is dropped, each by itself."""

    text: Probability = 0.1
    audio: Probability = 0.1
    first_frame: Probability = 0.1
    last_frame: Probability = 0.1


class Timesteps(Strict):
    """How sigmas are drawn: uniformly, or as the logistic of a normal variable; then shifted towards noise."""

    sampling: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0.0)
    shift: float = Field(default=1.0, gt=0.0)


class Optimizer(Strict):
    """AdamW. learning_rate: after `warmup_steps` of linear rise; decay: then it stays, or falls to 0 by half a cosine
    until the phase's last step. max_grad_norm: of all gradients together."""

    learning_rate: float = Field(gt=0.0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.01, ge=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["none", "cosine"] = "none"

    def share_of_rate(self, step: int, steps: int) -> float:
        """What share of the learning rate step 1 to `steps` of a phase takes."""
        rise = min(1.0, step / max(1, self.warmup_steps))
        return rise if self.decay == "none" else rise * 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps))


class Data(Strict):
    """What a training sample is.

    frames: of the video, 4n + 1. fps: frames a second that clips must have. batch: samples a step, over all workers and
    accumulated micro-batches. latents: how video and text are encoded, as the curation's stage of that name says it.
    whiten: the power of each channel's deviation, in pictures of the dataset, that it is divided by: at 1 all are
    alike, below it those that matter more to the picture are larger. None: as the codec gives them. Measured once,
    where a training begins with new weights; what starts from weights takes latents as those were trained on.
    tiers: of the dataset, widest first. max_bad: share of samples that may be unreadable before the run stops.
    """

    frames: int = Field(ge=1)
    fps: int = Field(ge=1)
    batch: int = Field(ge=1)
    latents: LatentsSettings = LatentsSettings()
    whiten: float | None = Field(default=None, ge=0.0, le=1.0)
    tiers: list[str] = Field(default=["main", "hq"], min_length=1)
    max_bad: Probability = 0.01

    @model_validator(mode="after")
    def _whole_groups(self) -> "Data":
        if (self.frames - 1) % 4:
            near = (self.frames - 1) // 4 * 4 + 1
            raise ValueError(
                f"frames: the codec takes 4n + 1 frames, so {near} or {near + 4} in place of {self.frames}"
            )
        return self


class Run(Strict):
    """How the work is done. What is here may differ between two runs of one training.

    micro_batch: samples that a worker takes at once, gradients adding up; the whole of its share when None.
    bf16: matrix products in bfloat16, all else and the sums over workers in float32; on GPUs only.
    sharding: of the model over several workers: "ddp", each has the whole of it, or "fsdp" (FSDP2), each has a part.
    recompute: activations in the backward pass, instead of keeping them. compile: the model's blocks by torch.compile.
    checkpoint_every: steps. keep: so many checkpoints. log_every: steps. sample_every: steps; 0 for no sample videos.
    samples: how many videos. sample_steps: of the sampler. pseudo_last: how many latent frames beyond a video's end the
    reference stands. trackers: where curves go beside metrics.jsonl. max_failures: how often workers that were lost are
    started again.
    """

    micro_batch: int | None = Field(default=None, ge=1)
    bf16: bool = True
    sharding: Literal["ddp", "fsdp"] = "ddp"
    recompute: bool = False
    compile: bool = False
    checkpoint_every: int = Field(default=500, ge=1)
    keep: int = Field(default=3, ge=1)
    log_every: int = Field(default=10, ge=1)
    sample_every: int = Field(default=1000, ge=0)
    samples: int = Field(default=1, ge=1)
    sample_steps: int = Field(default=20, ge=1)
    pseudo_last: int = Field(default=PSEUDO_LAST, ge=1)
    trackers: list[Literal["tensorboard", "mlflow"]] = Field(default=["tensorboard"])
    max_failures: int = Field(default=3, ge=0)


def _origin(origin: str) -> str:
    if origin.endswith(".safetensors"):
        return origin
    phase, dot, part = origin.partition(".")
    if not phase or (dot and part not in PARTS):
        raise ValueError(f"{origin!r}: a phase, such as base, a part of one, such as base.text, or a .safetensors file")
    return origin


_PHASE = r"^[a-z][a-z0-9_-]{0,31}$"  # it names a folder


class Phase(Strict):
    """One phase of training.

    weights: where each part starts from: "new", the averaged weights of an earlier phase ("base"), another part of one
        ("base.text"), or a file ("/models/base.safetensors").
    train: the parts whose weights change. tier: of the dataset. learning_rate: in place of the optimizer's.
    conditions: how often each is dropped.
    """

    weights: dict[Literal["video", "text", "audio"], Annotated[str, AfterValidator(_origin)]]
    train: list[Literal["video", "text", "audio"]] = Field(min_length=1)
    tier: str = "main"
    steps: int = Field(ge=0)
    learning_rate: float | None = Field(default=None, gt=0.0)
    conditions: Conditions = Conditions()


class TrainingRecipe(Strict):
    """What a training does, phase by phase, in the order given.

    name: of the recipe. model: its family. size: one of the sizes the family has. ema: decay of the averaged weights a
    step. seed: of everything that is drawn. run: changes nothing of what is learnt, but for rounding.
    """

    name: str
    model: Literal["active_mind"]
    size: str
    data: Data
    optimizer: Optimizer
    timesteps: Timesteps = Timesteps()
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    seed: int = 0
    phases: dict[Annotated[str, Field(pattern=_PHASE)], Phase] = Field(min_length=1)
    run: Run = Run()

    @model_validator(mode="after")
    def _parts_fit(self) -> "TrainingRecipe":
        faults = [] if self.size in SIZES else [f"size: unknown size {self.size!r}{nearest(self.size, list(SIZES))}"]
        earlier: list[str] = []
        for name, phase in self.phases.items():
            for part in PARTS:
                origin = phase.weights.get(part)  # type: ignore[call-overload]
                if origin is None:
                    faults.append(f"phases.{name}.weights: where does {part} start from? give new, or an earlier phase")
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
        """These phases, all of them where none is named, in the recipe's order. Raises RecipeError for one that is not
        there."""
        for name in names or ():
            if name not in self.phases:
                raise RecipeError(f"phases: {unknown_key(name, list(self.phases)).replace('key', 'phase', 1)}")
        return [name for name in self.phases if not names or name in names]

    def digest(self) -> str:
        """12 hex digits over all that changes what is learnt."""
        content = json.dumps(self.model_dump(mode="json", exclude={"name", "run"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


class Adapters(Strict):
    """Low-rank changes of the layers that are not trained whole (Hu et al. 2022), times alpha / rank."""

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0.0)


class PhysicalState(Strict):
    """Where and how much the physical state is supervised (training.physical_state_loss). block: of the main branch's
    30, from 1. weight: of its loss beside flow matching's."""

    block: int = Field(ge=1, le=30)
    weight: float = Field(gt=0.0)


class PhysAvatarTraining(Strict):
    """The numbers of physavatar's training. Its network cannot be trained here yet."""

    name: str
    model: Literal["physavatar"]
    data: Data
    optimizer: Optimizer
    adapters: Adapters
    physical_state: PhysicalState


def _is_phase(origin: str) -> bool:
    return origin != "new" and not origin.endswith(".safetensors")


def load_training(name_or_path: str | Path) -> TrainingRecipe:
    """The `training` section of a recipe's YAML file, or of a recipe that comes along by its name.

    Raises RecipeError with a line for each fault, and for a model that cannot be trained here.
    """
    path = find_recipe(str(name_or_path))
    content: dict[str, Any] = read_yaml(path)
    section = content.get("training")
    if not isinstance(section, dict):
        raise RecipeError(f"{path}: it has no `training` section, so there is nothing to train")
    named, where = {**section, "name": content.get("name", path.stem)}, f"{path}: in training"
    if section.get("model") == "physavatar":
        validate(PhysAvatarTraining, named, where)
        raise RecipeError(f"{where}: model: physavatar cannot be trained yet, its network is missing; take active_mind")
    return validate(TrainingRecipe, named, where)
