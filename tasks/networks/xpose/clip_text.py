"""CLIP ViT-B/32's text encoder, which embeds X-Pose's prompts (Radford et al., Learning Transferable Visual Models From
Natural Language Supervision, 2021).

It is a re-implementation of openai/CLIP for inference, with modules named as in X-Pose's checkpoint. The tokenizer is
left out, because the three prompts are fixed. The vision half has its weights, since they are in the checkpoint, and no
forward pass.
"""

import torch
from torch import Tensor, nn

_VOCABULARY, _LENGTH = 49408, 77
_LAYERS = 12
_START, _END = 49406, 49407
# Token ids of "a photo of" and of the class names, from CLIP's published byte pair vocabulary.
_PHRASE = (320, 1125, 539)
_WORDS = {"person": 2533, "face": 1710, "hand": 2463}


class _QuickGelu(nn.Module):
    """CLIP's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", _QuickGelu())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class _Transformer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width, heads) for _ in range(_LAYERS))


class _Vision(nn.Module):
    """CLIP's vision half, without a forward pass. X-Pose's checkpoint has its weights for prompts by images, whose code
    was never published."""

    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(768))
        self.positional_embedding = nn.Parameter(torch.zeros(50, 768))
        self.proj = nn.Parameter(torch.zeros(768, 512))
        self.conv1 = nn.Conv2d(3, 768, 32, 32, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(768), nn.LayerNorm(768)
        self.transformer = _Transformer(768, 12)


class ClipText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(_LENGTH, 512))
        self.text_projection = nn.Parameter(torch.zeros(512, 512))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.visual = _Vision()
        self.transformer = _Transformer(512, 8)
        self.token_embedding = nn.Embedding(_VOCABULARY, 512)
        self.ln_final = nn.LayerNorm(512)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed texts.

        ids: [texts, at most 77] int64, each text between the start and the end token. Tokens after the end token have
            no influence.

        Returns: [texts, 512], not normalised.
        """
        length = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        mask = torch.full((length, length), -torch.inf, device=x.device, dtype=x.dtype).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        end = ids.argmax(1)  # the end token has the highest id
        return self.ln_final(x)[torch.arange(len(ids), device=x.device), end] @ self.text_projection


def prompts(*words: str) -> Tensor:
    """The token ids of "a photo of <word>" for each word: [words, 6] int64. Raises KeyError for a word that is not a
    class of X-Pose here."""
    return torch.tensor([(_START, *_PHRASE, _WORDS[word], _END) for word in words])
