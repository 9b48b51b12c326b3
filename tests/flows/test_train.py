"""The flow `train` with a real Prefect server: each phase is a task, and can be trained and continued alone."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from data_manifests.storage import Storage
from flows.cli.exit_codes import DONE, FAILED, INTERRUPTED
from flows.cli.train import run
from flows.curves import loss_curve
from flows.parameters import TrainParameters
from tasks.synthetic.puppet_shards import LATENTS, make_puppets
from training.loop.phases import about_weights
from training.loop.tracking import read_metrics

EVERYTHING = ["video", "text", "audio"]


pytestmark = pytest.mark.usefixtures("server")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("puppets")
    make_puppets(folder, 8, frames=9)
    return folder / "dataset.json"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    phase = {"train": EVERYTHING, "steps": 2}
    training = {
        "model": "active_mind",
        "size": "debug",
        "data": {"frames": 9, "fps": 25, "batch": 4, "latents": LATENTS.model_dump()},
        "optimizer": {"learning_rate": 1e-3},
        "phases": {
            "base": {"weights": dict.fromkeys(EVERYTHING, "new"), **phase},
            "warmup": {"weights": {"video": "base", "text": "base", "audio": "base.text"}, **phase},
        },
        "run": {"log_every": 1, "sample_every": 2, "sample_steps": 1, "trackers": []},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"training": training}, sort_keys=False))
    return path


def train(dataset: Path | str, recipe: Path | str, out: Path | str, **more: Any) -> tuple[int, str]:
    """Run the flow. Returns the exit code, and the text on the console."""
    said = io.StringIO()
    parameters = TrainParameters(manifest=str(dataset), recipe=str(recipe), out=str(out), **more)
    return run(parameters, Console(file=said, width=1000)), said.getvalue()


def artifacts() -> dict[str, tuple[str, Any]]:
    """The type and the data of the newest artifact of each key."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = client.read_artifacts()
    return {
        artifact.key: (artifact.type or "", artifact.data)
        for artifact in sorted(found, key=lambda artifact: artifact.created)
        if artifact.key
    }


