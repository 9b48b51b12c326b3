"""SyncNet and S3FD of their full size, with weights made by hand. tests.tiny_weights lists them with the others."""

from pathlib import Path

import numpy as np
import torch

from tests.parity import filled


def syncnet(folder: Path, speech: np.ndarray | None = None) -> np.ndarray:
    """Write a SyncNet whose embedding of a window of frames is the brightness of the middle one.

    The audio network keeps its random features, scaled to the range of a brightness. So frames whose brightness follows
    these features fit the audio.

    speech: [samples] float32 at 16 kHz, the audio; a second of noise where None.

    Returns: [frames], 0 to 255, the brightness that fits the audio, 25 frames a second. The last five frames are left
        out, because their windows would end after the audio.
    """
    from tasks.networks.mfcc import mfcc
    from tasks.networks.syncnet import SyncNet, ready, sound_vectors

    if speech is None:
        speech = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    network = SyncNet()
    state = {key: value for key, value in filled(network.state_dict()).items() if key.startswith("net")}
    for key, value in network.state_dict().items():
        if key.startswith(("netcnnlip", "netfclip")):
            state[key] = value.clone() if value.dim() == 0 else torch.zeros_like(value)
            if key.endswith("running_var") or (value.dim() == 1 and key.endswith("weight")):
                state[key] += 1
    state["netcnnlip.0.weight"][0, :, 2] = 1 / (3 * 49)
    state["netcnnlip.4.weight"][0, 0] = 1 / 25
    for layer in (8, 11, 14):
        state[f"netcnnlip.{layer}.weight"][0, 0, 0, 1, 1] = 1
    state["netcnnlip.18.weight"][0, 0] = 1 / 36
    state["netfclip.0.weight"][0, 0] = state["netfclip.3.weight"][0, 0] = 1
    state["netfcaud.3.weight"][1:] = 0
    state["netfcaud.3.bias"][:] = 0
    network.load_state_dict(state)
    audio = sound_vectors(ready(network), mfcc(speech * 32768), len(speech) // 640 - 5)[:, 0]
    scale = 180 / float(audio.max() - audio.min())
    state["netfcaud.3.weight"][0] *= scale
    state["netfcaud.3.bias"][0] = 40 - scale * float(audio.min())
    folder.mkdir(parents=True)
    # old checkpoints lack the counters of the batch normalisations
    kept = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(kept, folder / "syncnet_v2.model")
    brightness = 40 + scale * (audio.numpy() - float(audio.min()))
    return np.concatenate([brightness[:1], brightness[:1], brightness[:-2]])


def s3fd(folder: Path) -> None:
    """Write an S3FD that finds one face, in the centre of any frame of 160 x 120 pixels."""
    from tasks.networks.s3fd import expected_shapes

    state = {key: torch.zeros(shape) for key, shape in expected_shapes(folder).items()}
    for level in range(5):
        state[f"conf.{level}.bias"] += torch.tensor([9.0, 9.0, 9.0, -9.0] if level == 0 else [9.0, -9.0])
    state["conf.5.bias"] += torch.tensor([-9.0, 9.0])
    # one prior box, 512 pixels around (64, 64), becomes 20 pixels around (20, 15)
    state["loc.5.bias"] += torch.tensor([-44 / 51.2, -49 / 51.2, *[np.log(20 / 512) / 0.2] * 2])
    folder.mkdir(parents=True)
    torch.save(state, folder / "sfd_face.pth")
