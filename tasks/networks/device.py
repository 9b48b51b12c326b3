"""The device that networks run on."""

import torch


def device() -> torch.device:
    """The GPU that this process sees, else the CPU.

    It also switches TF32 off for convolutions on a GPU, which would round float32 inputs to a mantissa of ten bits.
    """
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
