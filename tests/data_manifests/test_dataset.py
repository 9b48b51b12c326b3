"""Dataset manifests: written the same each time, and `verify` finds every fault of a dataset."""

import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_manifests.dataset import DatasetManifest, NoDataset, ShardEntry, load, verify
from data_manifests.lineage import RecipeName
from data_manifests.sources import ManifestError
from data_manifests.storage import Storage
from tasks.shards import Sample, ShardSettings, lineage, plan_shards, write_shard

Members = list[tuple[tarfile.TarInfo, bytes]]


def make(address: str, make_clip) -> Storage:
    """Two shards, of two tiers, with three samples."""
    storage = Storage(address)
    entries = []
    for tier, starts in (("hq", [0]), ("main", [1000, 2000])):
        samples = []
        for start in starts:
            clip = make_clip(storage, start_ms=start)
            about = lineage(
                clip, uri="/f.mp4", sha256=clip.source_id + "0" * 48, audio_usable=True, audio_reason="", scores={},
                rules={}, tier=tier, recipe_name="demo", recipe_hash="abc",
            )  # fmt: skip
            buffer = io.BytesIO()
            np.save(buffer, np.zeros((clip.frames, 3), np.float16))
            storage.write_bytes(f"features/{clip.clip_id}.npy", buffer.getvalue())
            samples.append(Sample.of(clip, about, {"pose.npy": f"features/{clip.clip_id}.npy"}, 10**6))
        entries += [write_shard(plan, storage) for plan in plan_shards(samples, ShardSettings(), 0, tier)]
    DatasetManifest.of(RecipeName(name="demo", hash="abc"), "/footage", reversed(entries)).write(storage)
    return storage


@pytest.fixture
def storage(tmp_path: Path, make_clip) -> Storage:
    return make(str(tmp_path / "out"), make_clip)


def address(storage: Storage) -> str:
    return f"{storage.address}/dataset.json"


def faults(storage: Storage, deep: bool = True) -> list[str]:
    return [str(fault) for fault in verify(address(storage), deep).faults]


def entry(storage: Storage, tier: str = "main") -> ShardEntry:
    return next(shard for shard in load(address(storage)).shards if shard.tier == tier)


def rewrite(storage: Storage, change: Callable[[Members], object], file_format: int = tarfile.PAX_FORMAT) -> ShardEntry:
    """Change the members of the main shard, and let the manifest agree with the new size and checksum."""
    shard = entry(storage)
    path = Path(storage.path(shard.name))
    with tarfile.open(path) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    changed = change(members)
    members = changed if isinstance(changed, list) else members
    with tarfile.open(path, "w", format=file_format) as tar:
        for header, data in members:
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    agree(storage, shard)
    return shard


def agree(storage: Storage, shard: ShardEntry) -> None:
    data = storage.read_bytes(shard.name)
    manifest = json.loads(storage.read_bytes("dataset.json"))
    for item in manifest["shards"]:
        if item["name"] == shard.name:
            item.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    storage.write_bytes("dataset.json", json.dumps(manifest).encode())


def put(extension: str, data: bytes) -> Callable[[Members], Members]:
    """Replace that member of the first sample."""

    def change(members: Members) -> Members:
        key = members[0][0].name.partition(".")[0]
        return [(m, data if m.name == f"{key}.{extension}" else old) for m, old in members]

    return change


def edit_json(change: Callable[[dict], object]) -> Callable[[Members], Members]:
    def apply(members: Members) -> Members:
        about = json.loads(next(data for m, data in members if m.name.endswith(".json")))
        change(about)
        return put("json", json.dumps(about).encode())(members)

    return apply


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def test_an_undamaged_dataset_has_no_faults(storage: Storage, s3_folder: str, make_clip) -> None:
    for place in (storage, make(s3_folder, make_clip)):
        for deep in (True, False):
            report = verify(address(place), deep)
            assert report.ok, report.faults
            assert (report.shards, report.samples) == (2, 3)
            assert report.hours == pytest.approx(3 / 3600, abs=1e-5)


