"""Ultralytics' YOLO: people in images and, with a pose network, their joints.

A published checkpoint is a pickle of whole objects. Ultralytics itself loads it by running what the pickle asks for.
Here nothing of it is run: tensors are read, every other object becomes one without code, and the tensors fill the
installed package's own definition of the architecture. Pre- and postprocessing are those of the package. Tracking,
masks and training are left out.
"""

import os
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from tasks.weights import store as weights
from tasks.weights.missing import MissingBackend
from tasks.weights.store import WrongWeights

if TYPE_CHECKING:
    from ultralytics.nn.tasks import DetectionModel

JOINTS = 17  # COCO's: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; of each pair the left one first

_SIDE = 640  # pixels of an image's longer side, as the networks were trained
_MAX_IOU = 0.7  # of non-maximum suppression, ultralytics' default
# Images at a time. Each takes some 100 MB through the largest network. On a CPU, more than two outgrow its caches.
_BATCH, _BATCH_ON_CPU = 8, 2
_INSTEAD = "install it with `pip install 'understudy[yolo]'`; people's backend `mediapipe` needs no ultralytics"
# The objects that published checkpoints hold besides tensors. `getattr` names a method of the last layer.
_HELD = re.compile(r"(ultralytics|torch\.nn|numpy|pathlib)\..+|builtins\.getattr")
_ARCHITECTURE = re.compile(r"yolov?\d+[a-z](-p[26])?(-pose)?(-p[26])?")  # detection and pose networks alone


class DetectedPeople(NamedTuple):
    """The people in one image, the largest box first."""

    boxes: np.ndarray
    """[people, 5] float32: x0, y0, x1, y1 in the image's pixels, and the score, 0 to 1."""
    joints: np.ndarray | None
    """[people, 17, 3] float32: x, y in pixels, and the confidence, 0 to 1. None from a network without joints."""


class Checkpoint(NamedTuple):
    """The content of a checkpoint."""

    architecture: str
    """Ultralytics' name of the architecture, such as "yolo11n-pose"."""
    names: list[str]
    """The names of the classes."""
    state: dict[str, torch.Tensor]
    """The state dict."""


class _Inert:
    """Stands for every object of a pickle. It keeps the object's attributes and has no code that a pickle could run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def read(path: Path) -> Checkpoint:
    """Read a checkpoint without running anything of it. Raises WrongWeights where it asks for other objects than a
    published checkpoint does."""
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # torch raises several classes of errors
        raise WrongWeights(f"{path} cannot be read as a checkpoint: {error}") from None
    foreign = [name for name in asked if not _HELD.fullmatch(name)]
    if foreign:
        raise WrongWeights(
            f"{path} asks for {', '.join(sorted(foreign))}, which no checkpoint of ultralytics holds. Nothing of it "
            "was run; download the published file again"
        )
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in asked]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WrongWeights(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from None
    model = (content.get("ema") or content.get("model")) if isinstance(content, dict) else None
    attributes = vars(model) if isinstance(model, _Inert) else {}
    names, definition = attributes.get("names"), attributes.get("yaml")
    if not isinstance(definition, dict) or not isinstance(names, dict) or set(names) != set(range(len(names))):
        raise WrongWeights(f"{path} holds no network of ultralytics with its architecture and its classes")
    architecture = PurePosixPath(str(definition.get("yaml_file")).replace("\\", "/")).stem
    return Checkpoint(
        architecture, [str(names[number]) for number in range(len(names))], dict(_state_dict(model, "", set()))
    )


def _state_dict(module: Any, prefix: str, visited: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict of a module that was read as an inert object. A module under two names is read once."""
    if not isinstance(module, _Inert) or id(module) in visited:
        return
    visited.add(id(module))
    attributes = vars(module)
    not_saved = attributes.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, value in dict(attributes.get(kind) or {}).items():
            if isinstance(value, torch.Tensor) and name not in not_saved:
                yield f"{prefix}{name}", value.detach()
    for name, child in dict(attributes.get("_modules") or {}).items():
        yield from _state_dict(child, f"{prefix}{name}.", visited)


