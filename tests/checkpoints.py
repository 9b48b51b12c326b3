"""Checkpoints of any size for tests that read keys and shapes alone."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch


def write_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a checkpoint with these keys and shapes that takes almost no disk space.

    A safetensors file is sparse where its numbers would be. In a pickle, every tensor is one repeated number.
    """
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
