"""The weights that a phase starts from and the weights that it leaves, as safetensors files with their history."""

import contextlib
import functools
import hashlib
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from data_manifests.storage import Storage, local_copy
from training.config import PARTS, PhaseSettings, TrainingRecipe
from training.loop.parallel import WorkerGroup, full_tensor

_ALONE = WorkerGroup()

WEIGHTS, AVERAGED, ABOUT = "model.safetensors", "averaged.safetensors", "weights.json"

Weights = Mapping[str, Tensor]
PartOf = Callable[[str], str]  # parameter name -> its part, one of PARTS
Counterpart = Callable[[str, str], str | None]  # (parameter name, part) -> the corresponding parameter of that part


class PhaseError(ValueError):
    """A phase that cannot start; the message names the phase and what to do."""


def phase_weights_folder(out: Path | str, phase: str) -> str:
    """The address of a finished phase's weights."""
    return f"{out}/{phase}/weights"


class StartingWeights:
    """The weights that a phase starts from, part by part, as its `weights` say. They are read piece by piece.

    Earlier phases give their averaged weights. A part that starts from another part takes the weights of the
    corresponding parameters. Parts that are "new" have none here, nor have parameters without a counterpart in the part
    that they start from.

    A context manager, which closes the files.

    shapes: of the model's parameters, by name. Raises PhaseError when an earlier phase has not ended, or its weights do
    not fit the model.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        phase: str,
        recipe: TrainingRecipe,
        out: Path | str,
        part_of: PartOf,
        counterpart: Counterpart,
    ) -> None:
        self._phase, self._out = phase, out
        self._closing = contextlib.ExitStack()
        self._origins: dict[str, tuple[str, Any, str]] = {}  # address, open file, name in it
        opened: dict[str, tuple[str, Any, set[str]]] = {}
        faults: list[str] = []
        try:
            for name, shape in shapes.items():
                part = part_of(name)
                origin, other_part = split_origin(recipe.phases[phase].weights[part])  # type: ignore[index]
                origin_name = name if other_part in (None, part) else counterpart(name, str(other_part))
                if origin == "new":
                    continue
                if origin not in opened:
                    opened[origin] = self._open(origin)
                if origin_name is None:
                    continue
                address, file, names = opened[origin]
                if origin_name not in names:
                    faults.append(f"{address}: has no {origin_name}")
                elif (there := list(file.get_slice(origin_name).get_shape())) != list(shape):
                    faults.append(f"{address}: {origin_name} is {there}, the model's {name} is {list(shape)}")
                else:
                    self._origins[name] = (address, file, origin_name)
            if faults:
                shown = faults[:5] + ([f"... and {len(faults) - 5} more"] if len(faults) > 5 else [])
                raise PhaseError(f"phase {phase} cannot start: these are weights of another model\n" + "\n".join(shown))
        except BaseException:
            self._closing.close()
            raise

    def __enter__(self) -> "StartingWeights":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def piece(self, name: str, place: tuple[slice, ...]) -> Tensor | None:
        """The rows, columns and so on of a parameter that `place` names, on the CPU. None for a parameter that keeps
        its new value."""
        if name not in self._origins:
            return None
        address, file, origin_name = self._origins[name]
        with self._readable(address):
            found: Tensor = file.get_slice(origin_name)[place]
        return found

    def _open(self, origin: str) -> tuple[str, Any, set[str]]:
        is_file = origin.endswith(".safetensors")
        address = origin if is_file else f"{phase_weights_folder(self._out, origin)}/{AVERAGED}"
        try:
            # weights without a weights.json are not completely written yet
            if not is_file and about_weights(self._out, origin) is None:
                raise FileNotFoundError
            with self._readable(address):
                path = self._closing.enter_context(local_copy(address))
                file = self._closing.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            missing = "there is no such file" if is_file else f"train phase {origin} first"
            raise PhaseError(f"phase {self._phase} starts from {address}: {missing}") from None
        return address, file, set(file.keys())

    @contextlib.contextmanager
    def _readable(self, address: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, SafetensorError) as error:
            raise PhaseError(f"phase {self._phase} starts from {address}: it cannot be read: {error}") from None


def starting_scale(phase: str, recipe: TrainingRecipe, out: Path | str) -> tuple[float, ...] | None:
    """The divisor of latents that the weights a phase starts from were trained with, from the weights.json beside them.

    () for 1. None where all parts are new. A weights file without a weights.json is taken to need no divisor, unless
    the recipe whitens latents. Then a weights.json is required.

    Raises PhaseError when a required weights.json is missing or does not say, or when two of them differ.
    """
    scales: dict[str, tuple[float, ...]] = {}
    for origin in dict.fromkeys(recipe.phases[phase].weights.values()):
        if origin == "new":
            continue
        name, _ = split_origin(origin)
        is_file = name.endswith(".safetensors")
        beside = name.rpartition("/")[0] or ("/" if name.startswith("/") else ".")
        folder = beside if is_file else phase_weights_folder(out, name)
        about = _about(folder)
        if about is None and not is_file:
            raise PhaseError(f"phase {phase} starts from {folder}: train phase {name} first")
        scale = latent_scale_in(about or {})
        if scale is None and (not is_file or recipe.data.whiten is not None):
            raise PhaseError(
                f"phase {phase} starts from {name}: no {ABOUT} at {folder} says which latent_scale it was trained "
                "with; put the one that was written with the weights there"
            )
        scales[name] = scale or ()
    if len(set(scales.values())) > 1:
        raise PhaseError(
            f"phase {phase} cannot start: {' and '.join(scales)} were trained on latents of different scales "
            f"(latent_scale in their {ABOUT}); start all parts from weights of one training"
        )
    return next(iter(scales.values()), None)


Trained = dict[str, dict[str, bool]]  # phase -> part -> whether its weights have been trained


def check_origins(recipe: TrainingRecipe, chosen: Sequence[str], out: Path | str) -> None:
    """See that no chosen phase would start from weights that nothing has trained, before the first one begins.

    Raises PhaseError.
    """
    made: Trained = {}
    for phase in chosen:
        settings = recipe.phases[phase]
        before = (about_weights(out, phase) or {}).get("trained", {})  # where it has ended already
        made[phase] = {
            part: trained or before.get(part, False) or (settings.steps > 0 and part in settings.train)
            for part, trained in trained_origins(phase, recipe, out, made).items()
        }


def trained_origins(
    phase: str, recipe: TrainingRecipe, out: Path | str, made: Mapping[str, Mapping[str, bool]] = MappingProxyType({})
) -> dict[str, bool]:
    """By part, whether the weights that a phase starts from have been trained. Those of a file have.

    made: what earlier phases of this run will have trained. Of others, their weights.json says it.

    Raises PhaseError when a part starts from an earlier phase that left it at random numbers, unless the phase's
    untrained_base is set.
    """
    settings = recipe.phases[phase]
    trained: dict[str, bool] = {}
    for part, origin in settings.weights.items():
        name, other_part = split_origin(origin)
        if origin == "new" or name.endswith(".safetensors"):
            trained[part] = origin != "new"
            continue
        known = made[name] if name in made else (about_weights(out, name) or {}).get("trained", {})
        trained[part] = known.get(other_part or part, True)  # old weights do not say
        if not trained[part] and not settings.untrained_base:
            earlier, needed = recipe.phases[name], other_part or part
            mend = f"give phase {name} steps, or published weights"
            if needed not in earlier.train:
                mend = (
                    f"phase {name} trains only {', '.join(earlier.train)}; start from a part of it, such as {name}.text"
                )
            raise PhaseError(
                f"phase {phase} starts its {part} from {origin}, which nothing has trained: its weights are still "
                f"random; {mend}, or, to learn from nothing, set phases.{phase}.untrained_base"
            )
    return trained


def latent_scale_in(about: Mapping[str, Any]) -> tuple[float, ...] | None:
    """The divisor of latents in a weights.json, or in a checkpoint's progress.json. () for 1.

    None where the file has no shape, as an old checkpoint's, or where the divisor is invalid.
    """
    shape = about.get("shape")
    scale = shape.get("latent_scale", []) if isinstance(shape, dict) else None
    if not isinstance(scale, list) or not all(isinstance(of, float | int) and 0 < of < math.inf for of in scale):
        return None
    return tuple(map(float, scale))


def split_origin(origin: str) -> tuple[str, str | None]:
    """The phase or file of an origin, and the part of that phase. The part is None where the origin names none."""
    if origin.endswith(".safetensors"):
        return origin, None
    name, _, part = origin.partition(".")
    return name, part or None


def read_weights(address: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises OSError, SafetensorError."""
    with local_copy(address) as path:
        return load_file(path)


