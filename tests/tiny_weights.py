"""Checkpoints of small networks in the published layouts, one function for each network.

A function makes the network's weights folder and writes its files there. A network that is published in several layouts
gets one of them.
"""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from tasks.networks import qalign as ratings
from tasks.networks import umt5 as texts
from tasks.networks import wan_vae as codec
from tests.noise import xpose_state
from tests.parity import filled
from tests.tiny_syncnet import s3fd, syncnet

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from transformers import UMT5EncoderModel

Box = tuple[float, float, float, float]


# ---- RAFT and X-Pose, of their full size ----


def raft_state() -> dict[str, torch.Tensor]:
    """RAFT's weights by the fill rule."""
    from tasks.networks.raft import Raft

    state = filled(Raft().state_dict())
    for key in [key for key in state if ".norm3." in key]:
        state[key] = state[key.replace(".norm3.", ".downsample.1.")]  # one module under two names
    return state


def raft(folder: Path) -> None:
    """With the fill rule's weights, in Princeton's layout."""
    folder.mkdir(parents=True)
    torch.save(raft_state(), folder / "raft-things.pth")


def xpose(folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """state: the weights; random ones where None."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"module.{key}": value for key, value in (xpose_state() if state is None else state).items()}
    torch.save({"model": named}, folder / "unipose_swint.pth")


# ---- Whisper ----

WHISPER = {
    "vocab_size": 64,
    "num_mel_bins": 80,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 32,
    "d_model": 48,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def whisper(folder: Path) -> None:
    """With the fill rule's weights."""
    from transformers import WhisperConfig, WhisperModel

    model = WhisperModel(WhisperConfig(**WHISPER))
    model.load_state_dict(filled(model.state_dict()))
    model.save_pretrained(folder)


# ---- Q-Align ----

# A model with the published one's call. It scores bright images higher, and videos higher than images.
QALIGN_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel


class TinyConfig(PretrainedConfig):
    model_type = "tiny_align"

    def __init__(self, vocab_size=32, **more):
        self.vocab_size = vocab_size
        super().__init__(**more)


class TinyAlign(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.by_word = torch.nn.Parameter(torch.zeros(config.vocab_size))
        self.post_init()

    def forward(self, input_ids, images):
        films = isinstance(images, list)
        assert (input_ids == -200).sum(1).eq(1).all() and input_ids[0, 0] == 1 and (input_ids == 1).sum(1).eq(1).all()
        assert all(film.shape[1:] == (3, 448, 448) for film in images) if films else images.shape[1:] == (3, 448, 448)
        light = torch.stack([film.mean() for film in images]) + films
        return {"logits": (light[:, None] * self.by_word)[:, None].expand(-1, input_ids.shape[1], -1)}
"""
_QALIGN_WORDS = ["<unk>", "<s>", *ratings.LEVELS]
_QALIGN_WORDS += ["USER:", "How", "would", "you", "rate", "the", "quality", "of", "this", "?"]


def qalign(folder: Path) -> None:
    """With the code of the network in tiny_align.py."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(_QALIGN_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    auto = {"AutoConfig": "tiny_align.TinyConfig", "AutoModelForCausalLM": "tiny_align.TinyAlign"}
    config = {"model_type": "tiny_align", "architectures": ["TinyAlign"], "auto_map": auto, "vocab_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tiny_align.py").write_text(QALIGN_CODE)
    by_word = torch.zeros(32)
    by_word[2:7] = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    save_file({"by_word": by_word}, folder / "model.safetensors", {"format": "pt"})


# ---- InsightFace ----


def face_in(image: np.ndarray) -> Box:
    """The box of an image's face as SCRFD would give it, in the form that `insightface` takes.

    image: [height, width, 3] uint8 RGB.
    """
    from tasks.stages.identity.backends import MediaPipeFaces

    found, aspect = MediaPipeFaces(0.5).faces(image)[0], image.shape[0] / image.shape[1]
    top = found.y - 0.25 * found.height  # SCRFD's boxes include the hair
    return found.x, top * aspect, found.x + found.width, (found.y + found.height) * aspect


def insightface(folder: Path, face: Box = (0.4, 0.3, 0.6, 0.7)) -> None:
    """A pack of tiny networks. The detector finds one face at the same place in every image; the recogniser's embedding
    is a projection of the face's colours.

    face: x0, y0, x1, y1 in widths of the image.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def save(
        name: str, inputs: list[int | str], constants: dict[str, np.ndarray], nodes: list, outputs: list[str]
    ) -> None:
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, inputs)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in outputs],
            [numpy_helper.from_array(value.astype(np.float32), key) for key, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.save(model, folder / f"{name}.onnx")

    folder = folder / "models" / "buffalo_l"
    folder.mkdir(parents=True)
    constants, nodes, outputs = {}, [], []
    for kind, width in (("score", 1), ("box", 4), ("points", 10)):
        for stride in (8, 16, 32):
            value, cells = np.zeros(((160 // stride) ** 2 * 2, width)), 160 // stride
            if stride == 32:
                x0, y0, x1, y1 = (side * 160 / stride for side in face)
                column, row = int((x0 + x1) / 2), int((y0 + y1) / 2)
                sides = [column - x0, row - y0, x1 - column, y1 - row]
                value[(row * cells + column) * 2] = {"score": [0.9], "box": sides, "points": [0.1] * 10}[kind]
            constants[f"{kind}{stride}_"] = value
            # adds zero, made of the input, so that the graph has an input
            nodes.append(helper.make_node("Add", [f"{kind}{stride}_", "nothing"], [f"{kind}{stride}"]))
            outputs.append(f"{kind}{stride}")
    constants["zero"] = np.zeros(())
    nodes.insert(0, helper.make_node("ReduceMean", ["input"], ["mean"], keepdims=0))
    nodes.insert(1, helper.make_node("Mul", ["mean", "zero"], ["nothing"]))
    save("det_10g", [1, 3, 160, 160], constants, nodes, outputs)
    spread = np.random.default_rng(0).normal(size=(3 * 7 * 7, 512))
    nodes = [
        helper.make_node("AveragePool", ["input"], ["cells"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Flatten", ["cells"], ["flat"]),
        helper.make_node("MatMul", ["flat", "spread"], ["embedding"]),
    ]
    save("w600k_r50", ["batch", 3, 112, 112], {"spread": spread}, nodes, ["embedding"])


# ---- Wan's VAE and UMT5 ----

WAN_VAE = codec.PUBLISHED | {"base_dim": 8, "num_res_blocks": 1}
UMT5 = texts.PUBLISHED | {"vocab_size": 101, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_UMT5_WORDS = ["<pad>", "</s>", "<unk>", "a", "woman", "in", "red", "dress", "talks", "'", '"', "&"]


def wan_vae_network() -> "AutoencoderKLWan":
    """With few channels and the fill rule's weights."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    network = AutoencoderKLWan(**WAN_VAE)
    network.load_state_dict(filled(network.state_dict()))
    return network.eval().requires_grad_(False)


def wan_vae(folder: Path) -> None:
    """In diffusers' layout."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(wan_vae_network().state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan", **WAN_VAE}))


def umt5_network() -> "UMT5EncoderModel":
    """With the fill rule's weights."""
    from transformers import UMT5Config, UMT5EncoderModel

    network = UMT5EncoderModel(UMT5Config(**UMT5, num_decoder_layers=2))
    network.load_state_dict(filled(network.state_dict()))
    return network.eval().requires_grad_(False)


def umt5(folder: Path) -> None:
    """In transformers' layout, with the embedding under one of its two names, as transformers saves it."""
    state = {key: value for key, value in umt5_network().state_dict().items() if key != "encoder.embed_tokens.weight"}
    (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "text_encoder" / "model.safetensors")
    (folder / "text_encoder" / "config.json").write_text(json.dumps({"model_type": "umt5", **UMT5}))
    umt5_tokenizer(folder / "tokenizer" / "tokenizer.json")


def umt5_tokenizer(path: Path, end: bool = True) -> None:
    """A tokenizer of whole words. end: whether it ends texts with the end token, as UMT5's does."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(_UMT5_WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    if end:
        tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


# ---- Qwen2.5-Omni's Thinker ----


def qwen_omni(folder: Path) -> None:
    """It gives the same answers for every clip."""
    from tests.tasks.networks import tiny_omni

    tiny_omni.write(folder, (json.dumps(tiny_omni.ANALYSIS), json.dumps(tiny_omni.PLAN), tiny_omni.PHRASES))


# ---- YOLO and PaddleOCR. Their own libraries write them; where those are missing, the files are placeholders ----

_PADDLE_DETECTOR = """
Global: {model_name: PP-OCRv5_server_det}
PreProcess:
  transform_ops:
  - DecodeImage: {channel_first: false, img_mode: BGR}
  - DetLabelEncode: null
  - DetResizeForTest: {resize_long: 960}
  - NormalizeImage: {mean: [0.485, 0.456, 0.406], order: hwc, scale: 1./255., std: [0.229, 0.224, 0.225]}
  - ToCHWImage: null
  - KeepKeys: {keep_keys: [image, shape, polys, ignore_tags]}
PostProcess: {name: DBPostProcess, thresh: 0.3, box_thresh: 0.6, max_candidates: 1000, unclip_ratio: 1.5}
"""
_PADDLE_RECOGNISER = """
Global: {model_name: PP-OCRv5_server_rec}
PreProcess:
  transform_ops:
  - DecodeImage: {channel_first: false, img_mode: BGR}
  - MultiLabelEncode: {gtc_encode: NRTRLabelEncode}
  - RecResizeImg: {image_shape: [3, 48, 320]}
  - KeepKeys: {keep_keys: [image, label_ctc, label_gtc, length, valid_ratio]}
PostProcess: {name: CTCLabelDecode, character_dict: [a, b]}
"""


def yolo(folder: Path) -> None:
    """A YOLO11 pose network as ultralytics saves it: whole objects, in half precision."""
    network: Any = torch.nn.Conv2d(3, 4, 1)
    if find_spec("ultralytics") is not None:
        from ultralytics.nn.tasks import PoseModel

        network = PoseModel("yolo11n-pose.yaml", nc=1, verbose=False)
    network.yaml, network.names = {"yaml_file": "yolo11n-pose.yaml"}, {0: "person"}
    folder.mkdir(parents=True)
    torch.save({"model": network.half(), "ema": None}, folder / "yolo11n-pose.pt")


def paddleocr(folder: Path) -> None:
    """`paddle_networks` where Paddle is installed, else `paddle_files`."""
    paddle_files(folder)
    if find_spec("paddle") is not None:
        paddle_networks(folder)


def paddle_files(folder: Path) -> None:
    """The files of PaddleOCR's networks, empty except for inference.yml with their names."""
    for name, text in (("det", _PADDLE_DETECTOR), ("rec", _PADDLE_RECOGNISER)):
        (folder / name).mkdir(parents=True)
        (folder / name / "inference.yml").write_text(text)
        for file in ("inference.json", "inference.pdiparams"):
            (folder / name / file).touch()


def paddle_networks(folder: Path) -> None:
    """Replace the files of `paddle_files` by networks that take bright pixels for text: white for the letter a, red for
    the letter b."""
    import paddle
    from paddle.nn import functional

    class Detector(paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.bright = paddle.nn.Conv2D(3, 1, 1)
            self.bright.weight.set_value(np.full((1, 3, 1, 1), 4, np.float32))
            self.bright.bias.set_value(np.full(1, -12, np.float32))

        def forward(self, x: Any) -> Any:
            return functional.sigmoid(self.bright(x))

    class Recogniser(paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            # from blue, green, red to the scores of: no letter, a, b, space
            self.letters = paddle.nn.Conv2D(3, 4, 1)
            weight = np.array([[-5, -5, -5], [5, 5, 0], [-5, -5, 10], [0, 0, 0]], np.float32)
            self.letters.weight.set_value(weight.reshape(4, 3, 1, 1))
            self.letters.bias.set_value(np.array([0, 0, 0, -20], np.float32))

        def forward(self, x: Any) -> Any:
            columns = functional.avg_pool2d(self.letters(x), [48, 8], [48, 8])  # [lines, 4, 1, columns]
            return functional.softmax(columns.squeeze(2).transpose([0, 2, 1]), -1)

    for name, network, height in (("det", Detector(), None), ("rec", Recogniser(), 48)):
        for file in ("inference.json", "inference.pdiparams"):
            (folder / name / file).unlink()
        shape = paddle.static.InputSpec([None, 3, height, None], "float32", "x")
        network.eval()
        paddle.jit.save(paddle.jit.to_static(network, input_spec=[shape]), str(folder / name / "inference"))


# The functions by the catalogue's names of the networks.
WRITERS: dict[str, Callable[[Path], object]] = {
    "raft": raft,
    "xpose": xpose,
    "syncnet": syncnet,
    "s3fd": s3fd,
    "whisper": whisper,
    "qalign": qalign,
    "insightface": insightface,
    "yolo": yolo,
    "paddleocr": paddleocr,
    "wan-vae": wan_vae,
    "umt5": umt5,
    "qwen2.5-omni": qwen_omni,
}
