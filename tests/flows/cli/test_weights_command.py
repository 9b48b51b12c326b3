"""`understudy weights`, and a curation whose weights are missing."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import Result
from typer.testing import CliRunner

from flows.cli.main import app
from tasks.networks.raft import expected_shapes
from tasks.weights.catalogue import CATALOGUE

CLIPS = {"fps": 25, "short_side": 256}
Run = Callable[..., Result]


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture
def run(weights: Path) -> Run:
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def raft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raft") / "raft-things.pth"
    torch.save({key: torch.zeros(shape) for key, shape in expected_shapes(path.parent).items()}, path)
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with two backends that need weights."""
    measure = {"speech": {"backend": "whisper"}, "pose": {"backend": "xpose"}, "motion": {"backend": "dis"}}
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({"curation": {"clips": CLIPS, "measure": measure}}, sort_keys=False))
    return path


def test_the_list_shows_backends_files_licence_and_whether_weights_are_here(
    run: Run, weights: Path, raft: Path
) -> None:
    lines = {line.split()[0]: line for line in run("weights", "list").stdout.splitlines() if line.strip()}
    assert CATALOGUE.keys() <= lines.keys()
    for cell in ("speech: whisper", "config.json", "3.10 GB", "MIT", "missing", "hf://openai/whisper-large-v3"):
        assert cell in lines["whisper"]
    assert str(weights) in lines["weights"]
    (weights / "whisper").mkdir(parents=True)
    (weights / "whisper" / "config.json").write_text("{}")
    assert run("weights", "pull", "raft", "--from", raft).exit_code == 0
    lines = {line.split()[0]: line for line in run("weights", "list").stdout.splitlines() if line.strip()}
    assert "incomplete" in lines["whisper"] and str(weights / "whisper") in lines["whisper"]
    assert "present" in lines["raft"] and str(weights / "raft") in lines["raft"]


def test_a_check_reports_weights_that_fit_are_missing_or_do_not_fit(run: Run, weights: Path, raft: Path) -> None:
    nothing = run("weights", "check")
    assert nothing.exit_code == 0 and "no weights are here" in nothing.stdout
    assert run("weights", "pull", "raft", "--from", raft).exit_code == 0
    fits = run("weights", "check")
    assert fits.exit_code == 0 and fits.stdout.startswith("raft: fits, 0.02 GB, ")
    both = run("weights", "check", "raft", "i3d")
    assert both.exit_code == 2 and both.stdout == fits.stdout
    assert both.stderr.startswith("i3d: weights of i3d are missing") and both.stderr.count("\n") == 1
    torch.save({"fnet.conv1.weight": torch.zeros(2)}, weights / "raft" / "raft-things.pth")
    wrong = run("weights", "check", "raft", "--quick")
    assert wrong.exit_code == 2 and "178 missing" in wrong.stderr and "[2] for [64, 3, 7, 7]" in wrong.stderr


def test_a_check_of_a_recipe_covers_all_weights_that_it_needs(run: Run, recipe: Path) -> None:
    checked = run("weights", "check", "--recipe", recipe)
    assert checked.exit_code == 2
    assert [line.split(":")[0] for line in checked.stderr.splitlines()] == ["whisper", "xpose"]
    assert run("weights", "check", "--recipe", "demo").exit_code == 0
    assert "no recipe of that name" in run("weights", "check", "--recipe", "dem").stderr


@pytest.mark.parametrize("command", ["check", "pull"])
def test_an_unknown_network_is_refused_with_the_most_similar_name(run: Run, command: str) -> None:
    refused = run("weights", command, "rafft")
    assert refused.exit_code == 2 and "did you mean 'raft'?" in refused.stderr


def test_understudy_models_is_refused_and_names_understudy_weights(run: Run) -> None:
    refused = run("models", "list")
    assert refused.exit_code == 2 and "understudy weights" in refused.stderr
    assert not refused.stdout


def test_one_failed_pull_is_reported_and_the_others_go_on(
    run: Run, weights: Path, raft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The licence is shown even when nothing can be fetched."""
    monkeypatch.setitem(CATALOGUE, "raft", dataclasses.replace(CATALOGUE["raft"], source=str(raft)))
    missing = str(tmp_path / "unipose_swint.pth")
    monkeypatch.setitem(CATALOGUE, "xpose", dataclasses.replace(CATALOGUE["xpose"], source=missing))
    pulled = run("weights", "pull", "xpose", "raft")
    assert pulled.exit_code == 2 and (weights / "raft").is_dir() and not (weights / "xpose").exists()
    assert "non-commercial" in pulled.stderr and "nothing is there" in pulled.stderr


def test_a_curation_with_missing_weights_fails_before_any_work_and_names_all_of_them(
    run: Run, recipe: Path, world, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused = run("curate", world.path("talk_3s.mp4").parent, "--recipe", recipe, "--out", out)
    assert refused.exit_code == 2 and not out.exists()
    lines = refused.stderr.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: weights of whisper are missing: ")
    assert lines[1].startswith("weights of xpose are missing: ") and "pose's backend `landmarks` serves" in lines[1]
