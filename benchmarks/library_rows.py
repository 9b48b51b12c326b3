"""Rows of `benchmarks.networks` for networks that a library defines: they measure how this project calls them."""

import os
from collections import deque
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.row import NotMeasured, Row, seconds, size_of
from tasks.networks.device import device
from tests import tiny_weights

_NUMBERS = ("running_", "num_batches_tracked")  # keys of a state dict that are no parameters


def wan_vae(decoding: bool) -> Row:
    """Frames as a stream. Reference: diffusers' own way, the whole clip at once."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    from tasks.networks import wan_vae

    vae = AutoencoderKLWan(**wan_vae.PUBLISHED).to(device()).eval().requires_grad_(False)
    side = 256 if device().type == "cuda" else 64
    video, latents = torch.rand(1, 3, 9, side, side) * 2 - 1, torch.randn(1, 16, 3, side // 8, side // 8)

    def own() -> None:
        if decoding:
            deque(wan_vae.decode(vae, latents.unbind(2)), 0)
        else:
            deque(wan_vae.encode(vae, (video[:, :, :1], *video[:, :, 1:].split(4, 2))), 0)

    with torch.inference_mode():
        reference = seconds(lambda: vae.decode(latents.to(device())) if decoding else vae.encode(video.to(device())))
    return Row(*size_of(vae), f"frames of {side}x{side}", seconds(own) / 9, reference / 9)


def umt5() -> Row:
    """Captions of 60 tokens by 2 of the 24 layers. Reference: captions padded to 512 tokens, as Wan's own code does.
    Keys and parameters are those of the whole network."""
    from transformers import UMT5Config, UMT5EncoderModel

    from tasks.networks import umt5

    with torch.device("meta"):
        whole = UMT5EncoderModel(UMT5Config(**umt5.PUBLISHED))
    network = UMT5EncoderModel(UMT5Config(**umt5.PUBLISHED | {"vocab_size": 1000, "num_layers": 2}))
    network.to(device(), torch.bfloat16 if device().type == "cuda" else torch.float32).eval().requires_grad_(False)
    ids = torch.randint(2, 1000, (2, 60))
    padded, mask = torch.zeros(2, 512, dtype=torch.long), torch.zeros(2, 512, dtype=torch.long)
    padded[:, :60], mask[:, :60] = ids, 1
    own = seconds(lambda: umt5.states(network, ids.tolist()), 1)
    with torch.inference_mode():
        reference = seconds(lambda: network(padded.to(device()), attention_mask=mask.to(device())), 1)
    return Row(*size_of(whole), "captions through 2 layers", own / 2, reference / 2)


def whisper() -> Row:
    """10 s of sound by 2 of the 32 layers of large-v3. Reference: the front end and the call of transformers. Keys and
    parameters are those of the whole encoder."""
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from tasks.networks.whisper import states

    large = {"num_mel_bins": 128, "d_model": 1280, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
    with torch.device("meta"):
        counts = size_of(WhisperEncoder(WhisperConfig(**large, encoder_layers=32)))
    encoder = WhisperEncoder(WhisperConfig(**large, encoder_layers=2)).to(device()).eval().requires_grad_(False)
    samples, front = torch.randn(160_000).numpy() * 0.1, WhisperFeatureExtractor(128)

    def plain() -> Tensor:
        heard = front(samples, sampling_rate=16_000, return_tensors="pt").input_features
        return encoder(heard.to(device())).last_hidden_state.cpu()

    own = seconds(lambda: states(encoder, samples), 1)
    with torch.inference_mode():
        reference = seconds(plain, 1)
    return Row(*counts, "windows of 30 s through 2 layers", own, reference)


def qalign() -> Row:
    """Only our part: images are prepared and given to a tiny model. Reference: CLIP's image processor in transformers,
    one image at a time."""
    import numpy as np
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from tasks.networks import qalign
    from tasks.weights import remote_code

    images = [*torch.randint(0, 256, (4, 480, 854, 3), dtype=torch.uint8).numpy()]
    side = {"height": qalign.SIDE, "width": qalign.SIDE}
    front = CLIPImageProcessorPil(size=side, crop_size=side)

    def prepared(image: np.ndarray) -> Tensor:
        square = Image.new("RGB", (854, 854), (122, 116, 104))
        square.paste(Image.fromarray(image), (0, 187))
        return front(square, return_tensors="pt").pixel_values[0]

    with TemporaryDirectory() as folder:
        tiny_weights.qalign(Path(folder) / "qalign")
        with patch.dict(os.environ, {"UNDERSTUDY_WEIGHTS": folder, "HF_MODULES_CACHE": f"{folder}/modules"}):
            model = qalign.load(remote_code.digest("qalign"))
    own = seconds(lambda: model.images(images, "quality"))
    with patch.object(qalign, "prepared", prepared):
        reference = seconds(lambda: [model.images([image], "quality") for image in images])
    return Row(*size_of(model._network), "pictures of 854x480, model aside", own / 4, reference / 4)


def wan_vace() -> Row:
    """Latents of 17 frames of 256x256 through 1 of the 30 blocks and 1 of the 15 VACE blocks. Reference: rotary
    positions multiplied as complex numbers of double precision, as the original does. Keys and parameters are those of
    the whole network."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor
    from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
    from torch.nn.functional import scaled_dot_product_attention

    from training.models.physavatar.wan_vace import PUBLISHED

    with torch.device("meta"):
        whole = WanVACETransformer3DModel(**PUBLISHED)
    network = WanVACETransformer3DModel(**PUBLISHED | {"num_layers": 1, "vace_layers": [0]})
    network.to(device()).eval().requires_grad_(False)
    noisy, control = torch.randn(1, 16, 5, 32, 32, device=device()), torch.randn(1, 96, 5, 32, 32, device=device())
    given = {
        "timestep": torch.tensor([500.0], device=device()),
        "encoder_hidden_states": torch.randn(1, 512, 4096, device=device()),
        "control_hidden_states": control,
        "return_dict": False,
    }

    def attend(
        self: Any, attn: Any, x: Tensor, text: Tensor | None = None, mask: None = None, rotary: Any = None
    ) -> Tensor:
        seen = x if text is None else text
        heads = [attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(seen)), attn.to_v(seen)]
        query, key, value = (part.unflatten(2, (attn.heads, -1)) for part in heads)
        if rotary is not None:
            turns = torch.complex(rotary[0][..., ::2].double(), rotary[1][..., 1::2].double())
            query, key = (
                torch.view_as_real(torch.view_as_complex(part.double().unflatten(-1, (-1, 2))) * turns)
                .flatten(3)
                .float()
                for part in (query, key)
            )
        found = scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)))
        return attn.to_out[0](found.transpose(1, 2).flatten(2))

    with torch.inference_mode():
        own = seconds(lambda: network(noisy, **given))
        with patch.object(WanAttnProcessor, "__call__", attend):
            reference = seconds(lambda: network(noisy, **given))
    return Row(*size_of(whole), "steps of 17 frames of 256x256 through 2 of 45 blocks", own, reference)