def part_hashes(weights: Weights, part_of: PartOf, group: WorkerGroup = _ALONE) -> dict[str, str]:
    """A sha256 of each part, over the names, types, shapes and bytes of its parameters.

    group: the workers over which the weights are sharded. Every one calls it, and one parameter at a time is gathered.
    """
    digests = {part: hashlib.sha256() for part in PARTS}
    for name in sorted(weights):
        value = full_tensor(weights[name].detach())
        if group.is_leader:
            value = value.cpu().contiguous()
            digest = digests[part_of(name)]
            digest.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    hashes = {part: digest.hexdigest() for part, digest in digests.items()}
    gathered: dict[str, str] = group.gather(hashes)[0]
    return gathered


def write_weights(
    out: Path | str,
    phase: str,
    model: Weights,
    averaged: Weights,
    about: Mapping[str, Any],
    group: WorkerGroup = _ALONE,
) -> None:
    """Write a phase's weights and their weights.json, completely or not at all.

    On a file system they are written to another folder, which is renamed in the end. In an object store weights.json is
    removed first and written last.

    group: the workers over which the weights are sharded. Every one calls it, and the leading one writes.
    """
    folder = Storage(phase_weights_folder(out, phase))
    writing_to = Storage(f"{out}/{phase}/.weights.tmp") if folder.is_local else folder
    if group.is_leader and folder.is_local:
        shutil.rmtree(writing_to.root, ignore_errors=True)
    elif group.is_leader:
        folder.remove(ABOUT)
    for name, weights in ((WEIGHTS, model), (AVERAGED, averaged)):
        if group.is_leader:
            writing_to.write(name, functools.partial(_save, weights))
        else:
            for key in sorted(weights):
                full_tensor(weights[key].detach())  # the leading worker gathers it
    if not group.is_leader:
        return
    writing_to.write_bytes(ABOUT, (json.dumps(dict(about), sort_keys=True, indent=1) + "\n").encode())
    if folder.is_local:
        shutil.rmtree(folder.root, ignore_errors=True)
        Path(writing_to.root).rename(folder.root)


