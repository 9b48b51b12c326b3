"""The parity fixtures: inputs, outputs and key lists of the reference networks, and the fill rule for their weights.

The fixtures lie beside the project, in shared/parity. Tests that need them are skipped where they are missing.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PARITY = Path(__file__).parents[2] / "shared" / "parity"

needs_parity = pytest.mark.skipif(not PARITY.is_dir(), reason="needs the parity fixtures in shared/parity")


def arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of a fixture, such as "raft/raft_large.npz"."""
    with np.load(PARITY / name, allow_pickle=False) as file:
        return dict(file)


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of a key list, such as "raft/keys_princeton.json", in the order of the state dict."""
    return {key: tuple(shape) for key, (shape, _) in listing(name)["keys"].items()}


def listing(name: str) -> dict[str, Any]:
    """The whole content of a JSON fixture."""
    return json.loads((PARITY / name).read_text())


def number(key: str, shape: tuple[int, ...], gain: float = 1.0) -> np.ndarray:
    """A tensor's weights by the fill rule: [*shape] float32. They depend on its key alone.

    gain: factor of the weights of matrices and convolutions.
    """
    noise = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)
    last = key.rpartition(".")[2]
    if last == "running_var":
        value = 1 + 0.1 * np.abs(noise)
    elif last == "running_mean":
        value = 0.02 * noise
    elif last == "gamma" or (len(shape) <= 1 and last in ("weight", "scale")):
        value = 1 + 0.02 * noise
    elif len(shape) <= 1:
        value = 0.02 * noise
    else:
        value = gain * noise / np.sqrt(np.prod(shape[1:]))
    return np.asarray(value, np.float32)


def filled(state: Mapping[str, Any], gain: float = 1.0) -> dict[str, Any]:
    """A state dict whose floating tensors have the fill rule's weights. Loaded into a network, a tensor under several
    keys gets the weights of the last one."""
    import torch

    return {
        key: torch.from_numpy(number(key, tuple(value.shape), gain)) if value.is_floating_point() else value.clone()
        for key, value in state.items()
    }
