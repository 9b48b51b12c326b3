"""Whisper's encoder: what is said and how, 50 states a second (Radford et al., 2022), through transformers.

Of a published checkpoint only the encoder is used; the decoder's tensors are left where they are.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from tasks import weights
from tasks.clip import SAMPLE_RATE
from tasks.log_mel import CHUNK_S, log_mel
from tasks.networks import layouts
from tasks.networks.device import device

if TYPE_CHECKING:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

Layers = Literal["last", "mean"] | int

STATES_PER_S = 50
_OVERLAP_S = 5  # of two windows of a long sound; each gives half of it, away from where it sees nothing
_BATCH = 4  # windows at a time: in float32 1.2 GB of scratch in large-v3

_RULES = ((r"^(model\.)?encoder\.", ""),)
_DECODER = re.compile(r"^((model\.)?decoder\.|proj_out\.)")


def _empty(folder: Path) -> "WhisperEncoder":
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    path = folder / "config.json"
    config = WhisperConfig.from_json_file(path)
    return layouts.empty(lambda: WhisperEncoder(config), path)


def takes(folder: Path) -> weights.Shapes:
    """The keys and shapes of the checkpoint in `folder`: those of its encoder, and whatever its decoder has."""
    has = weights.shapes(*layouts.checkpoints("whisper", folder))
    decoder = {key: shape for key, shape in has.items() if _DECODER.match(key)}
    return layouts.takes(_empty(folder), has, _RULES) | decoder


def load(dtype: torch.dtype = torch.float32) -> Any:
    """The WhisperEncoder with its published weights, of whichever size. Raises MissingBackend, WrongWeights."""
    folder = weights.find("whisper")
    network: torch.nn.Module = _empty(folder).to_empty(device=device())
    state: dict[str, torch.Tensor] = {}
    for path in layouts.checkpoints("whisper", folder):
        found = weights.read(path)
        state |= {layouts.renamed(key, _RULES): value for key, value in found.items() if not _DECODER.match(key)}
    weights.fill(network, state, folder)
    return network.to(dtype).eval().requires_grad_(False)


@torch.inference_mode()
def states(encoder: "WhisperEncoder", samples: np.ndarray, layers: Layers = "last") -> np.ndarray:
    """The encoder's states of a sound.

    samples: [samples] float in -1..1 at 16 kHz. Longer than 30 s, it is heard in windows of 30 s that overlap by 5 s.
    layers: "last", the output after its layer norm; "mean", the mean of what goes into and comes out of all layers,
    that output being the last of them; a number k, what comes out of layer k (0: what goes into the first).

    Returns: [ceil(50 * seconds), dim] float32; state k is centred on 20 k milliseconds and saw the whole window.
    """
    length = -(-len(samples) * STATES_PER_S // SAMPLE_RATE)
    step = (CHUNK_S - _OVERLAP_S) * SAMPLE_RATE
    starts = range(0, max(len(samples) - _OVERLAP_S * SAMPLE_RATE, 1), step)
    parameter = next(encoder.parameters())
    heard: list[torch.Tensor] = []
    for at in range(0, len(starts), _BATCH):
        mels = [
            log_mel(samples[start : start + CHUNK_S * SAMPLE_RATE], encoder.config.num_mel_bins).T
            for start in starts[at : at + _BATCH]
        ]
        features = torch.from_numpy(np.stack(mels)).to(parameter.device, parameter.dtype)
        heard += _chosen(encoder, features, layers).float().cpu().unbind(0)
    edge = _OVERLAP_S * STATES_PER_S // 2
    parts = [
        window[edge if number else 0 : None if number == len(heard) - 1 else -edge]
        for number, window in enumerate(heard)
    ]
    return torch.cat(parts)[:length].numpy()


def _chosen(encoder: "WhisperEncoder", features: torch.Tensor, layers: Layers) -> torch.Tensor:
    """[windows, mels, 3000] to [windows, 1500, dim]."""
    if layers == "last":
        return encoder(features).last_hidden_state
    hidden = encoder(features, output_hidden_states=True).hidden_states
    return torch.stack(hidden).mean(0) if layers == "mean" else hidden[layers]
