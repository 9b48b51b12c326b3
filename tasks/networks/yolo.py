"""Ultralytics' YOLO: the people in pictures and, by a pose network, their joints.

A published checkpoint is a pickle of whole objects, which ultralytics would build by running what the pickle says. Here
none is built: the numbers are taken out, everything else becomes an object without code, and ultralytics' own
definition of the architecture, out of the installed package, is filled with them.
"""

import os
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from tasks import weights
from tasks.stage import MissingBackend
from tasks.weights import WrongWeights

if TYPE_CHECKING:
    from ultralytics.nn.tasks import DetectionModel

JOINTS = 17  # COCO's: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; the left one first

_SIDE = 640  # pixels of a picture's longer side, as the networks were trained
_OVERLAP = 0.7  # from which two boxes are of one person, as ultralytics predicts
# pictures at a time, some 100 MB each through the largest network; a CPU's caches hold no more
_BATCH, _BATCH_ON_CPU = 8, 2
_INSTEAD = "install it with `pip install 'understudy[yolo]'`; people's backend `mediapipe` serves without"
# what checkpoints hold besides numbers; `getattr` names a method of the last layer
_HELD = re.compile(r"(ultralytics|torch\.nn|numpy|pathlib)\..+|builtins\.getattr")
_ARCHITECTURE = re.compile(r"yolov?\d+[a-z](-p[26])?(-pose)?(-p[26])?")  # detects, or finds joints; no masks, no words


class Seen(NamedTuple):
    """boxes: [people, 5] float32, x0, y0, x1, y1 in the picture's pixels and the score, 0 to 1; the largest first.
    joints: [people, 17, 3] float32, x, y in pixels and the confidence, 0 to 1; None by a network without joints."""

    boxes: np.ndarray
    joints: np.ndarray | None


class Checkpoint(NamedTuple):
    """architecture: ultralytics' name of it, "yolo11n-pose". names: of the classes. state: numbers by key."""

    architecture: str
    names: list[str]
    state: dict[str, torch.Tensor]


class _Inert:
    """Stands for every object of a pickle: it keeps the attributes, and has no code that the pickle could run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def read(path: Path) -> Checkpoint:
    """What a checkpoint holds. Raises WrongWeights where it asks for more than a published one does."""
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # torch raises several kinds, by what is wrong with the file
        raise WrongWeights(f"{path} cannot be read as a checkpoint: {error}") from None
    foreign = [name for name in asked if not _HELD.fullmatch(name)]
    if foreign:
        raise WrongWeights(
            f"{path} asks for {', '.join(sorted(foreign))}, which no checkpoint of ultralytics holds; nothing was run. "
            "Get the published file again"
        )
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in asked]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WrongWeights(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from None
    model = (content.get("ema") or content.get("model")) if isinstance(content, dict) else None
    facts = vars(model) if isinstance(model, _Inert) else {}
    names, made_by = facts.get("names"), facts.get("yaml")
    if not isinstance(made_by, dict) or not isinstance(names, dict) or set(names) != set(range(len(names))):
        raise WrongWeights(f"{path} holds no network of ultralytics with its architecture and its classes")
    architecture = PurePosixPath(str(made_by.get("yaml_file")).replace("\\", "/")).stem
    return Checkpoint(
        architecture, [str(names[number]) for number in range(len(names))], dict(_numbers(model, "", set()))
    )


def _numbers(part: Any, prefix: str, before: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict of a module that was read as an inert object, each part taken once."""
    if not isinstance(part, _Inert) or id(part) in before:
        return
    before.add(id(part))
    facts = vars(part)
    passing = facts.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, value in dict(facts.get(kind) or {}).items():
            if isinstance(value, torch.Tensor) and name not in passing:
                yield f"{prefix}{name}", value.detach()
    for name, inner in dict(facts.get("_modules") or {}).items():
        yield from _numbers(inner, f"{prefix}{name}.", before)


