"""What the embedded video codec loses and costs: `python -m benchmarks.latents [FILE ...]`.

Without files it measures generated footage.

PSNR is over all pixels and colours of the clip as the stage crops it, at 480 lines at most and 25 frames a second.
Columns:
- PSNR dB as seen: measured by decoding the latents.
- as the stage says: the stage's own column, computed by the codec.
- best as many: the PSNR of as many channels if they were chosen for this clip. The difference is the cost of the fixed
  order of channels.
- stage, codec: CPU seconds of the stage, and of the codec within it, over those of a bare decode of the source (libav,
  one thread, no conversion).
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
from tasks.cutting.clip_plan import ClipSettings, plan_clips
from tasks.cutting.clip_writer import write_clips
from tasks.cutting.ingest import ingest
from tasks.cutting.shots import Shot
from tasks.media.clip import Clip
from tasks.networks.latent_geometry import usable_frames
from tasks.stages.latents.codec import MAX_CHANNELS, CosineCodec
from tasks.stages.latents.stage import Latents, LatentsSettings, picture_size
from tasks.synthetic import make

CHANNELS = (16, 32, 48, 96)
GENERATED = ["talk_office.mp4", "talk_medium.mp4", "talk_full.mp4", "pan.mp4"]


def cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of the work, and its result."""
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
    records, _ = plan_clips(source, [Shot(0.0, end_s, 0.0, end_s, False, False)], [], settings)
    (record,) = write_clips(source, path, records[:1], settings, storage)
    return Clip(record, Path(storage.path(record.video)), None)


def db(error: float) -> str:
    """PSNR in dB of a mean squared error of 8-bit values."""
    return f"{10 * math.log10(255**2 / error):.1f}"


def best(codec: CosineCodec, frames: Iterable[np.ndarray], counts: Iterable[int]) -> list[float]:
    """The mean squared error of the clip if only the channels with the most energy in it are kept, for each count."""
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
    """Print the rows of one clip, one for each number of channels."""
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
