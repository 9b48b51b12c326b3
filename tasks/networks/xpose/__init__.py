"""X-Pose, of Swin-T: tokens of persons, faces and hands (Yang et al., X-Pose: Detecting Any Keypoints, ECCV 2024).

Of the two levels of its decoder the object level runs, whose output tokens physavatar takes for physical state
(appendix B); they do not depend on the key points' level. They do depend on which classes are asked for together, so
these are fixed: "a photo of person", "a photo of face", "a photo of hand".
"""

from pathlib import Path

import torch
from torch import Tensor

from tasks import weights
from tasks.networks.xpose.clip_text import prompts
from tasks.networks.xpose.network import Objects, XPose

CLASSES = ("person", "face", "hand")
BATCH = 4  # frames at a time; each takes some 0.4 GB at 800x1333
SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels, as published: the shorter side, unless the longer one would exceed its own

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ObjectTokens:
    """The object level, with its classes encoded: the network that `load` gives.

    network: with its weights, all of them; only what the object level needs is kept.
    """

    def __init__(self, network: XPose, device: torch.device, dtype: torch.dtype) -> None:
        with torch.inference_mode():
            self.classes = network.classes(network.clip_model(prompts(*CLASSES))).to(device, dtype)
        network.serve()
        self.network = network.to(device, dtype)

    @torch.inference_mode()
    def __call__(self, frames: Tensor) -> Objects:
        """frames: [frames, height, width, 3] uint8 RGB, at the size that `input_size` gives; `BATCH` at a time.

        Returns: tokens [frames, 900, 256] after the last layer norm, logits [frames, 900, 3] of CLASSES (their sigmoid
        is the score), boxes [frames, 900, 4] (centre and size, in fractions of the frame); fewer than 900 where the
        frame has fewer places. float32 on the CPU, whatever the network's own type is.
        """
        found = [self.network(self._normalised(batch), self.classes).after for batch in frames.split(BATCH)]
        return Objects(*(torch.cat(values).float().cpu() for values in zip(*found, strict=True)))

    def _normalised(self, frames: Tensor) -> Tensor:
        images = frames.to(self.classes.device).permute(0, 3, 1, 2).float()
        mean, deviation = (images.new_tensor(values)[:, None, None] for values in (_MEAN, _DEVIATION))
        return ((images / 255 - mean) / deviation).to(self.classes.dtype)


def takes(folder: Path) -> weights.Shapes:
    """The keys and shapes of the published checkpoint, `folder`'s whatever they are."""
    del folder
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in XPose().state_dict().items()}


def load(device: torch.device, dtype: torch.dtype = torch.float32) -> ObjectTokens:
    """The object level with its published weights. Raises MissingBackend, WrongWeights."""
    (path,) = weights.files("xpose")
    with torch.device("meta"):
        network = XPose()
    network = network.to_empty(device="cpu")
    weights.fill(network, weights.read(path), path)
    return ObjectTokens(network.eval().requires_grad_(False), device, dtype)


def input_size(width: int, height: int, short_side: int = SHORT_SIDE) -> tuple[int, int]:
    """The width and height that the network wants frames at: their shorter side `short_side` pixels, and the longer
    one no more than 1333 to 800 times that."""
    longest = short_side * LONG_SIDE / SHORT_SIDE
    short = min(short_side, round(longest * min(width, height) / max(width, height)))
    long = int(short * max(width, height) / min(width, height))
    return (short, long) if width < height else (long, short)
