"""Published weights are found, read without running code from them, and recognised by their bytes."""

import json
import os
import pickle
import struct
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_manifests.sources import SourceRow
from data_manifests.storage import Storage
from tasks.execution.curation import Curation
from tasks.execution.worker_pool import WorkerPool
from tasks.recipe import parse_curation
from tasks.weights import store as weights
from tasks.weights.catalogue import CATALOGUE, Published
from tasks.weights.missing import MissingBackend
from tasks.weights.store import WrongWeights

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
STATE = {"conv.weight": torch.ones(4, 3), "conv.bias": torch.zeros(4)}


def expected_shapes(folder: Path) -> weights.Shapes:
    """The shapes that the network of these tests takes. Its config.json gives the width, if there is one."""
    config = folder / "config.json"
    width = json.loads(config.read_text())["width"] if config.exists() else 4
    return {"conv.weight": (width, 3), "conv.bias": (width,)}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder of a network called toy."""
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path / "weights"))
    entry = Published("toy", ("toy.safetensors|*.pth",), "https://nowhere.example/toy.pth", "MIT", 0.1, "`stand-in`")
    monkeypatch.setitem(
        CATALOGUE, "toy", Published(**{**vars(entry), "expected_shapes": f"{__name__}:expected_shapes"})
    )
    folder = tmp_path / "weights" / "toy"
    folder.mkdir(parents=True)
    return folder


class Harm:
    """Its pickle creates a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_with_the_reason_and_not_run(toy: Path, zipped: bool) -> None:
    harm = Harm(toy.parent / "harmed")
    torch.save({**STATE, "more": Namespace(more=harm)}, toy / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WrongWeights, match=r"a\.pth cannot be read as weights alone.*posix\.system") as refused:
        weights.check("toy")
    assert "\n" not in str(refused.value) and "weights_only" not in str(refused.value)
    (toy / "a.pth").write_bytes(pickle.dumps(harm))
    with pytest.raises(WrongWeights, match=r"a\.pth cannot be read as weights alone"):
        weights.check("toy")
    assert not harm.path.exists()
    os.system(harm.__reduce__()[1][0])
    assert harm.path.exists()  # the pickle would have created it


@pytest.mark.parametrize("zipped", [True, False])
def test_the_wrapping_of_a_training_script_is_removed(toy: Path, zipped: bool) -> None:
    prefixed = {f"module.{key}": value for key, value in STATE.items()}
    wrapped = {"state_dict": prefixed, "epoch": 3, "args": Namespace(rate=0.1, folders=["a"])}
    torch.save(wrapped, toy / "a.pth", _use_new_zipfile_serialization=zipped)
    weights.check("toy")
    assert weights.read(toy / "a.pth").keys() == STATE.keys()


def test_a_misfit_is_described_by_its_differences(toy: Path) -> None:
    save_file({"conv.weight": torch.ones(4, 5), "norm.bias": torch.zeros(4)}, toy / "toy.safetensors")
    with pytest.raises(WrongWeights) as refused:
        weights.check("toy")
    assert "1 missing (conv.bias); 1 left over (norm.bias); 1 of another shape (conv.weight [4, 5] for [4, 3])" in str(
        refused.value
    )
    (toy / "config.json").write_text("{}")
    with pytest.raises(WrongWeights, match="of another network than toy: KeyError: 'width'"):
        weights.check("toy")
    (toy / "config.json").unlink()
    (toy / "toy.safetensors").write_bytes(b"<html>Not found</html>")
    with pytest.raises(WrongWeights, match="cannot be read as safetensors"):
        weights.check("toy")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle_is_refused_in_one_line(toy: Path, zipped: bool) -> None:
    torch.save(STATE, toy / "a.pth", _use_new_zipfile_serialization=zipped)
    whole = (toy / "a.pth").read_bytes()
    drawn = np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[drawn.integers(0, len(whole), 8)] ^= drawn.integers(1, 256, 8, np.uint8)
        (toy / "a.pth").write_bytes(damaged.tobytes())
        try:
            weights.check("toy")  # passes where the flipped bytes are numbers of the weights, or padding
        except WrongWeights as error:
            refused += 1
            assert "a.pth" in str(error) or "those of toy" in str(error)
            assert "\n" not in str(error)
    assert refused > 10


