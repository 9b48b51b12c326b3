"""What the embedded video codec loses, by channels, and what it costs: `python -m benchmarks.latents [FILE ...]`.

Without files, on generated footage. PSNR is over all pixels and colours of the clip as the stage cuts it, at 480 lines
at most and 25 frames a second. "as seen" is measured by decoding; "as the stage says" comes from the codec. "best as
many" is what as many channels would give if they were chosen for this very clip: what the fixed order costs. The last
two columns are CPU seconds of the stage, and of the codec in it, over those of a bare decode of the source (libav, one
thread, no conversion).
"""

import math
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_manifests.storage import Storage
from tasks.clip import Clip
from tasks.clips import ClipSettings, plan
from tasks.cut import write_clips
from tasks.ingest import ingest
from tasks.latent_codec import MAX_CHANNELS, CosineCodec, usable_frames
from tasks.latents import Latents, LatentsSettings, picture_size
from tasks.scenes import Shot
from tests.world import make

CHANNELS = (16, 32, 48, 96)
GENERATED = ["talk_office.mp4", "talk_medium.mp4", "talk_full.mp4", "pan.mp4"]


def cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def bare_decode(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        return sum(1 for _ in container.decode(video=0))


def clip_of(path: Path, storage: Storage) -> Clip:
    """The first 20 s of a file, as one clip."""
    source, settings = ingest(str(path)), ClipSettings(fps=25, short_side=480, min_s=0.2, max_s=20)
    end_s = min(20.0, source.duration_s or 20.0)
    records, _ = plan(source, [Shot(0.0, end_s, 0.0, end_s, False, False)], [], settings)
    (record,) = write_clips(source, path, records[:1], settings, storage)
    return Clip(record, Path(storage.path(record.video)), None)


def db(error: float) -> str:
    return f"{10 * math.log10(255**2 / error):.1f}"


def best(codec: CosineCodec, frames: Iterable[np.ndarray], counts: Iterable[int]) -> list[float]:
    """Mean squared error when the coefficients with the most energy in the clip are kept."""
    energy, pixels = np.zeros(codec.channels), 0
    std = np.abs(codec.basis).reshape(codec.channels, -1)
    scale = 1 / np.square(np.linalg.norm(std, axis=1))  # the basis without its scaling is orthonormal
    for number, encoded in enumerate(codec.encode(frames)):
        share = 1 if number else 0.25
        energy += share * np.square(encoded.latent, dtype=np.float64).sum(axis=(1, 2)) * scale
        pixels += int(share * encoded.latent[0].size * MAX_CHANNELS)
    falling = np.sort(energy)[::-1]
    return [float(falling[count:].sum() / pixels) for count in counts]


def main(files: list[Path]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        footage = files
        if not footage:
            make(Path(folder), GENERATED)
            footage = [Path(folder) / name for name in GENERATED]
        storage = Storage(str(Path(folder) / "clips"))
        print("| clip | size | channels | PSNR dB as seen | as the stage says | best as many | stage | codec |")
        print("|---|---|---:|---:|---:|---:|---:|---:|")
        for path in footage:
            clip = clip_of(path, storage)
            measure(path, clip)


def measure(path: Path, clip: Clip) -> None:
    """Print the rows of one clip."""
    settings = LatentsSettings(backend="dct")
    _, (top, left, height, width) = picture_size(clip.record.width, clip.record.height, settings)
    part = slice(top, top + height), slice(left, left + width)
    count = usable_frames(clip.record.frames)
    frames = [frame[part] for frame in islice(clip.frames(), count)]
    bests = best(CosineCodec(MAX_CHANNELS), frames, CHANNELS)
    for channels, limit in zip(CHANNELS, bests, strict=True):
        codec = CosineCodec(channels)
        decode_s = cpu(partial(bare_decode, path))[0]
        stage = Latents(LatentsSettings(backend="dct", channels=channels))
        stage_s, found = cpu(partial(stage.measure, clip))
        codec_s, _ = cpu(partial(deque, codec.encode(frames), 0))
        decoded = codec.decode(found.arrays["latent"], height, width)
        error = np.mean([np.square(a.astype(int) - b).mean() for a, b in zip(frames, decoded, strict=True)])
        found_db = found.columns["psnr_db"]
        print(
            f"| {path.name} | {width}x{height} | {channels} | {db(float(error))} | {found_db:.1f} | {db(limit)} "
            f"| {stage_s / decode_s:.2f} | {codec_s / decode_s:.2f} |"
        )


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
