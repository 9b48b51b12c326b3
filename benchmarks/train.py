"""What a training step of active-mind costs: FLOPs of each branch, and the time of a block, compared with the block
without sound and text and with a block of Wan in diffusers.

    python -m benchmarks.train [--width 256] [--frames 21] [--side 24] [--rounds 3]

Times are of the forward and backward pass of one block, as ratios of runs that take turns. They are CPU seconds on a
CPU. The share of sound and text depends on the number of visual tokens beside the 512 text tokens. The default is
12,096 visual tokens: a quarter of those of the papers' clips, which a CPU processes in some seconds. On a GPU, the
benchmark also measures a whole step of size 1.3b on synthetic latents of 81 x 512 x 512. The tables are Markdown.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.loop.metrics import peak_flops
from training.models.active_mind import rope
from training.models.active_mind.attention import AttentionLayout
from training.models.active_mind.block import Block, Branch, PerBranch
from training.models.active_mind.config import SIZES, Shape, active_mind_settings
from training.models.active_mind.model import ActiveMind, Conditions

WORDS = 512  # text tokens of the paper's encoders
WHISPER = {"text_dim": 4096, "audio_window": 2, "audio_features": 1280}


def flops_table() -> None:
    """Print the FLOPs of each size for the papers' clips, rounded to what the codec takes: 121 frames of 480 x 832 at
    24 frames a second."""
    print("| size | parameters | TFLOP a step | sound and text beside video |\n|---|---|---|---|")
    for size in SIZES:
        settings = active_mind_settings(size, channels=16, **WHISPER)
        flops = settings.flops(frames=31, height=60, width=104, text_tokens=WORDS)
        more = (flops["text"] + flops["audio"]) / flops["video"]
        print(
            f"| {size} | {settings.parameter_count() / 1e9:.3f} G | {3 * sum(flops.values()) / 1e12:.1f} | {more:.1%} |"
        )


class VideoOnly(nn.Module):
    """Only the video branch of a block."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor, level: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        vectors = self.branch.modulation(level)
        query, key, value = self.branch.project_qkv(x, vectors, turn)
        assert query is not None
        return self.branch.residual_update(x, F.scaled_dot_product_attention(query, key, value), vectors)


def block_times(shape: Shape, frames: int, side: int, rounds: int, device: torch.device) -> None:
    """Print the times of our block, our block without sound and text, and Wan's block, with equal width and tokens."""
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    width, tokens = shape.width, frames * side * side
    ours, wans = (
        Block(shape, last=False).to(device),
        WanTransformerBlock(width, shape.mlp, shape.heads, cross_attn_norm=True).to(device),
    )
    alone = VideoOnly(ours.video)
    layout = AttentionLayout(frames, 0, side * side, 1, WORDS, torch.tensor([WORDS], device=device))
    made = [torch.randn(1, count, width, device=device, requires_grad=True) for count in (tokens, frames, WORDS)]
    level = torch.randn(1, frames, 6, width, device=device)
    levels = PerBranch(level, level[:, :1], level[:, :1])
    video = rope.rope_cos_sin(rope.grid_positions(torch.arange(frames), side, side), width // shape.heads)
    turns = tuple(
        tuple(part.to(device) for part in turn)
        for turn in (
            video,
            *(
                rope.rope_cos_sin(rope.time_positions(torch.arange(n)[None]), width // shape.heads)
                for n in (frames, WORDS)
            ),
        )
    )
    for_wan = tuple(part[:, :, None].repeat_interleave(2, -1) for part in turns[0])
    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: torch.cat(ours(PerBranch(*made), levels, turns, layout), 1),
        "ours, video only": lambda: alone(made[0], level, turns[0]),
        "Wan's": lambda: wans(made[0], made[2], level[:, 0], for_wan),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for taken in range(rounds + 1):
        for name, run in runs.items():
            spent = _seconds(lambda run=run: run().square().mean().backward(), device)  # type: ignore[misc]
            if taken:  # the first run only warms up
                times[name].append(spent)
    print(f"\n{tokens} visual tokens, width {width}, {shape.heads} heads, {WORDS} text tokens, on {device.type}")
    print("| block | seconds | to ours |\n|---|---|---|")
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, times["ours"], strict=True))
        print(f"| {name} | {statistics.median(seconds):.3f} | {ratio:.2f} |")


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    before = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - before


def whole_step(rounds: int) -> None:
    """Print the cost of a step of size 1.3b: synthetic latents of 81 x 512 x 512 (21 x 64 x 64), bfloat16, compiled,
    with activation checkpointing."""
    device = torch.device("cuda")
    settings = active_mind_settings("1.3b", channels=16, **WHISPER)
    model = ActiveMind(settings).to(device)
    model.set_activation_checkpointing(True)
    for block in model.blocks:
        block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    no = torch.zeros(1, dtype=torch.bool, device=device)
    conditions = Conditions(
        torch.randn(1, 81, 2, 1280, device=device),
        torch.randn(1, WORDS, 4096, device=device),
        torch.ones(1, WORDS, dtype=torch.bool, device=device),
        no,
        no,
    )
    latents, clean = torch.randn(1, 16, 21, 64, 64, device=device), torch.zeros(1, 21, dtype=torch.bool, device=device)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            velocity = model(latents, torch.full((1,), 0.5, device=device), clean, conditions).velocity
        (velocity - latents).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = statistics.median([_seconds(step, device) for _ in range(rounds + 3)][3:])
    flops = 3 * sum(settings.flops(21, 64, 64, WORDS).values())
    peak = peak_flops(device)
    print("\n| step | visual tokens/s | peak memory | MFU |\n|---|---|---|---|")
    mfu = f"{flops / seconds / peak:.1%}" if peak else "unknown device"
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(f"| {seconds:.3f} s | {21 * 32 * 32 / seconds:.0f} | {memory:.1f} GiB | {mfu} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--frames", type=int, default=21, help="latent frames")
    parser.add_argument("--side", type=int, default=24, help="visual tokens along a side of a latent frame")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    flops_table()
    shape = Shape(
        width=arguments.width, depth=1, heads=max(1, arguments.width // 128), mlp=4 * arguments.width, patch=1
    )
    block_times(shape, arguments.frames, arguments.side, arguments.rounds, device)
    if device.type == "cuda":
        whole_step(arguments.rounds)
    else:
        print("\nNo GPU here: step time, memory and MFU of size 1.3b were not measured.")


if __name__ == "__main__":
    main()
