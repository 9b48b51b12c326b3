"""Which stage detects which fault: `python -m benchmarks.confusion [--variants abcdef] [--workers N] [--folder DIR]`.

Films of talkers with one fault each, and without a fault (tasks.synthetic.faults), go through ingest, cutting and every
stage. A detector is a set of the recipe's rules. It points at a clip that fails one of them. Recall is the share of the
clips with the detector's own fault that it points at. Precision is the share of the clips that it points at that have
its own fault.
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
from tasks.cutting.clip_plan import plan_clips
from tasks.cutting.clip_writer import write_clips
from tasks.cutting.ingest import ingest
from tasks.cutting.shots import Shot
from tasks.media.clip import Clip, Measurement, Value
from tasks.policy.copies import copies
from tasks.policy.rules import Rule
from tasks.recipe import load_recipe
from tasks.stages.base import Stage
from tasks.stages.registry import STAGES
from tasks.synthetic import Truth, make
from tasks.synthetic.faults import QUALITY, VARIANTS, faults

RECIPE = "physavatar"
MEASURED = ("people", "subtitles", "aesthetics", "duplicates", "motion", "identity", "sync", "speech")
COPY = "copy"
FRAME_S = 0.04

Row = dict[str, Value]  # the values of one clip, by "stage.column"


@dataclass(frozen=True)
class Detector:
    """Points at the clips that fail one of its rules."""

    name: str
    rules: tuple[Rule, ...]
    fault: Callable[[Truth], bool | None]
    """Whether a clip has the detector's own fault; None if pointing at the clip is neither right nor wrong."""

    def points_at(self, row: Mapping[str, Value]) -> bool:
        """Whether a clip fails a rule. A missing value fails none."""
        values = [(rule, row[rule.score]) for rule in self.rules]
        return any(not rule.passes(value) for rule, value in values if value is not None)


@cache
def detectors() -> dict[str, Detector]:
    """All detectors by name, except the one for copies, which compares clips (see `pointed_at`)."""
    policy = load_recipe(RECIPE).policy
    rules = policy.rules | policy.audio

    def closer(name: str, **bounds: float) -> Rule:
        """A rule with closer bounds: the recipe tolerates small captions, and sound that is 0.2 s off."""
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
    """The stages that detect faults, each after the stages that it needs."""
    settings = load_recipe(RECIPE).measure
    return [STAGES[name](settings[name]) for name in MEASURED]


def measure(path: Path, truth: Truth, folder: Path, chain: list[Stage[Any]]) -> Row:
    """Measure a file as one clip, with all stages."""
    storage = Storage(str(folder))
    source, settings = ingest(str(path)), load_recipe(RECIPE).clips
    end_s = truth.duration_s
    planned, _ = plan_clips(source, [Shot(0.0, end_s, 0.0, end_s, False, False)], [], settings)
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
    """Make the files that do not exist yet, and measure each. Returns the truth and the values, one row a file."""
    truths = make(folder, names, workers=workers)
    with tempfile.TemporaryDirectory() as clips:
        jobs = [(folder / truth.file, truth, Path(clips)) for truth in truths]
        with ProcessPoolExecutor(workers, get_context("spawn"), _start) as pool:
            return truths, list(pool.map(_measure, jobs))


def pointed_at(truths: list[Truth], rows: list[Row]) -> dict[str, list[bool]]:
    """For each detector, whether it points at each clip."""
    import pandas as pd

    found = {d.name: [d.points_at(row) for row in rows] for d in detectors().values()}
    # copies come after their originals: of two copies, the later row counts as the copy
    order = sorted(range(len(truths)), key=lambda k: (bool(truths[k].like), truths[k].file))
    names = {"duplicates.picture": "picture", "duplicates.sound": "sound"}
    hashes = pd.DataFrame([rows[k] for k in order]).rename(columns=names)
    bits = load_recipe(RECIPE).policy.near_duplicates
    assert bits is not None
    first = dict(zip(order, copies(hashes, bits.picture_bits, bits.sound_bits), strict=True))
    return found | {COPY: [bool(first[k] >= 0) for k in range(len(truths))]}


def has_fault(detector: str, truth: Truth) -> bool | None:
    """Whether a clip has a detector's own fault; None if pointing at the clip is neither right nor wrong."""
    if detector == COPY:
        return bool(truth.like)
    return detectors()[detector].fault(truth)


@dataclass(frozen=True)
class Score:
    """How good a detector is."""

    precision: float
    """Share of the clips that it points at that have its own fault, 0 to 1."""
    recall: float
    """Share of the clips with its own fault that it points at, 0 to 1."""
    others: float
    """Share of the clips without its own fault that it points at, 0 to 1."""
    mistakes: tuple[str, ...]
    """The files that it is wrong about."""


def scores(truths: list[Truth], found: dict[str, list[bool]]) -> dict[str, Score]:
    """The score of each detector."""
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
    """A table with a row for each fault and a column for each detector.

    A cell has the percentage of the clips that the detector points at, [in brackets] for its own fault; "-" if pointing
    is neither right nor wrong.
    """
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
    parser.add_argument("--variants", default=VARIANTS, help="letters of the variants to measure (default: all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="folder for the footage, which the next call uses again")
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
