"""Checkpoints of one network under several namings: rules that rename every key to the library's own name.

A rule is (regular expression, replacement). Rules are applied in order. They leave the library's own names unchanged,
so a checkpoint in any of the namings can be read without knowing which one it is in.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from tasks.weights import store as weights

Network = TypeVar("Network", bound=nn.Module)
Rules = Sequence[tuple[str, str]]


def renamed(key: str, rules: Rules) -> str:
    """The library's name of a checkpoint's key."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def checkpoints(name: str, folder: Path | None = None) -> list[Path]:
    """The files of a network that hold tensors. folder: its own weights folder when None. Raises MissingBackend."""
    return [path for path in weights.files(name, folder) if path.suffix != ".json"]


def config(path: Path, published: Mapping[str, Any], names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A network's configuration: the published one, updated from the JSON file at `path` where it exists.

    published: every field with its published value. Other fields of the file are ignored.
    names: fields that have another name in the file, {name in the file: name here}.

    Raises WrongWeights for a file that is not a JSON object.
    """
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise weights.WrongWeights(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise weights.WrongWeights(f"{path} is not the configuration of a network: it holds no JSON object")
    found = {(names or {}).get(name, name): value for name, value in found.items()}
    return {name: found.get(name, value) for name, value in published.items()}


def empty(build: Callable[[], Network], path: Path) -> Network:
    """A network on the meta device: shapes without numbers.

    build: makes the network from the configuration at `path`. Raises WrongWeights where it cannot.
    """
    try:
        with torch.device("meta"):
            return build()
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise weights.WrongWeights(f"{path} does not describe this network: {error}") from None


def expected_shapes(network: nn.Module, has: Mapping[str, object], rules: Rules) -> weights.Shapes:
    """The keys and shapes that a network expects of a checkpoint, in the checkpoint's naming.

    has: the checkpoint's keys. Where the rules give several keys one name, any of them will do.
    """
    keys_of: dict[str, list[str]] = {}
    for key in has:
        keys_of.setdefault(renamed(key, rules), []).append(key)
    own = {renamed(key, rules): tuple(value.shape) for key, value in network.state_dict().items()}
    return {key: shape for name, shape in own.items() for key in keys_of.get(name, [name])}


def load_into(
    network: nn.Module,
    paths: Sequence[Path],
    rules: Rules,
    device: torch.device,
    dtype: torch.dtype,
    float32: Sequence[str] = (),
) -> None:
    """Fill a network made by `empty` from its checkpoint's files.

    Files are read one after the other, and each tensor goes straight to the device. Where the rules give several keys
    of the network one name, only the key of that name is filled. The network is then in evaluation mode, without
    gradients.

    dtype: of the tensors on the device.
    float32: parts of keys (between two dots) whose tensors are float32 whatever `dtype` is.

    Raises WrongWeights where a key is missing, left over, or of another shape.
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
