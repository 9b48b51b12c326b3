"""PaddleOCR from local folders: tiny networks in the published format, through PaddleOCR's own API."""

import importlib.metadata
import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.media.clip import Clip
from tasks.stages.subtitles.ocr import PaddleOcr, TextBox
from tasks.stages.subtitles.stage import Subtitles, SubtitlesSettings
from tasks.weights.missing import MissingBackend
from tasks.weights.store import WrongWeights
from tests import tiny_weights

needs_paddle = pytest.mark.skipif(
    importlib.util.find_spec("paddleocr") is None or importlib.util.find_spec("paddle") is None,
    reason="paddleocr and paddlepaddle are not installed (the extra `ocr`)",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    tiny_weights.paddle_files(tmp_path / "paddleocr")
    return tmp_path / "paddleocr"


@pytest.fixture
def networks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny networks in the weights folder, and no connection to any host."""
    tiny_weights.paddle_networks(folder)
    for name in ("det", "rec"):
        assert (folder / name / "inference.json").stat().st_size

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("PaddleOCR tried to connect to a host")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)


@needs_paddle
def test_text_is_found_and_read_from_local_folders(networks: None) -> None:
    ocr = PaddleOcr()
    assert "paddleocr 3" in ocr.version()
    image = np.zeros((384, 704, 3), np.uint8)
    image[300:332, 200:520] = 255
    (box,) = ocr.find(image, 192)
    # The detector marks the middle of a line. PaddleOCR widens it by 1.3 of its area over its outline: here 19 pixels.
    np.testing.assert_allclose(box, TextBox(200, 300, 520, 332), atol=22)
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


def test_missing_packages_and_weights_are_errors_before_work_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Subtitles(SubtitlesSettings(backend="paddleocr"))

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", absent)
        with pytest.raises(MissingBackend, match=r"paddleocr is not installed in .*'understudy\[ocr\]'.*`rapidocr`"):
            stage.check()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3")
    stage.check()
    (folder / "det" / "inference.yml").write_text((folder / "rec" / "inference.yml").read_text())
    with pytest.raises(WrongWeights, match=r"inference\.yml names the network PP-OCRv5_server_rec, .* ends in _det"):
        stage.check()
    (folder / "det" / "inference.yml").write_text("[]")
    with pytest.raises(WrongWeights, match=r"det/inference\.yml does not name its network"):
        stage.check()
    (folder / "rec" / "inference.pdiparams").unlink()
    with pytest.raises(MissingBackend, match=r"paddleocr are missing: rec/inference\.pdiparams;"):
        stage.check()
