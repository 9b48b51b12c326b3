"""Random numbers that depend on their purpose alone.

The numbers drawn for a sample come from a generator of its own, seeded by the training's seed, the phase, the epoch and
the sample's key. So they are the same on any number of workers and after any interruption, and no generator's state has
to be kept.
"""

import hashlib

import torch


def generator_for(*purpose: object) -> torch.Generator:
    """A generator on the CPU for one purpose: (seed, phase, epoch, key), or other values that identify the purpose."""
    digest = hashlib.sha256("\0".join(map(str, purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
