"""YOLO: equal to ultralytics' own predictions. Nothing of a checkpoint is run."""

import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.media.clip import Clip
from tasks.networks import yolo
from tasks.stages.people.stage import People, PeopleSettings, person_framing
from tasks.weights.missing import MissingBackend
from tasks.weights.store import WrongWeights
from tests.parity import filled

CPU = torch.device("cpu")
HIPS, ANKLES = slice(11, 13), slice(15, 17)
needs_ultralytics = pytest.mark.skipif(
    importlib.util.find_spec("ultralytics") is None, reason="ultralytics is not installed (the extra `yolo`)"
)


def save(path: Path, network: Any, **more: Any) -> Path:
    """Save a checkpoint as ultralytics does: whole objects, in half precision."""
    path.parent.mkdir(exist_ok=True)
    training = {"ema": None, "project": Path("runs"), "fitness": np.float64(0.4)}
    torch.save({"model": network.half(), **training, **more}, path)
    return path


def named(network: Any, architecture: str = "yolo11n.yaml", names: tuple[str, ...] = ("person",)) -> Any:
    network.yaml, network.names = {"yaml_file": architecture}, dict(enumerate(names))
    return network


@pytest.fixture
def layers() -> torch.nn.Module:
    shared = torch.nn.SiLU()
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), shared, torch.nn.Conv2d(4, 1, 1), shared
    )
    layers.register_buffer("passing", torch.zeros(3), persistent=False)
    return named(layers, "runs\\yolo11s-pose.yaml", ("cat", "person"))


def test_a_pickled_network_gives_its_state_dict(tmp_path: Path, layers: torch.nn.Module) -> None:
    found = yolo.read(save(tmp_path / "a.pt", layers))
    assert (found.architecture, found.names) == ("yolo11s-pose", ["cat", "person"])
    wanted = layers.state_dict()
    assert list(found.state) == list(wanted)
    assert all(torch.equal(found.state[key], value) for key, value in wanted.items())


class Runs:
    """A pickle that runs a function when it is opened."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


def test_a_pickle_that_would_run_a_function_is_refused_by_its_name(tmp_path: Path, layers: torch.nn.Module) -> None:
    ran = tmp_path / "ran"
    with pytest.raises(WrongWeights, match=r"a\.pt asks for posix\.mkdir, which no checkpoint"):
        yolo.read(save(tmp_path / "a.pt", layers, note=Runs(os.mkdir, str(ran))))
    (tmp_path / "b.pt").write_bytes(b"nothing")
    with pytest.raises(WrongWeights, match=r"b\.pt cannot be read as a checkpoint"):
        yolo.read(tmp_path / "b.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "c.pt")
    with pytest.raises(WrongWeights, match=r"c\.pt holds no network of ultralytics"):
        yolo.read(tmp_path / "c.pt")
    assert not ran.exists()


def test_not_even_ultralytics_own_functions_are_run(
    tmp_path: Path, layers: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ultralytics' networks evaluate the text of their activation function."""
    ran = tmp_path / "ran"

    def build(path: str) -> None:
        Path(path).mkdir()

    build.__module__, build.__qualname__ = "ultralytics.nn.tasks", "build"
    for name in ("ultralytics", "ultralytics.nn", "ultralytics.nn.tasks"):
        module = types.ModuleType(name)
        module.build = build  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    assert yolo.read(save(tmp_path / "a.pt", layers, note=Runs(build, str(ran)))).state
    assert not ran.exists()


@pytest.mark.parametrize(
    ("tall", "hips", "ankles", "framing"),
    [
        (0.9, (0.5, 0.1), (0.9, 0.1), "upper body"),
        (0.9, (0.9, 0.9), (0.99, 0.2), "medium"),
        (0.8, (0.5, 0.9), (0.9, 0.9), "full"),
        (0.3, (0.5, 0.9), (0.6, 0.9), "long"),
    ],
)
def test_framing_is_decided_by_the_lowest_joint_that_is_seen(
    tall: float, hips: tuple[float, float], ankles: tuple[float, float], framing: str
) -> None:
    joints = np.tile(np.array([0.5, 0.5, 0.9], np.float32), (yolo.JOINTS, 1))
    joints[HIPS, 1:], joints[ANKLES, 1:] = hips, ankles
    assert person_framing(tall, joints) == framing


