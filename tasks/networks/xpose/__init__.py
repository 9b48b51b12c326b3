"""X-Pose with the Swin-T backbone: object tokens of persons, faces and hands.

Source: Yang et al., X-Pose: Detecting Any Keypoints, ECCV 2024; code and weights of IDEA-Research/X-Pose. It is a
re-implementation for inference with modules named as in the published checkpoint (unipose_swint.pth).

X-Pose's decoder has an object level, which finds boxes, and a keypoint level after it. Only the object level runs here.
physavatar takes its output tokens as physical state tokens (appendix B). They do not depend on the keypoint level. They
do depend on the set of classes in the prompt, so the prompts are fixed: "a photo of person", "a photo of face",
"a photo of hand". Left out are the keypoint level, prompts by images (CLIP's vision half), the tokenizer and training.
"""

from pathlib import Path

import torch
from torch import Tensor

from tasks.networks.xpose.clip_text import prompts
from tasks.networks.xpose.network import Objects, XPose
from tasks.weights import store as weights

CLASSES = ("person", "face", "hand")
BATCH = 4  # frames at a time; each takes some 0.4 GB at 800x1333
# Published input size in pixels: the shorter side is 800, or less where the longer side would exceed 1333.
SHORT_SIDE, LONG_SIDE = 800, 1333

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class ObjectTokens:
    """X-Pose's object level with its three classes encoded. `load` makes it."""

    def __init__(self, network: XPose, device: torch.device, dtype: torch.dtype) -> None:
        """network: with all of its weights. Parts that the object level does not need are removed from it."""
        with torch.inference_mode():
            self.classes = network.classes(network.clip_model(prompts(*CLASSES))).to(device, dtype)
        network.serve()
        self.network = network.to(device, dtype)

    @torch.inference_mode()
    def __call__(self, frames: Tensor) -> Objects:
        """The object level's outputs, computed for `BATCH` frames at a time.

        frames: [frames, height, width, 3] uint8 RGB, at the size that `input_size` gives.

        Returns: float32 on the CPU, whatever dtype the network has: tokens [frames, 900, 256] after the last layer
        norm; logits [frames, 900, 3] of CLASSES, whose sigmoid is the score; boxes [frames, 900, 4], centre and size in
        fractions of the frame. There are fewer than 900 queries where a frame has fewer positions.
        """
        found = [self.network(self._normalised(batch), self.classes).after for batch in frames.split(BATCH)]
        return Objects(*(torch.cat(values).float().cpu() for values in zip(*found, strict=True)))

    def _normalised(self, frames: Tensor) -> Tensor:
        images = frames.to(self.classes.device).permute(0, 3, 1, 2).float()
        mean, std = (images.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        return ((images / 255 - mean) / std).to(self.classes.dtype)


def expected_shapes(folder: Path) -> weights.Shapes:
    """The keys and shapes that the published checkpoint has. folder: not used; there is one layout."""
    del folder
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in XPose().state_dict().items()}


def load(device: torch.device, dtype: torch.dtype = torch.float32) -> ObjectTokens:
    """Load the object level with its published weights. Raises MissingBackend, WrongWeights."""
    (path,) = weights.files("xpose")
    with torch.device("meta"):
        network = XPose()
    network = network.to_empty(device="cpu")
    weights.load_into(network, weights.read(path), path)
    return ObjectTokens(network.eval().requires_grad_(False), device, dtype)


def input_size(width: int, height: int, short_side: int = SHORT_SIDE) -> tuple[int, int]:
    """The size, (width, height), to scale frames to.

    The shorter side gets `short_side` pixels. It gets fewer where the longer side would exceed 1333 / 800 times
    `short_side`.

    width, height: of the frames in pixels.
    """
    longest = short_side * LONG_SIDE / SHORT_SIDE
    short = min(short_side, round(longest * min(width, height) / max(width, height)))
    long = int(short * max(width, height) / min(width, height))
    return (short, long) if width < height else (long, short)
