"""A Qwen2.5-Omni of a few thousand parameters, with the files and key names of the published one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2_5OmniThinkerForConditionalGeneration

DIM = 32
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_bos|>", "<|vision_eos|>", "<|IMAGE|>", "<|VIDEO|>"]
MARKS += ["<|audio_bos|>", "<|audio_eos|>", "<|AUDIO|>"]
QUESTIONS = ("You analyse", "You plan", "You direct")  # the first words of the three prompts
# A good answer to each prompt.
ANALYSIS = {
    "language": "English",
    "transcription": "hello there",
    "type": "speech",
    "emotion": "Calm and friendly.",
    "intention": "To greet somebody.",
    "segments": [{"content": "A greeting.", "intention": "To begin."}],
}
PLAN = {"shots": [{"expression": "Smiles at the camera.", "action": "Nods once."}]}
PHRASES = (
    "[AUDIO]: warm tone; steady pace; soft volume\n",
    "[IMAGE]: young woman; dark suit; plain wall\n[VIDEO]: gaze forward; gentle nods; calm smile",
)

_ASKED, _DONE, _HALFWAY = 0, 4, 5  # dimensions of a hidden state: the prompt, and what was generated last


def tokenizer(words: list[str]) -> "PreTrainedTokenizerFast":
    """A tokenizer of bytes, with each of `words` as one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(MARKS)
    built.add_tokens([AddedToken(word, normalized=False) for word in words])
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def config(ids: Mapping[str, int], vocabulary: int) -> dict[str, Any]:
    """A config.json in the published form. ids: of the special tokens. vocabulary: number of tokens."""
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "thinker_config": {
            "model_type": "qwen2_5_omni_thinker",
            "audio_config": {
                "d_model": DIM,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 64,
                "output_dim": DIM,
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": DIM,
                "num_heads": 4,
                "intermediate_size": 64,
                "out_hidden_size": DIM,
                "fullatt_block_indexes": [1],
            },
            "text_config": {
                "hidden_size": DIM,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": vocabulary,
                "rope_scaling": {"mrope_section": [2, 1, 1], "rope_type": "default", "type": "default"},
                "tie_word_embeddings": False,
            },
            "audio_token_index": ids["<|AUDIO|>"],
            "image_token_index": ids["<|IMAGE|>"],
            "video_token_index": ids["<|VIDEO|>"],
            "audio_start_token_id": ids["<|audio_bos|>"],
            "audio_end_token_id": ids["<|audio_eos|>"],
            "vision_start_token_id": ids["<|vision_bos|>"],
            "vision_end_token_id": ids["<|vision_eos|>"],
        },
        "talker_config": {"model_type": "qwen2_5_omni_talker"},
        "token2wav_config": {"model_type": "qwen2_5_omni_token2wav"},
    }


def write(folder: Path, answers: tuple[str, str, tuple[str, str]] | None = None) -> None:
    """Write the model into `folder`.

    answers: to each of the QUESTIONS, the last in two pieces. With None the weights are random.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = [*QUESTIONS, answers[0], answers[1], *answers[2]] if answers else []
    tokens = tokenizer(words)
    tokens.save_pretrained(folder)
    ids = {word: tokens.convert_tokens_to_ids(word) for word in [*MARKS, *words, "Ċ"]}  # the last is the line break
    configuration = config(ids, len(tokens))
    (folder / "config.json").write_text(json.dumps(configuration))
    preprocessing = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 128,
        "chunk_length": 30,
        "nb_max_frames": 3000,
        "n_samples": 480_000,
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 3136,
        "max_pixels": 28 * 28 * 16,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    torch.manual_seed(0)
    network = Qwen2_5OmniThinkerForConditionalGeneration(
        Qwen2_5OmniThinkerConfig.from_dict(configuration["thinker_config"])
    )
    if answers:
        _teach(network, ids, answers)
    names = (("model.language_model.", "thinker.model."), ("model.", "thinker."), ("lm_head.", "thinker.lm_head."))
    state = {}
    for key, value in network.state_dict().items():
        old, new = next(pair for pair in names if key.startswith(pair[0]))
        state[new + key.removeprefix(old)] = value.contiguous()
    first, second = list(state)[::2], list(state)[1::2]
    save_file({key: state[key] for key in first}, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    rest = {key: state[key] for key in second} | {"talker.thinker_to_talker_proj.weight": torch.zeros(2, 2)}
    rest["token2wav.code2wav_dit_model.proj_out.weight"] = torch.zeros(2, 2)
    save_file(rest, folder / "model-00002-of-00002.safetensors", {"format": "pt"})
    index = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    index |= dict.fromkeys(rest, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@torch.no_grad()
def _teach(
    network: "Qwen2_5OmniThinkerForConditionalGeneration",
    ids: Mapping[str, int],
    answers: tuple[str, str, tuple[str, str]],
) -> None:
    """Set the weights by hand. The first layer attends to all tokens for the prompt's first words, and the head maps
    them to the answer."""
    text = network.model.language_model
    words, head = text.embed_tokens.weight, network.lm_head.weight
    words.zero_()
    head.zero_()
    words[:, 8:] = 0.01  # so that no state is zero
    for layer in text.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            part.weight.zero_()
            part.bias.zero_()
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    for part in (network.model.visual.merger.mlp[2], network.model.audio_tower.proj):
        part.weight.zero_()  # images and audio have no effect
        part.bias.zero_()
    look = text.layers[0].self_attn
    for number, (question, answer) in enumerate(zip(QUESTIONS, (*answers[:2], answers[2][0]), strict=True)):
        words[ids[question], _ASKED + number] = 1.0
        look.v_proj.weight[number, _ASKED + number] = 1.0
        look.o_proj.weight[_ASKED + number, number] = 1000.0
        head[ids[answer], _ASKED + number] = 1.0
    for said in (*answers[:2], answers[2][1]):
        words[ids[said], _DONE] = 1e5
    words[ids[answers[2][0]], _HALFWAY] = 1e5
    head[ids["<|im_end|>"], _DONE] = head[ids[answers[2][1]], _HALFWAY] = 1.0