def described(key: str) -> str:
    """The description of the newest artifact of a key."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = [artifact for artifact in client.read_artifacts() if artifact.key == key]
    return max(found, key=lambda artifact: artifact.created).description or ""


def test_each_phase_is_a_task_that_can_be_gone_on_with_alone(
    dataset: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.client.orchestration import get_client

    out = tmp_path / "out"
    with get_client(sync_client=True) as client:
        before = {run.id for run in client.read_task_runs()}
    code, said = train(dataset, recipe, out, phases=["warmup"])
    assert code == FAILED and "train phase base first" in said
    assert train(dataset, recipe, out, phases=["base"])[0] == DONE
    assert train(dataset, recipe, out, phases=["warmup"])[0] == DONE
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["base", "warmup"]
    about = about_weights(out, "warmup")
    assert about is not None and about["step"] == 2 and about["started_from"]["audio"]["origin"] == "base.text"
    with get_client(sync_client=True) as client:
        names = [run.name for run in client.read_task_runs() if run.id not in before]
    assert sorted(names) == ["base", "warmup", "warmup"]
    # all phases are trained: nothing is trained again
    assert train(dataset, recipe, out)[0] == DONE
    assert "warmup: 2 steps (went on from step 2)" in capsys.readouterr().out


def test_loss_curve_and_samples_are_artifacts_in_the_ui(dataset: Path, recipe: Path, tmp_path: Path) -> None:
    assert train(dataset, recipe, tmp_path / "out", phases=["base"])[0] == DONE
    shown = artifacts()
    assert shown["loss-base"][0] == shown["samples-base"][0] == "image"
    assert shown["loss-base"][1].startswith("data:image/svg+xml;base64,")
    assert shown["samples-base"][1].startswith("data:image/jpeg;base64,")
    assert "| base | 2 | 0 |" in shown["training"][1]
    assert len(list((tmp_path / "out" / "base" / "samples" / "step-00000002").glob("*.mp4"))) == 1


def test_missing_guidance_in_the_shards_is_an_error_before_any_work(
    dataset: Path, recipe: Path, tmp_path: Path
) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["training"]["data"]["latents"] |= {"text": "guidance", "dim": 32}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    code, said = train(dataset, recipe, tmp_path / "out")
    assert code == FAILED and "main-00000" in said and "have no guidance.json; curate with the stage guidance" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("s3")
def test_an_error_that_the_user_can_mend_is_one_message_without_a_traceback(
    dataset: Path, recipe: Path, tmp_path: Path
) -> None:
    def refusal(*arguments: Any, **more: Any) -> str:
        code, said = train(*arguments, **more)
        assert code == FAILED and "Traceback" not in said
        return said

    assert "there is no such dataset manifest" in refusal(tmp_path / "nowhere.json", recipe, tmp_path)
    assert "no recipe of that name comes along" in refusal(dataset, "actve_mind", tmp_path)
    assert "unknown phase 'warmp'; did you mean 'warmup'?" in refusal(dataset, recipe, tmp_path, phases=["warmp"])
    assert "bucket does not exist" in refusal(dataset, recipe, "s3://no-such-bucket/out")
    assert "3 workers do not share a batch of 4 evenly; take 2 or 4" in refusal(dataset, recipe, tmp_path, workers=3)
    text = recipe.read_text().replace("fps: 25", "fps: 24")
    (tmp_path / "slow.yaml").write_text(text)
    said = refusal(dataset, tmp_path / "slow.yaml", tmp_path / "slow")
    assert f"no sample of the dataset can be used, of 8 in {dataset}: 8 (25 frames a second, not 24)" in said


def test_a_training_into_an_object_store_shows_its_samples_and_can_be_continued(
    dataset: Path, recipe: Path, s3_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(dataset, recipe, f"{s3_folder}/", phases=["base"])[0] == DONE
    assert f"{s3_folder}/base/weights" in capsys.readouterr().out
    there = Storage(f"{s3_folder}/base")
    assert {"loss.svg", "metrics.jsonl"} <= set(there.files())
    assert {name.rpartition(".")[2] for name in there.files("samples/step-00000002")} == {"mp4", "png"}
    assert f"the video: {s3_folder}/base/samples/step-00000002/" in described("samples-base")
    code, _ = train(dataset, recipe, s3_folder, phases=["warmup"])
    assert code == DONE and about_weights(s3_folder, "warmup") is not None


def test_an_interrupted_training_keeps_its_last_step_and_goes_on_from_it(
    dataset: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    from training.learners.active_mind import ActiveMindLearner

    losses = ActiveMindLearner.losses

    def interrupted(self: ActiveMindLearner, *arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return losses(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ActiveMindLearner, "losses", interrupted)
        code, said = train(dataset, recipe, tmp_path / "out")
    assert code == INTERRUPTED and "phase base was asked to end; step 1 is kept: run it again to go on" in said
    assert train(dataset, recipe, tmp_path / "out")[0] == DONE
    assert [row["step"] for row in read_metrics(tmp_path / "out" / "base" / "metrics.jsonl") if "loss" in row] == [1, 2]


def test_a_loss_curve_of_any_numbers_stays_inside_its_image() -> None:
    import xml.etree.ElementTree as ElementTree

    for points in ([(1, 2.0)], [(1, 0.0), (2, -1.0)], [(step, 1.0) for step in range(5000)]):
        line = ElementTree.fromstring(loss_curve(points, "a & b")).find("{http://www.w3.org/2000/svg}polyline")
        assert line is not None
        places = [tuple(map(float, at.split(","))) for at in line.attrib["points"].split()]
        assert 1 <= len(places) <= 400
        assert all(0 <= x <= 800 and 0 <= y <= 320 for x, y in places)


def test_a_tier_that_the_dataset_lacks_is_an_error_before_any_phase_trains(
    dataset: Path, recipe: Path, tmp_path: Path
) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["training"]["phases"]["warmup"]["tier"] = "hq"
    content["training"]["data"]["tiers"] = ["main", "hq"]
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    code, said = train(dataset, recipe, tmp_path / "out")
    assert code == FAILED
    assert "has no tier hq, which phase warmup trains on; it has main" in said
    assert not (tmp_path / "out" / "base").exists()


def test_a_phase_on_a_wide_tier_trains_when_all_samples_are_in_a_narrower_tier(recipe: Path, tmp_path: Path) -> None:
    manifest = make_puppets(tmp_path / "best", 6, frames=9, hq=1.0)
    assert list(manifest.tiers) == ["hq"]
    assert train(tmp_path / "best" / "dataset.json", recipe, tmp_path / "out", phases=["base"])[0] == DONE


def test_a_tracker_that_is_not_installed_is_an_error_before_any_phase_trains(
    dataset: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["training"]["run"]["trackers"] = ["tensorboard", "mlflow"]
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.setitem(sys.modules, "mlflow", None)
    code, said = train(dataset, recipe, tmp_path / "out")
    assert code == FAILED and "mlflow is not installed: pip install 'understudy[mlflow]', or use tensorboard" in said
    assert not (tmp_path / "out").exists()


def test_the_recipe_puppets_fits_the_shards_of_puppets() -> None:
    from training.config import load_training

    recipe = load_training("puppets")
    assert recipe.data.latents == LATENTS
    assert {phase.tier for phase in recipe.phases.values()} == {"main"}
