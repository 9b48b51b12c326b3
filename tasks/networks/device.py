"""Where networks run: the GPU that this process sees, else the CPU."""

import torch


def device() -> torch.device:
    """Also keeps float32 what it is: convolutions on a GPU round to ten bits unless told not to."""
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
