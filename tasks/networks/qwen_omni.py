"""Qwen2.5-Omni's Thinker: a language model that looks and listens (Xu et al., 2025), through transformers.

Of the published checkpoint the Talker and its vocoder are left where they are. The prompt is put together here from
the published pieces, tokenizer, picture and sound front ends: the library's own processor wants torchvision, for the
films that are not used. Words inside a turn can never become the model's own marks.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks import weights
from tasks.chat import MAX_TOKENS, Answer, Turn
from tasks.clip import SAMPLE_RATE
from tasks.networks import layouts
from tasks.networks.device import device

_SYSTEM = "You are a helpful assistant."  # the published template's, where a talk has no other
_HALF = float(np.finfo(np.float16).max)

# the library's names of the Thinker's parts, and the published ones
_RULES = (
    (r"^model\.language_model\.", "thinker.model."),
    (r"^model\.(audio_tower|visual)\.", r"thinker.\1."),
    (r"^lm_head\.", "thinker.lm_head."),
)
_OTHERS = re.compile(r"^(talker|token2wav)\.")


class QwenOmni:
    """The model (Qwen2_5OmniThinkerForConditionalGeneration) with its tokenizer, and what it sees and hears with."""

    def __init__(self, network: Any, tokenizer: Any, sight: Any, hearing: Any) -> None:
        self._network, self._tokenizer, self._sight, self._hearing = network, tokenizer, sight, hearing
        self._start, self._end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        self._ends = {self._end, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}

    @torch.inference_mode()
    def __call__(self, turns: Sequence[Turn], schema: Mapping[str, Any] | None = None) -> Answer:
        """The most likely answer, word by word. schema: is not enforced; the question has to say it."""
        from transformers import GenerationConfig

        ids, seen = self._inputs(turns)
        # one of our own, or the checkpoint's would draw words by chance, and fill in what ours leaves open
        self._network.generation_config = GenerationConfig()
        how = GenerationConfig(
            do_sample=False, max_new_tokens=MAX_TOKENS, eos_token_id=sorted(self._ends), pad_token_id=self._end
        )
        made = self._network.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how, **seen)
        tokens = [int(token) for token in made[0, ids.shape[1] :]]
        while tokens and tokens[-1] in self._ends:
            tokens.pop()
        return Answer(self._tokenizer.decode(tokens, skip_special_tokens=True), tuple(tokens))

    @torch.inference_mode()
    def embeddings(self, turns: Sequence[Turn], answer: Answer) -> tuple[np.ndarray, np.ndarray]:
        """physavatar's e_con and e_tok (section 3.4, equation 5): what the model's own Talker hears its Thinker by.

        Both have a row for each token of the text that the model has written: the state of the last layer, after its
        norm, where that token stood; and the token's own input embedding, which tells words of like meaning apart.

        turns, answer: the talk, and the answer that it has given. Returns: [tokens, dim] float16, twice.
        """
        ids, seen = self._inputs(turns)
        said = torch.tensor([answer.tokens], dtype=ids.dtype, device=ids.device)
        whole = torch.cat([ids, said], dim=1)
        out = self._network.model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False, **seen)
        continuous = out.last_hidden_state[0, ids.shape[1] :]
        tokenised = self._network.get_input_embeddings()(said)[0]
        return _half(continuous), _half(tokenised)

    def _inputs(self, turns: Sequence[Turn]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The talk as ids, [1, tokens] int64, up to where the model goes on; and what stands for pictures and sound."""
        config, parameter = self._network.config, next(self._network.parameters())
        images = [image for turn in turns for image in turn.images]
        sounds = [turn.sound for turn in turns if turn.sound is not None]
        seen: dict[str, torch.Tensor] = {}
        if images:
            seen |= dict(self._sight(images, return_tensors="pt"))
        if sounds:
            # padded to the front end's whole length and masked, as the published processor does
            heard = self._hearing(
                sounds, sampling_rate=SAMPLE_RATE, padding="max_length", return_attention_mask=True, return_tensors="pt"
            )
            seen |= {"input_features": heard["input_features"], "feature_attention_mask": heard["attention_mask"]}
        grids = iter(seen["image_grid_thw"].tolist() if images else ())
        lengths = iter(seen["feature_attention_mask"].sum(-1).tolist() if sounds else ())
        ids = [self._start, *self._words(f"system\n{_SYSTEM}"), self._end, *self._words("\n")]
        for turn in turns:
            ids += [self._start, *self._words(f"{turn.role}\n")]
            for _ in turn.images:
                time, height, width = next(grids)
                count = time * height * width // self._sight.merge_size**2
                ids += [config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id]
            if turn.sound is not None:
                count = ((next(lengths) - 1) // 2 + 1 - 2) // 2 + 1  # after the convolution and the pooling, by 2 each
                ids += [config.audio_start_token_id, *[config.audio_token_id] * count, config.audio_end_token_id]
            ids += [*self._words(turn.text), self._end, *self._words("\n")]
        ids += [self._start, *self._words("assistant\n")]
        placed = {
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)
            for name, value in seen.items()
        }
        return torch.tensor([ids], device=parameter.device), placed

    def _words(self, text: str) -> list[int]:
        """The ids of plain text: a mark inside it stays the letters that it is written with."""
        return list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _half(rows: torch.Tensor) -> np.ndarray:
    return rows.float().clamp(-_HALF, _HALF).cpu().numpy().astype(np.float16)


def takes(folder: Path) -> weights.Shapes:
    """The keys and shapes of the checkpoint in `folder`: those of its Thinker, and whatever Talker and vocoder have."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    config = _config(folder)
    network = layouts.empty(lambda: Qwen2_5OmniThinkerForConditionalGeneration(config), folder / "config.json")
    own = {layouts.renamed(key, _RULES): tuple(value.shape) for key, value in network.state_dict().items()}
    has = weights.shapes(*(path for path in weights.files("qwen2.5-omni", folder) if path.suffix == ".safetensors"))
    return own | {key: shape for key, shape in has.items() if _OTHERS.match(key)}


def _config(folder: Path) -> Any:
    from transformers import Qwen2_5OmniThinkerConfig

    path = folder / "config.json"
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or not isinstance(found.get("thinker_config"), dict):
        raise weights.WrongWeights(f"{path} has no thinker_config, so it is not Qwen2.5-Omni's")
    return Qwen2_5OmniThinkerConfig.from_dict(found["thinker_config"])


def load(dtype: torch.dtype = torch.bfloat16) -> QwenOmni:
    """The Thinker with its published weights. dtype: as published, unless told otherwise: in float32 they are 36 GB.

    Raises MissingBackend, WrongWeights.
    """
    from transformers import AutoTokenizer, Qwen2_5OmniThinkerForConditionalGeneration, WhisperFeatureExtractor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder, where = weights.find("qwen2.5-omni"), device()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        sight = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        hearing = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
        loaded: Any = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
            folder,
            config=_config(folder),
            local_files_only=True,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise weights.WrongWeights(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from None
    network, told = loaded
    left = [*told["missing_keys"], *told["mismatched_keys"]]
    if left:
        raise weights.WrongWeights(f"{folder} lacks {len(left)} of the Thinker's tensors, such as {left[0]}")
    return QwenOmni(network.to(where).eval().requires_grad_(False), tokenizer, sight, hearing)
