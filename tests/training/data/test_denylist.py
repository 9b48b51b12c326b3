"""Clips that a denylist names are left out, also where it has grown since the run that is resumed."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from data_manifests.dataset import DatasetManifest
from data_manifests.storage import Storage
from tasks.synthetic.puppet_shards import make_puppets
from tests.training.data.loading import loader
from training.data.buckets import LoaderError
from training.data.loader import Loader, read_denylist


@pytest.fixture(scope="module")
def puppets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Puppets of two lengths."""
    folder = tmp_path_factory.mktemp("puppets")
    parts = [make_puppets(folder, 20, 1, samples_a_shard=9), make_puppets(folder, 10, 2, frames=65, samples_a_shard=6)]
    shards = [shard for part in parts for shard in part.shards]
    DatasetManifest.of(parts[0].recipe, "puppets", shards).write(Storage(str(folder)))
    return folder


def test_clips_that_the_denylist_names_are_left_out(puppets: Path, tmp_path: Path) -> None:
    keys = [key for batch in islice(loader(puppets), 4) for key in batch.keys]
    denied = tmp_path / "denied.txt"
    denied.write_text(f"# not these\n{keys[0]}  # a comment\n\n{keys[5]}\nnobody\n")
    assert read_denylist(str(denied)) == {keys[0], keys[5], "nobody"}
    loaded = loader(puppets, denied=read_denylist(str(denied)))
    kept = [key for batch in islice(loaded, 4) for key in batch.keys]
    assert not {keys[0], keys[5]} & set(kept)
    assert loaded.left_out["named in the denylist"] >= 2
    with pytest.raises(LoaderError, match=r"the denylist .*absent\.txt cannot be read"):
        read_denylist(str(tmp_path / "absent.txt"))


def test_a_clip_that_waits_for_its_batch_can_be_denied_on_resuming(puppets: Path) -> None:
    loaded = loader(puppets, frames=(33, 65), batch=7)  # two lengths, so that clips of one wait while the other is full
    batches = iter(loaded)
    while not loaded.state_dict()["pending"]:
        next(batches)
    batches.close()
    waiting = {key for batch in islice(resumed(puppets, loaded), 4) for key in batch.keys}
    for key in sorted(waiting):
        kept = [k for batch in islice(resumed(puppets, loaded, denied=[key]), 4) for k in batch.keys]
        assert key not in kept


def resumed(puppets: Path, loaded: Loader, **settings: Any) -> Loader:
    again = loader(puppets, frames=(33, 65), batch=7, **settings)
    again.load_state_dict(loaded.state_dict())
    return again
