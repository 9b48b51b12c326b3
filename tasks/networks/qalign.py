"""Q-Align: pictures and films rated by a language model's choice among five words (Wu et al., ICML 2024).

The published model (q-future/one-align) brings code of its own, of which only the call is used here: token ids and
pixels in, logits out. Prompt, padding, frames, words and weights are ours, as the paper's scorer has them.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from tasks import remote_code, weights
from tasks.networks.device import device

LEVELS = ("excellent", "good", "fair", "poor", "bad")
_WORTH = (5.0, 4.0, 3.0, 2.0, 1.0)
SIDE = 448  # pixels
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
_STD = (0.26862954, 0.26130258, 0.27577711)
_PICTURE = -200  # the token id that the model replaces by the picture
_BATCH = 4  # pictures at a time

Asked = Literal["quality", "aesthetics"]


class QAlign:
    """The model with its tokenizer."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self._network, self._tokenizer = network, tokenizer
        # a word is its second token: the first begins the text
        self._levels = [tokenizer(word).input_ids[1] for word in LEVELS]

    def images(self, images: Sequence[np.ndarray], asked: Asked) -> np.ndarray:
        """How good pictures are, each alone. images: [height, width, 3] uint8 RGB each. Returns: [images] float64, 1
        to 5."""
        parts = [self._rated(images[at : at + _BATCH], asked) for at in range(0, len(images), _BATCH)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def video(self, frames: Sequence[np.ndarray], asked: Asked) -> float:
        """How good a film is, its frames in one prompt: another number than the mean of their own.

        frames: one a second, and one of a film below that; [height, width, 3] uint8 RGB each. Returns: 1 to 5.
        """
        return float(self._scored(torch.stack([prepared(frame) for frame in frames])[None], asked, "video")[0])

    def _rated(self, images: Sequence[np.ndarray], asked: Asked) -> np.ndarray:
        return self._scored(torch.stack([prepared(image) for image in images]), asked, "image")

    @torch.inference_mode()
    def _scored(self, pixels: torch.Tensor, asked: Asked, kind: Literal["image", "video"]) -> np.ndarray:
        parameter = next(self._network.parameters())
        ids = torch.tensor([self._prompt(asked, kind)] * len(pixels), device=parameter.device)
        seen = pixels.to(parameter.device, parameter.dtype)
        # one tensor of pictures, or a list with the frames of each film
        logits = self._network(ids, images=seen if kind == "image" else list(seen))["logits"]
        return scores(logits[:, -1, self._levels].float().cpu().numpy())

    def _prompt(self, asked: Asked, kind: Literal["image", "video"]) -> list[int]:
        before = f"USER: How would you rate the {asked} of this {kind}?\n"
        after = f"\nASSISTANT: The {asked} of the {kind} is"
        # each part begins with the token that begins a text; it stays once
        return [*self._tokenizer(before).input_ids, _PICTURE, *self._tokenizer(after).input_ids[1:]]


def scores(logits: np.ndarray) -> np.ndarray:
    """The mean of 5, 4, 3, 2, 1 under the softmax of five logits. [..., 5] in the order of LEVELS to [...] float64."""
    weight = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True) @ np.array(_WORTH)


def prepared(image: np.ndarray) -> torch.Tensor:
    """A picture as the model sees it: padded to a square with CLIP's mean colour, scaled to 448, normalised.

    image: [height, width, 3] uint8 RGB. Returns: [3, 448, 448] float32.
    """
    from PIL import Image

    height, width = image.shape[:2]
    side = max(height, width)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in _MEAN))
    square.paste(Image.fromarray(image), ((side - width) // 2, (side - height) // 2))
    scaled = square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = (np.asarray(scaled, np.float32) / 255 - np.array(_MEAN, np.float32)) / np.array(_STD, np.float32)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def precision() -> torch.dtype:
    """What the model computes in unless told otherwise: half precision on a GPU, as published; float32 elsewhere, where
    half precision is slow."""
    return torch.float16 if device().type == "cuda" else torch.float32


def load(trusted: str, dtype: torch.dtype | None = None) -> QAlign:
    """The model with its published weights, run by the code beside them.

    trusted: the hash by which the recipe trusts that code (tasks.remote_code). dtype: `precision` when None. Raises
    MissingBackend, WrongWeights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    remote_code.check("qalign", "aesthetics.remote_code", trusted)
    folder = weights.find("qalign")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        network: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=True, dtype=dtype or precision()
        )
    except Exception as error:  # whatever the code beside the weights raises
        raise weights.WrongWeights(f"Q-Align in {folder} cannot be loaded: {type(error).__name__}: {error}") from error
    return QAlign(network.to(device()).eval().requires_grad_(False), tokenizer)
