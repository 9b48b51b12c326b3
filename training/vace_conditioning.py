"""The control video that VACE reads: what to keep, what to make anew, and references (Jiang et al. 2025, "VACE",
section 3.2; numbers as in Wan2.1's own code).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.latent_codec import STRIDE_S, STRIDE_T, latent_frames, usable_frames
from tasks.networks import wan_vae

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

_MULTIPLE = 2 * STRIDE_S  # pixels of a token, each way


def control(vae: "AutoencoderKLWan", video: Tensor, mask: Tensor, references: Tensor | None = None) -> Tensor:
    """What VACE reads beside the noisy latents.

    video: [batch, 3, frames, height, width] float, RGB from -1 to 1, 4n + 1 frames, height and width multiples of 16.
    mask: [batch, 1, frames, height, width], above 0.5 where the picture is to be made anew. references: [batch,
    references, 3, height, width] float, from -1 to 1; they stand before the video as frames that are kept, and the
    noisy latents need as many more frames, which are dropped in the end.

    Returns: [batch, 96, references + n + 1, height / 8, width / 8] float32: 16 channels of latents of what is kept
    (grey elsewhere), 16 of what is to be made anew (the same), 64 of the mask's pixels under each latent.
    Raises ValueError for other shapes.
    """
    _check(video, mask, references)
    anew = (mask > 0.5).to(video.dtype)
    latents = torch.cat([_encoded(vae, video * (1 - anew)), _encoded(vae, video * anew)], 1)
    masks = mask_channels(anew)
    if references is not None:
        kept = [_encoded(vae, picture[:, :, None]) for picture in references.unbind(1)]
        before = torch.cat(kept, 2)
        latents = torch.cat([torch.cat([before, torch.zeros_like(before)], 1), latents], 2)
        masks = F.pad(masks, (0, 0, 0, 0, before.shape[2], 0))
    return torch.cat([latents, masks.to(latents)], 1)


def mask_channels(mask: Tensor) -> Tensor:
    """A mask of pixels by latents: the 8 x 8 pixels under each as 64 channels, row by row; of the frames the nearest
    ones, by which the first latent's is not the first frame but one near it.

    mask: [batch, 1, frames, height, width] float. Returns: [batch, 64, latent frames, height / 8, width / 8].
    """
    batch, _, frames = mask.shape[:3]
    folded = F.pixel_unshuffle(mask.transpose(1, 2).flatten(0, 1), STRIDE_S).unflatten(0, (batch, frames))
    size = (latent_frames(frames), *folded.shape[-2:])
    return F.interpolate(folded.transpose(1, 2), size, mode="nearest-exact")


def _encoded(vae: "AutoencoderKLWan", video: Tensor) -> Tensor:
    """[batch, 16, latent frames, height / 8, width / 8] float32."""

    def pieces() -> Iterator[Tensor]:
        yield video[:, :, :1]
        yield from video[:, :, 1:].split(STRIDE_T, 2) if video.shape[2] > 1 else ()

    return torch.stack(list(wan_vae.encode(vae, pieces())), 2)


def _check(video: Tensor, mask: Tensor, references: Tensor | None) -> None:
    batch, _, frames, height, width = video.shape
    if frames != usable_frames(frames) or height % _MULTIPLE or width % _MULTIPLE:
        raise ValueError(
            f"a control video of {frames} frames of {width}x{height}: it has 4n + 1, such as {usable_frames(frames)}, "
            f"and sides that are multiples of {_MULTIPLE}"
        )
    if mask.shape != (batch, 1, frames, height, width):
        raise ValueError(f"a mask of {list(mask.shape)} for a control video of {list(video.shape)}")
    if references is not None and (references.shape[0], *references.shape[2:]) != (batch, 3, height, width):
        raise ValueError(f"references of {list(references.shape)} for a control video of {list(video.shape)}")
