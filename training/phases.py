"""What a phase starts from and what it leaves: weights by parts of the model, as safetensors with their history."""

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_manifests.storage import Storage, local_copy
from training.config import PARTS, Phase, TrainingRecipe

WEIGHTS, AVERAGED, ABOUT = "model.safetensors", "averaged.safetensors", "weights.json"

Weights = dict[str, Tensor]
PartOf = Callable[[str], str]  # the part, one of PARTS, that a parameter of this name belongs to
Counterpart = Callable[[str, str], str | None]  # the parameter's equal in another part; None where it has none


class PhaseError(ValueError):
    """A phase that cannot start; the message names the phase and what to do."""


def weights_folder(out: Path | str, phase: str) -> str:
    """The address at which a finished phase keeps its weights."""
    return f"{out}/{phase}/weights"


def starting_weights(
    own: Weights, phase: str, recipe: TrainingRecipe, out: Path | str, part_of: PartOf, counterpart: Counterpart
) -> Weights:
    """The weights that a phase starts from, part by part as its `weights` say.

    own: of the model as it was made: what parts that are "new" start from, and parameters of a part that starts from
    another part but have no equal there. Earlier phases give their averaged weights.

    Raises PhaseError when an earlier phase has not ended, or its weights are not of this model.
    """
    files: dict[str, tuple[str, Weights]] = {}
    found: Weights = {}
    faults: list[str] = []
    for name, value in own.items():
        part = part_of(name)
        origin, other = split_origin(recipe.phases[phase].weights[part])  # type: ignore[index]
        if origin == "new":
            found[name] = value
            continue
        if origin not in files:
            files[origin] = _open(origin, phase, out)
        path, weights = files[origin]
        there = name if other in (None, part) else counterpart(name, str(other))
        if there is None:
            found[name] = value
        elif there not in weights:
            faults.append(f"{path}: has no {there}")
        elif weights[there].shape != value.shape:
            faults.append(f"{path}: {there} is {list(weights[there].shape)}, {name} here is {list(value.shape)}")
        else:
            found[name] = weights[there].to(value.dtype)
    if faults:
        shown = faults[:5] + ([f"... and {len(faults) - 5} more"] if len(faults) > 5 else [])
        raise PhaseError(f"phase {phase} cannot start: these are weights of another model\n" + "\n".join(shown))
    return found


def starting_scale(phase: str, recipe: TrainingRecipe, out: Path | str) -> tuple[float, ...] | None:
    """What latents are divided by for the weights that a phase starts from, as weights.json beside them has it; None
    where all parts are new.

    Of a file without a weights.json nothing is known: it takes latents as the codec gives them, unless the recipe
    whitens them.

    Raises PhaseError when an origin does not say, or several say different things.
    """
    found: dict[str, tuple[float, ...]] = {}
    for origin in dict.fromkeys(recipe.phases[phase].weights.values()):
        if origin == "new":
            continue
        name, _ = split_origin(origin)
        is_file = name.endswith(".safetensors")
        beside = name.rpartition("/")[0] or ("/" if name.startswith("/") else ".")
        folder = beside if is_file else weights_folder(out, name)
        about = _about(folder)
        if about is None and not is_file:
            raise PhaseError(f"phase {phase} starts from {folder}: train phase {name} first")
        scale = latent_scale(about or {})
        if scale is None and (not is_file or recipe.data.whiten is not None):
            raise PhaseError(
                f"phase {phase} starts from {name}: no {ABOUT} at {folder} says which latent_scale it was trained "
                "with; put the one that was written with the weights there"
            )
        found[name] = scale or ()
    if len(set(found.values())) > 1:
        raise PhaseError(
            f"phase {phase} cannot start: {' and '.join(found)} were trained on latents of different scales "
            f"(latent_scale in their {ABOUT}); start all parts from weights of one training"
        )
    return next(iter(found.values()), None)


def latent_scale(about: Mapping[str, Any]) -> tuple[float, ...] | None:
    """What latents are divided by, () for 1, by what is said of a model's weights or of a checkpoint. None where
    nothing is said, as in a checkpoint of before it was."""
    shape = about.get("shape")
    scale = shape.get("latent_scale", []) if isinstance(shape, dict) else None
    if not isinstance(scale, list) or not all(isinstance(of, float | int) and 0 < of < math.inf for of in scale):
        return None
    return tuple(map(float, scale))


