"""A refactor changes no fingerprint, no parameter's name, no batch and no weight (tests/golden holds the records)."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_manifests.storage import Storage
from tasks.execution.curation import Curation
from tasks.execution.worker_pool import WorkerPool
from tasks.recipe import bundled_recipes, load_recipe
from tasks.stages.base import fingerprint
from tasks.stages.registry import STAGES, upstream
from tasks.synthetic.puppet_shards import make_puppets
from tasks.weights import remote_code
from tasks.weights import store as weights
from tasks.weights.missing import MissingBackend
from tests.golden import compare, machine, record
from tests.training.data.loading import loader, take
from tests.training.learners.test_active_mind_learner import job
from training.learners.active_mind import MindAndMasks
from training.loop import phases
from training.loop.parallel import WorkerGroup
from training.loop.tracking import read_metrics
from training.loop.trainer import train_phase
from training.models.active_mind.config import SIZES, active_mind_settings

PAPERS = ("active_mind_paper", "physavatar_paper")  # whose networks need weights
CURATING = [name for name in bundled_recipes() if name not in ("puppets", *PAPERS)]
# stages whose library comes with an extra, which may be here or not
_EXTRAS = ("yolo", "paddleocr")


@pytest.fixture(scope="module")
def puppets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden puppets")
    make_puppets(folder, 24, frames=33, unusable=0.3, samples_a_shard=7)
    return folder


@pytest.mark.parametrize("name", CURATING)
def test_the_fingerprint_of_every_step(name: str, tmp_path: Path) -> None:
    with WorkerPool(1) as pool:
        curation = Curation(load_recipe(name), Storage(str(tmp_path)), [], pool)
        compare(
            f"fingerprints_{name}",
            {step.name: [step.fingerprint, step.about] for step in curation.steps.by_name.values()},
        )


@pytest.mark.parametrize("recipe", PAPERS)
def test_the_fingerprint_of_every_network_of_the_papers(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights that have one hash, whatever they are."""
    monkeypatch.setattr(weights, "digest", lambda name: f"weights of {name}")
    monkeypatch.setattr(remote_code, "digest", lambda name: f"code of {name}")
    found: dict[str, list[object]] = {}
    for name, settings in load_recipe(recipe).measure.items():
        stage = STAGES[name](settings)
        version = "" if settings.backend in _EXTRAS else _version(stage)
        above = " ".join(f"{other}:{found[other][0]}" for other in upstream(load_recipe(recipe).measure, name))
        found[name] = [fingerprint(name, stage.version, version, settings, above), version]
    compare(f"fingerprints_{recipe}", found)


def _version(stage: object) -> str:
    try:
        return stage.backend_version()  # type: ignore[attr-defined,no-any-return]
    except MissingBackend:
        return "missing"


@pytest.mark.parametrize("size", SIZES)
def test_the_name_and_shape_of_every_parameter(size: str) -> None:
    with torch.device("meta"):
        model = MindAndMasks(active_mind_settings(size, channels=16, text_dim=256))
    listed = "\n".join(f"{name} {list(value.shape)}" for name, value in model.state_dict().items())
    first, *_, last = listed.splitlines()
    found = {"count": len(model.state_dict()), "first": first, "last": last, "sha256": _sha256(listed.encode())}
    compare(f"parameters_{size}", found)


def test_the_sequence_of_batches(puppets: Path) -> None:
    batches = take(loader(puppets, batch=5, seed=3, shuffle=16), 12)
    found = [
        {
            "keys": batch.keys,
            "epochs": batch.epochs,
            "dropped": [
                [int(flag) for flag in flags]
                for flags in (batch.drop_text, batch.drop_audio, batch.drop_first, batch.drop_last)
            ],
        }
        for batch in batches
    ]
    compare("batches", found)


def test_twenty_steps_of_training(puppets: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train_phase(job(puppets, tmp_path, "base", steps=20, checkpoint_every=20), WorkerGroup())
    finally:
        torch.set_num_threads(threads)
    folder = Path(phases.phase_weights_folder(tmp_path, "base"))
    found = {
        "machine": machine(),
        "loss": [row["loss"] for row in read_metrics(tmp_path / "base" / "metrics.jsonl")],
        "sums": {
            name: float(value.double().abs().sum()) for name, value in load_file(folder / phases.AVERAGED).items()
        },
        "sha256": {name: _sha256((folder / name).read_bytes()) for name in (phases.WEIGHTS, phases.AVERAGED)},
    }
    expected = record("twenty_steps", found)
    assert len(found["loss"]) == 20
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert found["sums"] == pytest.approx(expected["sums"], rel=1e-3)
    if found["machine"] == expected["machine"]:
        assert found["sha256"] == expected["sha256"]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
