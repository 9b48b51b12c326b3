"""MiniCPM-o 2.6, a multimodal language model for images and audio (Yao et al., 2024).

It runs by the code that is published with its weights (openbmb/MiniCPM-o-2_6). That code was written for transformers
4.44 and needs packages of its own. Only its `chat` is called: messages of text, images and audio in, text out. The part
that synthesises speech is left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tasks.networks.chat import MAX_TOKENS, Answer, Message
from tasks.networks.device import device
from tasks.weights import remote_code
from tasks.weights import store as weights
from tasks.weights.missing import MissingBackend

_ELSEWHERE = "run it behind a server such as vLLM or llama.cpp, and use the backend `endpoint`"


class MiniCPM:
    """The model with its tokenizer."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self._network, self._tokenizer = network, tokenizer

    @torch.inference_mode()
    def __call__(self, messages: Sequence[Message], schema: Mapping[str, Any] | None = None) -> Answer:
        """Answer by beam search, without sampling. schema: not enforced; the prompt has to describe the answer."""
        text = self._network.chat(
            msgs=[{"role": message.role, "content": _content(message)} for message in messages],
            tokenizer=self._tokenizer,
            sampling=False,
            max_new_tokens=MAX_TOKENS,
            max_slice_nums=1,
            use_image_id=False,
        )
        if not isinstance(text, str):
            raise TypeError(f"MiniCPM-o's chat returned {type(text).__name__} instead of text")
        return Answer(text)


def _content(message: Message) -> list[Any]:
    from PIL import Image

    # the template's special tokens for images, audio and roles are words in angle brackets
    text = message.text.replace("<", "(").replace(">", ")")
    sound = [] if message.sound is None else [message.sound]
    return [*(Image.fromarray(image) for image in message.images), *sound, text]


def check_imports() -> None:
    """Check, without running the model's code, that the packages it imports are installed. Raises MissingBackend."""
    from transformers.dynamic_module_utils import check_imports as missing

    for path in sorted(weights.find("minicpm-o").glob("*.py")):
        try:
            missing(path)
        except ImportError as error:
            first = str(error).partition(". Run")[0]
            raise MissingBackend(f"MiniCPM-o's {path.name}: {first}; install them, or {_ELSEWHERE}") from None


def load(trusted: str, dtype: torch.dtype = torch.bfloat16) -> MiniCPM:
    """Load the model with its published weights, through the code beside them, without its speech synthesis.

    trusted: the hash of that code, by which the recipe trusts it (tasks.weights.remote_code).
    dtype: of the weights; bfloat16 as published.

    Raises MissingBackend, WrongWeights.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    remote_code.check("minicpm-o", "guidance.remote_code", trusted)
    folder, where = weights.find("minicpm-o"), device()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
        config.init_tts = False
        network = AutoModel.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=True, use_safetensors=True, dtype=dtype
        )
    except Exception as error:  # the code beside the weights may raise anything
        raise weights.WrongWeights(
            f"MiniCPM-o in {folder} cannot be loaded: {type(error).__name__}: {error}. Its code was written for "
            f"transformers 4.44. You may also {_ELSEWHERE}"
        ) from error
    return MiniCPM(network.to(where).eval().requires_grad_(False), tokenizer)
