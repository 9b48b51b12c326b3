"""Where networks run: the GPU that this process sees, else the CPU."""

import torch


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