class Yolo:
    """A network of ultralytics with the weights of a checkpoint."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """path: the checkpoint. Raises WrongWeights, and MissingBackend where ultralytics is not installed."""
        checkpoint = read(path)
        people = [number for number, name in enumerate(checkpoint.names) if name.lower() == "person"]
        if not people:
            raise WrongWeights(
                f"{path} cannot detect people: it has no class 'person' among its {len(checkpoint.names)}"
            )
        network = _definition(checkpoint, path)
        weights.load_into(network, checkpoint.state, path)
        self._network = network.fuse(verbose=False).to(device, dtype).eval().requires_grad_(False)
        self._num_classes, self._person = len(checkpoint.names), people[0]
        self._device, self._dtype = device, dtype
        self._batch = _BATCH_ON_CPU if device.type == "cpu" else _BATCH

    @torch.inference_mode()
    def __call__(self, images: list[np.ndarray], least: float) -> list[DetectedPeople]:
        """Detect the people in images of one size.

        images: [height, width, 3] uint8 RGB each, any number of them.
        least: the lowest score of a person, 0 to 1.
        """
        batches = (images[first : first + self._batch] for first in range(0, len(images), self._batch))
        return [seen for batch in batches for seen in self._detected(batch, least)]

    def _detected(self, images: list[np.ndarray], least: float) -> Iterator[DetectedPeople]:
        from ultralytics.data.augment import LetterBox
        from ultralytics.utils import nms, ops

        scaled = LetterBox(_SIDE, auto=True, stride=int(self._network.stride.max()))
        batch = torch.from_numpy(np.stack([scaled(image=image) for image in images])).to(self._device)
        output = self._network(batch.permute(0, 3, 1, 2).to(self._dtype) / 255)
        found = nms.non_max_suppression(
            output,
            least,
            _MAX_IOU,
            classes=[self._person],
            nc=self._num_classes,
            max_time_img=float("inf"),  # with a time limit, a busy machine would find fewer people
            end2end=getattr(self._network, "end2end", False),
        )
        for image, rows in zip(images, found, strict=True):
            rows = rows.float().cpu()
            boxes = ops.scale_boxes(batch.shape[1:3], rows[:, :5].clone(), image.shape).numpy()
            order = np.argsort(-(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), kind="stable")
            joints = None
            if rows.shape[1] > 6:
                points = rows[:, 6:].reshape(-1, JOINTS, 3).clone()
                joints = ops.scale_coords(batch.shape[1:3], points, image.shape).numpy()[order]
            yield DetectedPeople(boxes[order], joints)


def _definition(checkpoint: Checkpoint, path: Path) -> "DetectionModel":
    """The architecture that a checkpoint names, as the installed ultralytics defines it, without its weights."""
    release = check()
    # ultralytics reads these at import; without them it goes online, installs packages and prints messages
    for name, value in (("YOLO_OFFLINE", "true"), ("YOLO_AUTOINSTALL", "false"), ("YOLO_VERBOSE", "false")):
        os.environ.setdefault(name, value)
    try:
        import ultralytics
        from ultralytics.nn import tasks
        from ultralytics.utils import YAML
    except (ImportError, RuntimeError) as error:  # RuntimeError: libraries built for another torch
        raise MissingBackend(f"ultralytics {release} cannot be imported: {error}; {_INSTEAD}") from None

    wanted = checkpoint.architecture
    folder = Path(ultralytics.__file__).parent / "cfg" / "models"
    # one file defines all sizes of a version, except for v9 and v10
    stems = (wanted, re.sub(r"(\d+)[a-z]", r"\1", wanted, count=1)) if _ARCHITECTURE.fullmatch(wanted) else ()
    files = [file for stem in stems for file in sorted(folder.rglob(f"{stem}.yaml"))]
    if not files:
        raise WrongWeights(
            f"{path} is of the architecture {wanted!r}, which is no detection or pose network of ultralytics {release}"
        )
    settings = YAML.load(files[0]) | {"scale": tasks.guess_model_scale(wanted), "nc": len(checkpoint.names)}
    network = {"detect": tasks.DetectionModel, "pose": tasks.PoseModel}[tasks.guess_model_task(settings)]
    return network(settings, verbose=False)


def load(device: torch.device, dtype: torch.dtype = torch.float32) -> Yolo:
    """Load the network whose checkpoint is in the weights folder. Raises MissingBackend, WrongWeights."""
    (path,) = weights.files("yolo")
    return Yolo(path, device, dtype)


def check() -> str:
    """The installed version of ultralytics. Raises MissingBackend where it is not installed."""
    try:
        return version("ultralytics")
    except PackageNotFoundError:
        raise MissingBackend(f"ultralytics is not installed; {_INSTEAD}") from None
