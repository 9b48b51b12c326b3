"""Whisper's encoder: 50 hidden states for each second of speech (Radford et al., 2022).

The network runs through transformers. The decoder is left out: its tensors in a checkpoint are not loaded.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from tasks.media.clip import SAMPLE_RATE
from tasks.networks import layouts
from tasks.networks.device import device
from tasks.networks.log_mel import CHUNK_S, log_mel
from tasks.weights import store as weights

if TYPE_CHECKING:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

Layers = Literal["last", "mean"] | int

STATES_PER_S = 50
_OVERLAP_S = 5  # seconds that successive windows share; the earlier one gives the first half, the later one the second
_BATCH = 4  # windows at a time; with large-v3 in float32 they take 1.2 GB of memory for activations

_RULES = ((r"^(model\.)?encoder\.", ""),)
_DECODER = re.compile(r"^((model\.)?decoder\.|proj_out\.)")


def _empty(folder: Path) -> "WhisperEncoder":
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    path = folder / "config.json"
    config = WhisperConfig.from_json_file(path)
    return layouts.empty(lambda: WhisperEncoder(config), path)


def expected_shapes(folder: Path) -> weights.Shapes:
    """The keys and shapes that the checkpoint in `folder` should have: the encoder's, and whatever its decoder has."""
    has = weights.shapes(*layouts.checkpoints("whisper", folder))
    decoder = {key: shape for key, shape in has.items() if _DECODER.match(key)}
    return layouts.expected_shapes(_empty(folder), has, _RULES) | decoder


def load(dtype: torch.dtype = torch.float32) -> Any:
    """Load the WhisperEncoder with its published weights, of any size. Raises MissingBackend, WrongWeights."""
    folder = weights.find("whisper")
    network: torch.nn.Module = _empty(folder).to_empty(device=device())
    state: dict[str, torch.Tensor] = {}
    for path in layouts.checkpoints("whisper", folder):
        found = weights.read(path)
        state |= {layouts.renamed(key, _RULES): value for key, value in found.items() if not _DECODER.match(key)}
    weights.load_into(network, state, folder)
    return network.to(dtype).eval().requires_grad_(False)


@torch.inference_mode()
def states(encoder: "WhisperEncoder", samples: np.ndarray, layers: Layers = "last") -> np.ndarray:
    """The encoder's hidden states of a stretch of audio.

    samples: [samples] float in -1..1 at 16 kHz. Audio longer than 30 s is encoded in windows of 30 s that overlap by
        5 s.
    layers: which states. "last": the output, after its layer norm. A number k: the output of layer k, and 0 the input
        of the first layer. "mean": the mean of all of these, from the first layer's input to the normed output.

    Returns: [ceil(50 * seconds), dim] float32. State k is centred on 20 k milliseconds.
    """
    length = -(-len(samples) * STATES_PER_S // SAMPLE_RATE)
    step = (CHUNK_S - _OVERLAP_S) * SAMPLE_RATE
    starts = range(0, max(len(samples) - _OVERLAP_S * SAMPLE_RATE, 1), step)
    parameter = next(encoder.parameters())
    windows: list[torch.Tensor] = []
    for first in range(0, len(starts), _BATCH):
        mels = [
            log_mel(samples[start : start + CHUNK_S * SAMPLE_RATE], encoder.config.num_mel_bins).T
            for start in starts[first : first + _BATCH]
        ]
        features = torch.from_numpy(np.stack(mels)).to(parameter.device, parameter.dtype)
        windows += _layer_states(encoder, features, layers).float().cpu().unbind(0)
    edge = _OVERLAP_S * STATES_PER_S // 2
    parts = [
        window[edge if number else 0 : None if number == len(windows) - 1 else -edge]
        for number, window in enumerate(windows)
    ]
    return torch.cat(parts)[:length].numpy()


def _layer_states(encoder: "WhisperEncoder", features: torch.Tensor, layers: Layers) -> torch.Tensor:
    """The states of the chosen layers. features: [windows, mels, 3000]. Returns: [windows, 1500, dim]."""
    if layers == "last":
        return encoder(features).last_hidden_state
    hidden = encoder(features, output_hidden_states=True).hidden_states
    return torch.stack(hidden).mean(0) if layers == "mean" else hidden[layers]
