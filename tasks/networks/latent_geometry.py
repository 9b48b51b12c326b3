"""How latents lie over frames and pixels. This is the one home of the strides.

The geometry is that of Wan's VAE (Wan Team 2025, "Wan: Open and Advanced Large-Scale Video Generative Models"). 4n + 1
frames give n + 1 latent frames. Latent frame 0 covers frame 0 alone; latent frame i >= 1 covers frames 4i - 3 to 4i. A
latent pixel covers 8 x 8 pixels.
"""

TEMPORAL_STRIDE = 4
"""Frames of a latent frame, except for the first."""
SPATIAL_STRIDE = 8
"""Pixels of a latent pixel, in height and in width."""
WAN_CHANNELS = 16
"""Channels of the latents of Wan's VAE."""


def usable_frames(frames: int) -> int:
    """How many of `frames` frames, from the first, have latents: the largest 4n + 1 that is at most `frames`."""
    return (frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1 if frames > 0 else 0


def latent_frames(frames: int) -> int:
    """How many latent frames 4n + 1 frames have: n + 1."""
    return (frames - 1) // TEMPORAL_STRIDE + 1 if frames > 0 else 0


def video_frames(latents: int) -> int:
    """How many frames n + 1 latent frames cover: 4n + 1."""
    return TEMPORAL_STRIDE * (latents - 1) + 1
