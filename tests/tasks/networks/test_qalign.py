"""Q-Align: preprocessing and scores equal to the reference, and the stage `aesthetics` with a tiny model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.media.clip import Clip
from tasks.networks import qalign
from tasks.stages.aesthetics.stage import Aesthetics, AestheticsSettings
from tasks.weights import remote_code
from tasks.weights.missing import MissingBackend
from tests import tiny_weights
from tests.parity import arrays, needs_parity


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "qalign"
    tiny_weights.qalign(folder)
    return folder


@needs_parity
def test_scores_from_logits_equal_the_reference() -> None:
    known = arrays("qalign/score_map.npz")
    found = qalign.scores(known["level_logits_excellent_good_fair_poor_bad"])
    np.testing.assert_allclose(found, known["score_1_to_5"], rtol=1e-12)
    np.testing.assert_allclose((found - 1) / 4, known["score_0_to_1"], rtol=1e-12)


@needs_parity
def test_preprocessed_pixels_equal_the_reference() -> None:
    known = arrays("qalign/score_map.npz")
    found = qalign.prepared(known["image_rgb"])
    np.testing.assert_allclose(found[:, ::4, ::4], known["pixel_values_every4"], atol=1e-5)


def test_code_beside_weights_runs_only_when_it_is_trusted(folder: Path) -> None:
    with pytest.raises(MissingBackend, match=r"only when you say so.*remote_code: [0-9a-f]{12}"):
        Aesthetics(AestheticsSettings(backend="qalign")).check()
    trusted = remote_code.digest("qalign")
    Aesthetics(AestheticsSettings(backend="qalign", remote_code=trusted)).check()
    (folder / "tiny_align.py").write_text(tiny_weights.QALIGN_CODE + "\nprint('more')\n")
    with pytest.raises(MissingBackend, match="it has changed"):
        qalign.load(trusted)


def test_images_and_videos_are_rated_by_the_model(folder: Path, clip_of: Callable[..., Clip]) -> None:
    model = qalign.load(remote_code.digest("qalign"))
    images = [np.full((40, 60, 3), value, np.uint8) for value in (0, 60, 130, 190, 255)]
    alone = model.images(images, "quality")
    assert list(alone) == sorted(alone)
    assert alone[0] < 2 < 4 < alone[-1]
    np.testing.assert_allclose(alone[3], model.images(images[3:4], "quality")[0], rtol=1e-6)
    assert model.video(images, "quality") > np.mean(alone)


def test_rows_of_a_gpu_and_of_a_cpu_have_different_versions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU computes in half precision, which gives slightly different scores."""
    stage = Aesthetics(AestheticsSettings(backend="qalign", remote_code=remote_code.digest("qalign")))
    monkeypatch.setattr(qalign, "device", lambda: torch.device("cpu"))
    here = stage.backend_version()
    assert next(qalign.load(remote_code.digest("qalign"))._network.parameters()).dtype == torch.float32
    monkeypatch.setattr(qalign, "device", lambda: torch.device("cuda"))
    assert "float32" in here and stage.backend_version() == here.replace("float32", "float16")


def test_the_aesthetics_stage_rates_a_clip(folder: Path, clip_of: Callable[..., Clip]) -> None:
    stage = Aesthetics(AestheticsSettings(backend="qalign", remote_code=remote_code.digest("qalign")))
    columns = stage.measure(clip_of("talk_office.mp4")).columns
    assert all(1 <= columns[name] <= 5 for name in ("quality", "aesthetic", "video_quality"))  # type: ignore[operator]
    assert columns["sharpness"] is None
