"""Shards: WebDataset reads them, the same samples give the same bytes, and a shard is complete or not there."""

import hashlib
import io
import json
import math
import os
import pickle
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_manifests.dataset import ShardEntry
from data_manifests.lineage import Lineage
from data_manifests.storage import Storage
from tasks.media.clip import ClipRecord
from tasks.shards import Sample, ShardPlan, ShardSettings, lineage, plan_shards, write_shard


def lineage_of(clip: ClipRecord, value: object = 0.75) -> Lineage:
    return lineage(
        clip,
        uri="/footage/a b.mp4",
        sha256=clip.source_id + "0" * 48,
        audio_usable=False,
        audio_reason="speech: 0.1, at least 0.5",
        scores={
            "motion": {
                "backend": "dis",
                "version": "opencv 4.14",
                "fingerprint": "0123456789ab",
                "values": {"speed": value, "still": np.bool_(True), "pairs": np.int64(3), "none": np.float32("nan")},
            }
        },
        rules={"static": {"score": "motion.speed", "value": value, "max": 0.9, "passed": True}},
        tier="main",
        recipe_name="demo",
        recipe_hash="abc",
    )


def sample_of(storage: Storage, clip: ClipRecord, value: object = 0.75) -> Sample:
    feature = f"features/speech/0123456789ab/{clip.clip_id}.log_mel.npy"
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((clip.frames, 4, 80), np.float16))
    storage.write_bytes(feature, buffer.getvalue())
    size = sum(storage.size(name) for name in (clip.video, clip.audio, feature) if name)
    return Sample.of(clip, lineage_of(clip, value), {"log_mel.npy": feature}, size)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "out"))


@pytest.fixture
def samples(storage: Storage, make_clip) -> list[Sample]:
    clips = [make_clip(storage, start_ms=k * 1000, frames=10 + k, sound=k % 2 == 0) for k in range(7)]
    return [sample_of(storage, clip) for clip in clips]


def files(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read_bytes(name) for name in storage.files("shards")}


def test_plain_webdataset_reads_a_shard(storage: Storage, samples: list[Sample]) -> None:
    (plan,) = plan_shards(samples, ShardSettings(), 3, "main")
    entry = write_shard(plan, storage)
    assert (entry.samples, entry.tier, entry.partition) == (7, "main", 3)
    assert entry.hours == pytest.approx(sum(range(10, 17)) / 25 / 3600, abs=1e-6)
    read = list(webdataset.WebDataset([storage.path(entry.name)], shardshuffle=False).decode())
    assert [sample["__key__"] for sample in read] == [sample.key for sample in samples]
    first, second = read[:2]
    assert {key for key in first if not key.startswith("__")} == {"mp4", "flac", "json", "log_mel.npy"}
    assert "flac" not in second
    assert first["log_mel.npy"].shape == (10, 4, 80)
    assert first["json"]["source"] == {
        "uri": "/footage/a b.mp4",
        "source_id": "0123456789abcdef",
        "sha256": "0123456789abcdef" + "0" * 48,
        "start_s": 0.0,
        "end_s": 0.4,
    }
    assert first["json"]["metadata"] == {"caption": "une dame à la fenêtre", "licence note": "CC-BY"}
    assert first["json"]["scores"]["motion"]["values"] == {"speed": 0.75, "still": True, "pairs": 3, "none": None}


