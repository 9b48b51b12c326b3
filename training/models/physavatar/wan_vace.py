"""Wan2.1-VACE-1.3B as published, through diffusers.

A video diffusion transformer of 30 blocks. 15 more blocks read a control video and add their output to every second of
the 30 (Jiang et al. 2025, "VACE: All-in-One Video Creation and Editing").

Inputs: noisy latents [batch, 16, frames, height, width] of even height and width; a control video [batch, 96, frames,
height, width] (training.models.physavatar.vace_conditioning); a text embedding [batch, 512, 4096], zeros beyond the
text's end, which are not masked; timesteps [batch], 0 to 1000. Output: the velocity noise - data, shaped as the
latents.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tasks.networks import layouts
from tasks.weights import store as weights

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel

NAME = "wan-vace"

# Every field is given, because diffusers' defaults are those of the 14B model.
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
# The same fields by their names in the original config.json.
_ORIGINAL = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "vace_in_dim": "vace_in_channels",
}

# From the original checkpoint's names to those of diffusers.
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
    (r"\.norm3\.", ".norm2."),  # the norm before cross attention, which diffusers numbers 2
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
    width = config.pop("dim")  # the original config gives the width, and no width of a head

    def build() -> WanVACETransformer3DModel:
        heads = {} if width is None else {"attention_head_dim": width // config["num_attention_heads"]}
        return WanVACETransformer3DModel(**config | heads)

    network = layouts.empty(build, path)
    fields = (network.config[name] for name in ("attention_head_dim", "patch_size", "rope_max_seq_len"))
    network.rope = WanRotaryPosEmbed(*fields)  # its numbers are in no checkpoint
    return network


def expected_shapes(folder: Path) -> weights.Shapes:
    """The keys and shapes of the checkpoint in `folder`, by the original's names or those of diffusers."""
    return layouts.expected_shapes(_empty(folder), weights.shapes(*layouts.checkpoints(NAME, folder)), RULES)


def load(device: torch.device, dtype: torch.dtype = torch.float32) -> "WanVACETransformer3DModel":
    """The network with its published weights, in eval mode and without gradients.

    The checkpoint may have the original's names or those of diffusers. Modules that lose accuracy by rounding stay in
    float32: rotary positions, the timestep embedding and its tables, norms.

    Raises MissingBackend, WrongWeights.
    """
    network = _empty(weights.find(NAME))
    layouts.load_into(network, layouts.checkpoints(NAME), RULES, device, dtype, network._keep_in_fp32_modules)
    network.rope.to(device)
    return network
