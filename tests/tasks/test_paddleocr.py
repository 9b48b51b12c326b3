"""PaddleOCR from local folders: tiny networks in the published format, through its own constructor and calls."""

import importlib.metadata
import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.clip import Clip
from tasks.ocr import Box, PaddleOcr
from tasks.stage import MissingBackend
from tasks.subtitles import Subtitles, SubtitlesSettings
from tasks.weights import WrongWeights

needs_paddle = pytest.mark.skipif(
    importlib.util.find_spec("paddleocr") is None or importlib.util.find_spec("paddle") is None,
    reason="paddleocr and paddlepaddle are not installed (the extra `ocr`)",
)

DETECTOR = """
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
RECOGNISER = """
Global: {model_name: PP-OCRv5_server_rec}
PreProcess:
  transform_ops:
  - DecodeImage: {channel_first: false, img_mode: BGR}
  - MultiLabelEncode: {gtc_encode: NRTRLabelEncode}
  - RecResizeImg: {image_shape: [3, 48, 320]}
  - KeepKeys: {keep_keys: [image, label_ctc, label_gtc, length, valid_ratio]}
PostProcess: {name: CTCLabelDecode, character_dict: [a, b]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files are, empty ones but for the names of the networks."""
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    for name, text in (("det", DETECTOR), ("rec", RECOGNISER)):
        inner = tmp_path / "paddleocr" / name
        inner.mkdir(parents=True)
        (inner / "inference.yml").write_text(text)
        for file in ("inference.json", "inference.pdiparams"):
            (inner / file).touch()
    return tmp_path / "paddleocr"


@pytest.fixture
def networks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks to which what is bright is text: white is the letter a, red the letter b. No network can be reached."""
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
            # of blue, green, red to none, a, b, space
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
        assert (folder / name / "inference.json").is_file()

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it looked for something outside")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)


@needs_paddle
def test_text_is_found_and_read_from_local_folders(networks: None) -> None:
    ocr = PaddleOcr()
    assert "paddleocr 3" in ocr.version()
    image = np.zeros((384, 704, 3), np.uint8)
    image[300:332, 200:520] = 255
    (box,) = ocr.find(image, 192)
    # the detector marks the middle of a line, which is widened by 1.3 of its area over its outline: here 19 pixels
    np.testing.assert_allclose(box, Box(200, 300, 520, 332), atol=22)
    assert box.x0 <= 204 and box.x1 >= 516
    assert ocr.find(np.zeros_like(image), 192) == []
    line = np.zeros((24, 200, 3), np.uint8)
    line[:, 20:60] = line[:, 150:180] = 255
    line[:, 90:130] = 255, 0, 0
    wide = np.concatenate([line] * 4, axis=1)
    (text, sure), (longer, _) = ocr.read([line, wide])
    assert (text, longer) == ("aba", "aba" * 4)
    assert 0.5 < sure <= 1.0


@needs_paddle
def test_the_subtitles_stage_runs_on_networks_from_disk(networks: None, clip_of: Callable[..., Clip]) -> None:
    stage = Subtitles(SubtitlesSettings(backend="paddleocr"))
    stage.check()
    assert "paddlex" in stage.backend_version()
    found = stage.measure(clip_of("talk_office.mp4")).columns
    assert set(found) == set(Subtitles.columns)
    assert found["samples"]


def test_what_is_missing_is_said_before_work_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Subtitles(SubtitlesSettings(backend="paddleocr"))

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", absent)
        with pytest.raises(MissingBackend, match=r"paddleocr is not installed in .*'understudy\[ocr\]'.*`rapidocr`"):
            stage.check()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3")
    stage.check()
    (folder / "det" / "inference.yml").write_text(RECOGNISER)
    with pytest.raises(WrongWeights, match=r"inference\.yml is of PP-OCRv5_server_rec, .* ends in _det was looked for"):
        stage.check()
    (folder / "det" / "inference.yml").write_text("[]")
    with pytest.raises(WrongWeights, match=r"det/inference\.yml does not name its network"):
        stage.check()
    (folder / "rec" / "inference.pdiparams").unlink()
    with pytest.raises(MissingBackend, match=r"paddleocr are missing: rec/inference\.pdiparams;"):
        stage.check()
