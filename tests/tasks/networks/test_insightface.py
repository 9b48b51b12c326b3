"""InsightFace's networks: alignment, detection and embeddings equal to the reference."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.media.clip import Clip
from tasks.networks import face_align, insightface
from tasks.networks.iresnet import LAYERS, IResNet
from tasks.stages.identity.stage import Identity, IdentitySettings
from tasks.weights.store import MissingBackend, WrongWeights
from tests import tiny_weights
from tests.parity import arrays, filled, needs_parity, shapes


@needs_parity
def test_alignment_equals_the_reference() -> None:
    known = arrays("insightface/align.npz")
    np.testing.assert_array_equal(face_align.TEMPLATE, known["template_112"])
    for size in (112, 128, 224, 256):
        for points, wanted in zip(known["landmarks"], known[f"M_{size}"], strict=True):
            np.testing.assert_allclose(face_align.transform(points, size), wanted, rtol=1e-5, atol=1e-4)
    cuts = np.stack([face_align.cut_aligned(known["image"], points) for points in known["landmarks"]])
    assert np.abs(cuts.astype(int) - known["crop112"]).max() <= 2
    other = face_align.cut_aligned(known["image"], known["landmarks"][0], 128)
    assert np.abs(other.astype(int) - known["crop128_0"]).max() <= 2
    large = face_align.cut_aligned(known["image"], known["landmarks"][1], 256)[::2, ::2]
    assert np.abs(large.astype(int) - known["crop256_1_every2"]).max() <= 2
    # the fixture's images are BGR
    found = insightface.blob(known["crop112"][:1, ..., ::-1])[0][:, ::4, ::4]
    np.testing.assert_allclose(found, known["arcface_blob0_every4"], atol=1e-6)


@given(st.floats(-3, 3), st.floats(0.1, 10), st.tuples(st.floats(-500, 500), st.floats(-500, 500)))
def test_a_transformed_template_is_mapped_back_to_the_template(
    angle: float, scale: float, shift: tuple[float, float]
) -> None:
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = face_align.TEMPLATE @ rotation.T + shift
    matrix = face_align.transform(points)
    np.testing.assert_allclose(points @ matrix[:, :2].T + matrix[:, 2], face_align.TEMPLATE, atol=1e-3)


@needs_parity
def test_decoded_detections_equal_the_reference() -> None:
    known = arrays("insightface/scrfd_decode.npz")
    image, size = known["image"][..., ::-1], (int(known["input_size_wh"][0]), int(known["input_size_wh"][1]))
    blob, scale = insightface.letterboxed(image, size)
    np.testing.assert_allclose(blob[0, :, ::4, ::4], known["input_blob_every4"], atol=2.1 / 128)
    found = insightface.decoded([known[f"net_out{k}"] for k in range(9)], size, scale)
    np.testing.assert_allclose(found.boxes, known["det"], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.points, known["kps"], rtol=1e-4, atol=1e-3)
    # where it keeps one face, the reference takes the largest, by area or by area minus twice the squared distance to
    # the image's centre
    x0, y0, x1, y1 = found.boxes[:, :4].T
    area = (x1 - x0) * (y1 - y0)
    distance = ((x0 + x1) / 2 - image.shape[1] // 2) ** 2 + ((y0 + y1) / 2 - image.shape[0] // 2) ** 2
    for value, name in ((area, "det_max1_area"), (area - 2 * distance, "det_max1_default")):
        np.testing.assert_allclose(found.boxes[[value.argmax()]], known[name], rtol=1e-4)


@needs_parity
def test_embeddings_equal_the_reference() -> None:
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
def test_the_published_keys_are_expected_and_no_others(name: str) -> None:
    with torch.device("meta"):
        found = {key: tuple(value.shape) for key, value in IResNet(LAYERS[name]).state_dict().items()}
    assert found == shapes(f"insightface/keys_{name}.json")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    tiny_weights.insightface(tmp_path / "insightface")
    return tmp_path / "insightface"


def test_the_identity_stage_runs_on_a_pack_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_of: Callable[..., Clip]
) -> None:
    clip = clip_of("talk_office.mp4")
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    tiny_weights.insightface(tmp_path / "insightface", tiny_weights.face_in(next(iter(clip.frames()))))
    stage = Identity(IdentitySettings(backend="insightface"))
    stage.check()
    assert "insightface" in stage.backend_version()
    measured = stage.measure(clip)
    assert measured.columns["speakers"] == 1
    assert measured.columns["stability"] > 0.9  # type: ignore[operator]


def test_a_batch_of_faces_gets_the_embeddings_of_each_alone(folder: Path) -> None:
    detector, recogniser = insightface.load()
    image = cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8), (400, 300))
    found = detector(image)
    assert found.boxes.shape == (1, 5)
    faces = np.stack([face_align.cut_aligned(image, face_align.TEMPLATE + k) for k in range(20)])
    together = recogniser(faces)
    assert together.shape == (20, 512)
    np.testing.assert_allclose(together[7], recogniser(faces[7:8])[0], rtol=1e-4, atol=1e-4)


def test_another_network_under_the_files_name_is_refused(folder: Path) -> None:
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
