"""Checkpoints as they are published, written by tests: of any size by shape alone, and a small Wan VAE."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tasks.networks.wan_vae import PUBLISHED
from tests.parity import filled

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

TINY_VAE = PUBLISHED | {"base_dim": 8, "num_res_blocks": 1}


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


def tiny_vae() -> "AutoencoderKLWan":
    """A Wan VAE of few channels, with the numbers of the fill rule."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    network = AutoencoderKLWan(**TINY_VAE)
    network.load_state_dict(filled(network.state_dict()))
    return network.eval().requires_grad_(False)
