"""UMT5-XXL's encoder (Chung et al., "UniMax", ICLR 2023), the text encoder of Wan.

The network runs through transformers. Checkpoints in Wan's naming and in transformers' are read. The decoder is left
out, and so is the repair of wrongly decoded text (ftfy) that Wan's own code does.
"""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tasks.networks import layouts
from tasks.weights import store as weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import UMT5EncoderModel

NAME = "umt5"
MAX_TOKENS = 512  # of a text, as in Wan

_BATCH = 8  # texts at a time; with 512 tokens each they take half a gigabyte of attention scores
_END = "</s>"
_STRAIGHT = str.maketrans("‘’‚‛“”„‟", "''''\"\"\"\"")

PUBLISHED: dict[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}

# From the names in Wan's models_t5_umt5-xxl-enc-bf16.pth to those of transformers, which has two for the embedding.
RULES: layouts.Rules = (
    (r"^token_embedding\.", "shared."),
    (r"^encoder\.embed_tokens\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"blocks.\1.\2.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"blocks.\1.1.SelfAttention."),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
        r"blocks.\1.1.SelfAttention.relative_attention_bias.",
    ),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"blocks.\1.2.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"blocks.\1.2.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"blocks.\1.2.DenseReluDense.wo."),
    (r"^blocks\.(\d+)\.1\.", r"encoder.block.\1.layer.0."),
    (r"^blocks\.(\d+)\.2\.", r"encoder.block.\1.layer.1."),
)


def config(folder: Path) -> dict[str, Any]:
    """The encoder's configuration: that of the folder, or the published one where the folder has none."""
    return layouts.config(folder / "text_encoder" / "config.json", PUBLISHED)


def _empty(folder: Path) -> "UMT5EncoderModel":
    from transformers import UMT5Config, UMT5EncoderModel

    fields = config(folder)

    def build() -> UMT5EncoderModel:
        return UMT5EncoderModel(UMT5Config(**fields, num_decoder_layers=fields["num_layers"]))

    return layouts.empty(build, folder / "text_encoder" / "config.json")


def expected_shapes(folder: Path) -> weights.Shapes:
    """The keys and shapes that the checkpoint in `folder` should have, in its own one of the two namings."""
    return layouts.expected_shapes(_empty(folder), weights.shapes(*layouts.checkpoints(NAME, folder)), RULES)


def load(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> "UMT5EncoderModel":
    """Load the network with its published weights, in either naming.

    dtype: of the weights. Wan runs it in bfloat16, in which they take 11.4 GB.

    Raises MissingBackend, WrongWeights.
    """
    network = _empty(weights.find(NAME))
    layouts.load_into(network, layouts.checkpoints(NAME), RULES, device, dtype)
    network.encoder.embed_tokens.weight = network.shared.weight
    return network


def tokenizer() -> "Tokenizer":
    """Load the tokenizer in the weights folder. Raises MissingBackend, WrongWeights."""
    from tokenizers import Tokenizer

    (path,) = (path for path in weights.files(NAME) if path.name == "tokenizer.json")
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other kind
        raise weights.WrongWeights(f"{path} cannot be read as a tokenizer: {error}") from None
    end, size = found.token_to_id(_END), config(weights.find(NAME))["vocab_size"]
    if end is None or found.encode("").ids != [end] or found.get_vocab_size() > size:
        raise weights.WrongWeights(
            f"{path} is not UMT5's tokenizer, which ends texts with {_END} and has at most {size} tokens"
        )
    found.no_padding()
    return found


def cleaned(text: str) -> str:
    """Clean a text as Wan's own code does before the tokenizer: HTML entities resolved, straight quotes, single spaces.

    Wan's code also repairs wrongly decoded text (with ftfy). This does not.
    """
    text = html.unescape(html.unescape(text)).translate(_STRAIGHT)
    return re.sub(r"\s+", " ", text).strip()


def tokens(tokenizer: "Tokenizer", texts: Sequence[str], max_tokens: int = MAX_TOKENS) -> list[list[int]]:
    """The token ids of each text, ending with the end token. A longer text is cut to its first `max_tokens` - 1 tokens
    and the end token."""
    tokenizer.enable_truncation(max_tokens)
    return [encoding.ids for encoding in tokenizer.encode_batch([cleaned(text) for text in texts])]


@torch.inference_mode()
def states(network: "UMT5EncoderModel", ids: Sequence[Sequence[int]]) -> Tensor:
    """The encoder's last hidden states, computed for 8 texts at a time.

    ids: the token ids of each text.

    Returns: [texts, tokens of the longest, dim] float32 on the CPU, zeros beyond a text's end.
    """
    longest = max(map(len, ids), default=0)
    found = torch.zeros(len(ids), longest, network.config.d_model)
    for first in range(0, len(ids), _BATCH):
        batch = ids[first : first + _BATCH]
        lengths = torch.tensor([len(row) for row in batch])
        padded = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long)
        for row, text_ids in zip(padded, batch, strict=True):
            row[: len(text_ids)] = torch.tensor(text_ids)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        hidden = network(padded.to(network.device), attention_mask=mask.to(network.device).long()).last_hidden_state
        found[first : first + len(batch), : padded.shape[1]] = hidden.float().cpu() * mask[:, :, None]
    return found