def test_webdataset_reads_from_an_object_store(s3_folder: str, make_clip, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(s3_folder)
    clips = [make_clip(storage, start_ms=k * 1000) for k in range(3)]
    (plan,) = plan_shards([sample_of(storage, clip) for clip in clips], ShardSettings(), 0, "main")
    entry = write_shard(plan, storage)
    monkeypatch.setitem(
        webdataset.gopen_schemes, "s3", lambda url, mode="rb", *_args, **_kw: fsspec.open(url, mode).open()
    )
    read = list(webdataset.WebDataset([f"{s3_folder}/{entry.name}"], shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [clip.clip_id for clip in clips]
    assert write_shard(plan, storage) == entry


def test_shards_have_the_same_bytes_for_any_number_of_workers(
    tmp_path: Path, make_clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for workers in (1, 4):
        storage = Storage(str(tmp_path / str(workers)))
        made = [sample_of(storage, make_clip(storage, start_ms=k * 1000)) for k in range(8)]
        plans = plan_shards(made, ShardSettings(max_samples=2), 0, "main")
        with ThreadPoolExecutor(workers) as threads:
            entries = list(threads.map(lambda plan, place=storage: write_shard(plan, place), plans))
        assert len(entries) == 4
        found.append(files(storage))
        monkeypatch.setattr("time.time", lambda: 4e9)
    assert found[0] == found[1]
    names = [name for name in found[0] if name.endswith(".tar")]
    with tarfile.open(fileobj=io.BytesIO(found[0][names[0]])) as tar:
        member = tar.getmembers()[0]
    assert (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode) == (0, 0, 0, "", "", 0o644)


def test_a_finished_shard_is_never_written_again(storage: Storage, samples: list[Sample]) -> None:
    plan = plan_shards(samples, ShardSettings(), 0, "main")[0]
    entry = write_shard(plan, storage)
    path = Path(storage.path(plan.name))
    before = path.stat()
    assert write_shard(plan, storage) == entry
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("damage", ["no entry", "no tar", "cut tar", "cut entry"])
def test_a_shard_that_a_kill_or_a_broken_disk_damaged_is_written_again(
    storage: Storage, samples: list[Sample], damage: str
) -> None:
    plan = plan_shards(samples, ShardSettings(), 0, "main")[0]
    write_shard(plan, storage)
    undisturbed = files(storage)
    tar = Path(storage.path(plan.name))
    victim = tar if damage.endswith("tar") else tar.with_suffix(".json")
    if damage.startswith("no"):
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:100])
    write_shard(plan, storage)
    assert files(storage) == undisturbed


def test_no_shard_is_written_when_a_file_is_missing_or_has_grown(storage: Storage, samples: list[Sample]) -> None:
    plan = plan_shards(samples, ShardSettings(), 0, "main")[0]
    video = Path(storage.path(samples[-1].files[0][1]))
    whole = video.read_bytes()
    video.write_bytes(whole * 2)
    with pytest.raises(ValueError, match=samples[-1].key):
        write_shard(plan, storage)
    video.unlink()
    with pytest.raises(FileNotFoundError):
        write_shard(plan, storage)
    assert not list(Path(storage.path("shards")).iterdir())


def test_a_shard_is_complete_or_not_there_after_a_kill(storage: Storage, samples: list[Sample]) -> None:
    plan = plan_shards(samples, ShardSettings(), 0, "main")[0]
    video = Path(storage.path(samples[-1].files[0][1]))
    kept = video.rename(video.with_suffix(".kept"))
    os.mkfifo(video)  # the writer blocks here, after it has written most of the shard
    code = "import pickle, sys; from tasks.shards import write_shard; write_shard(*pickle.load(sys.stdin.buffer))"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=Path(__file__).parents[2]) as writer:
        assert writer.stdin
        writer.stdin.write(pickle.dumps((plan, storage)))
        writer.stdin.close()
        shards = Path(storage.path("shards"))
        deadline = time.monotonic() + 60
        while not list(shards.glob(".*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        writer.kill()
    assert [path.suffix for path in shards.iterdir()] == [".tmp"]
    kept.replace(video)
    storage.sweep(["shards"])
    entry = write_shard(plan, storage)
    assert hashlib.sha256(storage.read_bytes(plan.name)).hexdigest() == entry.sha256
    assert len(list(shards.iterdir())) == 2


def fake(key: str, size: int, about: bytes = b"{}") -> Sample:
    return Sample(key, (("mp4", f"clips/{key}.mp4"),), about, size, 1.0)


@given(
    st.lists(st.integers(0, 400_000), max_size=60),
    st.integers(1, 20),
    st.floats(0.02, 2.0),
)
@settings(deadline=None)
def test_every_sample_is_in_one_shard_and_none_is_over_its_bound(
    sizes: list[int], max_samples: int, max_mb: float
) -> None:
    samples = [fake(f"k{number:04d}", size) for number, size in enumerate(sizes)]
    plans = plan_shards(iter(samples), ShardSettings(max_samples=max_samples, max_mb=max_mb), 1, "hq")
    assert [sample for plan in plans for sample in plan.samples] == samples
    assert len({plan.name for plan in plans}) == len(plans)
    for plan in plans:
        blocks = sum(sum(512 + math.ceil(size / 512) * 512 for size in (s.size, len(s.lineage))) for s in plan.samples)
        tar_bytes = math.ceil((blocks + 1024) / 10240) * 10240
        assert len(plan.samples) == 1 or (tar_bytes <= max_mb * 1e6 and len(plan.samples) <= max_samples)


def test_written_shards_stay_within_the_bound(storage: Storage, samples: list[Sample]) -> None:
    plans = plan_shards(samples, ShardSettings(max_mb=0.06), 0, "main")
    assert 1 < len(plans) < len(samples)
    assert all(write_shard(plan, storage).bytes <= 60_000 for plan in plans)


def names(plans: list[ShardPlan]) -> list[str]:
    return [plan.name for plan in plans]


def test_a_shards_name_depends_on_its_contents(storage: Storage, make_clip) -> None:
    samples = [fake(f"k{number}", 10) for number in range(6)]
    two = ShardSettings(max_samples=2)
    plans = names(plan_shards(samples, two, 7, "main"))
    assert plans[0].startswith("shards/main-00007-000000-")
    assert names(plan_shards(list(samples), two, 7, "main")) == plans
    for other in (fake("k3", 10, b"{1}"), fake("k3", 11), fake("k3x", 10)):
        changed = names(plan_shards([*samples[:3], other, *samples[4:]], two, 7, "main"))
        assert [a == b for a, b in zip(plans, changed, strict=True)] == [True, False, True]
    clip = make_clip(storage)
    features = ({"a.npy": "features/x.npy"}, {})
    with_feature, without = (Sample.of(clip, lineage_of(clip), files, 1) for files in features)
    assert names(plan_shards([with_feature], two, 0, "hq")) != names(plan_shards([without], two, 0, "hq"))


def test_unsorted_samples_and_names_that_webdataset_would_misread_are_refused(storage: Storage, make_clip) -> None:
    for keys in (["b", "a"], ["a", "a"]):
        with pytest.raises(ValueError, match="sorted"):
            plan_shards([fake(key, 1) for key in keys], ShardSettings(), 0, "main")
    clip = make_clip(storage)
    for array in ("Log_mel", "log.mel", "../x", "", "x" * 60):
        with pytest.raises(ValueError, match="cannot name"):
            Sample.of(clip, lineage_of(clip), {f"{array}.npy": "x"}, 1)
    with pytest.raises(ValueError, match="tier"):
        plan_shards([], ShardSettings(), 0, "../main")


def test_the_same_lineage_has_the_same_bytes_and_never_holds_nan(storage: Storage, make_clip) -> None:
    clip = make_clip(storage)
    for value in (float("nan"), float("inf"), np.float64("nan"), None):
        encoded = lineage_of(clip, value).encode()
        assert json.loads(encoded)["rules"]["static"]["value"] is None
        assert encoded == lineage_of(clip, value).encode()
    assert Lineage.model_validate_json(encoded).encode() == encoded
    with pytest.raises(ValueError, match=clip.clip_id):
        lineage(
            clip, uri="", sha256="", audio_usable=True, audio_reason="", scores={"motion": {}}, rules={}, tier="main",
            recipe_name="", recipe_hash="",
        )  # fmt: skip


def test_entry_names_stay_inside_the_folder() -> None:
    good = {"sha256": "0" * 64, "bytes": 1, "samples": 1, "hours": 0.0, "tier": "main", "partition": 0}
    for name in ("../x.tar", "/x.tar", "a/../x.tar", "a//x.tar", "s3://b/x.tar", "x.zip", "x.tar\n", ".x.tar"):
        with pytest.raises(ValueError, match="name"):
            ShardEntry(name=name, **good)
