"""How fast the loader is, compared with reading the same tars with `tarfile`: `python -m benchmarks.loader`.

Each round reads everything both ways, in turn, from the page cache. The best round counts. There are two datasets:
puppets, whose tiny samples show the cost of each sample; and clips of 5 s at 512 x 512, whose cost is that of reading
latents. `delivered` counts all bytes of the tars whose samples were delivered. `taken` counts only the bytes that went
into batches: the loader does not read a video if the sample has latents.
"""

import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from benchmarks.curate import table
from data_manifests.dataset import DatasetManifest, load
from data_manifests.lineage import RecipeName
from data_manifests.storage import Storage
from tasks.media.clip import ClipRecord
from tasks.shards import Sample, ShardSettings, lineage, plan_shards, write_shard
from tasks.synthetic.puppet_shards import make_puppets
from training.data.loader import Loader

ROUNDS = 5


def large_clips(folder: Path, count: int) -> None:
    """Write samples as large as real ones: 5 s at 24 frames a second, 512 x 512. Their contents are noise."""
    storage, random = Storage(str(folder)), np.random.default_rng(0)
    frames, samples = 121, []
    arrays = {
        "latent": random.standard_normal((31, 16, 64, 64)).astype(np.float16),
        "log_mel": random.standard_normal((frames, 5, 80)).astype(np.float16),
        "pose": random.standard_normal((frames, 4, 256)).astype(np.float16),
        "text_embedding": random.standard_normal((40, 256)).astype(np.float16),
    }
    for number in range(count):
        name = f"{number:016x}"
        record = ClipRecord(name, name, 0.0, 5.04, 24, frames, 512, 512, f"{name}.mp4", f"{name}.flac")
        contents = {record.video: random.bytes(2_000_000), record.audio: random.bytes(100_000)}
        for array_name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            contents[f"{name}.{array_name}.npy"] = buffer.getvalue()
        for file, data in contents.items():
            storage.write_bytes(file, data)
        about = lineage(
            record,
            uri=name,
            sha256=name * 4,
            audio_usable=True,
            audio_reason="",
            scores={},
            rules={},
            tier="main",
            recipe_name="benchmark",
            recipe_hash="0",
        )
        files = {f"{array_name}.npy": f"{name}.{array_name}.npy" for array_name in arrays}
        samples.append(Sample.of(record, about, files, sum(map(len, contents.values()))))
    plans = plan_shards(samples, ShardSettings(max_mb=100), 0, "main")
    entries = [write_shard(plan, storage) for plan in plans]
    DatasetManifest.of(RecipeName(name="benchmark", hash="0"), "noise", entries).write(storage)


def read_by_tarfile(folder: Path) -> None:
    for shard in load(f"{folder}/dataset.json").shards:
        with tarfile.open(folder / shard.name, "r|") as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                file.read()


class Epochs:
    """A loader that delivers one epoch at each call. The index of the shards exists before the first call."""

    def __init__(self, folder: Path, frames: int, batch: int, cache: Path) -> None:
        loader = Loader(f"{folder}/dataset.json", tiers=("main",), frames=(frames,), batch=batch, cache=str(cache))
        self.samples, self._batches = loader.samples, iter(loader)
        self._steps = self.samples // batch
        self.taken = 0
        self()

    def __call__(self) -> None:
        self.taken = 0
        for batch in islice(self._batches, self._steps):
            tensors = (batch.latents, batch.audio, batch.text[batch.text_mask])
            self.taken += sum(2 * tensor.numel() for tensor in tensors)  # stored with 16 bits

    def close(self) -> None:
        self._batches.close()


def best(*work: Callable[[], None]) -> list[tuple[float, float]]:
    """The least (wall, CPU) seconds of each piece of work over all rounds. The pieces take turns."""
    times: list[list[tuple[float, float]]] = [[] for _ in work]
    for _ in range(ROUNDS):
        for one, taken in zip(work, times, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            one()
            taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    return [(min(wall for wall, _ in taken), min(cpu for _, cpu in taken)) for taken in times]


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as name:
        root = Path(name)
        make_puppets(root / "puppets", 480)
        large_clips(root / "clips", 64)
        for what, frames, batch in (("puppets", 33, 16), ("clips", 121, 4)):
            folder = root / what
            size = sum(shard.bytes for shard in load(f"{folder}/dataset.json").shards) / 1e6
            epoch = Epochs(folder, frames, batch, root / "cache")
            (tar_wall, tar_cpu), (wall, cpu) = best(lambda folder=folder: read_by_tarfile(folder), epoch)  # type: ignore[misc]
            epoch.close()
            rows.append(
                [
                    f"{what} ({size / epoch.samples:.2f} MB each)",
                    f"{size / tar_wall:.0f}",
                    f"{size / wall:.0f}",
                    f"{epoch.taken / 1e6 / wall:.0f}",
                    f"{tar_wall / wall:.0%}",
                    f"{tar_cpu / cpu:.0%}",
                ]
            )
    table(
        "Loader against tarfile, MB/s",
        ["samples", "tarfile", "delivered", "taken", "delivered, of tarfile's", "the same by CPU time"],
        rows,
    )


if __name__ == "__main__":
    main()
