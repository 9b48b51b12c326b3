"""Speed and memory of the curation: `make bench`, or `python -m benchmarks.curate [speed] [workers] [memory] [rerun]`.

UNDERSTUDY_FOOTAGE names a folder of real videos to measure the speed on, in place of the generated footage.

The figures for speed are ratios to a plain full decode of the same sources in the same run, since machines differ. They
are CPU seconds of one process, the least of three rounds, since machines are shared.
"""

import dataclasses
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from data_manifests.storage import Storage
from tasks.cutting.clip_plan import ClipSettings
from tasks.cutting.ingest import ingest
from tasks.execution.jobs import CutSource, Source, SourceToCut, WriteClips
from tasks.execution.stage_results import StageResult, file_name
from tasks.media.clip import Clip, ClipRecord, Measurement
from tasks.media.decode import MediaError
from tasks.media.frames import FrameCache
from tasks.recipe import Recipe, RunSettings, load_recipe
from tasks.stages.base import Stage
from tasks.stages.registry import STAGES
from tasks.synthetic import make

KEEP_BYTES = RunSettings().keep_frames_mb * 1_000_000
ROUNDS = 3
LARGE = "talk_1080p.mp4"  # talk_hd.mp4, enlarged
SOURCES = ["talk_hd.mp4", "talk_45s.mp4", "cuts_plain.mp4", "fps_60.mp4"]


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Print a table in aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}")
    for row in [head, ["-" * w for w in widths], *rows]:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process and all its threads, and the result of the work."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def as_a_camera_would(source: Path, target: Path, height: int | None = None) -> None:
    """Encode a source again, with all tools of H.264 and with noise.

    Generated footage is encoded fast, so it is cheaper to decode than real footage.

    height: pixels; that of the source when None.
    """
    import av

    noise = np.random.default_rng(0)
    with av.open(str(source)) as given, av.open(str(target), "w") as made:
        pictures = given.streams.video[0]
        options = {"preset": "medium", "crf": "20"}
        video = made.add_stream("libx264", rate=pictures.average_rate, options=options)
        size = pictures.width, pictures.height
        size = size if height is None else (round(size[0] * height / size[1] / 2) * 2, height)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        sound = made.add_stream_from_template(given.streams.audio[0])
        for packet in given.demux(pictures, given.streams.audio[0]):
            if packet.stream.type == "audio":
                if packet.dts is not None:
                    packet.stream = sound
                    made.mux(packet)
                continue
            for frame in packet.decode():
                image = frame.to_ndarray(format="rgb24", width=size[0], height=size[1]).astype(np.int16)
                image += noise.integers(-4, 5, (*image.shape[:2], 1), np.int16)
                made.mux(video.encode(av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), format="rgb24")))
        made.mux(video.encode(None))


