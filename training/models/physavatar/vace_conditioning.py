"""The control video of VACE: the part of the video to keep, the part to generate, and reference images.

Jiang et al. 2025, "VACE", section 3.2. Numbers as in Wan2.1's own code.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.networks import wan_vae
from tasks.networks.latent_geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE, latent_frames, usable_frames

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

_MULTIPLE = 2 * SPATIAL_STRIDE  # pixels each way of a token


def control(vae: "AutoencoderKLWan", video: Tensor, mask: Tensor, references: Tensor | None = None) -> Tensor:
    """VACE's input beside the noisy latents.

    video: [batch, 3, frames, height, width] float, RGB from -1 to 1, 4n + 1 frames, height and width multiples of 16.
    mask: [batch, 1, frames, height, width], above 0.5 where the video is to be generated. references: [batch,
    references, 3, height, width] float, from -1 to 1. They stand before the video as frames to keep. The noisy latents
    need as many more frames, which the caller drops after sampling.

    Returns: [batch, 96, references + n + 1, height / 8, width / 8] float32. 16 channels are latents of the part to
    keep, grey elsewhere. 16 are latents of the part to generate, grey elsewhere. 64 are the mask's pixels under each
    latent. Raises ValueError for other shapes.
    """
    _check(video, mask, references)
    generated = (mask > 0.5).to(video.dtype)
    latents = torch.cat([_encoded(vae, video * (1 - generated)), _encoded(vae, video * generated)], 1)
    masks = mask_channels(generated)
    if references is not None:
        kept = [_encoded(vae, image[:, :, None]) for image in references.unbind(1)]
        before = torch.cat(kept, 2)
        latents = torch.cat([torch.cat([before, torch.zeros_like(before)], 1), latents], 2)
        masks = F.pad(masks, (0, 0, 0, 0, before.shape[2], 0))
    return torch.cat([latents, masks.to(latents)], 1)


def mask_channels(mask: Tensor) -> Tensor:
    """A pixel mask at the size of the latents: the 8 x 8 pixels under each latent become 64 channels, row by row.

    Each latent frame takes the nearest frame of the mask when frames are spread evenly. So the first latent frame takes
    a frame near the first one, not the first one itself.

    mask: [batch, 1, frames, height, width] float. Returns: [batch, 64, latent frames, height / 8, width / 8].
    """
    batch, _, frames = mask.shape[:3]
    folded = F.pixel_unshuffle(mask.transpose(1, 2).flatten(0, 1), SPATIAL_STRIDE).unflatten(0, (batch, frames))
    size = (latent_frames(frames), *folded.shape[-2:])
    return F.interpolate(folded.transpose(1, 2), size, mode="nearest-exact")


def _encoded(vae: "AutoencoderKLWan", video: Tensor) -> Tensor:
    """[batch, 16, latent frames, height / 8, width / 8] float32."""

    def latent_by_latent() -> Iterator[Tensor]:
        yield video[:, :, :1]
        yield from video[:, :, 1:].split(TEMPORAL_STRIDE, 2) if video.shape[2] > 1 else ()

    return torch.stack(list(wan_vae.encode(vae, latent_by_latent())), 2)


def _check(video: Tensor, mask: Tensor, references: Tensor | None) -> None:
    batch, _, frames, height, width = video.shape
    if frames != usable_frames(frames) or height % _MULTIPLE or width % _MULTIPLE:
        raise ValueError(
            f"a control video of {frames} frames of {width}x{height}: give 4n + 1 frames, such as "
            f"{usable_frames(frames)}, and sides that are multiples of {_MULTIPLE}"
        )
    if mask.shape != (batch, 1, frames, height, width):
        raise ValueError(f"the mask's shape {list(mask.shape)} does not fit the control video's {list(video.shape)}")
    if references is not None and (references.shape[0], *references.shape[2:]) != (batch, 3, height, width):
        raise ValueError(
            f"the references' shape {list(references.shape)} does not fit the control video's {list(video.shape)}"
        )
