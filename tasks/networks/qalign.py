"""Q-Align: images and videos rated by the logits that a language model gives to five words (Wu et al., ICML 2024).

The published model (q-future/one-align) comes with code of its own. Of that code only the forward pass runs here: token
ids and pixels in, logits out. Prompt, preprocessing and the score from the logits are re-implemented after the paper's
scorer.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from tasks.networks.device import device
from tasks.weights import remote_code
from tasks.weights import store as weights

LEVELS = ("excellent", "good", "fair", "poor", "bad")
_SCORES = (5.0, 4.0, 3.0, 2.0, 1.0)  # of the levels
SIDE = 448  # pixels
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's mean and standard deviation of RGB
_STD = (0.26862954, 0.26130258, 0.27577711)
_IMAGE_TOKEN = -200  # the token id that the model replaces by the image
_BATCH = 4  # images at a time

Asked = Literal["quality", "aesthetics"]


class QAlign:
    """The model with its tokenizer."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self._network, self._tokenizer = network, tokenizer
        # the tokenizer puts a start token first; the word's own token is the second
        self._levels = [tokenizer(word).input_ids[1] for word in LEVELS]

    def images(self, images: Sequence[np.ndarray], asked: Asked) -> np.ndarray:
        """Rate images, each alone. images: [height, width, 3] uint8 RGB each. Returns: [images] float64, 1 to 5."""
        parts = [self._rated(images[at : at + _BATCH], asked) for at in range(0, len(images), _BATCH)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def video(self, frames: Sequence[np.ndarray], asked: Asked) -> float:
        """Rate a video. All frames stand in one prompt, so the score is not the mean of the frames' own.

        frames: one a second, at least one; [height, width, 3] uint8 RGB each. Returns: 1 to 5.
        """
        return float(self._scored(torch.stack([prepared(frame) for frame in frames])[None], asked, "video")[0])

    def _rated(self, images: Sequence[np.ndarray], asked: Asked) -> np.ndarray:
        return self._scored(torch.stack([prepared(image) for image in images]), asked, "image")

    @torch.inference_mode()
    def _scored(self, pixels: torch.Tensor, asked: Asked, kind: Literal["image", "video"]) -> np.ndarray:
        parameter = next(self._network.parameters())
        ids = torch.tensor([self._prompt(asked, kind)] * len(pixels), device=parameter.device)
        seen = pixels.to(parameter.device, parameter.dtype)
        # the model takes one tensor of images, or a list with the frames of each video
        logits = self._network(ids, images=seen if kind == "image" else list(seen))["logits"]
        return scores(logits[:, -1, self._levels].float().cpu().numpy())

    def _prompt(self, asked: Asked, kind: Literal["image", "video"]) -> list[int]:
        before = f"USER: How would you rate the {asked} of this {kind}?\n"
        after = f"\nASSISTANT: The {asked} of the {kind} is"
        # both parts begin with the start token; the second one's is dropped
        return [*self._tokenizer(before).input_ids, _IMAGE_TOKEN, *self._tokenizer(after).input_ids[1:]]


def scores(logits: np.ndarray) -> np.ndarray:
    """The expected score: the mean of 5, 4, 3, 2, 1 weighted by the softmax of the five levels' logits.

    logits: [..., 5] in the order of LEVELS. Returns: [...] float64, 1 to 5.
    """
    weight = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True) @ np.array(_SCORES)


def prepared(image: np.ndarray) -> torch.Tensor:
    """Preprocess an image: pad it to a square with CLIP's mean colour, scale it to 448 pixels, normalise.

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
    """The dtype that the model computes in by default: float16 on a GPU, as published. On a CPU, where float16 is slow,
    it is float32."""
    return torch.float16 if device().type == "cuda" else torch.float32


def load(trusted: str, dtype: torch.dtype | None = None) -> QAlign:
    """Load the model with its published weights, through the code beside them.

    trusted: the hash of that code, by which the recipe trusts it (tasks.weights.remote_code).
    dtype: of the weights; `precision()` when None.

    Raises MissingBackend, WrongWeights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    remote_code.check("qalign", "aesthetics.remote_code", trusted)
    folder = weights.find("qalign")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        network: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=True, dtype=dtype or precision()
        )
    except Exception as error:  # the code beside the weights may raise anything
        raise weights.WrongWeights(f"Q-Align in {folder} cannot be loaded: {type(error).__name__}: {error}") from error
    return QAlign(network.to(device()).eval().requires_grad_(False), tokenizer)
