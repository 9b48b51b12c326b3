"""Wan2.1-VACE-1.3B as it is published, through diffusers: a video diffusion transformer of 30 blocks, and 15 more that
read a control video and add to every second of them (Jiang et al. 2025, "VACE: All-in-One Video Creation and Editing").

What it takes: noisy latents [batch, 16, frames, height, width], height and width even; a control video's [batch, 96,
frames, height, width] (training.vace_conditioning); a text's [batch, 512, 4096], zeros beyond its end, which are not
masked; and timesteps [batch], 0 to 1000. What it gives: the velocity noise - data, as the latents.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tasks import weights
from tasks.networks import layouts

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel

NAME = "wan-vace"

# Every field, because diffusers' own defaults are those of the 14B.
PUBLISHED: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
    "vace_layers": list(range(0, 30, 2)),
    "vace_in_channels": 96,
}
# the same fields in the original's config.json
_ORIGINAL = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "vace_in_dim": "vace_in_channels",
}

# From the original's names to diffusers'.
RULES: layouts.Rules = (
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.(attn[12])\.([qkv])\.", r".\1.to_\2."),
    (r"\.(attn[12])\.o\.", r".\1.to_out.0."),
    (r"\.norm3\.", ".norm2."),  # of the two norms with weights in diffusers' numbering
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (r"\.before_proj\.", ".proj_in."),
    (r"\.after_proj\.", ".proj_out."),
)


def _empty(folder: Path) -> "WanVACETransformer3DModel":
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
    from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel

    path = folder / "config.json"
    config = layouts.config(path, {**PUBLISHED, "dim": None}, _ORIGINAL)
    width = config.pop("dim")  # the original's, which gives heads and width, and no width of a head

    def build() -> WanVACETransformer3DModel:
        heads = {} if width is None else {"attention_head_dim": width // config["num_attention_heads"]}
        return WanVACETransformer3DModel(**config | heads)

    network = layouts.empty(build, path)
    fields = (network.config[name] for name in ("attention_head_dim", "patch_size", "rope_max_seq_len"))
    network.rope = WanRotaryPosEmbed(*fields)  # numbers, which are in no checkpoint
    return network


def takes(folder: Path) -> weights.Shapes:
    """The keys and shapes of the checkpoint in `folder`, in whichever of the two namings it is written."""
    return layouts.takes(_empty(folder), weights.shapes(*layouts.checkpoints(NAME, folder)), RULES)


def load(device: torch.device, dtype: torch.dtype = torch.float32) -> "WanVACETransformer3DModel":
    """The network with its published weights, in either naming, set to evaluate and without gradients. What loses by
    rounding stays in float32: rotary positions, the noise level's embedding and tables, norms.

    Raises MissingBackend, WrongWeights.
    """
    network = _empty(weights.find(NAME))
    layouts.fill(network, layouts.checkpoints(NAME), RULES, device, dtype, network._keep_in_fp32_modules)
    network.rope.to(device)
    return network
