"""Which stage points at which fault: `python -m benchmarks.confusion [--variants abcdef] [--workers N] [--folder DIR]`.

Talkers with one fault each, and some with none (tests.world.faults), go through ingest, clips and every stage. A
detector points at a clip that fails one of its rules, the recipe's. It should point at all clips with its own fault,
which is recall, and at no others, which is precision.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data_manifests.storage import Storage
from tasks.clip import Clip
from tasks.clips import plan
from tasks.cut import write_clips
from tasks.duplicates import copies
from tasks.ingest import ingest
from tasks.recipe import load_recipe
from tasks.rules import Rule
from tasks.scenes import Shot
from tasks.stage import Measurement, Stage, Value
from tasks.stages import STAGES
from tests.world import Truth, make
from tests.world.faults import QUALITY, VARIANTS, faults

RECIPE = "physavatar"
MEASURED = ("people", "subtitles", "aesthetics", "duplicates", "motion", "identity", "sync", "speech")
COPY = "copy"
FRAME_S = 0.04

Row = dict[str, Value]  # values by "stage.column"


@dataclass(frozen=True)
class Detector:
    """Points at the clips that fail one of its rules.

    fault: whether a clip has what the detector is there for; None where pointing at it is neither right nor wrong.
    """

    name: str
    rules: tuple[Rule, ...]
    fault: Callable[[Truth], bool | None]

    def points_at(self, row: Mapping[str, Value]) -> bool:
        values = [(rule, row[rule.score]) for rule in self.rules]
        return any(not rule.passes(value) for rule, value in values if value is not None)


@cache
def detectors() -> dict[str, Detector]:
    """All that go by rules, by name; copies are found by comparing clips."""
    policy = load_recipe(RECIPE).policy
    rules = policy.rules | policy.audio

    def closer(name: str, **bounds: float) -> Rule:
        """A rule with bounds closer than the recipe's, which puts up with small captions and sound 0.2 s away."""
        return Rule.model_validate(rules[name].model_dump() | bounds)

    subtitles = rules["subtitles"], closer("caption", max=0.005)
    near = closer("near", min=-0.12, max=0.12)
    found = [
        Detector("nobody", (rules["face"],), lambda t: t.people == 0),
        Detector("faces", (rules["one_face"],), lambda t: bool(t.second_s) if t.people else None),
        Detector("static", (rules["not_static"],), lambda t: bool(t.frozen_s)),
        Detector("chaos", (rules["not_chaotic"],), lambda t: bool(t.shake_s)),
        Detector("subtitles", subtitles, lambda t: bool(t.subtitles_s)),
        Detector("watermark", (rules["watermark"],), lambda t: t.watermark_box is not None),
        Detector("quality", (rules["quality"],), lambda t: t.fault in QUALITY),
        Detector("speech", (rules["spoken"],), lambda t: not t.speech_s),
        Detector("offset", (near,), lambda t: bool(t.sound_offset_s) if t.lips == "own" else None),
        Detector("lips", (rules["in_sync"],), lambda t: t.lips != "own" if t.lips else None),
    ]
    return {detector.name: detector for detector in found}


def stages() -> list[Stage[Any]]:
    """Those that detect something, each after those that it needs."""
    settings = load_recipe(RECIPE).measure
    return [STAGES[name](settings[name]) for name in MEASURED]


def measure(path: Path, truth: Truth, folder: Path, chain: list[Stage[Any]]) -> Row:
    """What the stages find in a file, as one clip."""
    storage = Storage(str(folder))
    source, settings = ingest(str(path)), load_recipe(RECIPE).clips
    end_s = truth.duration_s
    planned, _ = plan(source, [Shot(0.0, end_s, 0.0, end_s, False, False)], [], settings)
    (record,) = write_clips(source, path, planned, settings, storage)
    found: dict[str, Measurement] = {}
    audio = Path(storage.path(record.audio)) if record.audio else None
    clip = Clip(record, Path(storage.path(record.video)), audio, found)
    for stage in chain:
        found[stage.name] = stage.measure(clip)
    row: Row = {f"{name}.{column}": v for name, m in found.items() for column, v in m.columns.items()}
    return row | {"duration_s": record.duration_s, "source_id": record.source_id}


_chain: list[Stage[Any]] = []


def _start() -> None:
    _chain.extend(stages())


def _measure(job: tuple[Path, Truth, Path]) -> Row:
    return measure(*job, _chain)


