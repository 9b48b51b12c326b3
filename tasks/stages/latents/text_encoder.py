"""Text encoders, from texts to one embedding a token: feature hashing without weights, and Wan's UMT5.

The interface is that of UMT5 in Wan: a batch of texts in, padded embeddings and their attention mask out.
"""

import hashlib
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from tasks.stages.backend import Backend, Resources
from tasks.weights import store as weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import UMT5EncoderModel


class Embedded(NamedTuple):
    """The embeddings of a batch of texts."""

    embeddings: np.ndarray
    """[batch, tokens, dim] float32, zeros beyond a text's end."""
    mask: np.ndarray
    """[batch, tokens] bool, True for the tokens of a text."""


class TextEncoder(Backend, ABC):
    """A text encoder. A text's embedding does not depend on the other texts of the batch."""

    @abstractmethod
    def __init__(self, dim: int, max_tokens: int) -> None:
        """dim: numbers of a token's embedding. max_tokens: tokens of a text, at most.

        Raises ValueError for numbers that the encoder cannot have.
        """

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Embedded:
        """Embed texts. Each is cut to `max_tokens` tokens, the last of which is the end token. An empty text has the
        end token alone.
        """


_END = "</s>"  # the end token, named as T5's; no word contains its characters
_GRAMS = (3, 4)  # lengths of the character n-grams that are features of a word
_BINS = 4  # numbers of the vector that a feature adds to
_MAX_WORD = 64  # characters of a word that count
# A token is a word, or a single character of a script without spaces: Thai to Khmer, kana, Chinese characters.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


class HashedText(TextEncoder):
    """Feature hashing with signs (Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask Learning").

    The features of a word are the word itself and its character n-grams of length 3 and 4, so words of similar spelling
    have similar embeddings. A feature adds +1 or -1 to 4 numbers that its hash chooses. The embedding is scaled to the
    length sqrt(dim), which is about unit variance for each number. It holds neither meaning nor word order: the model
    that reads it has to learn them.
    """

    resources: ClassVar[Resources] = Resources(memory_gb=0.1)

    def __init__(self, dim: int, max_tokens: int) -> None:
        self.dim, self.max_tokens = dim, max_tokens

    @classmethod
    def version(cls) -> str:
        """The version of Unicode by which words are split."""
        return f"unicode {unicodedata.unidata_version}"

    def encode(self, texts: Sequence[str]) -> Embedded:
        """Embed texts. Tokens are their words in lower case, without punctuation."""
        tokens = [self._tokens(text) for text in texts]
        longest = max(map(len, tokens), default=0)
        embeddings = np.zeros((len(texts), longest, self.dim), np.float32)
        mask = np.zeros((len(texts), longest), bool)
        for row, words in enumerate(tokens):
            for column, word in enumerate(words):
                embeddings[row, column] = _vector(word, self.dim)
                mask[row, column] = True
        return Embedded(embeddings, mask)

    def _tokens(self, text: str) -> list[str]:
        words: list[str] = []
        for match in _TOKEN.finditer(unicodedata.normalize("NFKC", text).casefold()):
            if len(words) == self.max_tokens - 1:
                break
            words.append(match.group()[:_MAX_WORD])
        return [*words, _END]


@lru_cache(maxsize=4096)
def _vector(word: str, dim: int) -> np.ndarray:
    """A word's embedding: [dim] float32 of length sqrt(dim)."""
    marked = f"<{word}>"
    grams = [marked[at : at + n] for n in _GRAMS for at in range(len(marked) - n + 1)]
    vector = np.zeros(dim)
    for feature in [f"={word}", *grams]:
        digest = hashlib.blake2b(feature.encode("utf-8", "surrogatepass"), digest_size=4 * _BINS).digest()
        for number in np.frombuffer(digest, "<u4"):
            vector[(number >> 1) % dim] += 1.0 if number & 1 else -1.0
    length = float(np.sqrt(np.square(vector).sum()))
    if not length:  # with few dimensions all features may cancel
        vector[0], length = 1.0, 1.0
    vector *= np.sqrt(dim) / length
    return vector.astype(np.float32)


class Umt5Text(TextEncoder):
    """UMT5-XXL's encoder with its published weights, in bfloat16, as Wan runs it. A text has at most 512 tokens."""

    networks: ClassVar = ("umt5",)
    resources: ClassVar[Resources] = Resources(gpu=0.5, memory_gb=12.4)
    """Memory by the size of its weights, not measured: 11.4 GB in bfloat16, in which it computes (half of the
    catalogue's 22.7 GB, which are in float32), and an allowance of 1 GB for libraries and activations."""

    def __init__(self, dim: int, max_tokens: int) -> None:
        from tasks.networks import umt5

        has = umt5.config(weights.find("umt5"))["d_model"]
        if dim != has:
            raise ValueError(f"dim is {dim}, and UMT5 gives {has} numbers a token; set dim: {has}")
        if max_tokens > umt5.MAX_TOKENS:
            raise ValueError(
                f"max_tokens is {max_tokens}, and Wan's UMT5 reads {umt5.MAX_TOKENS} at most; set max_tokens: "
                f"{umt5.MAX_TOKENS}"
            )
        self.dim, self.max_tokens = dim, max_tokens

    @classmethod
    def version(cls) -> str:
        libraries = ", ".join(f"{name} {version(name)}" for name in ("transformers", "tokenizers", "torch"))
        return f"{libraries}, weights {weights.digest('umt5')}"

    @classmethod
    def check(cls, settings: Any) -> None:
        """Raises MissingBackend where weights or tokenizer are missing or do not fit."""
        from tasks.networks import umt5

        super().check(settings)
        umt5.tokenizer()

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from tasks.networks import umt5

        return umt5.tokenizer()

    @cached_property
    def _network(self) -> "UMT5EncoderModel":
        from tasks.networks import umt5
        from tasks.networks.device import device

        return umt5.load(device())

    def encode(self, texts: Sequence[str]) -> Embedded:
        from tasks.networks import umt5

        ids = umt5.tokens(self._tokenizer, texts, self.max_tokens)
        embeddings = umt5.states(self._network, ids).numpy()
        lengths = np.array([len(row) for row in ids], int)
        return Embedded(embeddings, np.arange(embeddings.shape[1]) < lengths[:, None])


ENCODERS: dict[str, type[TextEncoder]] = {"hashed": HashedText, "umt5": Umt5Text}