def plain_decode(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        try:
            return sum(1 for _ in container.decode(video=0))
        except av.FFmpegError:
            return 0  # a damaged file, which the curation reports


@dataclass
class Costs:
    """The cost and the measurements of stages, by stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    """CPU seconds over all clips."""
    decoded: dict[str, int] = field(default_factory=dict)
    """Frames of clips that were decoded, at any size."""
    found: dict[str, list[Measurement]] = field(default_factory=dict)
    """One measurement a clip."""


def measure_all(records: list[ClipRecord], storage: Storage, stages: dict[str, Stage[Any]], costs: Costs) -> None:
    """Measure clips with all stages in order, also clips that a rule would reject. Adds to `costs`.

    The first stage that needs a frame pays for decoding it.
    """
    for record in records:
        made = record
        found: dict[str, Measurement] = {}
        decoded = FrameCache(Path(storage.path(made.video)), KEEP_BYTES)
        for name, stage in stages.items():
            audio = Path(storage.path(made.audio)) if made.audio else None
            clip = Clip(made, Path(storage.path(made.video)), audio, found, decoded)
            if name not in costs.found:
                stage.measure(dataclasses.replace(clip, decoded=None))  # loads what the stage needs
            before = decoded.read
            spent, measurement = cpu(lambda s=stage, c=clip: s.measure(c))
            costs.seconds[name] = costs.seconds.get(name, 0.0) + spent
            costs.decoded[name] = costs.decoded.get(name, 0) + decoded.read - before
            costs.found.setdefault(name, []).append(measurement)
            found[name] = measurement
            if stage.remakes_clip:
                finding = StageResult(name, "bench", dict(measurement.columns), files=tuple(measurement.files))
                for file, data in measurement.files.items():
                    storage.write_bytes(file_name(name, "bench", made.clip_id, file), data)
                made = finding.remake(made)
                if "mp4" in measurement.files:
                    decoded = FrameCache(Path(storage.path(made.video)), KEEP_BYTES)


def speed(folder: Path) -> None:
    """Measure each step of both recipes, compared with the decode of its sources."""
    for name in ("active_mind", "physavatar"):
        speed_of(load_recipe(name), folder)


def one_round(
    path: Path, recipe: Recipe, settings: ClipSettings, storage: Storage, stages: dict[str, Stage[Any]]
) -> tuple[dict[str, float], list[ClipRecord], Costs]:
    """CPU seconds of each step for one source, its clips, and the costs of the stages."""
    seconds = {"decode": cpu(lambda: plain_decode(path))[0]}
    seconds["hash and probe"], info = cpu(lambda: ingest(str(path)))
    job = CutSource(recipe.scenes, WriteClips(settings, storage), KEEP_BYTES)
    seconds["scenes and clips"], made = cpu(lambda: job(SourceToCut(Source(info, {}))))
    if error := next((one.row["error"] for one in made.values() if one.row["error"]), ""):
        raise MediaError(error)
    records = [ClipRecord(**clip, metadata={}) for clip in made["clips"].row["clips"]]
    costs = Costs()
    measure_all(records, storage, stages, costs)
    return seconds | {stage: costs.seconds.get(stage, 0.0) for stage in stages}, records, costs


def speed_of(recipe: Recipe, folder: Path) -> None:
    """Print the table of one recipe: a row for each step, a column for each source."""
    settings = ClipSettings.model_validate(recipe.clips.model_dump() | {"min_s": 2.0})
    stages = {name: STAGES[name](s) for name, s in recipe.measure.items()}
    total: dict[str, float] = {}
    decoded: dict[str, int] = {}
    ratios: dict[str, dict[str, str]] = {}
    clip_seconds, clip_frames = 0.0, 0
    real = os.environ.get("UNDERSTUDY_FOOTAGE")
    paths = sorted(Path(real).glob("*.mp4")) if real else [folder / LARGE, *(folder / "footage" / n for n in SOURCES)]
    for path in paths:
        name = path.name
        rounds: list[dict[str, float]] = []
        try:
            for number in range(ROUNDS):
                storage = Storage(str(folder / "speed" / f"{recipe.name}-{number}"))
                spent, records, costs = one_round(path, recipe, settings, storage, stages)
                rounds.append(spent)
        except MediaError as error:
            print(f"{name}: {error}")
            continue
        seconds = {step: min(spent[step] for spent in rounds) for step in rounds[0]}
        seconds["all but pose"] = sum(s for step, s in seconds.items() if step not in ("decode", "pose"))
        clip_seconds += sum(r.duration_s for r in records)
        clip_frames += sum(r.frames for r in records)
        for step, spent in seconds.items():
            total[step] = total.get(step, 0.0) + spent
        for step, frames in costs.decoded.items():
            decoded[step] = decoded.get(step, 0) + frames
        ratios[name] = {step: f"{spent / seconds['decode']:.2f}" for step, spent in seconds.items()}
    decoded["all but pose"] = sum(frames for step, frames in decoded.items() if step != "pose")
    rows = [
        [
            step,
            *(some[step] for some in ratios.values()),
            f"{total[step] / total['decode']:.2f}",
            f"{1000 * total[step] / clip_seconds:.0f}",
            f"{decoded[step] / clip_frames:.2f}" if step in decoded else "",
        ]
        for step in total
    ]
    table(
        f"{recipe.name}: CPU seconds over those of a plain decode ({clip_seconds:.0f} s of clips)",
        ["step", *ratios, "all", "CPU ms a clip second", "frames decoded a clip frame"],
        rows,
    )


def curated(
    footage: Path, out: Path, workers: int, recipe_name: str = "demo", bounds: dict[str, float] | None = None
) -> dict[str, float]:
    """Curate without Prefect; wall seconds by step."""
    from data_manifests.dataset import DatasetManifest
    from data_manifests.sources import SourceRow, read_sources
    from tasks.execution.curation import Curation
    from tasks.execution.outcome import Outcome
    from tasks.execution.worker_pool import WorkerPool

    recipe = load_recipe(recipe_name)
    if bounds:
        recipe = recipe.model_copy(update={"clips": recipe.clips.model_copy(update=bounds)})
    with WorkerPool(workers) as pool:
        rows = [row for row in read_sources(str(footage)) if isinstance(row, SourceRow)]
        curation = Curation(recipe, Storage(str(out)), rows, pool)
        # processes are started before the clock
        list(pool.map(time.sleep, ((str(number), 0.0) for number in range(workers * 2)), 60))
        started = time.perf_counter()
        totals = curation.run(curation.everything())
        seconds = {name: total.seconds for name, total in totals.items()}
        outcome = Outcome(curation)
        plans = [plan for p in range(curation.view.partitions) for plan in outcome.plan_shards(p)]
        entries = outcome.write_shards(plans)
        outcome.record(DatasetManifest.of(outcome.recipe_name, str(footage), entries))
        seconds["all"] = time.perf_counter() - started
        seconds["samples"] = sum(entry.samples for entry in entries)
    return seconds


def workers(folder: Path) -> None:
    """Compare one worker with two, on the same sources."""
    many = folder / "many"
    many.mkdir(exist_ok=True)
    for number in range(4):
        for name in SOURCES:
            copy = many / f"{number}-{name}"
            shutil.copy(folder / "footage" / name, copy)
            with copy.open("ab") as file:  # other bytes, the same video
                file.write(b"\0\0\0\x10free" + number.to_bytes(8, "big"))
    one = curated(many, folder / "one", 1)
    two = curated(many, folder / "two", 2)
    rows = [
        [step, f"{one[step]:.1f}", f"{two[step]:.1f}", f"{one[step] / two[step]:.2f}"]
        for step in one
        if step != "samples"
    ]
    table("wall seconds by workers, 16 sources", ["step", "1 worker", "2 workers", "ratio"], rows)


def rerun(folder: Path) -> None:
    """Measure a second run on an unchanged corpus."""
    footage, out = folder / "footage", folder / "again"
    first = curated(footage, out, 2)
    second = curated(footage, out, 2)
    table(
        "wall seconds without start-up",
        ["run", "seconds"],
        [["first", f"{first['all']:.1f}"], ["again", f"{second['all']:.2f}"]],
    )


def memory(folder: Path, counts: tuple[int, ...] = (10, 100, 1000)) -> None:
    """Measure the peak memory of the run, and of all its workers together, for several numbers of clips."""
    rows = []
    for count in counts:
        many, out = folder / f"clips-{count}", folder / f"memory-{count}"
        many.mkdir()
        for number in range(-(-count // 20)):  # each source gives twenty clips of two seconds
            copy = many / f"{number}.mp4"
            shutil.copy(folder / "footage" / "talk_45s.mp4", copy)
            with copy.open("ab") as file:
                file.write(b"\0\0\0\x10free" + number.to_bytes(8, "big"))
        peak = Peak()
        seconds = curated(many, out, 2, bounds={"min_s": 2.0, "max_s": 2.25, "short_side": 128})
        parent, children = peak.stop()
        rows.append(
            [f"{seconds['samples']:.0f}", f"{seconds['all']:.0f}", f"{parent / 1e6:.0f}", f"{children / 1e6:.0f}"]
        )
        shutil.rmtree(out)
    table("peak resident MB", ["clips", "seconds", "run", "workers together"], rows)


class Peak:
    """Watches the resident memory of this process, and of all its children together, five times a second."""

    def __init__(self) -> None:
        self._parent = self._children = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._ended.wait(0.2):
            self._parent = max(self._parent, me.memory_info().rss)
            together = 0
            for child in me.children(recursive=True):
                try:
                    together += child.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self._children = max(self._children, together)

    def stop(self) -> tuple[int, int]:
        """The peaks of this process and of its children, in bytes."""
        self._ended.set()
        self._thread.join()
        return self._parent, self._children


def main() -> None:
    chosen = sys.argv[1:] or ["speed", "workers", "rerun", "memory"]
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as name:
        folder = Path(name)
        make(folder / "made", names=SOURCES)
        (folder / "footage").mkdir()
        for source in SOURCES:
            as_a_camera_would(folder / "made" / source, folder / "footage" / source)
        as_a_camera_would(folder / "made" / SOURCES[0], folder / LARGE, 1080)
        for part in chosen:
            {"speed": speed, "workers": workers, "rerun": rerun, "memory": memory}[part](folder)


if __name__ == "__main__":
    main()
