"""Random weights with which a network of any size works, and whose files are small."""

import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch


def noise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random weights that keep the scale of a network's activations: norms near 1, biases near 0, and the other weights
    of such a variance that outputs are about as large as inputs.

    Each row of a weight is the row before, shifted by one number. All rows share memory, so a pickle of the weight is
    hardly larger than one row.
    """
    return {key: _tensor(key, shape) for key, shape in shapes.items()}


def xpose_state() -> dict[str, torch.Tensor]:
    """Random weights for all keys of X-Pose's published checkpoint. Some of CLIP's are in half precision, as there."""
    from tasks.networks.xpose import expected_shapes
    from tasks.networks.xpose.swin import relative_places

    state = noise(expected_shapes(Path()))
    for key, value in state.items():
        if key.endswith("relative_position_index"):
            state[key] = relative_places(7)
        elif key.startswith("clip_model.") and value.dim() < 2:
            state[key] = value.half()
    return state


def _tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    rows, inputs = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (math.prod(shape), 1)
    numbers = torch.randn(rows + inputs - 1, generator=generator)
    if len(shape) > 1:
        strides = [math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
        return (numbers / inputs**0.5).as_strided(shape, (1, *strides))
    return (0.02 * numbers + key.endswith("weight")).reshape(shape)