def _save(weights: Weights, path: Path) -> None:
    """Write float32 weights as a safetensors file, as safetensors.torch.save_file does. That would need all of them in
    memory; this has one tensor at a time."""
    header, end = {}, 0
    for name in sorted(weights):
        begin, end = end, end + 4 * weights[name].numel()
        header[name] = {"dtype": "F32", "shape": list(weights[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(weights):
            value = full_tensor(weights[name].detach()).float().cpu().contiguous()
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)


def about_weights(out: Path | str, phase: str) -> dict[str, Any] | None:
    """The weights.json of a finished phase. None when the phase has not ended. Raises PhaseError."""
    return _about(phase_weights_folder(out, phase))


def _about(address: str) -> dict[str, Any] | None:
    """The weights.json of a folder. None where there is none. Raises PhaseError."""
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


def settings_of(recipe: TrainingRecipe, phase: str, dataset: str, without_defaults: bool = False) -> dict[str, Any]:
    """The settings that decide what a phase learns, as JSON values.

    A training may resume another one's checkpoint if their settings are equal. So the number of steps is included only
    where the learning rate depends on it.

    dataset: the sha256 of the dataset manifest. without_defaults: leave out settings that have their default value.
    """
    settings = recipe.model_dump(
        mode="json",
        exclude={"name": True, "run": True, "phases": True, "data": {"max_bad", "denylist"}},
        exclude_defaults=without_defaults,
    )
    of_phase: PhaseSettings = recipe.phases[phase]
    left_out = {"untrained_base", *(["steps"] if recipe.optimizer.decay == "none" else [])}
    phase_settings = of_phase.model_dump(mode="json", exclude=left_out, exclude_defaults=without_defaults)
    return {"dataset": dataset, **settings, "phase": phase_settings}


def changed_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], not_default: Mapping[str, Any], above: str = ""
) -> list[str]:
    """The settings that differ, one line each: "KEY: BEFORE is now NOW".

    `before` may come from a version that did not have a setting yet. Such a setting differs only if it is among
    `not_default` (`settings_of` without defaults). Its default changes nothing in what was learnt without it.
    """
    lines = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += changed_settings(old, new, not_default.get(key) or {}, f"{above}{key}.")
        elif old != new and (key in before or key in not_default):
            lines.append(f"{above}{key}: {old!r} is now {new!r}")
    return lines