def measure_all(folder: Path, names: Collection[str], workers: int) -> tuple[list[Truth], list[Row]]:
    """Make files, unless they are there, and measure each."""
    truths = make(folder, names, workers=workers)
    with tempfile.TemporaryDirectory() as clips:
        jobs = [(folder / truth.file, truth, Path(clips)) for truth in truths]
        with ProcessPoolExecutor(workers, get_context("spawn"), _start) as pool:
            return truths, list(pool.map(_measure, jobs))


def pointed_at(truths: list[Truth], rows: list[Row]) -> dict[str, list[bool]]:
    """Detector by detector, whether it points at each clip."""
    import pandas as pd

    found = {d.name: [d.points_at(row) for row in rows] for d in detectors().values()}
    # what is a copy of another comes after it, as a policy takes clips in a fixed order
    order = sorted(range(len(truths)), key=lambda k: (bool(truths[k].like), truths[k].file))
    names = {"duplicates.picture": "picture", "duplicates.sound": "sound"}
    hashes = pd.DataFrame([rows[k] for k in order]).rename(columns=names)
    bits = load_recipe(RECIPE).policy.near_duplicates
    assert bits is not None
    first = dict(zip(order, copies(hashes, bits.picture_bits, bits.sound_bits), strict=True))
    return found | {COPY: [bool(first[k] >= 0) for k in range(len(truths))]}


def has_fault(detector: str, truth: Truth) -> bool | None:
    """Whether a clip has a detector's own fault; None where pointing at it is neither right nor wrong."""
    if detector == COPY:
        return bool(truth.like)
    return detectors()[detector].fault(truth)


@dataclass(frozen=True)
class Score:
    """precision, recall: 0 to 1. others: share of the clips without the detector's fault that it points at."""

    precision: float
    recall: float
    others: float
    mistakes: tuple[str, ...]


def scores(truths: list[Truth], found: dict[str, list[bool]]) -> dict[str, Score]:
    """How good each detector is."""
    result = {}
    for name, points in found.items():
        cases = [(t.file, has_fault(name, t), p) for t, p in zip(truths, points, strict=True)]
        right = sum(p and fault is True for _, fault, p in cases)
        wrong = [file for file, fault, p in cases if fault is not None and p != fault]
        false = sum(p and fault is False for _, fault, p in cases)
        faulty, sound = (sum(fault is value for _, fault, _ in cases) for value in (True, False))
        precision = right / (right + false) if right + false else 0.0
        result[name] = Score(precision, right / faulty if faulty else 1.0, false / max(1, sound), tuple(wrong))
    return result


def table(truths: list[Truth], found: dict[str, list[bool]]) -> str:
    """Faults down, detectors across: the percentage of the clips that each points at, [in brackets] for its own fault;
    "-" where pointing would be neither right nor wrong."""
    kinds = list(dict.fromkeys(t.fault for t in sorted(truths, key=lambda t: (t.fault != "", t.fault))))
    lines = [f"{'':16}{'clips':>6}" + "".join(f"{name:>11}" for name in found)]
    for kind in kinds:
        rows = [k for k, t in enumerate(truths) if t.fault == kind]
        cells = []
        for name, points in found.items():
            own = {has_fault(name, truths[k]) for k in rows}
            share = f"{100 * sum(points[k] for k in rows) / len(rows):.0f}"
            cells.append("-" if own == {None} else f"[{share}]" if True in own else share)
        lines.append(f"{kind or 'none':16}{len(rows):>6}" + "".join(f"{cell:>11}" for cell in cells))
    result = scores(truths, found)
    lines += [
        f"{title:22}" + "".join(f"{getattr(result[name], title):>11.3f}" for name in found)
        for title in ("precision", "recall", "others")
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=VARIANTS, help="letters of the variants of each fault (all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where the footage is made, and found again the next time")
    options = parser.parse_args()
    names = [film.name for film in faults() if film.name.removesuffix(".mp4")[-1] in options.variants]
    with tempfile.TemporaryDirectory() as temporary:
        truths, rows = measure_all(options.folder or Path(temporary), names, options.workers)
    found = pointed_at(truths, rows)
    print(table(truths, found))
    offsets = [
        (abs(float(row["sync.offset_s"]) - t.sound_offset_s), t.file)
        for t, row in zip(truths, rows, strict=True)
        if t.lips == "own" and row["sync.offset_s"] is not None
    ]
    close = sum(error <= FRAME_S for error, _ in offsets)
    worst, where = max(offsets)
    print(f"\noffsets found to within a frame: {close} of {len(offsets)}; the worst is {worst:.3f} s off ({where})")
    for name, score in scores(truths, found).items():
        if score.mistakes:
            print(f"{name} is wrong about {', '.join(score.mistakes)}")


if __name__ == "__main__":
    main()
