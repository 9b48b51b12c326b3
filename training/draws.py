"""Random numbers that depend on what they are for and on nothing else.

What is drawn for a sample comes from a generator of its own, seeded by the training's seed, the phase, the epoch and
the sample's key. So it is the same on any number of workers and after any kill, and no generator's state is kept.
"""

import hashlib

import torch


def generator(*purpose: object) -> torch.Generator:
    """A generator on the CPU for one purpose: (seed, phase, epoch, key) and whatever tells it from others."""
    digest = hashlib.sha256("\0".join(map(str, purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