def test_the_manifest_has_the_same_bytes_each_time_and_adds_up(tmp_path: Path, storage: Storage, make_clip) -> None:
    manifest = load(address(storage))
    assert [shard.name for shard in manifest.shards] == sorted(shard.name for shard in manifest.shards)
    assert {tier: summary.samples for tier, summary in manifest.tiers.items()} == {"hq": 1, "main": 2}
    again = make(str(tmp_path / "again"), make_clip)
    assert again.read_bytes("dataset.json") == storage.read_bytes("dataset.json") == manifest.encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no such dataset manifest"),
        (b"{", "JSON"),
        (b'{"version": 2}', "version"),
        (b"\xff\xfe", "JSON"),
    ],
)
def test_a_manifest_that_cannot_be_read_says_why(storage: Storage, content: bytes | None, words: str) -> None:
    if content is None:
        Path(address(storage)).unlink()
    else:
        storage.write_bytes("dataset.json", content)
    with pytest.raises(ManifestError, match=words):
        load(address(storage))
    if content is None:  # there is nothing to verify, so no fault can be reported
        with pytest.raises(NoDataset, match=words):
            verify(address(storage))
    else:
        assert words in faults(storage)[0]


def test_a_flipped_bit_a_cut_and_a_missing_shard_are_all_found(storage: Storage) -> None:
    main, best = entry(storage, "main"), entry(storage, "hq")
    path = Path(storage.path(main.name))
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    Path(storage.path(best.name)).unlink()
    for deep in (True, False):
        found = faults(storage, deep)
        assert f"{best.name}: is not there" in found
        assert f"{main.name}: its sha256 is not the manifest's: the bytes have changed" in found
    path.write_bytes(data[: len(data) // 2])
    assert any("bytes, the manifest says" in what for what in faults(storage, deep=False))
    found = faults(storage)
    assert any("cut off" in what for what in found)
    assert any("hours, the manifest says" in what or "samples, the manifest says" in what for what in found)


def test_sums_that_do_not_add_up_are_found(storage: Storage) -> None:
    manifest = json.loads(storage.read_bytes("dataset.json"))
    manifest["shards"][0]["samples"] += 1
    manifest["shards"][1]["hours"] += 1
    storage.write_bytes("dataset.json", json.dumps(manifest).encode())
    found = " ".join(faults(storage))
    for words in ("tiers", "1 samples, the manifest says 2", "0.000556 hours, the manifest says 1.000556"):
        assert words in found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda members: [m for m in members if not m[0].name.endswith("json")], ["has no json", "has no json"]),
        (lambda members: [m for m in members if not m[0].name.endswith("mp4")], ["has no mp4", "has no mp4"]),
        (lambda members: [m for m in members if not m[0].name.endswith("flac")], ["has no flac", "has no flac"]),
        (put("json", b"{"), ["json: "]),
        (put("json", b"[" * 10**6), ["json: "]),
        (edit_json(lambda about: about.update(clip_id="other")), ["json is of another clip: 'other'"]),
        (edit_json(lambda about: about.update(tier="hq")), ["json says tier 'hq'"]),
        (edit_json(lambda about: about["clip"].update(has_audio=False)), ["has a flac"]),
        (edit_json(lambda about: about["clip"].update(width=640)), ["mp4: is 64x48"]),
        (
            edit_json(lambda about: about["clip"].update(frames=50, duration_s=2.0)),
            ["mp4: has 25 frames", "flac: has 16000", "pose.npy: has shape (25, 3)", "hours, the manifest"],
        ),
        (put("mp4", b"not a video"), ["mp4: cannot be opened"]),
        (put("mp4", b"#EXTM3U\n#EXTINF:1\nfile:///etc/passwd\n"), ["mp4: cannot be opened"]),
        (put("flac", b""), ["flac: cannot be opened"]),
        (put("pose.npy", npy(np.zeros((24, 3)))), ["pose.npy: has shape (24, 3)"]),
        (put("pose.npy", npy(np.array(1.0))), ["pose.npy: has shape ()"]),
        (put("pose.npy", npy(np.zeros((25, 3)))[:-1]), ["pose.npy: cannot be opened"]),
        (put("pose.npy", npy(np.zeros(0)).replace(b"(0,), ", b"(10**9,)")), ["pose.npy: cannot be opened"]),
        (lambda members: members + members, ["is in this shard twice"] * 2 + ["samples, ", "hours, "]),
    ],
)
def test_every_fault_of_a_sample_is_found(storage: Storage, change, words: list[str]) -> None:
    shard = rewrite(storage, change)
    found = [what for what in faults(storage) if "hours" not in what or "hours" in str(words)]
    assert all(what.startswith(shard.name) for what in found)
    assert len(found) == len(words), found
    for word in words:
        assert any(word in what for what in found), (word, found)


