"""Wan2.1's video VAE (Wan Team 2025, section 4.1) through diffusers: streams of frames to latents and back.

Its convolutions look only back in time, and what they look back at is kept between the pieces of a stream: two frames
for each, however long the video is, and the numbers are those of the whole video at once.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tasks import weights
from tasks.latent_codec import WAN_CHANNELS
from tasks.networks import layouts

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
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
# those of Wan2.2's VAE, of other strides and channels, differ in these
_WAN21 = ("z_dim", "temperal_downsample", "is_residual", "in_channels", "out_channels", "patch_size")


def rules(res_blocks: int = PUBLISHED["num_res_blocks"]) -> layouts.Rules:
    """From the names in Wan2.1_VAE.pth to diffusers'. res_blocks: num_res_blocks, by which the decoder's one list of
    layers falls into blocks: one residual layer more than that, then what enlarges, in all blocks but the last."""
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
        raise weights.WrongWeights(f"{path} is not of Wan2.1's VAE: {', '.join(other)}")
    return layouts.empty(lambda: AutoencoderKLWan(**config), path)


def takes(folder: Path) -> weights.Shapes:
    """The keys and shapes of the checkpoint in `folder`, in whichever of the two namings it is written."""
    network = _empty(folder)
    has = weights.shapes(*layouts.checkpoints(NAME, folder))
    return layouts.takes(network, has, rules(network.config["num_res_blocks"]))


def load(device: torch.device, dtype: torch.dtype = torch.float32) -> "AutoencoderKLWan":
    """The network with its published weights, in either naming. Raises MissingBackend, WrongWeights."""
    network = _empty(weights.find(NAME))
    layouts.fill(network, layouts.checkpoints(NAME), rules(network.config["num_res_blocks"]), device, dtype)
    return network


def encode(vae: "AutoencoderKLWan", pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """A stream of video to latents, as the posterior's mode, (z - mean) / std.

    pieces: [batch, 3, frames, height, width] float, RGB from -1 to 1, height and width multiples of 8: the first of one
    frame, every other of four. Yields: for each its latent frame, [batch, 16, height / 8, width / 8] float32.
    """
    mean, std = _statistics(vae)
    kept = _memory(vae.encoder)
    for piece in pieces:
        with torch.inference_mode():
            moments = vae.quant_conv(vae.encoder(piece.to(vae.device, vae.dtype), feat_cache=kept, feat_idx=[0]))
            latent = (moments[:, : mean.shape[1], 0].float() - mean) / std
        yield latent


def decode(vae: "AutoencoderKLWan", latents: Iterable[Tensor]) -> Iterator[Tensor]:
    """A stream of latents to video.

    latents: [batch, 16, height / 8, width / 8] as `encode` gives them. Yields: for the first one frame, for every other
    four, [batch, 3, frames, height, width] float32, RGB from -1 to 1.
    """
    mean, std = _statistics(vae)
    kept = _memory(vae.decoder)
    for number, latent in enumerate(latents):
        with torch.inference_mode():
            z = (latent.to(vae.device, torch.float32) * std + mean).to(vae.dtype)
            frames = vae.decoder(
                vae.post_quant_conv(z[:, :, None]), feat_cache=kept, feat_idx=[0], first_chunk=not number
            )
            frames = frames.float().clamp(-1, 1)
        yield frames


def _statistics(vae: "AutoencoderKLWan") -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels, [1, 16, 1, 1] float32."""
    mean, std = (torch.tensor(vae.config[name], device=vae.device) for name in ("latents_mean", "latents_std"))
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def _memory(half: torch.nn.Module) -> list[Any]:
    """Room for what each convolution of the encoder or decoder keeps of the pieces before."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return [None] * sum(isinstance(module, WanCausalConv3d) for module in half.modules())
