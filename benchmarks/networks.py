"""What the published networks cost: `python -m benchmarks.networks [NAME ...]`; all of them without a name.

Of each network the keys of its checkpoint, its parameters, the items it takes in a second, and how that compares with
the reference's arithmetic: the same numbers by the operations that the published code makes, in plain PyTorch. On the
CPU with one thread, by CPU seconds; on a GPU, where there is one, by the clock. The weights are noise.
"""

import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from tasks.networks.device import device
from tests.noise import xpose_state


class Row(NamedTuple):
    """items: what is counted. seconds: of one item; reference_seconds: by the reference's arithmetic, None where the
    operations are the reference's own."""

    keys: int
    parameters: int
    items: str
    seconds: float
    reference_seconds: float | None


def seconds(work: Callable[[], Any], repeats: int = 2) -> float:
    """The least of several runs, after one that is not counted."""
    clock = time.perf_counter if device().type == "cuda" else time.process_time

    def once() -> float:
        started = clock()
        work()
        if device().type == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    once()
    return min(once() for _ in range(repeats))


def xpose() -> Row:
    """Against all classes padded to 350, all of the fusion's projections, and all queries sampled at once."""
    from tasks.networks.xpose import attention
    from tasks.networks.xpose.network import XPose

    with torch.device("meta"):
        network = XPose()
    network = network.to_empty(device="cpu").eval().requires_grad_(False)
    keys, parameters = len(network.state_dict()), sum(value.numel() for value in network.parameters())
    network.load_state_dict(xpose_state())
    network.serve()
    network.to(device())
    images, classes = torch.randn(1, 3, 800, 800, device=device()), torch.randn(3, 256, device=device())
    padded = torch.cat([classes, classes.new_zeros(347, 256)])

    def both_ways(self: Any, picture: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attention.FUSION_HEADS, -1)).transpose(1, 2)

        query, key = heads(self.v_proj(picture)) * 256**-0.5, heads(self.l_proj(text))
        scores = query @ key.transpose(2, 3)
        to_text = scores.transpose(2, 3).softmax(-1) @ heads(self.values_v_proj(picture))
        scores[..., len(classes) :] = -torch.inf
        to_picture = scores.softmax(-1) @ heads(self.values_l_proj(text))
        to_picture, to_text = (x.transpose(1, 2).flatten(2) for x in (to_picture, to_text))
        return self.out_v_proj(to_picture), self.out_l_proj(to_text)

    with torch.inference_mode():
        own = seconds(lambda: network(images, classes))
        with patch.object(attention._BothWays, "forward", both_ways), patch.object(attention, "_AT_ONCE", 10**9):
            reference = seconds(lambda: network(images, padded))
    return Row(keys, parameters, "frames of 800x800", own, reference)


def wan_vae(decoding: bool) -> Row:
    """In a stream, against diffusers' own way with the whole clip at once."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    from tasks.networks import wan_vae

    vae = AutoencoderKLWan(**wan_vae.PUBLISHED).to(device()).eval().requires_grad_(False)
    keys, parameters = len(vae.state_dict()), sum(value.numel() for value in vae.parameters())
    side = 256 if device().type == "cuda" else 64
    video, latents = torch.rand(1, 3, 9, side, side) * 2 - 1, torch.randn(1, 16, 3, side // 8, side // 8)

    def own() -> None:
        if decoding:
            deque(wan_vae.decode(vae, latents.unbind(2)), 0)
        else:
            deque(wan_vae.encode(vae, (video[:, :, :1], *video[:, :, 1:].split(4, 2))), 0)

    with torch.inference_mode():
        reference = seconds(lambda: vae.decode(latents.to(device())) if decoding else vae.encode(video.to(device())))
    return Row(keys, parameters, f"frames of {side}x{side}", seconds(own) / 9, reference / 9)


def umt5() -> Row:
    """Captions of 60 tokens by 2 of the 24 layers, against all padded to 512 as Wan's own code does; keys and
    parameters are those of the whole."""
    from transformers import UMT5Config, UMT5EncoderModel

    from tasks.networks import umt5

    with torch.device("meta"):
        whole = UMT5EncoderModel(UMT5Config(**umt5.PUBLISHED))
    keys, parameters = len(whole.state_dict()), sum(value.numel() for value in whole.parameters())
    network = UMT5EncoderModel(UMT5Config(**umt5.PUBLISHED | {"vocab_size": 1000, "num_layers": 2}))
    network.to(device(), torch.bfloat16 if device().type == "cuda" else torch.float32).eval().requires_grad_(False)
    ids = torch.randint(2, 1000, (2, 60))
    padded, mask = torch.zeros(2, 512, dtype=torch.long), torch.zeros(2, 512, dtype=torch.long)
    padded[:, :60], mask[:, :60] = ids, 1
    own = seconds(lambda: umt5.states(network, ids.tolist()), 1)
    with torch.inference_mode():
        reference = seconds(lambda: network(padded.to(device()), attention_mask=mask.to(device())), 1)
    return Row(keys, parameters, "captions through 2 layers", own / 2, reference / 2)


def syncnet() -> Row:
    """Lips against five frames stacked for each window, as the reference feeds them, in its memory layout."""
    from copy import deepcopy

    from tasks.networks import syncnet

    network = syncnet.SyncNet().to(device()).eval().requires_grad_(False)
    fast = syncnet.ready(deepcopy(network))
    windows = 16
    pictures = torch.randint(0, 256, (windows + 4, 224, 224, 3), dtype=torch.uint8).numpy()

    def stacked() -> Tensor:
        strip = torch.from_numpy(pictures).to(device()).flip(-1).permute(3, 0, 1, 2).float()
        return network.lips(torch.stack([strip[:, at : at + 5] for at in range(windows)]))

    own = seconds(lambda: syncnet.lip_vectors(fast, pictures))
    with torch.inference_mode():
        reference = seconds(stacked)
    parameters = sum(value.numel() for value in network.parameters())
    return Row(len(network.state_dict()), parameters, "windows of lips", own / windows, reference / windows)


def s3fd() -> Row:
    """Against one picture at a time, as the reference searches, in its memory layout."""
    from copy import deepcopy

    from tasks.networks import s3fd

    network = s3fd.S3FD().to(device()).eval().requires_grad_(False)
    fast = s3fd.ready(deepcopy(network))
    images = [*torch.randint(0, 256, (8, 480, 854, 3), dtype=torch.uint8).numpy()]
    own = seconds(lambda: s3fd.faces(fast, images))
    reference = seconds(lambda: [s3fd.faces(network, [image]) for image in images])
    parameters = sum(value.numel() for value in network.parameters())
    return Row(len(network.state_dict()), parameters, "frames of 854x480, at a quarter", own / 8, reference / 8)


NETWORKS: dict[str, Callable[[], Row]] = {
    "syncnet": syncnet,
    "s3fd": s3fd,
    "xpose": xpose,
    "wan-vae-encode": partial(wan_vae, False),
    "wan-vae-decode": partial(wan_vae, True),
    "umt5": umt5,
}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'network':<14} {'keys':>5} {'parameters':>13} {'items/s':>9} {'reference':>9}  items ({device()})")
    for name in names or NETWORKS:
        row = NETWORKS[name]()
        reference = "" if row.reference_seconds is None else f"{row.reference_seconds / row.seconds:.2f} x"
        print(
            f"{name:<14} {row.keys:>5} {row.parameters:>13,} {1 / row.seconds:>9.3g} {reference:>9}  {row.items}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
