"""Latents that shards lack."""

import threading
from pathlib import Path

import pytest
import torch

from tasks.synthetic.puppet_shards import LATENTS, make_puppets
from tests.training.data.loading import loader, take
from training.data.buckets import LoaderError


def test_latents_that_shards_lack_are_made_once_and_kept(tmp_path: Path) -> None:
    make_puppets(tmp_path / "with", 10, 4)
    make_puppets(tmp_path / "without", 10, 4, latents=None)
    cache = tmp_path / "cache"
    wanted = {
        int(key[:6]): row
        for batch in take(loader(tmp_path / "with", batch=5), 2)
        for key, row in zip(batch.keys, zip(batch.latents, batch.text, strict=True), strict=True)
    }

    def check() -> None:
        made = loader(tmp_path / "without", batch=5, latents=LATENTS, cache=str(cache))
        for batch in take(made, 2):
            for key, latent, text in zip(batch.keys, batch.latents, batch.text, strict=True):
                assert torch.equal(latent, wanted[int(key[:6])][0])
                assert torch.equal(text, wanted[int(key[:6])][1])
        for thread in threading.enumerate():  # threads that still make batches which were not taken
            if thread.name.startswith("loader"):
                thread.join()

    check()
    kept = sorted(cache.rglob("*.latent.npy"))
    assert len(kept) == 10
    times = [path.stat().st_mtime_ns for path in kept]
    kept[3].write_bytes(kept[3].read_bytes()[:100])  # as if the disk had been full
    check()
    again = [path.stat().st_mtime_ns for path in kept]
    assert [a == b for a, b in zip(times, again, strict=True)] == [number != 3 for number in range(10)]
    with pytest.raises(LoaderError, match=r"no latent\.npy and text_embedding\.npy, and no codec"):
        take(loader(tmp_path / "without"), 1)
    other = LATENTS.model_copy(update={"channels": 16})
    (batch,) = take(loader(tmp_path / "with", batch=5, latents=other), 1)
    assert batch.latents.shape[1] == 16  # not the shards' own latents, which have other channels
