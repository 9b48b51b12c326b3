"""Texts to vectors, one a token: the interface of an encoder, one without weights, by hashing, and Wan's UMT5.

The interface is that of UMT5 in Wan: a batch of texts in, padded embeddings and their mask out.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property, lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import numpy as np

from tasks import weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import UMT5EncoderModel


class Embedded(NamedTuple):
    """embeddings: [batch, tokens, dim] float32, zeros beyond a text's end; mask: [batch, tokens] bool, True within."""

    embeddings: np.ndarray
    mask: np.ndarray


class TextEncoder(Protocol):
    """A text encoder. What stands beside a text in the batch does not change its embedding."""

    def __init__(self, dim: int, max_tokens: int) -> None:
        """Raises ValueError for numbers that the encoder does not have."""

    @staticmethod
    def version() -> str:
        """Library and weights, as far as they can change a number."""

    @staticmethod
    def check() -> None:
        """Raises tasks.stage.MissingBackend when the encoder cannot run."""

    def encode(self, texts: Sequence[str]) -> Embedded:
        """Embed texts, each cut off at `max_tokens`; every text has at least one token, the one that ends it."""


_END = "</s>"  # ends every text, as T5's token of that name; no word has its signs
_GRAMS = (3, 4)  # letters in a row that are features of a word
_BINS = 4  # numbers of the vector that a feature adds to
_MAX_WORD = 64  # letters of a word that count
# Words, or single signs in the scripts that write without spaces: Thai to Khmer, kana, Chinese characters.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


class HashedText:
    """Each word by signed hashing of itself and of its runs of 3 and 4 letters (Weinberger et al. 2009, "Feature
    Hashing for Large Scale Multitask Learning"), so that words that look alike are near each other.

    A feature adds +1 or -1 to 4 numbers that its hash names; a word's vector is scaled to a length of sqrt(dim), about
    unit variance a number. There is no meaning in it and no order: those are the model's to learn.
    """

    def __init__(self, dim: int, max_tokens: int) -> None:
        self.dim, self.max_tokens = dim, max_tokens

    @staticmethod
    def version() -> str:
        """Which Unicode the words are told apart by."""
        return f"unicode {unicodedata.unidata_version}"

    @staticmethod
    def check() -> None:
        """All in this module."""

    def encode(self, texts: Sequence[str]) -> Embedded:
        """As TextEncoder says. dim numbers a token; words in lower case without punctuation."""
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
    """[dim] float32 of length sqrt(dim)."""
    marked = f"<{word}>"
    grams = [marked[at : at + n] for n in _GRAMS for at in range(len(marked) - n + 1)]
    vector = np.zeros(dim)
    for feature in [f"={word}", *grams]:
        digest = hashlib.blake2b(feature.encode("utf-8", "surrogatepass"), digest_size=4 * _BINS).digest()
        for number in np.frombuffer(digest, "<u4"):
            vector[(number >> 1) % dim] += 1.0 if number & 1 else -1.0
    length = float(np.sqrt(np.square(vector).sum()))
    if not length:  # in few dimensions all may cancel
        vector[0], length = 1.0, 1.0
    vector *= np.sqrt(dim) / length
    return vector.astype(np.float32)


class Umt5Text:
    """UMT5-XXL's encoder with its published weights, in bfloat16, as Wan reads texts with it; its tokens are 512 at
    most."""

    networks: ClassVar = ("umt5",)

    def __init__(self, dim: int, max_tokens: int) -> None:
        from tasks.networks import umt5

        has = umt5.config(weights.find("umt5"))["d_model"]
        if dim != has:
            raise ValueError(f"{dim} numbers a token: UMT5 gives {has}; set dim: {has}")
        if max_tokens > umt5.MAX_TOKENS:
            raise ValueError(f"{max_tokens} tokens: UMT5 reads {umt5.MAX_TOKENS} as Wan has it; set max_tokens to that")
        self.dim, self.max_tokens = dim, max_tokens

    @staticmethod
    def version() -> str:
        """transformers, tokenizers, torch and the weights."""
        libraries = ", ".join(f"{name} {version(name)}" for name in ("transformers", "tokenizers", "torch"))
        return f"{libraries}, weights {weights.digest('umt5')}"

    @staticmethod
    def check() -> None:
        """Raises tasks.stage.MissingBackend where weights or tokenizer are missing or do not fit."""
        from tasks.networks import umt5

        weights.check("umt5")
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
        """As TextEncoder says."""
        from tasks.networks import umt5

        ids = umt5.tokens(self._tokenizer, texts, self.max_tokens)
        embeddings = umt5.states(self._network, ids).numpy()
        lengths = np.array([len(row) for row in ids], int)
        return Embedded(embeddings, np.arange(embeddings.shape[1]) < lengths[:, None])


ENCODERS: dict[str, type[TextEncoder]] = {"hashed": HashedText, "umt5": Umt5Text}
