from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.clip import Clip
from tasks.identity import Identity, IdentitySettings, MediaPipeFaces
from tasks.networks import face_align, insightface
from tasks.networks.iresnet import LAYERS, IResNet
from tasks.weights import MissingBackend, WrongWeights
from tests.parity import arrays, filled, needs_parity, shapes


@needs_parity
def test_faces_are_cut_as_the_reference_cuts_them() -> None:
    known = arrays("insightface/align.npz")
    np.testing.assert_array_equal(face_align.TEMPLATE, known["template_112"])
    for size in (112, 128, 224, 256):
        for points, wanted in zip(known["landmarks"], known[f"M_{size}"], strict=True):
            np.testing.assert_allclose(face_align.transform(points, size), wanted, rtol=1e-5, atol=1e-4)
    cuts = np.stack([face_align.cut(known["image"], points) for points in known["landmarks"]])
    assert np.abs(cuts.astype(int) - known["crop112"]).max() <= 2
    other = face_align.cut(known["image"], known["landmarks"][0], 128)
    assert np.abs(other.astype(int) - known["crop128_0"]).max() <= 2
    large = face_align.cut(known["image"], known["landmarks"][1], 256)[::2, ::2]
    assert np.abs(large.astype(int) - known["crop256_1_every2"]).max() <= 2
    # the fixture's pictures are BGR
    found = insightface.blob(known["crop112"][:1, ..., ::-1])[0][:, ::4, ::4]
    np.testing.assert_allclose(found, known["arcface_blob0_every4"], atol=1e-6)


@given(st.floats(-3, 3), st.floats(0.1, 10), st.tuples(st.floats(-500, 500), st.floats(-500, 500)))
def test_points_that_are_the_template_moved_are_laid_on_it(
    turn: float, scale: float, shift: tuple[float, float]
) -> None:
    rotation = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = face_align.TEMPLATE @ rotation.T + shift
    matrix = face_align.transform(points)
    np.testing.assert_allclose(points @ matrix[:, :2].T + matrix[:, 2], face_align.TEMPLATE, atol=1e-3)


@needs_parity
def test_the_detectors_outputs_are_read_as_the_reference_reads_them() -> None:
    known = arrays("insightface/scrfd_decode.npz")
    image, size = known["image"][..., ::-1], (int(known["input_size_wh"][0]), int(known["input_size_wh"][1]))
    blob, scale = insightface.letterboxed(image, size)
    np.testing.assert_allclose(blob[0, :, ::4, ::4], known["input_blob_every4"], atol=2.1 / 128)
    found = insightface.decoded([known[f"net_out{k}"] for k in range(9)], size, scale)
    np.testing.assert_allclose(found.boxes, known["det"], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.points, known["kps"], rtol=1e-4, atol=1e-3)
    wide = (image.shape[1], image.shape[0])
    np.testing.assert_allclose(insightface.largest(found, 1, wide).boxes, known["det_max1_default"], rtol=1e-4)
    np.testing.assert_allclose(insightface.largest(found, 1, wide, "area").boxes, known["det_max1_area"], rtol=1e-4)


@needs_parity
def test_embeddings_are_the_references() -> None:
    network = IResNet(LAYERS["iresnet50"])
    network.load_state_dict(filled(network.state_dict()))
    known = arrays("insightface/iresnet50.npz")
    faces = insightface.blob(arrays("insightface/align.npz")["crop112"][:2, ..., ::-1])
    with torch.inference_mode():
        found = network.eval()(torch.from_numpy(faces)).numpy()
    np.testing.assert_allclose(found, known["embedding"], rtol=1e-4, atol=1e-4 * 274)
    cosine = found[0] @ found[1] / np.prod(np.linalg.norm(found, axis=1))
    assert cosine == pytest.approx(float(known["cosine"]), abs=1e-5)


@needs_parity
@pytest.mark.parametrize("name", list(LAYERS))
def test_the_published_keys_are_taken_whole(name: str) -> None:
    with torch.device("meta"):
        found = {key: tuple(value.shape) for key, value in IResNet(LAYERS[name]).state_dict().items()}
    assert found == shapes(f"insightface/keys_{name}.json")


def pack(folder: Path, face: tuple[float, float, float, float] = (0.4, 0.3, 0.6, 0.7)) -> None:
    """A pack as it is published, of tiny networks: one face at the same place of any picture (x0, y0, x1, y1, in
    widths of the picture), described by its colours."""
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
            # the input takes part, so that the graph has one
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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    pack(tmp_path / "insightface" / "models" / "buffalo_l")
    return tmp_path / "insightface"


def test_the_identity_stage_runs_on_a_pack_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_of: Callable[..., Clip]
) -> None:
    clip = clip_of("talk_office.mp4")
    image = next(iter(clip.frames()))
    found, aspect = MediaPipeFaces(0.5).faces(image)[0], image.shape[0] / image.shape[1]
    top = found.y - 0.25 * found.height  # where SCRFD's box begins
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    box = (found.x, top * aspect, found.x + found.width, (found.y + found.height) * aspect)
    pack(tmp_path / "insightface" / "models" / "buffalo_l", box)
    stage = Identity(IdentitySettings(backend="insightface"))
    stage.check()
    assert "insightface" in stage.backend_version()
    measured = stage.measure(clip)
    assert measured.columns["speakers"] == 1
    assert measured.columns["stability"] > 0.9  # type: ignore[operator]


def test_faces_of_many_sizes_are_described_in_batches(folder: Path) -> None:
    detector, recogniser = insightface.load()
    image = cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8), (400, 300))
    found = detector(image)
    assert found.boxes.shape == (1, 5)
    faces = np.stack([face_align.cut(image, face_align.TEMPLATE + k) for k in range(20)])
    together = recogniser(faces)
    assert together.shape == (20, 512)
    np.testing.assert_allclose(together[7], recogniser(faces[7:8])[0], rtol=1e-4, atol=1e-4)


def test_another_network_under_the_name_is_refused(folder: Path) -> None:
    models = folder / "models" / "buffalo_l"
    (models / "w600k_r50.onnx").write_bytes((models / "det_10g.onnx").read_bytes())
    with pytest.raises(WrongWeights, match=r"w600k_r50.onnx has 9 outputs"):
        insightface.load()
    (models / "w600k_r50.onnx").write_bytes(b"nothing")
    with pytest.raises(WrongWeights, match=r"w600k_r50.onnx cannot be read as ONNX"):
        insightface.load()
    (models / "w600k_r50.onnx").unlink()
    with pytest.raises(MissingBackend, match=r"w600k_r50.onnx.*`mediapipe` serves without"):
        Identity(IdentitySettings(backend="insightface")).check()