def test_missing_weights_and_libraries_are_reported_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    stage = People(PeopleSettings(backend="yolo"))
    monkeypatch.setattr(yolo, "version", lambda name: "8.4")
    with pytest.raises(MissingBackend, match=r"weights of yolo are missing: \*\.pt.*`mediapipe` serves without"):
        stage.check()

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(yolo, "version", absent)
    with pytest.raises(MissingBackend, match=r"pip install 'understudy\[yolo\]'.*`mediapipe` needs no ultralytics"):
        stage.check()


def test_a_library_that_cannot_be_imported_is_reported_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: torch.nn.Module
) -> None:
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    save(tmp_path / "yolo" / "yolo11s-pose.pt", layers)
    monkeypatch.setattr(yolo, "version", lambda name: "8.4")
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(
        MissingBackend, match=r"ultralytics 8\.4 cannot be imported: .*`mediapipe` needs no ultralytics"
    ):
        People(PeopleSettings(backend="yolo")).check()


def _standardise(layer: torch.nn.Conv2d, output: torch.Tensor) -> None:
    """Change a layer so that its output has mean 0 and standard deviation 1 for each channel."""
    layer.weight.data /= output.std((0, 2, 3)).view(-1, 1, 1, 1)
    layer.bias.data = (layer.bias.data - output.mean((0, 2, 3))) / output.std((0, 2, 3))  # type: ignore[union-attr]


def network(name: str, classes: int) -> Any:
    """One of ultralytics' own networks with random weights that detect some people."""
    from ultralytics.nn.tasks import DetectionModel, PoseModel

    found = (PoseModel if "pose" in name else DetectionModel)(f"{name}.yaml", nc=classes, verbose=False)
    found.load_state_dict(filled(found.state_dict(), gain=2.0))
    head = found.model[-1]
    outputs = [layer for layer in head.modules() if isinstance(layer, torch.nn.Conv2d) and layer.bias is not None]
    hooks = [layer.register_forward_hook(lambda layer, _, output: _standardise(layer, output)) for layer in outputs]
    with torch.no_grad():
        found.eval()(torch.rand(1, 3, 192, 192, generator=torch.Generator().manual_seed(0)))
    for hook in hooks:
        hook.remove()
    for key, value in head.named_parameters():
        if key.endswith("dfl.conv.weight"):
            value.data[:] = torch.arange(16.0).view(1, 16, 1, 1)
        elif "cv3" in key and key.endswith(".2.bias") and classes > 1:
            value.data[0] += 2
        elif "cv2" in key and key.endswith(".2.bias") and value.numel() == 4:
            value.data += 4
    return named(found, f"{name}.yaml", ("person", *map(str, range(1, classes))))


