"""A curation with every network that the papers name, with small weights in the published layout."""

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from data_manifests.dataset import load, verify
from data_manifests.lineage import Lineage
from tasks.recipe import load_recipe, recipe_path
from tasks.weights import remote_code
from tests import tiny_weights
from tests.flows.conftest import Server

# settings that are smaller than the recipe's, so that a clip takes seconds
QUICK = {
    "motion": {"rate_hz": 2, "short_side": 64},
    "crop": {"size": 128},
    "aesthetics": {"max_samples": 2},
    "pose": {"short_side": 128},
    "guidance": {"max_segments": 1, "pictures": 2},
    "latents": {"dim": tiny_weights.UMT5["d_model"]},
}
# by stage: the library of an extra, and the backend to use when it is not installed
EXTRAS = {"people": ("ultralytics", "mediapipe"), "subtitles": ("paddleocr", "rapidocr")}
ARRAYS = {"whisper", "face_box", "lips", "crop_box", "pose", "pose_box", "latent", "text_embedding"}
FOOTAGE = "talk_3s.mp4"

Understudy = Callable[..., str]


@pytest.fixture(scope="module")
def weights(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder with small networks. The face detector is made to find the face of the footage."""
    import av

    home = tmp_path_factory.mktemp("weights")
    with av.open(str(world.path(FOOTAGE))) as container:
        face = tiny_weights.face_in(next(container.decode(video=0)).to_ndarray(format="rgb24"))
    writers = tiny_weights.WRITERS | {"insightface": lambda folder: tiny_weights.insightface(folder, face)}
    for name in load_recipe("physavatar_paper").networks():
        writers[name](home / name)
    return home


@pytest.fixture(scope="module")
def understudy(weights: Path, server: Server) -> Understudy:
    """Runs the command in a process of its own. Returns what it prints."""
    env = server.env | {"UNDERSTUDY_WEIGHTS": str(weights), "HF_MODULES_CACHE": str(weights.parent / "modules")}

    def understudy(*arguments: object) -> str:
        line = [sys.executable, "-m", "flows.cli.main", *map(str, arguments)]
        done = subprocess.run(line, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return understudy


@pytest.fixture
def recipe(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe `physavatar_paper` with quick settings, and without rules: random weights would fail them."""
    content = yaml.safe_load(recipe_path("physavatar_paper").read_text())
    measure = content["curation"]["measure"]
    for stage, settings in QUICK.items():
        measure[stage] |= settings
    for stage, (library, substitute) in EXTRAS.items():
        if find_spec(library) is None:
            measure[stage] = {"backend": substitute}
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(weights))
    measure["aesthetics"]["remote_code"] = remote_code.digest("qalign")
    content["curation"] |= {"policy": {}, "run": {"time_limit_s": 3600}}  # the machine may be busy
    path = tmp_path / "quick.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.timeout(1200)
@pytest.mark.slow
def test_every_network_of_the_papers_measures_a_clip(
    understudy: Understudy, recipe: Path, world: Any, tmp_path: Path
) -> None:
    (tmp_path / "footage").mkdir()
    shutil.copy(world.path(FOOTAGE), tmp_path / "footage")
    checked = understudy("weights", "check", "--recipe", "physavatar_paper")
    assert [line.split(":")[0] for line in checked.splitlines()] == list(load_recipe("physavatar_paper").networks())
    out = tmp_path / "out"
    understudy("curate", tmp_path / "footage", "--recipe", recipe, "--out", out, "--workers", 1)
    assert list(pd.read_parquet(out / "clips.parquet")["verdict"]) == ["keep"]
    assert not verify(str(out / "dataset.json")).faults
    (shard,) = load(str(out / "dataset.json")).shards
    with tarfile.open(out / shard.name) as tar:
        members = {name.partition(".")[2]: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    assert {name.removesuffix(".npy") for name in members} == ARRAYS | {"mp4", "flac", "json", "guidance.json"}
    found = Lineage.model_validate_json(members["json"]).scores
    assert {stage: score.backend for stage, score in found.items()} == {
        stage: settings.backend for stage, settings in load_recipe(recipe).measure.items()
    }
    # they have measured: no face, speech or audio was missing
    assert found["sync"].values["reason"] == "" and found["sync"].values["confidence"] is not None
    assert found["identity"].values["speakers"] == 1
    for score in ("motion.speed", "aesthetics.quality", "speech.fraction", "pose.body_share"):
        stage, _, column = score.partition(".")
        assert isinstance(found[stage].values[column], float), score
