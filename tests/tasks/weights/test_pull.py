"""Weights from a web server and an object store: complete or not at all, going on where a download broke off."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data_manifests.storage import Storage
from tasks.networks.raft import expected_shapes
from tasks.weights.catalogue import CATALOGUE, Published
from tasks.weights.missing import MissingBackend
from tasks.weights.pull import PullError, pull
from tasks.weights.store import WrongWeights, sha256

BLOCK = 8 << 20

Serve = Callable[..., tuple[str, Callable[[], list[tuple[str, int]]]]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights folder. The catalogue has a network "toy" with two sources, and a network "packed" with a zip."""
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path / "weights"))
    sources = {"model": "memory://nothing/model", "tokenizer": "memory://nothing/tokenizer"}
    files = ("model/*.safetensors|model/*.pth", "tokenizer/words.json")
    toy = Published("toy", files, sources, "MIT", 0.1, "`stand-in`", also=("model/*.index.json",))
    packed = Published("packed", ("models/*/*.onnx",), {"models/pack": "memory://nothing.zip"}, "MIT", 0.1, "`no`")
    monkeypatch.setitem(CATALOGUE, "toy", toy)
    monkeypatch.setitem(CATALOGUE, "packed", packed)
    return tmp_path / "weights"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The files of the network "toy", as their source has them."""
    there = tmp_path / "published"
    for sub in ("model", "tokenizer"):
        (there / sub).mkdir(parents=True)
    for part in (1, 2):
        save_file({f"layer{part}": torch.ones(1000)}, there / "model" / f"model-{part}-of-2.safetensors")
    (there / "model" / "model.safetensors.index.json").write_text("{}")
    (there / "model" / "readme.md").write_text("not asked for")
    (there / "tokenizer" / "words.json").write_text("{}")
    return there


@pytest.fixture(scope="module")
def raft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with RAFT's size, layout and name: 21 MB, three blocks."""
    path = tmp_path_factory.mktemp("raft") / "raft-things.pth"
    torch.save({f"module.{key}": torch.zeros(shape) for key, shape in expected_shapes(path.parent).items()}, path)
    return path


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a web server on a folder. Returns its address and a function that lists the requests: path, first byte."""
    servers: list[subprocess.Popen[str]] = []

    def start(there: Path, *options: object) -> tuple[str, Callable[[], list[tuple[str, int]]]]:
        script = Path(__file__).with_name("file_server.py")
        command = [sys.executable, str(script), str(there), *map(str, options)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        servers.append(server)
        assert server.stdout is not None
        port = server.stdout.readline().strip()

        def asked() -> list[tuple[str, int]]:
            server.kill()
            assert server.stdout is not None
            return [(path, int(first)) for path, first in (line.split() for line in server.stdout)]

        return f"http://127.0.0.1:{port}", asked

    yield start
    for server in servers:
        server.kill()
        server.wait()


def left(folder: Path) -> list[str]:
    """Files in the weights folder, locks left out."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.endswith(".lock"))


