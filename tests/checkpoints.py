"""Checkpoints of any size, written by tests by shape alone."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch


def write_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A file with the keys and shapes of a checkpoint of any size, that takes next to no room: a safetensors file with
    a hole where the numbers are, or a pickle in which every tensor is one number, repeated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".safetensors":
        torch.save({key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}, path)
        return
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
