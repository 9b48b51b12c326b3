"""A library's network under more than one published naming: rules that turn every naming into the library's own.

Rules are (pattern, replacement) in the order they are applied; they leave the library's own names as they are, so that
nobody has to find out first which naming a checkpoint has.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from tasks import weights

Network = TypeVar("Network", bound=nn.Module)
Rules = Sequence[tuple[str, str]]


def renamed(key: str, rules: Rules) -> str:
    """The library's name of a key."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def checkpoints(name: str, folder: Path | None = None) -> list[Path]:
    """A network's files that hold tensors; in its own folder when None. Raises MissingBackend."""
    return [path for path in weights.files(name, folder) if path.suffix != ".json"]


def config(path: Path, published: Mapping[str, Any], names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The published configuration, with what the file at `path` says otherwise where there is one.

    names: fields that are called something else in the file, {there: here}. Fields that are not in `published` are
    passed over. Raises WrongWeights for a file that is no configuration.
    """
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise weights.WrongWeights(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise weights.WrongWeights(f"{path} holds no configuration of a network")
    found = {(names or {}).get(name, name): value for name, value in found.items()}
    return {name: found.get(name, value) for name, value in published.items()}


def empty(build: Callable[[], Network], path: Path) -> Network:
    """A network of shapes alone, on the meta device. Raises WrongWeights where the configuration at `path`, that
    `build` goes by, is none of such a network."""
    try:
        with torch.device("meta"):
            return build()
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise weights.WrongWeights(f"{path} does not describe such a network: {error}") from None


def takes(network: nn.Module, has: Mapping[str, object], rules: Rules) -> weights.Shapes:
    """The keys and shapes that a network takes of a checkpoint with the keys `has`, in the checkpoint's naming. Of keys
    that the rules make one, the checkpoint may have either."""
    there: dict[str, list[str]] = {}
    for key in has:
        there.setdefault(renamed(key, rules), []).append(key)
    own = {renamed(key, rules): tuple(value.shape) for key, value in network.state_dict().items()}
    return {key: shape for name, shape in own.items() for key in there.get(name, [name])}


def fill(
    network: nn.Module,
    paths: Sequence[Path],
    rules: Rules,
    device: torch.device,
    dtype: torch.dtype,
    float32: Sequence[str] = (),
) -> None:
    """Put checkpoints into a network made by `empty`, one file after the other, each tensor straight to its device.

    float32: parts between the dots of keys whose tensors stay so whatever the dtype. Of keys that the rules make one,
    only the renamed is filled. Raises WrongWeights where a key is missing, left over, or of another shape.
    """
    wanted = {renamed(key, rules): tuple(value.shape) for key, value in network.state_dict().items()}
    found: weights.Shapes = {}
    for path in paths:
        state = {renamed(key, rules): value for key, value in weights.read(path).items()}
        found |= {key: tuple(value.shape) for key, value in state.items()}
        fitting = {
            key: value.to(device, torch.float32 if set(float32).intersection(key.split(".")) else dtype)
            for key, value in state.items()
            if wanted.get(key) == tuple(value.shape)
        }
        network.load_state_dict(fitting, strict=False, assign=True)
    differences = weights.compare(wanted, found)
    if differences:
        where = ", ".join(map(str, paths))
        raise weights.WrongWeights(f"{where} does not fit {type(network).__name__}: {'; '.join(differences)}")
    network.eval().requires_grad_(False)