def test_a_key_in_two_shards_is_found(storage: Storage) -> None:
    best = entry(storage, "hq")
    with tarfile.open(storage.path(best.name)) as tar:
        extra = [(m, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    shard = rewrite(storage, lambda members: members + extra)
    key = extra[0][0].name.partition(".")[0]
    assert f"{shard.name}: {key}: is already in {best.name}" in faults(storage)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_hostile_tar_is_reported_and_has_no_effect(storage: Storage, tmp_path: Path) -> None:
    def named(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        return info

    bomb = np.empty(1, object)
    bomb[0] = Bomb(tmp_path / "exploded")
    hostile = [
        (named(str(tmp_path / "absolute.mp4")), b"x"),
        (named("../up.mp4"), b"x"),
        (named("nodot"), b"x"),
        (named("link.mp4", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (named("hard.mp4", tarfile.LNKTYPE, "/etc/passwd"), b""),
        (named("device.mp4", tarfile.CHRTYPE), b""),
        (named("n" * 90 + "\n.mp4"), b"x"),
        (named("x" * 200 + ".mp4"), b"x"),
    ]
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    rewrite(storage, put("pose.npy", pickle.dumps(Bomb(tmp_path / "exploded"))))
    assert any("pose.npy: cannot be opened" in what for what in faults(storage))
    assert not (tmp_path / "exploded").exists()
    shard = rewrite(storage, lambda members: [*put("pose.npy", npy(bomb))(members), *hostile])
    found = [what for what in faults(storage) if what.startswith(shard.name)]
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "exploded").exists()
    for words in ("absolute.mp4", "../up.mp4", "nodot", "link.mp4", "hard.mp4", "device.mp4", "@LongLink|PaxHeader"):
        assert any(word in what for what in found for word in words.split("|")), (words, found)
    assert any("pose.npy: cannot be opened: Object arrays cannot be loaded" in what for what in found)


def test_sizes_that_a_tar_claims_are_not_believed(storage: Storage) -> None:
    shard = entry(storage)
    huge = tarfile.TarInfo("x" * 16 + ".mp4")
    huge.size = 1 << 50
    sparse = tarfile.TarInfo("sparse.mp4")
    sparse.type = tarfile.GNUTYPE_SPARSE
    negative = bytearray(tarfile.TarInfo("n.mp4").tobuf(tarfile.USTAR_FORMAT))
    for content in (
        huge.tobuf(tarfile.GNU_FORMAT),
        sparse.tobuf(tarfile.GNU_FORMAT) + bytes(1024),
        bytes(negative[:124]) + b"\xff" * 12 + bytes(negative[136:]),
        b"\x01" * 512,
        gzip.compress(bytes(10**7)),
        b"",
    ):
        storage.write_bytes(shard.name, content)
        agree(storage, shard)
        assert any(what.startswith(f"{shard.name}: ") for what in faults(storage))
        assert len(faults(storage)) >= 2


def test_a_missing_dataset_is_reported_with_the_one_nearby(tmp_path: Path) -> None:
    with pytest.raises(NoDataset, match="there is no such dataset manifest"):
        verify(f"{tmp_path}/nothing/dataset.json")
    with pytest.raises(NoDataset, match=r"is a folder without a dataset\.json"):
        load(str(tmp_path))
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(NoDataset, match=f"give its dataset manifest: {tmp_path}/dataset.json"):
        load(f"{tmp_path}/")
    assert str(verify(f"{tmp_path}/dataset.json")).endswith(": 1 fault")