def yolo() -> Row:
    """YOLO11n for poses, images in one batch. Reference: one at a time, as ultralytics takes the frames of a video."""
    if find_spec("ultralytics") is None:
        raise NotMeasured("ultralytics is not installed (the extra `yolo`)")
    from tasks.networks import yolo

    images = [*torch.randint(0, 256, (8, 480, 854, 3), dtype=torch.uint8).numpy()]
    with TemporaryDirectory() as folder:
        tiny_weights.yolo(Path(folder) / "yolo")
        with patch.dict(os.environ, {"UNDERSTUDY_WEIGHTS": folder}):
            network = yolo.load(device())
            state = yolo.read(Path(folder) / "yolo" / "yolo11n-pose.pt").state
    own = seconds(lambda: network(images, 0.5))
    reference = seconds(lambda: [network([image], 0.5) for image in images])
    parameters = sum(value.numel() for key, value in state.items() if not key.rpartition(".")[2].startswith(_NUMBERS))
    return Row(len(state), parameters, "frames of 854x480", own / 8, reference / 8)


def paddleocr() -> Row:
    """Only our part, with a network of one convolution: an image is scaled by area, and its boxes are read. Reference:
    paddleocr from the whole image on, which scales by the four nearest pixels, so that small print breaks up."""
    if find_spec("paddleocr") is None or find_spec("paddle") is None:
        raise NotMeasured("paddleocr and paddlepaddle are not installed (the extra `ocr`)")
    os.environ.setdefault("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")
    from paddleocr import TextDetection

    from tasks.stages.subtitles import ocr

    image = torch.randint(0, 40, (480, 854, 3), dtype=torch.uint8).numpy()
    image[400:432, 200:600] = 255
    with TemporaryDirectory() as folder:
        tiny_weights.paddleocr(Path(folder) / "paddleocr")
        with patch.dict(os.environ, {"UNDERSTUDY_WEIGHTS": folder}):
            reader = ocr.PaddleOcr()
            detector, _ = ocr._paddle_folders()
            whole = TextDetection(
                model_name=ocr._paddle_name(detector),
                model_dir=str(detector),
                limit_type="max",
                limit_side_len=352,
                unclip_ratio=ocr._UNCLIP,
                engine="paddle_static",
                cpu_threads=1,
                enable_mkldnn=False,
            )
        bgr = ocr._bgr(image)
        own = seconds(lambda: reader.find(image, 192), 5)
        reference = seconds(lambda: whole.predict(bgr, batch_size=1), 5)
    return Row(0, 0, "pictures of 854x480, network aside", own, reference)


