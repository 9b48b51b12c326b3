"""Qwen2.5-Omni's Thinker, a multimodal language model for images and audio (Xu et al., 2025).

The network runs through transformers. The checkpoint's Talker and vocoder, which synthesise speech, are not loaded. The
prompt is built here from the published tokenizer, image processor and audio feature extractor. The library's own
processor is left out, because it needs torchvision for videos, which are not used. The text of a message can never
become one of the model's special tokens.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.media.clip import SAMPLE_RATE
from tasks.networks import layouts
from tasks.networks.chat import MAX_TOKENS, Answer, Message
from tasks.networks.device import device
from tasks.weights import store as weights

_SYSTEM = "You are a helpful assistant."  # the published chat template's default system message
_HALF = float(np.finfo(np.float16).max)

# From the library's names of the Thinker's parts to the published ones.
_RULES = (
    (r"^model\.language_model\.", "thinker.model."),
    (r"^model\.(audio_tower|visual)\.", r"thinker.\1."),
    (r"^lm_head\.", "thinker.lm_head."),
)
_OTHERS = re.compile(r"^(talker|token2wav)\.")


class QwenOmni:
    """The model (Qwen2_5OmniThinkerForConditionalGeneration) with its tokenizer, image processor and audio feature
    extractor."""

    def __init__(self, network: Any, tokenizer: Any, image_processor: Any, audio_features: Any) -> None:
        self._network, self._tokenizer = network, tokenizer
        self._image_processor, self._audio_features = image_processor, audio_features
        self._start, self._end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        self._ends = {self._end, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}

    @torch.inference_mode()
    def __call__(self, messages: Sequence[Message], schema: Mapping[str, Any] | None = None) -> Answer:
        """Answer by greedy decoding. schema: not enforced; the prompt has to describe the answer."""
        from transformers import GenerationConfig

        ids, media = self._inputs(messages)
        # the checkpoint's own configuration samples, and would fill in every field that ours leaves open
        self._network.generation_config = GenerationConfig()
        greedy = GenerationConfig(
            do_sample=False, max_new_tokens=MAX_TOKENS, eos_token_id=sorted(self._ends), pad_token_id=self._end
        )
        generated = self._network.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy, **media
        )
        tokens = [int(token) for token in generated[0, ids.shape[1] :]]
        while tokens and tokens[-1] in self._ends:
            tokens.pop()
        return Answer(self._tokenizer.decode(tokens, skip_special_tokens=True), tuple(tokens))

    @torch.inference_mode()
    def embeddings(self, messages: Sequence[Message], answer: Answer) -> tuple[np.ndarray, np.ndarray]:
        """physavatar's e_con and e_tok (section 3.4, equation 5), the inputs of the model's own Talker.

        Each has a row for each token of the answer. e_con is the state of the last layer, after its norm, at that
        token. e_tok is the token's input embedding, which tells words of similar meaning apart.

        messages, answer: the chat, and the answer that the model gave to it.

        Returns: e_con and e_tok, [tokens, dim] float16 each.
        """
        ids, media = self._inputs(messages)
        answered = torch.tensor([answer.tokens], dtype=ids.dtype, device=ids.device)
        whole = torch.cat([ids, answered], dim=1)
        out = self._network.model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False, **media)
        continuous = out.last_hidden_state[0, ids.shape[1] :]
        tokenised = self._network.get_input_embeddings()(answered)[0]
        return _half(continuous), _half(tokenised)

    def _inputs(self, messages: Sequence[Message]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The model's inputs for a chat.

        Returns: the token ids up to the start of the answer, [1, tokens] int64; and the features of all images and
        audio, by the names of the network's arguments.
        """
        config, parameter = self._network.config, next(self._network.parameters())
        media = self._media(messages)
        grids = iter(media["image_grid_thw"].tolist() if "image_grid_thw" in media else ())
        lengths = iter(media["feature_attention_mask"].sum(-1).tolist() if "feature_attention_mask" in media else ())
        ids = [self._start, *self._ids(f"system\n{_SYSTEM}"), self._end, *self._ids("\n")]
        for message in messages:
            ids += [self._start, *self._ids(f"{message.role}\n")]
            for _ in message.images:
                time, height, width = next(grids)
                count = time * height * width // self._image_processor.merge_size**2
                ids += [config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id]
            if message.sound is not None:
                count = ((next(lengths) - 1) // 2 + 1 - 2) // 2 + 1  # after a convolution and a pool of stride 2 each
                ids += [config.audio_start_token_id, *[config.audio_token_id] * count, config.audio_end_token_id]
            ids += [*self._ids(message.text), self._end, *self._ids("\n")]
        ids += [self._start, *self._ids("assistant\n")]
        on_device = {
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)
            for name, value in media.items()
        }
        return torch.tensor([ids], device=parameter.device), on_device

    def _media(self, messages: Sequence[Message]) -> dict[str, torch.Tensor]:
        """The features of all images and audio of a chat."""
        images = [image for message in messages for image in message.images]
        sounds = [message.sound for message in messages if message.sound is not None]
        media: dict[str, torch.Tensor] = {}
        if images:
            media |= dict(self._image_processor(images, return_tensors="pt"))
        if sounds:
            # padded to the feature extractor's whole length and masked, as the published processor does
            features = self._audio_features(
                sounds, sampling_rate=SAMPLE_RATE, padding="max_length", return_attention_mask=True, return_tensors="pt"
            )
            media |= {
                "input_features": features["input_features"],
                "feature_attention_mask": features["attention_mask"],
            }
        return media

    def _ids(self, text: str) -> list[int]:
        """The token ids of plain text. A special token's name inside it is tokenized as ordinary letters."""
        return list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _half(rows: torch.Tensor) -> np.ndarray:
    return rows.float().clamp(-_HALF, _HALF).cpu().numpy().astype(np.float16)


def expected_shapes(folder: Path) -> weights.Shapes:
    """The keys and shapes that the checkpoint in `folder` should have: the Thinker's, and whatever its Talker and
    vocoder have."""
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
        raise weights.WrongWeights(f"{path} is not Qwen2.5-Omni's: it has no thinker_config")
    return Qwen2_5OmniThinkerConfig.from_dict(found["thinker_config"])


def load(dtype: torch.dtype = torch.bfloat16) -> QwenOmni:
    """Load the Thinker with its published weights.

    dtype: of the weights; bfloat16 as published, 18 GB. In float32 they take 36 GB.

    Raises MissingBackend, WrongWeights.
    """
    from transformers import AutoTokenizer, Qwen2_5OmniThinkerForConditionalGeneration, WhisperFeatureExtractor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder, where = weights.find("qwen2.5-omni"), device()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        audio_features = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
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
    network, report = loaded
    lacking = [*report["missing_keys"], *report["mismatched_keys"]]
    if lacking:
        raise weights.WrongWeights(f"{folder} lacks {len(lacking)} of the Thinker's tensors, such as {lacking[0]}")
    return QwenOmni(network.to(where).eval().requires_grad_(False), tokenizer, image_processor, audio_features)
