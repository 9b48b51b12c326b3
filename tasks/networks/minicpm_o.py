"""MiniCPM-o: a language model that looks and listens (Yao et al., 2024), by the code that comes with its weights.

That code (openbmb/MiniCPM-o-2_6) was written for transformers 4.44 and wants packages of its own. Only its `chat` is
called: turns of words, pictures and sound in, words out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tasks import remote_code, weights
from tasks.chat import MAX_TOKENS, Answer, Turn
from tasks.networks.device import device
from tasks.stage import MissingBackend

_ELSEWHERE = "a server that runs it, such as vLLM or llama.cpp, serves it to the backend `endpoint`"


class MiniCPM:
    """The model with its tokenizer."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self._network, self._tokenizer = network, tokenizer

    @torch.inference_mode()
    def __call__(self, turns: Sequence[Turn], schema: Mapping[str, Any] | None = None) -> Answer:
        """The answer of its beam search, without chance. schema: is not enforced; the question has to say it."""
        said = self._network.chat(
            msgs=[{"role": turn.role, "content": _content(turn)} for turn in turns],
            tokenizer=self._tokenizer,
            sampling=False,
            max_new_tokens=MAX_TOKENS,
            max_slice_nums=1,
            use_image_id=False,
        )
        if not isinstance(said, str):
            raise TypeError(f"MiniCPM-o's chat gives {type(said).__name__} for words")
        return Answer(said)


def _content(turn: Turn) -> list[Any]:
    from PIL import Image

    # the marks of its template, for pictures, sounds and turns, are words in angle brackets
    words = turn.text.replace("<", "(").replace(">", ")")
    sound = [] if turn.sound is None else [turn.sound]
    return [*(Image.fromarray(image) for image in turn.images), *sound, words]


def check_imports() -> None:
    """See that what its code imports is installed; nothing of it is run. Raises MissingBackend."""
    from transformers.dynamic_module_utils import check_imports as missing

    for path in sorted(weights.find("minicpm-o").glob("*.py")):
        try:
            missing(path)
        except ImportError as error:
            first = str(error).partition(". Run")[0]
            raise MissingBackend(f"MiniCPM-o's {path.name}: {first}; install them, or: {_ELSEWHERE}") from None


def load(trusted: str, dtype: torch.dtype = torch.bfloat16) -> MiniCPM:
    """The model with its published weights, without the part that speaks, run by the code beside them.

    trusted: the hash by which the recipe trusts that code (tasks.remote_code). dtype: as published, unless told
    otherwise. Raises MissingBackend, WrongWeights.
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
    except Exception as error:  # whatever the code beside the weights raises
        raise weights.WrongWeights(
            f"MiniCPM-o in {folder} cannot be loaded: {type(error).__name__}: {error}. Its code was written for "
            f"transformers 4.44; {_ELSEWHERE}"
        ) from error
    return MiniCPM(network.to(where).eval().requires_grad_(False), tokenizer)