def test_none_of_several_checkpoints_is_chosen_silently(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(STATE, toy / "a.pth")
    torch.save(STATE, toy / "b.pth")
    with pytest.raises(WrongWeights, match=r"conv\.weight is in a\.pth and in b\.pth of .*not parts of one checkpoint"):
        weights.check("toy")
    monkeypatch.setitem(CATALOGUE, "toy", replace(CATALOGUE["toy"], single=True))
    for asked in (weights.check, weights.digest):
        with pytest.raises(WrongWeights, match=r"holds 2 files of which each may be .* toy: a\.pth, b\.pth"):
            asked("toy")
    save_file(STATE, toy / "toy.safetensors")  # its own name
    weights.check("toy")


def test_only_the_header_of_safetensors_is_read(toy: Path) -> None:
    """The file claims 64 GB of numbers and is sparse."""
    header = json.dumps({"conv.weight": {"dtype": "F32", "shape": [1 << 34], "data_offsets": [0, 1 << 36]}}).encode()
    with (toy / "toy.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + (1 << 36))
    assert weights.shapes(toy / "toy.safetensors") == {"conv.weight": (1 << 34,)}


def test_all_missing_weights_are_listed_at_once(toy: Path) -> None:
    with pytest.raises(MissingBackend) as refused:
        weights.require(["toy", "raft", "toy"])
    first, second = str(refused.value).splitlines()
    for said in ("toy.safetensors or *.pth", str(toy), "weights pull toy", "nowhere.example", "`stand-in`"):
        assert said in first
    assert "raft" in second


def test_a_digest_follows_the_bytes_and_nothing_else(toy: Path) -> None:
    save_file(STATE, toy / "toy.safetensors")
    first = weights.digest("toy")
    assert len(first) == 12
    os.utime(toy / "toy.safetensors", ns=(1, 1))
    assert weights.digest("toy") == first
    (toy / "toy.safetensors").unlink()
    save_file(STATE, toy / "other name.safetensors")
    (toy / "other name.safetensors").rename(toy / "other name.pth")
    assert weights.digest("toy") == first
    save_file(STATE | {"conv.bias": torch.ones(4)}, toy / "toy.safetensors")
    assert weights.digest("toy") != first
    (toy.parent / ".digests.json").write_text("not JSON")
    assert weights.digest("toy") != first


def test_bytes_that_change_under_the_same_time_and_size_are_found(toy: Path) -> None:
    path = toy / "toy.safetensors"
    save_file(STATE, path)
    assert weights.verify("toy") == []
    status = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    (fault,) = weights.verify("toy")
    assert "other bytes than before" in fault
    weights.check("toy")  # keys and shapes are unchanged


def test_a_file_must_have_the_hash_in_its_name(toy: Path) -> None:
    torch.save(STATE, toy / "toy-20240229.pth")
    assert weights.verify("toy") == []  # a date
    right = weights.sha256(toy / "toy-20240229.pth")[:8]
    (toy / "toy-20240229.pth").rename(toy / f"toy-{right}.pth")
    assert weights.verify("toy") == []
    (toy / f"toy-{right}.pth").rename(toy / "toy-0badcafe.pth")
    (fault,) = weights.verify("toy")
    assert "its name promises 0badcafe" in fault


def test_changed_weights_are_measured_anew_and_the_same_ones_are_not(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import WhisperConfig, WhisperModel

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=64, **sizes, **_TOKENS)
    model, folder = WhisperModel(config), tmp_path / "weights" / "whisper"
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(folder.parent))
    model.save_pretrained(folder)
    section = {"clips": {"fps": 25, "short_side": 256, "min_s": 2}, "measure": {"speech": {"backend": "whisper"}}}
    recipe = parse_curation({**section, "name": "heard", "shards": {"partitions": 1}}, "here")
    rows = [SourceRow(str(world.path("talk_3s.mp4")), {}, "here")]

    with WorkerPool(workers=1) as engine:

        def curate() -> tuple[str, dict[str, int]]:
            curation = Curation(recipe, Storage(str(tmp_path / "out")), rows, engine)
            curation.steps.check()
            results = curation.run(curation.everything())
            assert not any(result.errors for result in results.values())
            return curation.steps["speech"].fingerprint, {name: result.done for name, result in results.items()}

        first, done = curate()
        assert done == {"sources": 1, "scenes": 1, "clips": 1, "speech": 1}
        os.utime(folder / "model.safetensors", ns=(1, 1))
        assert curate() == (first, {})
        model.encoder.layer_norm.bias.data += 1
        model.save_pretrained(folder)
        second, done = curate()
        assert second != first and done == {"speech": 1}
        (folder / "config.json").write_text("{")
        with pytest.raises(MissingBackend, match="of another network than whisper"):
            curate()