# The values of Qwen2.5-Omni-7B that differ from the library's defaults
_SIGHT = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
_HEARING = {"encoder_layers": 32, "output_dim": 3584}


def _thinker() -> tuple[int, int]:
    """Keys and parameters of the Thinker of the 7B model."""
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    config = Qwen2_5OmniThinkerConfig(vision_config=_SIGHT, audio_config=_HEARING, tie_word_embeddings=False)
    with torch.device("meta"):
        return size_of(Qwen2_5OmniThinkerForConditionalGeneration(config))


def qwen_omni() -> Row:
    """512 tokens of a question by 1 of the 28 layers of its language model, in the precision in which it is loaded. The
    operations are the library's own. Keys and parameters are those of the whole Thinker."""
    from transformers import Qwen2_5OmniThinkerConfig
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerTextModel

    config = Qwen2_5OmniThinkerConfig().text_config
    config.update({"num_hidden_layers": 1, "layer_types": ["full_attention"], "vocab_size": 1000})
    network = Qwen2_5OmniThinkerTextModel(config).to(device(), torch.bfloat16).eval().requires_grad_(False)
    ids = torch.randint(0, 1000, (1, 512), device=device())
    with torch.inference_mode():
        own = seconds(lambda: network(ids, use_cache=False), 1)
    return Row(*_thinker(), "tokens of a question through 1 of 28 layers", own / 512, None)


def qwen_question() -> Row:
    """Only our part: a question with 4 images and 10 s of sound is prepared. Reference: the published front ends of
    images and sound alone, in the model's precision, which are a part of that work."""
    import json

    import numpy as np

    from tasks.media.clip import SAMPLE_RATE
    from tasks.networks import qwen_omni
    from tasks.networks.chat import Message

    drawn = np.random.default_rng(0)
    images = tuple(drawn.integers(0, 256, (4, 448, 796, 3), np.uint8))  # as guidance shows them
    sound = drawn.normal(0, 0.1, 10 * SAMPLE_RATE).astype(np.float32)
    with TemporaryDirectory() as folder:
        tiny_weights.qwen_omni(Path(folder) / "qwen2.5-omni")
        path = Path(folder) / "qwen2.5-omni" / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_pixels": 12_845_056}))  # as published
        with patch.dict(os.environ, {"UNDERSTUDY_WEIGHTS": folder}):
            model = qwen_omni.load()
    turns = [Message("user", "What is said, and how? " * 40, images, sound)]
    heard = {"sampling_rate": SAMPLE_RATE, "padding": "max_length", "return_attention_mask": True}

    def plain() -> None:
        where = next(model._network.parameters())
        model._image_processor(images, return_tensors="pt").to(where.device, where.dtype)
        model._audio_features([sound], return_tensors="pt", **heard).to(where.device, where.dtype)

    own, reference = seconds(lambda: model._inputs(turns), 5), seconds(plain, 5)
    return Row(0, 0, "questions on 4 pictures and 10 s, model aside", own, reference)


def minicpm_o() -> Row:
    """Our code only hands it images, sound and text."""
    raise NotMeasured("its code comes with its weights")