@needs_ultralytics
@pytest.mark.parametrize(("name", "classes"), [("yolo11n-pose", 1), ("yolov8n", 80), ("yolo26n-pose", 1)])
def test_people_are_found_as_ultralytics_finds_them(
    name: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skimage import data
    from ultralytics import YOLO
    from ultralytics.nn.autobackend import AutoBackend
    from ultralytics.utils import nms

    task = {"task": "pose" if "pose" in name else "detect"}
    path = save(tmp_path / f"{name}.pt", network(name, classes), train_args=task)
    image = data.astronaut()[:400]
    images = [image, np.ascontiguousarray(image[::-1])]
    own = yolo.Yolo(path, CPU)
    least = float(np.median(np.concatenate([seen.boxes[:, 4] for seen in own(images, 0.2)])))
    seen = own(images, least)
    assert all(len(one.boxes) > 10 for one in seen)
    assert all((one.boxes[:, :2] <= one.boxes[:, 2:4]).all() for one in seen)

    # its only effect here is to import torchvision
    monkeypatch.setattr(AutoBackend, "warmup", lambda *args, **kwargs: None)
    # without this it stops after two seconds, which happens on a busy machine
    monkeypatch.setattr(nms, "time", types.SimpleNamespace(time=lambda: 0.0))
    results = YOLO(str(path)).predict(
        [picture[..., ::-1] for picture in images], conf=least, classes=[0], device="cpu", save=False, verbose=False
    )
    for one, result in zip(seen, results, strict=True):
        wanted = result.boxes.data[:, :5].numpy()
        ours, theirs = (np.lexsort(boxes.round(2).T) for boxes in (one.boxes, wanted))
        np.testing.assert_allclose(one.boxes[ours], wanted[theirs], rtol=1e-4, atol=1e-3)
        assert (one.joints is None) == (result.keypoints is None)
        if one.joints is not None:
            known, points = result.keypoints.data.numpy()[theirs], one.joints[ours]
            shown = known[..., 2] >= 0.5  # ultralytics hides the others
            np.testing.assert_allclose(points[..., 2], known[..., 2], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(points[shown], known[shown], rtol=1e-4, atol=1e-2)
    for image, one in zip(images, seen, strict=True):
        (alone,) = own([image], least)
        np.testing.assert_allclose(alone.boxes, one.boxes, rtol=1e-4, atol=1e-3)


def certain(score: float, joints: float) -> Any:
    """A pose network with the same output for every image: people of one score, with hips at their centre and ankles
    of one confidence.

    score: of the people, before the sigmoid. joints: the confidence of the ankles, before the sigmoid.
    """
    found = network("yolo11n-pose", 1)
    for value in found.parameters():
        value.data.zero_()
    for level, scores, points in zip(found.model[-1].cv2, found.model[-1].cv3, found.model[-1].cv4, strict=True):
        level[2].bias.data.view(4, 16)[:, 6] = 20.0  # six cells from the middle to each side
        scores[2].bias.data[:] = -20.0
        points[2].bias.data.view(yolo.JOINTS, 3)[:, 2] = 5.0
        points[2].bias.data.view(yolo.JOINTS, 3)[ANKLES, 2] = joints
    found.model[-1].cv3[2][2].bias.data[:] = score
    found.model[-1].dfl.conv.weight.data[:] = torch.arange(16.0).view(1, 16, 1, 1)
    return found


@needs_ultralytics
@pytest.mark.parametrize(("score", "ankles", "framing"), [(3.0, -5.0, "medium"), (3.0, 5.0, "full"), (-3.0, 5.0, "")])
def test_the_people_stage_runs_on_a_checkpoint_from_disk(
    score: float,
    ankles: float,
    framing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clip_of: Callable[..., Clip],
) -> None:
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    save(tmp_path / "yolo" / "yolo11n-pose.pt", certain(score, ankles))
    stage = People(PeopleSettings(backend="yolo"))
    stage.check()
    assert "ultralytics" in stage.backend_version()
    found = stage.measure(clip_of("talk_office.mp4")).columns
    assert set(found) == set(People.columns)
    assert found["framing"] == framing
    assert found["framing_source"] == ("landmarks" if framing else "")
    assert found["person_share"] == (1.0 if framing else 0.0)
    assert bool(found["persons"]) == bool(framing)
    assert found["single_share"] == 0.0
    assert found["face_share"] is found["face_height"] is None


@needs_ultralytics
def test_a_network_that_does_not_detect_people_is_refused(tmp_path: Path) -> None:
    detector = network("yolo11n", 2)
    with pytest.raises(WrongWeights, match=r"architecture 'yolo11n-seg', which is no detection or pose network"):
        yolo.Yolo(save(tmp_path / "a.pt", named(detector, "yolo11n-seg.yaml")), CPU)
    with pytest.raises(WrongWeights, match=r"architecture 'mine'"):
        yolo.Yolo(save(tmp_path / "a.pt", named(detector, "mine.yaml")), CPU)
    with pytest.raises(WrongWeights, match=r"no class 'person' among its 2"):
        yolo.Yolo(save(tmp_path / "a.pt", named(detector, names=("cat", "dog"))), CPU)
    with pytest.raises(WrongWeights, match=r"does not fit DetectionModel: .* of another shape"):
        yolo.Yolo(save(tmp_path / "a.pt", named(detector, "yolo11s.yaml", ("person", "dog"))), CPU)
    del detector.model[0].bn.running_mean
    with pytest.raises(WrongWeights, match=r"1 missing \(model\.0\.bn\.running_mean\)"):
        yolo.Yolo(save(tmp_path / "a.pt", named(detector, names=("person", "dog"))), CPU)
