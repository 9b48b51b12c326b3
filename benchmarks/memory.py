"""What one GPU holds when active-mind is trained with FSDP, activation checkpointing and bfloat16.

    python -m benchmarks.memory [--size 7b] [--frames 117] [--height 480] [--width 832]

Nothing is allocated: the activations of a block are those that its backward pass would keep, counted on tensors without
storage. The table is Markdown. GB are 10^9 bytes.
"""

import argparse

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tasks.networks.latent_geometry import SPATIAL_STRIDE, latent_frames
from training.models.active_mind import rope
from training.models.active_mind.attention import AttentionLayout, text_times
from training.models.active_mind.block import Block, PerBranch
from training.models.active_mind.config import SIZES, active_mind_settings

WORDS = 512  # text tokens of the paper's encoder
PER_PARAMETER = {"weights": 4, "gradients": 4, "optimizer": 8, "averaged": 4}  # bytes, all float32, shared out


class Kept:
    """Bytes that a backward pass keeps, each tensor once, without the parameters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._known = {parameter.untyped_storage()._cdata for parameter in parameters}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.bytes += storage.nbytes()
        return tensor


def activations(size: str, frames: int, rows: int, columns: int) -> tuple[int, int]:
    """Bytes of one sample: of the tokens that go into a block, and those that the block's backward pass keeps."""
    shape = SIZES[size]
    with FakeTensorMode(), torch.device("cpu"):
        block = Block(shape, last=False)
        layout = AttentionLayout(frames, 0, rows * columns, 1, WORDS, torch.tensor([WORDS]))
        x = PerBranch(
            *(
                torch.zeros(1, tokens, shape.width, dtype=torch.bfloat16, requires_grad=True)
                for tokens in (layout.video_tokens, layout.audio_tokens, WORDS)
            )
        )
        levels = PerBranch(*(torch.zeros(1, groups, 6, shape.width) for groups in (frames, 1, 1)))
        times = torch.arange(frames)
        positions = (
            rope.grid_positions(times, rows, columns),
            rope.time_positions(times[None]),
            rope.time_positions(text_times(layout.text_count, WORDS, frames)),
        )
        cos_sin = tuple(rope.rope_cos_sin(of, shape.width // shape.heads) for of in positions)
        kept = Kept(list(block.parameters()))
        with (
            torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        ):
            block(x, levels, cos_sin, layout)
        return sum(tokens.nbytes for tokens in x), kept.bytes


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--size", choices=list(SIZES), default="7b")
    arguments.add_argument("--frames", type=int, default=117)
    arguments.add_argument("--height", type=int, default=480)
    arguments.add_argument("--width", type=int, default=832)
    asked = arguments.parse_args()
    settings = active_mind_settings(asked.size, 16, 4096, audio_window=2, audio_features=1280)
    shape, parameters = settings.shape, settings.parameter_count()
    with torch.device("meta"):
        block = sum(parameter.numel() for parameter in Block(shape, last=False).parameters())
    patch = SPATIAL_STRIDE * shape.patch
    entering, kept = activations(asked.size, latent_frames(asked.frames), asked.height // patch, asked.width // patch)
    print(f"{asked.size}: {parameters / 1e9:.2f} G parameters, {block / 1e6:.0f} M a block\n")
    print("| GB of one GPU | 8 GPUs | 64 GPUs | 256 GPUs |\n|---|---|---|---|")
    gpus = (8, 64, 256)
    lines = {name: [bytes_ * parameters / n for n in gpus] for name, bytes_ in PER_PARAMETER.items()}
    lines["two gathered blocks, one in use and the next"] = [2 * 4 * block] * 3
    lines["whole gradient of one block"] = [4 * block] * 3
    lines["tokens kept before each block, one sample"] = [shape.depth * entering] * 3
    lines["one block while it is computed again"] = [kept] * 3
    for name, values in [*lines.items(), ("together", [sum(column) for column in zip(*lines.values(), strict=True)])]:
        print(f"| {name} | " + " | ".join(f"{value / 1e9:.1f}" for value in values) + " |")


if __name__ == "__main__":
    main()
