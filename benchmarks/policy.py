"""What a new decision costs: the time and memory from a ledger of random clips on disk to the verdicts.

    python -m benchmarks.policy [--clips 1000000]

The table is Markdown. Memory is the peak of a new process, libraries included.
"""

import argparse
import dataclasses
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_manifests.storage import Storage
from tasks.execution.ledger import Ledger, partition_of, schema_for
from tasks.media.clip import ClipRecord
from tasks.policy.decide import decide, funnel, join
from tasks.policy.rules import Policy

PARTITIONS = 16
CLIPS_A_SOURCE = 20
TABLES: dict[str, dict[str, type]] = {
    "people": {
        "person_share": float,
        "face_share": float,
        "face_height": float,
        "framing": str,
        "framing_source": str,
        "scene": str,
    },
    "duplicates": {"picture": str, "sound": str},
    "motion": {
        "speed": float,
        "camera_speed": float,
        "subject_speed": float,
        "static_fraction": float,
        "chaotic_fraction": float,
    },
    "speech": {"fraction": float, "loudness_db": float},
}
POLICY = Policy.model_validate(
    {
        "rules": {
            "person": {"score": "people.person_share", "backend": "b", "min": 0.2},
            "framing": {"score": "people.framing", "backend": "b", "one_of": ["upper body", "medium", "full"]},
            "moves": {"score": "motion.static_fraction", "backend": "b", "max": 0.8},
            "calm": {"score": "motion.chaotic_fraction", "backend": "b", "max": 0.8},
        },
        "near_duplicates": {"backend": "b", "picture_bits": 48, "sound_bits": 32},
        "audio": {"spoken": {"score": "speech.fraction", "backend": "b", "min": 0.5, "missing": "reject"}},
        "tiers": {
            "main": {},
            "hq": {"hours": 100, "rank": {"people.face_height": 1.0, "speech.fraction": 1.0, "motion.speed": -0.5}},
        },
    }
)


def make_ledger(folder: Path, clips: int) -> None:
    """Write the ledger of random clips.

    Each stage failed on one clip in a thousand. All stages but the first have no row for one clip in ten thousand.
    """
    import pyarrow as pa

    ledger = Ledger(Storage(str(folder)), PARTITIONS)
    rng = np.random.default_rng(0)
    sources: dict[int, list[str]] = {}
    for _ in range(clips // CLIPS_A_SOURCE):
        source_id = f"{rng.integers(0, 2**63):016x}"
        sources.setdefault(partition_of(source_id, PARTITIONS), []).append(source_id)
    kinds: dict[object, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    element = pa.struct([(f.name, kinds[f.type]) for f in dataclasses.fields(ClipRecord) if f.type in kinds])
    clips_schema = schema_for({"clips": pa.list_(element)})
    for partition, some in sorted(sources.items()):
        cut = {s: [_clip(s, at, rng) for at in range(CLIPS_A_SOURCE)] for s in some}
        rows = [{"key": s, "status": "ok", "error": "", "inputs": "", "clips": found} for s, found in cut.items()]
        ledger.write("clips", "f", partition, rows, clips_schema)
        names = [c["clip_id"] for found in cut.values() for c in found]
        for stage, columns in TABLES.items():
            rows = [_row(name, columns, rng) for name in names if stage == "people" or rng.random() > 1e-4]
            if stage == "duplicates":
                _hash(rows, rng)
            ledger.write(stage, "f", partition, rows, schema_for(columns))


def _clip(source_id: str, at: int, rng: np.random.Generator) -> dict[str, Any]:
    clip_id = f"{source_id}-{at * 10_000:08d}-{rng.integers(0, 2**32):08x}"
    name, frames = f"clips/{source_id[:2]}/{clip_id}", int(rng.integers(120, 480))
    record = ClipRecord(
        clip_id, source_id, at * 10.0, at * 10.0 + frames / 24, 24, frames, 854, 480, f"{name}.mp4", f"{name}.flac"
    )
    return dataclasses.asdict(record)


def _row(key: str, columns: dict[str, type], rng: np.random.Generator) -> dict[str, Any]:
    row: dict[str, Any] = {"key": key, "inputs": ""}
    if rng.random() < 1e-3:
        return row | {"status": "error", "error": "DecodeError: the packet at 3.2 s is broken"}
    words = ("upper body", "medium", "full", "long")
    values = {name: words[rng.integers(4)] if kind is str else float(rng.random()) for name, kind in columns.items()}
    return row | {"status": "ok", "error": ""} | values


def _hash(rows: list[dict[str, Any]], rng: np.random.Generator) -> None:
    """Add hashes to the rows of `duplicates`. One clip in twenty is a copy of a clip of another source."""
    for at, row in enumerate(rows):
        if at > 2 * CLIPS_A_SOURCE and rng.random() < 0.05:
            other = rows[at - 2 * CLIPS_A_SOURCE]
            row |= {"picture": other["picture"], "sound": other["sound"]}
        else:
            row |= {"picture": rng.bytes(32).hex(), "sound": rng.bytes(16).hex()}


def redecide(folder: Path) -> None:
    """Read the ledger and decide. Prints a table with a row for each part of this work."""
    times = [("start", *_now())]

    import pandas as pd
    import pyarrow.parquet  # noqa: F401

    times.append(("import pandas and pyarrow", *_now()))
    ledger = Ledger(Storage(str(folder)), PARTITIONS)
    frames = []
    for partition in range(PARTITIONS):
        clips = ledger.read_list("clips", "f", "clips", partition, ["clip_id", "frames", "fps", "audio"])
        clips["duration_s"] = clips["frames"] / clips["fps"]
        tables = {
            stage: ledger.read(stage, "f", partition, ["status", "error", *columns])
            for stage, columns in POLICY.columns().items()
        }
        frames.append(join(clips.set_index("clip_id")[["duration_s", "audio"]], tables))
    frame = pd.concat(frames)
    times.append(("read the ledger and join", *_now()))
    decisions = decide(frame, POLICY, list(TABLES))
    times.append(("decide", *_now()))
    funnel(frame, decisions, POLICY, list(TABLES))
    times.append(("funnel", *_now()))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\n{len(frame):,} clips, {len(TABLES)} stages, {PARTITIONS} partitions\n")
    print("| part | seconds | CPU seconds |\n| --- | ---: | ---: |")
    for (_, *before), (name, *after) in itertools.pairwise(times):
        print(f"| {name} | {after[0] - before[0]:.2f} | {after[1] - before[1]:.2f} |")
    print(f"| **all of it** | **{times[-1][1] - times[0][1]:.2f}** | **{times[-1][2] - times[0][2]:.2f}** |")
    print(f"\npeak memory of the process: {peak_mb:,.0f} MB")
    print(f"verdicts: {decisions['verdict'].value_counts().to_dict()}")


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--ledger", type=Path, help="a folder with a ledger that was made before; decide on that one")
    arguments = parser.parse_args()
    if arguments.ledger:
        redecide(arguments.ledger)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_ledger(Path(folder), arguments.clips)
        subprocess.run([sys.executable, "-m", "benchmarks.policy", "--ledger", folder], check=True)


if __name__ == "__main__":
    main()
