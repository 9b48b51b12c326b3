"""Code beside weights: the trusted hash covers all code that would run."""

import json
from pathlib import Path

import pytest

from tasks.weights import remote_code
from tasks.weights.missing import MissingBackend
from tests import tiny_weights


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    tiny_weights.qalign(tmp_path / "qalign")
    return tmp_path / "qalign"


@pytest.mark.parametrize(
    "elsewhere",
    ["somebody/theirs--tiny_align.TinyAlign", "absent.TinyAlign", "{}/other.TinyAlign", "../other.TinyAlign"],
)
@pytest.mark.parametrize("listed", [False, True])
def test_code_from_elsewhere_is_never_trusted(folder: Path, elsewhere: str, listed: bool) -> None:
    (folder.parent / "other.py").write_text(tiny_weights.QALIGN_CODE)
    elsewhere = elsewhere.format(folder.parent)
    trusted = remote_code.digest("qalign")
    remote_code.check("qalign", "aesthetics.remote_code", trusted)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = [None, elsewhere] if listed else elsewhere
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MissingBackend, match=r"config\.json asks to run .*TinyAlign, .*`classical` serves") as refused:
        remote_code.check("qalign", "aesthetics.remote_code", trusted)
    assert elsewhere in str(refused.value)


def test_the_class_that_would_run_is_part_of_the_trusted_hash(folder: Path) -> None:
    trusted = remote_code.digest("qalign")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "tiny_align.Other"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MissingBackend, match=f"trusts {trusted}, .* it has changed"):
        remote_code.check("qalign", "aesthetics.remote_code", trusted)
