"""Helpers of the loader's tests."""

import hashlib
import io
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_manifests.dataset import DatasetManifest, load
from data_manifests.storage import Storage
from training.data.batch import Batch
from training.data.loader import Loader

Members = list[tuple[tarfile.TarInfo, bytes]]


def loader(folder: Path | str, **options: Any) -> Loader:
    defaults: dict[str, Any] = {"tiers": ("main", "hq"), "frames": (33,), "batch": 8, "text_tokens": 8}
    return Loader(f"{folder}/dataset.json", **(defaults | options))


def take(loaded: Loader, count: int) -> list[Batch]:
    return list(islice(loaded, count))


def repack(folder: Path, change: Callable[[Members], Members]) -> str:
    """Change the members of the first shard, and update its size and checksum in the manifest. Returns its name."""
    manifest = load(f"{folder}/dataset.json")
    shard = manifest.shards[0]
    path = folder / shard.name
    with tarfile.open(path) as tar:
        members = [(info, b"" if (file := tar.extractfile(info)) is None else file.read()) for info in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in change(members):
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = path.read_bytes()
    changed = shard.model_copy(update={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    DatasetManifest.of(manifest.recipe, "", [changed, *manifest.shards[1:]]).write(Storage(str(folder)))
    return shard.name


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