def split_origin(origin: str) -> tuple[str, str | None]:
    """An origin's phase, or file, and the part of it that is meant, where one is."""
    if origin.endswith(".safetensors"):
        return origin, None
    name, _, part = origin.partition(".")
    return name, part or None


def _open(origin: str, phase: str, out: Path | str) -> tuple[str, Weights]:
    is_file = origin.endswith(".safetensors")
    address = origin if is_file else f"{weights_folder(out, origin)}/{AVERAGED}"
    try:
        if not is_file and about_weights(out, origin) is None:  # in an object store the weights are there before it
            raise FileNotFoundError
        return address, read_weights(address)
    except FileNotFoundError:
        missing = "there is no such file" if is_file else f"train phase {origin} first"
        raise PhaseError(f"phase {phase} starts from {address}: {missing}") from None
    except (OSError, SafetensorError) as error:
        raise PhaseError(f"phase {phase} starts from {address}: it cannot be read: {error}") from None


def read_weights(address: str) -> Weights:
    """The tensors of a safetensors file, on the CPU. Raises OSError, SafetensorError."""
    with local_copy(address) as path:
        return load_file(path)


def part_hashes(weights: Mapping[str, Tensor], part_of: PartOf) -> dict[str, str]:
    """A sha256 for each part over the names, types, shapes and bytes of its parameters."""
    digests = {part: hashlib.sha256() for part in PARTS}
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest = digests[part_of(name)]
        digest.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return {part: digest.hexdigest() for part, digest in digests.items()}


def write_weights(out: Path | str, phase: str, model: Weights, averaged: Weights, about: Mapping[str, Any]) -> None:
    """Leave a phase's weights, and what is known of them, whole or not at all: as one folder that is renamed or, in an
    object store, with what is known of them as the last."""
    folder = Storage(weights_folder(out, phase))
    made = Storage(f"{out}/{phase}/.weights.tmp") if folder.is_local else folder
    if folder.is_local:
        shutil.rmtree(made.root, ignore_errors=True)
    else:
        folder.remove(ABOUT)
    for name, weights in ((WEIGHTS, model), (AVERAGED, averaged)):
        plain = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        made.write(name, functools.partial(save_file, plain))
    made.write_bytes(ABOUT, (json.dumps(dict(about), sort_keys=True, indent=1) + "\n").encode())
    if folder.is_local:
        shutil.rmtree(folder.root, ignore_errors=True)
        Path(made.root).rename(folder.root)


def about_weights(out: Path | str, phase: str) -> dict[str, Any] | None:
    """What a finished phase says of its weights; None when it has not ended."""
    return _about(weights_folder(out, phase))


def _about(address: str) -> dict[str, Any] | None:
    """What is said of the weights in a folder, where anything is."""
    folder = Storage(address)
    try:
        about = json.loads(folder.read_bytes(ABOUT))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise PhaseError(f"{folder.address}/{ABOUT}: cannot be read: {error}") from None
    if not isinstance(about, dict):
        raise PhaseError(f"{folder.address}/{ABOUT}: cannot be read: it holds no description of weights")
    return about


def settings_of(recipe: TrainingRecipe, phase: str, dataset: str, chosen: bool = False) -> dict[str, Any]:
    """All that decides what a phase learns: two trainings with the same settings are one, and one may go on where the
    other ended. So the number of steps counts only where the learning rate falls towards the last of them.

    dataset: the sha256 of the dataset manifest. chosen: leave out settings that have their default value.
    """
    settings = recipe.model_dump(
        mode="json",
        exclude={"name": True, "run": True, "phases": True, "data": {"max_bad"}},
        exclude_defaults=chosen,
    )
    of_phase: Phase = recipe.phases[phase]
    left_out = {"steps"} if recipe.optimizer.decay == "none" else set()
    about_phase = of_phase.model_dump(mode="json", exclude=left_out, exclude_defaults=chosen)
    return {"dataset": dataset, **settings, "phase": about_phase}


def changed(before: Mapping[str, Any], now: Mapping[str, Any], chosen: Mapping[str, Any], above: str = "") -> list[str]:
    """Which settings differ, as KEY: BEFORE is now NOW. A setting that was not known before differs where it is one of
    the `chosen` (`settings_of`): a default changes nothing of what was learnt without it."""
    lines = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += changed(old, new, chosen.get(key) or {}, f"{above}{key}.")
        elif old != new and (key in before or key in chosen):
            lines.append(f"{above}{key}: {old!r} is now {new!r}")
    return lines
