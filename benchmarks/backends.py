"""What the embedded backends cost: `python -m benchmarks.backends [STAGE ...]`; all stages without a name.

Each backend that needs no weights measures one generated clip of 5 s, at 25 frames a second and 480 lines, in a process
of its own. Two columns:
- CPU s a clip second: CPU seconds of the second time that the stage measures the clip, over the clip's seconds. The
  first time includes loading.
- peak memory GB: by how much the first time raises the peak of the process's resident memory, over that of a process
  that has only imported the stage's module, and NumPy by it. `Resources.memory_gb` of a backend without weights is
  this, rounded up to one decimal.

A stage with several choices of backends has a row for each combination. A backend that cannot be measured has a row
that says why. Linux only: the peak is VmHWM of /proc/self/status.
"""

import dataclasses
import importlib
import json
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the measuring process imports as little as it can
    from tasks.media.clip import Clip, Measurement
    from tasks.stages.base import Stage

FOOTAGE = "talk_medium.mp4"
SECONDS = 5.0
_NOT_EMBEDDED = {("guidance", "endpoint"): "needs a server"}


def main(names: Iterable[str]) -> None:
    from tasks.stages.registry import STAGES

    wanted = list(names) or list(STAGES)
    unknown = [name for name in wanted if name not in STAGES]
    if unknown:
        sys.exit(f"no stage is called {' or '.join(unknown)}; stages: {', '.join(STAGES)}")
    with tempfile.TemporaryDirectory() as folder:
        clip = make_clip(Path(folder))
        found: dict[str, Measurement] = {}
        print("| stage | backend | CPU s a clip second | peak memory GB |")
        print("|---|---|---:|---:|")
        for name in wanted:
            for chosen, obstacle in combinations(STAGES[name]):
                row = obstacle or cost(STAGES[name], chosen, clip, found, Path(folder))
                print(f"| {name} | {', '.join(chosen.values())} | {row} |", flush=True)


def combinations(stage: "type[Stage[Any]]") -> Iterator[tuple[dict[str, str], str]]:
    """The names of a stage's backends by settings field, for each combination; and why it cannot be measured, or ""."""
    fields = list(stage.backends)
    for names in product(*stage.backends.values()):
        chosen = dict(zip(fields, names, strict=True))
        networks = [network for field, name in chosen.items() for network in stage.backends[field][name].networks]
        obstacle = f"needs the weights of {' and '.join(networks)}" if networks else ""
        obstacle = obstacle or next((_NOT_EMBEDDED.get((stage.name, name), "") for name in names), "")
        yield chosen, f"{obstacle} | " if obstacle else ""


def cost(
    stage: "type[Stage[Any]]", chosen: dict[str, str], clip: "Clip", found: "dict[str, Measurement]", folder: Path
) -> str:
    """Measure a stage in a process of its own. found: results of the stages that others need, which this adds to.

    Returns: two cells of the table.
    """
    from tasks.stages.registry import STAGES, settings_type

    try:
        settings = settings_type(stage)(**chosen)
        needed = stage.needed(settings)
        for name in needed:
            if name not in found:
                found[name] = STAGES[name](settings_type(STAGES[name])()).measure(clip)
    except (ValueError, RuntimeError) as error:
        return f"{' '.join(str(error).split())} | "
    job = folder / "job.pickle"
    clip = dataclasses.replace(clip, found={name: found[name] for name in needed})
    job.write_bytes(pickle.dumps((settings, clip)))
    command = [sys.executable, "-m", "benchmarks.backends", "--measure", stage.__module__, stage.__name__, str(job)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        return f"{run.stderr.strip().splitlines()[-1]} | "
    result = json.loads(run.stdout.splitlines()[-1])
    return f"{result['cpu_s'] / clip.record.duration_s:.3f} | {result['peak_gb']:.3f}"


def make_clip(folder: Path) -> "Clip":
    """The first 5 s of generated footage, as one clip."""
    from data_manifests.storage import Storage
    from tasks.cutting.clip_plan import ClipSettings, plan_clips
    from tasks.cutting.clip_writer import write_clips
    from tasks.cutting.ingest import ingest
    from tasks.cutting.shots import Shot
    from tasks.media.clip import Clip
    from tasks.synthetic import make

    make(folder, [FOOTAGE])
    path, storage = folder / FOOTAGE, Storage(str(folder / "clips"))
    source, settings = ingest(str(path)), ClipSettings(fps=25, short_side=480, min_s=SECONDS, max_s=SECONDS)
    plan, _ = plan_clips(source, [Shot(0.0, SECONDS, 0.0, SECONDS, False, False)], [], settings)
    (record,) = write_clips(source, path, plan, settings, storage)
    return Clip(record, Path(storage.path(record.video)), Path(storage.path(record.audio)))


def measure(module: str, name: str, job: str) -> None:
    """Measure a clip twice and print the cost as JSON. Called in a process of its own."""
    stage_class = getattr(importlib.import_module(module), name)
    settings, clip = pickle.loads(Path(job).read_bytes())
    before = peak_gb()
    stage = stage_class(settings)
    stage.measure(clip)
    after = peak_gb()
    started = time.process_time()
    stage.measure(clip)
    print(json.dumps({"cpu_s": time.process_time() - started, "peak_gb": after - before}))


def peak_gb() -> float:
    """The peak of this process's resident memory. Unlike getrusage's, it leaves out the parent's."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e9


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        main(sys.argv[1:])
