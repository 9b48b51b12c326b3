"""The index of a shard."""

import gc
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_manifests.storage import Storage
from tasks.synthetic.puppet_shards import make_puppets
from training.data.shard_index import read_index


class Rubbish:
    """What only the garbage collector removes. Its removal lets another thread run."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        time.sleep(0)


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads take turns as often as they can, in the midst of collecting garbage, too."""
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(20)
    sys.setswitchinterval(1e-6)
    yield
    gc.set_threshold(*threshold)
    sys.setswitchinterval(interval)


def test_threads_that_read_indexes_do_not_meet_in_pythons_parser(tmp_path: Path, hasty_threads: None) -> None:
    manifest = make_puppets(tmp_path, 8)
    storage = Storage(str(tmp_path))

    def read(_: int) -> list[str]:
        Rubbish()
        return [entry.fault for shard in manifest.shards for entry in read_index(storage, shard, None).entries]

    with ThreadPoolExecutor(4) as pool:
        assert {fault for faults in pool.map(read, range(100)) for fault in faults} == {""}
