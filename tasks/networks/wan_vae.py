"""Wan2.1's video VAE (Wan Team 2025, section 4.1): streams of frames to latents, and back.

The network runs through diffusers. Its convolutions are causal in time. Each keeps the two frames that it needs from
the pieces before, so memory does not grow with the length of a video, and the numbers are those of the whole video at
once. Left out are sampling from the posterior (its mode is taken) and tiling.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tasks.networks import layouts
from tasks.networks.latent_geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE, WAN_CHANNELS
from tasks.weights import store as weights

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

NAME = "wan-vae"

PUBLISHED: dict[str, Any] = {
    "base_dim": 96,
    "decoder_base_dim": None,
    "z_dim": WAN_CHANNELS,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "latents_mean": [
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    "latents_std": [
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ],
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_temporal": TEMPORAL_STRIDE,
    "scale_factor_spatial": SPATIAL_STRIDE,
}
# Wan2.2's VAE has other strides and channels. Its configuration differs in these fields.
_WAN21 = ("z_dim", "temperal_downsample", "is_residual", "in_channels", "out_channels", "patch_size")


def rules(res_blocks: int = PUBLISHED["num_res_blocks"]) -> layouts.Rules:
    """The rules from the names in Wan2.1_VAE.pth to those of diffusers.

    The original's decoder is one list of layers. diffusers has it in blocks: `res_blocks` + 1 residual layers each and,
    in all blocks but the last, an upsampling layer.

    res_blocks: the configuration's num_res_blocks.
    """
    upsamples = []
    for block in range(len(PUBLISHED["dim_mult"])):
        first = block * (res_blocks + 2)
        names = [f"resnets.{number}" for number in range(res_blocks + 1)] + ["upsamplers.0"]
        upsamples += [
            (rf"^decoder\.upsamples\.{first + number}\.", f"decoder.up_blocks.{block}.{name}.")
            for number, name in enumerate(names)
        ]
    return (
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
        (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
        (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
        (r"^(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
        (r"^(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
        (r"^(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
        (r"^encoder\.downsamples\.", "encoder.down_blocks."),
        *upsamples,
        (r"\.residual\.0\.", ".norm1."),
        (r"\.residual\.2\.", ".conv1."),
        (r"\.residual\.3\.", ".norm2."),
        (r"\.residual\.6\.", ".conv2."),
        (r"\.shortcut\.", ".conv_shortcut."),
    )


def _empty(folder: Path) -> "AutoencoderKLWan":
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    path = folder / "config.json"
    config = layouts.config(path, PUBLISHED)
    other = [f"{name} {config[name]}" for name in _WAN21 if config[name] != PUBLISHED[name]]
    if other:
        raise weights.WrongWeights(f"{path} is not the configuration of Wan2.1's VAE: {', '.join(other)}")
    return layouts.empty(lambda: AutoencoderKLWan(**config), path)


def expected_shapes(folder: Path) -> weights.Shapes:
    """The keys and shapes that the checkpoint in `folder` should have, in its own one of the two namings."""
    network = _empty(folder)
    has = weights.shapes(*layouts.checkpoints(NAME, folder))
    return layouts.expected_shapes(network, has, rules(network.config["num_res_blocks"]))


def load(device: torch.device, dtype: torch.dtype = torch.float32) -> "AutoencoderKLWan":
    """Load the network with its published weights, in either naming. Raises MissingBackend, WrongWeights."""
    network = _empty(weights.find(NAME))
    layouts.load_into(network, layouts.checkpoints(NAME), rules(network.config["num_res_blocks"]), device, dtype)
    return network


def encode(vae: "AutoencoderKLWan", pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Encode a stream of video to latents: the posterior's mode z, normalised to (z - mean) / std.

    pieces: [batch, 3, frames, height, width] float each, RGB from -1 to 1, height and width multiples of 8. The first
        piece has one frame, every other has four.

    Yields: the latent frame of each piece, [batch, 16, height / 8, width / 8] float32.
    """
    mean, std = _statistics(vae)
    cache = _cache(vae.encoder)
    for piece in pieces:
        with torch.inference_mode():
            moments = vae.quant_conv(vae.encoder(piece.to(vae.device, vae.dtype), feat_cache=cache, feat_idx=[0]))
            latent = (moments[:, : mean.shape[1], 0].float() - mean) / std
        yield latent


def decode(vae: "AutoencoderKLWan", latents: Iterable[Tensor]) -> Iterator[Tensor]:
    """Decode a stream of latents to video.

    latents: [batch, 16, height / 8, width / 8] each, normalised as `encode` gives them.

    Yields: the frames of each latent, [batch, 3, frames, height, width] float32, RGB from -1 to 1. The first latent has
    one frame, every other has four.
    """
    mean, std = _statistics(vae)
    cache = _cache(vae.decoder)
    for number, latent in enumerate(latents):
        with torch.inference_mode():
            z = (latent.to(vae.device, torch.float32) * std + mean).to(vae.dtype)
            frames = vae.decoder(
                vae.post_quant_conv(z[:, :, None]), feat_cache=cache, feat_idx=[0], first_chunk=not number
            )
            frames = frames.float().clamp(-1, 1)
        yield frames


def _statistics(vae: "AutoencoderKLWan") -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels, [1, 16, 1, 1] float32 each."""
    mean, std = (torch.tensor(vae.config[name], device=vae.device) for name in ("latents_mean", "latents_std"))
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def _cache(half: torch.nn.Module) -> list[Any]:
    """An empty cache for the encoder or the decoder: an entry for each convolution that keeps frames."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return [None] * sum(isinstance(module, WanCausalConv3d) for module in half.modules())