class Yolo:
    """A network of ultralytics, filled from a checkpoint."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Raises MissingBackend without ultralytics, WrongWeights."""
        checkpoint = read(path)
        people = [number for number, name in enumerate(checkpoint.names) if name.lower() == "person"]
        if not people:
            raise WrongWeights(f"{path} has no class 'person' among its {len(checkpoint.names)}: it cannot find people")
        network = _definition(checkpoint, path)
        weights.fill(network, checkpoint.state, path)
        self._network = network.fuse(verbose=False).to(device, dtype).eval().requires_grad_(False)
        self._classes_count, self._person = len(checkpoint.names), people[0]
        self._device, self._dtype = device, dtype
        self._batch = _BATCH_ON_CPU if device.type == "cpu" else _BATCH

    @torch.inference_mode()
    def __call__(self, images: list[np.ndarray], least: float) -> list[Seen]:
        """The people in pictures of one size.

        images: [height, width, 3] uint8 RGB each, of any number. least: score of a person, 0 to 1.
        """
        batches = (images[at : at + self._batch] for at in range(0, len(images), self._batch))
        return [one for batch in batches for one in self._seen(batch, least)]

    def _seen(self, images: list[np.ndarray], least: float) -> Iterator[Seen]:
        from ultralytics.data.augment import LetterBox
        from ultralytics.utils import nms, ops

        scaled = LetterBox(_SIDE, auto=True, stride=int(self._network.stride.max()))
        batch = torch.from_numpy(np.stack([scaled(image=image) for image in images])).to(self._device)
        output = self._network(batch.permute(0, 3, 1, 2).to(self._dtype) / 255)
        found = nms.non_max_suppression(
            output,
            least,
            _OVERLAP,
            classes=[self._person],
            nc=self._classes_count,
            max_time_img=float("inf"),  # else a busy machine finds fewer
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
            yield Seen(boxes[order], joints)


def _definition(checkpoint: Checkpoint, path: Path) -> "DetectionModel":
    """The architecture that a checkpoint names, as the installed ultralytics defines it, not filled."""
    release = check()
    # read when ultralytics is imported: it looks for a network, fetches packages and talks unless it is told not to
    for name, value in (("YOLO_OFFLINE", "true"), ("YOLO_AUTOINSTALL", "false"), ("YOLO_VERBOSE", "false")):
        os.environ.setdefault(name, value)
    try:
        import ultralytics
        from ultralytics.nn import tasks
        from ultralytics.utils import YAML
    except (ImportError, RuntimeError) as error:  # the latter from libraries that were built for another torch
        raise MissingBackend(f"ultralytics {release} cannot be imported: {error}; {_INSTEAD}") from None

    wanted = checkpoint.architecture
    folder = Path(ultralytics.__file__).parent / "cfg" / "models"
    # one file defines all sizes, but for v9 and v10
    stems = (wanted, re.sub(r"(\d+)[a-z]", r"\1", wanted, count=1)) if _ARCHITECTURE.fullmatch(wanted) else ()
    files = [file for stem in stems for file in sorted(folder.rglob(f"{stem}.yaml"))]
    if not files:
        raise WrongWeights(
            f"{path} is of the architecture {wanted!r}, no detector and no pose network of ultralytics {release}"
        )
    settings = YAML.load(files[0]) | {"scale": tasks.guess_model_scale(wanted), "nc": len(checkpoint.names)}
    network = {"detect": tasks.DetectionModel, "pose": tasks.PoseModel}[tasks.guess_model_task(settings)]
    return network(settings, verbose=False)


def load(device: torch.device, dtype: torch.dtype = torch.float32) -> Yolo:
    """The network whose checkpoint is there. Raises MissingBackend, WrongWeights."""
    (path,) = weights.files("yolo")
    return Yolo(path, device, dtype)


def check() -> str:
    """The installed release of ultralytics. Raises MissingBackend."""
    try:
        return version("ultralytics")
    except PackageNotFoundError:
        raise MissingBackend(f"ultralytics is not installed; {_INSTEAD}") from None
