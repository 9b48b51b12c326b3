"""What the published networks cost: `python -m benchmarks.networks [NAME ...]`; all networks without a name.

The table has the keys of each network's checkpoint, its parameters, the items it processes per second, and the speed-up
over the reference: the same results by the operations of the published code, in plain PyTorch. On a CPU, one thread is
used and CPU seconds are measured; on a GPU, seconds on the clock. The weights are noise. A network that cannot be
measured here has a row that says why.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import library_rows
from benchmarks.row import NotMeasured, Row, seconds, size_of
from tasks.networks.device import device
from tests.noise import xpose_state


def xpose() -> Row:
    """Reference: classes padded to 350, all projections of the fusion, and all queries sampled at once."""
    from tasks.networks.xpose import attention
    from tasks.networks.xpose.network import XPose

    with torch.device("meta"):
        network = XPose()
    network = network.to_empty(device="cpu").eval().requires_grad_(False)
    counts = size_of(network)
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
        with patch.object(attention._BiAttention, "forward", both_ways), patch.object(attention, "_QUERY_BLOCK", 10**9):
            reference = seconds(lambda: network(images, padded))
    return Row(*counts, "frames of 800x800", own, reference)


def syncnet() -> Row:
    """Lips. Reference: five stacked frames for each window, in the published code's memory layout."""
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
    return Row(*size_of(network), "windows of lips", own / windows, reference / windows)


def s3fd() -> Row:
    """Reference: one image at a time, as the published code searches, in its memory layout."""
    from copy import deepcopy

    from tasks.networks import s3fd

    network = s3fd.S3FD().to(device()).eval().requires_grad_(False)
    fast = s3fd.ready(deepcopy(network))
    images = [*torch.randint(0, 256, (8, 480, 854, 3), dtype=torch.uint8).numpy()]
    own = seconds(lambda: s3fd.faces(fast, images))
    reference = seconds(lambda: [s3fd.faces(network, [image]) for image in images])
    return Row(*size_of(network), "frames of 854x480, at a quarter", own / 8, reference / 8)


def raft() -> Row:
    """Successive frames. Reference: each pair alone, which computes the features of each frame twice."""
    from tasks.networks.raft import Raft, flows

    network = Raft().to(device()).eval().requires_grad_(False)
    pairs = 8 if device().type == "cuda" else 2
    images = torch.randint(0, 256, (pairs + 1, 3, 184, 320), dtype=torch.uint8)
    own = seconds(lambda: flows(network, images), 1)
    reference = seconds(lambda: [flows(network, images[at : at + 2]) for at in range(pairs)], 1)
    return Row(*size_of(network), "pairs of 320x184", own / pairs, reference / pairs)


def fid_inception() -> Row:
    """Reference: one image at a time."""
    from tasks.networks.fid_inception import FidInception, features

    network = FidInception().to(device()).eval().requires_grad_(False)
    images = torch.rand(4, 3, 256, 256)
    own = seconds(lambda: features(network, images), 1)
    reference = seconds(lambda: features(network, images, batch=1), 1)
    return Row(*size_of(network), "pictures", own / 4, reference / 4)


def i3d() -> Row:
    """The operations are the reference's own."""
    from tasks.networks.i3d import I3d, features

    network = I3d().to(device()).eval().requires_grad_(False)
    videos = torch.rand(1, 3, 16, 224, 224) * 2 - 1
    return Row(*size_of(network), "frames, of videos of 16", seconds(lambda: features(network, videos), 1) / 16, None)


def scrfd() -> Row:
    """Only our part: preparing the image, reading the nine outputs, and removing overlapping boxes."""
    import numpy as np

    from tasks.networks.insightface import decoded, letterboxed

    drawn, image = np.random.default_rng(0), np.random.default_rng(1).integers(0, 256, (480, 854, 3), np.uint8)
    cells = [(640 // stride) ** 2 * 2 for stride in (8, 16, 32)]
    scores = [drawn.uniform(0, 0.51, (count, 1)).astype(np.float32) for count in cells]  # 2 in 100 count as faces
    sides, points = ([drawn.uniform(0, 4, (count, n)).astype(np.float32) for count in cells] for n in (4, 10))

    def find() -> None:
        _, scale = letterboxed(image, (640, 640))
        decoded([*scores, *sides, *points], (640, 640), scale)

    return Row(0, 0, "pictures of 854x480, network aside", seconds(find, 5), None)


def arcface() -> Row:
    """IResNet-50 in PyTorch, faces in one batch. Reference: one face at a time. The ONNX graph of a pack is the same
    network."""
    from tasks.networks.iresnet import LAYERS, IResNet

    network = IResNet(LAYERS["iresnet50"]).to(device()).eval().requires_grad_(False)
    faces = torch.rand(4, 3, 112, 112, device=device()) * 2 - 1
    with torch.inference_mode():
        own = seconds(lambda: network(faces), 1)
        reference = seconds(lambda: [network(face) for face in faces.split(1)], 1)
    return Row(*size_of(network), "faces", own / 4, reference / 4)


NETWORKS: dict[str, Callable[[], Row]] = {
    "syncnet": syncnet,
    "s3fd": s3fd,
    "xpose": xpose,
    "wan-vae-encode": partial(library_rows.wan_vae, False),
    "wan-vae-decode": partial(library_rows.wan_vae, True),
    "wan-vace": library_rows.wan_vace,
    "umt5": library_rows.umt5,
    "raft": raft,
    "whisper": library_rows.whisper,
    "qalign": library_rows.qalign,
    "fid-inception": fid_inception,
    "i3d": i3d,
    "scrfd": scrfd,
    "arcface": arcface,
    "yolo": library_rows.yolo,
    "paddleocr": library_rows.paddleocr,
    "qwen2.5-omni": library_rows.qwen_omni,
    "qwen-question": library_rows.qwen_question,
    "minicpm-o": library_rows.minicpm_o,
}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'network':<14} {'keys':>5} {'parameters':>13} {'items/s':>9} {'reference':>9}  items ({device()})")
    for name in names or NETWORKS:
        try:
            row = NETWORKS[name]()
        except NotMeasured as why:
            print(f"{name:<14} not measured: {why}", flush=True)
            continue
        reference = "" if row.reference_seconds is None else f"{row.reference_seconds / row.seconds:.2f} x"
        print(
            f"{name:<14} {row.keys:>5} {row.parameters:>13,} {1 / row.seconds:>9.3g} {reference:>9}  {row.items}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