def test_a_killed_pull_shows_nothing_and_goes_on_from_its_last_block(folder: Path, raft: Path, serve: Serve) -> None:
    slow, asked_first = serve(raft.parent, "--rate", 40e6)
    command = [sys.executable, "-m", "flows.cli.main", "weights", "pull", "raft", "--from"]
    part = folder / ".pulling" / "raft" / "parts" / "raft-things.pth.part"
    with subprocess.Popen([*command, f"{slow}/raft-things.pth"], stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (part.exists() and part.stat().st_size >= BLOCK):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    there = part.stat().st_size
    assert BLOCK <= there < raft.stat().st_size and not (folder / "raft").exists()
    assert asked_first()[0] == ("/raft-things.pth", 0)

    address, asked = serve(raft.parent, "--port", slow.rpartition(":")[2])
    done = subprocess.run([*command, f"{address}/raft-things.pth"], capture_output=True, text=True)
    assert done.returncode == 0 and str(folder / "raft") in done.stdout, done.stderr
    assert (folder / "raft" / "raft-things.pth").read_bytes() == raft.read_bytes()
    assert [first for _, first in asked()] == list(range(there, raft.stat().st_size, BLOCK))
    assert left(folder) == ["raft/raft-things.pth"]


def test_a_download_goes_on_after_its_connection_breaks(folder: Path, raft: Path, serve: Serve) -> None:
    """Every second answer breaks off, so each block takes two requests."""
    address, asked = serve(raft.parent, "--breaks", 3 << 20, "--every", 2)
    seen: list[tuple[str, int, int]] = []
    pull("raft", f"{address}/raft-things.pth", lambda *step: seen.append(step))
    size = raft.stat().st_size
    assert seen == [("raft-things.pth", min(at + BLOCK, size), size) for at in range(0, size, BLOCK)]
    assert [first for _, first in asked()] == [at for at in range(0, size, BLOCK) for _ in range(2)]
    assert sha256(folder / "raft" / "raft-things.pth") == sha256(raft)


def test_a_connection_that_always_breaks_is_given_up(
    folder: Path, raft: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = serve(raft.parent, "--breaks", 3 << 20)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(PullError, match="broke off at 0 bytes"):
        pull("raft", f"{address}/raft-things.pth")
    assert len(asked()) == 5 and not (folder / "raft").exists()


def test_a_server_that_knows_no_ranges_gives_the_whole_file(folder: Path, raft: Path, serve: Serve) -> None:
    address, _ = serve(raft.parent, "--whole")
    pull("raft", f"{address}/raft-things.pth?id=7#raft-kitti.pth")
    assert sha256(folder / "raft" / "raft-kitti.pth") == sha256(raft)


def test_a_file_that_changes_at_its_source_is_fetched_anew(folder: Path, raft: Path, tmp_path: Path) -> None:
    source = tmp_path / "raft-things.pth"
    shutil.copy(raft, source)

    def stop(name: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("raft", str(source), stop)
    changed = {key: torch.ones(shape) for key, shape in expected_shapes(tmp_path).items()}
    torch.save(changed, source)
    pull("raft", str(source))
    assert (folder / "raft" / "raft-things.pth").read_bytes() == source.read_bytes()


def test_names_in_a_bucket_do_not_lead_out_of_the_folder(
    folder: Path, published: Path, s3: Any, s3_folder: str
) -> None:
    store = Storage(s3_folder)
    for path in sorted(published.rglob("*.*")):
        store.write_bytes(path.relative_to(published).as_posix(), path.read_bytes())
    import boto3

    key = f"{s3_folder.removeprefix(s3.address)}/model/../../../escaped.safetensors".lstrip("/")
    boto3.client("s3").put_object(Bucket=s3.bucket, Key=key, Body=b"harm")
    assert pull("toy", s3_folder) == folder / "toy"
    wanted = ["model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"]
    assert left(folder) == [*(f"toy/model/{name}" for name in wanted), "toy/tokenizer/words.json"]
    assert not list(folder.parent.rglob("escaped*"))


def test_from_a_list_of_files_on_the_web(folder: Path, published: Path, serve: Serve) -> None:
    address, asked = serve(published)
    pull("toy", address)
    assert left(folder)[-1] == "toy/tokenizer/words.json" and len(left(folder)) == 4
    assert "/model/readme.md" not in [path for path, _ in asked()]


def test_files_from_a_hub_must_have_the_hash_that_the_hub_gives(folder: Path, raft: Path, serve: Serve) -> None:
    def pull_from(hash_told: str, address: str) -> subprocess.CompletedProcess[str]:
        hub, _ = serve(raft.parent, "--hub", hash_told)
        command = [sys.executable, "-m", "flows.cli.main", "weights", "pull", "raft", "--from", address]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_ENDPOINT": hub})

    other = pull_from("0" * 64, "hf://org/repo/raft-things.pth")
    assert other.returncode == 2 and "its sha256 is not the one that its source gives" in other.stderr
    assert not (folder / "raft").exists()
    right = pull_from(sha256(raft), "hf://org/repo")
    assert right.returncode == 0, right.stderr
    assert (folder / "raft" / "raft-things.pth").read_bytes() == raft.read_bytes()


def test_two_sources_go_to_their_subfolders(folder: Path, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {sub: str(published / sub) for sub in ("model", "tokenizer")}
    monkeypatch.setitem(CATALOGUE, "toy", Published(**{**vars(CATALOGUE["toy"]), "source": sources}))
    assert pull("toy") == pull("toy") == folder / "toy"
    assert (folder / "toy" / "tokenizer" / "words.json").read_text() == "{}"
    (published / "tokenizer" / "words.json").unlink()
    shutil.rmtree(folder / "toy")
    with pytest.raises(MissingBackend, match=r"does not have tokenizer/words\.json, which toy needs"):
        pull("toy")
    with pytest.raises(PullError, match="nothing is there"):
        pull("toy", str(published / "elsewhere"))
    assert left(folder) == []


def test_weights_that_do_not_fit_are_not_kept(folder: Path, raft: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "raft-sintel.pth"
    torch.save({"fnet.conv1.weight": torch.zeros(32, 3, 7, 7)}, wrong)
    with pytest.raises(WrongWeights, match=r"is not raft, and nothing of it is kept: 178 missing .*another shape"):
        pull("raft", str(wrong))
    wrong.write_bytes(b"<html>not found</html>")
    with pytest.raises(WrongWeights, match="is not raft, and nothing of it is kept"):
        pull("raft", str(wrong))
    assert left(folder) == []
    (folder / "raft").mkdir()
    (folder / "raft" / "mine.pth").write_bytes(b"my own")
    with pytest.raises(WrongWeights, match=r"is not empty.*is left as it is"):
        pull("raft", str(raft))
    assert (folder / "raft" / "mine.pth").read_bytes() == b"my own"


def test_a_zip_cannot_choose_where_its_files_go(folder: Path, tmp_path: Path) -> None:
    def pack(*members: tuple[str, bytes], link: str = "") -> str:
        with zipfile.ZipFile(tmp_path / "pack.zip", "w") as packed:
            for name, content in members:
                packed.writestr(name, content)
            if link:
                about = zipfile.ZipInfo(link)
                about.external_attr = (stat.S_IFLNK | 0o777) << 16
                packed.writestr(about, "/etc/passwd")
        return str(tmp_path / "pack.zip")

    harmful = [("../../../up.onnx", b"1"), ("/root.onnx", b"2"), ("inside/deep/in.onnx", b"3"), ("notes.txt", b"4")]
    pull("packed", pack(*harmful, ("..", b"5"), link="linked.onnx"))
    assert left(folder) == [f"packed/models/pack/{name}.onnx" for name in ("in", "root", "up")]
    assert not list(tmp_path.glob("*.onnx"))
    shutil.rmtree(folder / "packed")
    with pytest.raises(WrongWeights, match=r"holds a\.onnx twice"):
        pull("packed", pack(("a.onnx", b"1"), ("b/a.onnx", b"2")))
    with pytest.raises(WrongWeights, match=r"models/\*/\*\.onnx is not in it"):
        pull("packed", pack(("notes.txt", b"4")))
    (tmp_path / "pack.zip").write_bytes(b"<html>not found</html>")
    with pytest.raises(WrongWeights, match="cannot be unpacked"):
        pull("packed", str(tmp_path / "pack.zip"))
    assert left(folder) == []


def test_a_download_larger_than_the_disk_is_not_begun(folder: Path, published: Path) -> None:
    with (published / "model" / "model-3.safetensors").open("wb") as file:
        file.truncate(shutil.disk_usage(published).total)
    with pytest.raises(PullError, match="do not fit on the disk"):
        pull("toy", str(published))
