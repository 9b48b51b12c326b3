"""The loader on damaged and on hostile shards."""

import logging
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_manifests.dataset import load
from tasks.synthetic.puppet_shards import LATENTS, make_puppets
from tests.training.data.loading import Members, loader, npy, repack, take
from training.data.buckets import LoaderError

DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "no json": ("json", lambda data: b"{}", "json"),
    "another clip's json": ("json", lambda data: data.replace(b'"clip_id":"0', b'"clip_id":"9'), "of another clip"),
    "a pickle": ("latent.npy", lambda data: pickle.dumps({"a": 1}), "latent.npy"),
    "objects": ("latent.npy", lambda data: npy(np.array([{"a": 1}], object)), "latent.npy"),
    "a shape that claims more": ("latent.npy", lambda data: data.replace(b"(9, 64", b"(90,64"), "too many or too few"),
    "cut off": ("latent.npy", lambda data: data[:-10], "too many or too few"),
    "not a number": ("latent.npy", lambda data: data[:-2] + b"\xff\xff", "not finite"),
    "sound of other frames": ("log_mel.npy", lambda data: npy(np.zeros((5, 4, 80), np.float16)), "of 5 frames"),
    "sound of other windows": ("log_mel.npy", lambda data: npy(np.zeros((33, 5, 80), np.float16)), "windows of"),
    "doubles": ("log_mel.npy", lambda data: npy(np.zeros((33, 4, 80), np.float64)), "float64"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_sample_that_cannot_be_read_is_named_counted_and_skipped(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_puppets(tmp_path, 12, 6, samples_a_shard=6)
    extension, spoil, said = DAMAGE[damage]

    def change(members: Members) -> Members:
        changed = [(info, spoil(data) if info.name == f"{key}.{extension}" else data) for info, data in members]
        assert changed != members
        return changed

    with tarfile.open(tmp_path / load(f"{tmp_path}/dataset.json").shards[0].name) as tar:
        key = tar.getnames()[12].partition(".")[0]
    shard = repack(tmp_path, change)
    loaded = loader(tmp_path, batch=4, max_bad=0.1)
    with caplog.at_level(logging.WARNING):
        batches = take(loaded, 6)
    named = [record.getMessage() for record in caplog.records]
    assert any(shard in line and key in line and said in line for line in named), named
    assert loaded.bad >= 1
    given = [k for batch in batches for k, w in zip(batch.keys, batch.weight.tolist(), strict=True) if w]
    assert key not in given and len(set(given)) == 11
    for batch in batches:
        assert torch.isfinite(batch.latents).all() and batch.latents.flatten(1).any(1).all()
    with pytest.raises(LoaderError, match=rf"(?s)1 samples cannot be read.*max_bad.*{key}.*understudy verify"):
        take(loader(tmp_path, batch=4, max_bad=0.01), 6)


def test_a_hostile_tar_touches_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "inner" / "data"
    make_puppets(folder, 12, 6, samples_a_shard=6)

    def change(members: Members) -> Members:
        key = members[0][0].name.partition(".")[0]
        names = ("../../escaped.npy", "/escaped.npy", f"{key}/../../../escaped.mp4", "x" * 99)
        bad = [(tarfile.TarInfo(name), b"boo") for name in names]
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"{key}.latent.npy")
            info.type, info.linkname = kind, "/etc/passwd"
            bad.append((info, b""))
        return members[:6] + bad + members[6:]

    repack(folder, change)
    before = sorted(tmp_path.rglob("*"))
    loaded = loader(folder, batch=3, max_bad=1.0, latents=LATENTS)
    given = {key for batch in take(loaded, 8) for key, w in zip(batch.keys, batch.weight, strict=True) if w}
    assert len(given) >= 5
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("size", [0, 100, 512, 20_000, 100_000])
def test_a_shard_that_is_cut_off_gives_what_is_whole_and_the_rest_is_named(size: int, tmp_path: Path) -> None:
    make_puppets(tmp_path, 12, 6, samples_a_shard=6)
    shard = load(f"{tmp_path}/dataset.json").shards[0]
    os.truncate(tmp_path / shard.name, size)
    loaded = loader(tmp_path, batch=3, max_bad=0.6, cache=str(tmp_path / "cache"))
    given = [key for batch in take(loaded, 6) for key in batch.keys]
    assert len(set(given)) >= 6 and loaded.bad >= 1
    with pytest.raises(LoaderError, match=shard.name):
        take(loader(tmp_path, batch=3, max_bad=0.05, cache=str(tmp_path / "cache")), 6)


def test_a_shard_that_is_gone_is_named(tmp_path: Path) -> None:
    make_puppets(tmp_path, 6, 6)
    shard = load(f"{tmp_path}/dataset.json").shards[0]
    (tmp_path / shard.name).unlink()
    with pytest.raises(LoaderError, match=f"(?s){shard.name}.*the shard is not there"):
        take(loader(tmp_path), 1)
