"""In which order stages should run: `python -m benchmarks.order [recipe]`.

Each stage measures every clip, also clips that an earlier stage would have rejected. If filters reject independently of
each other, the cheapest order is by cost for each rejected clip, lowest first (Hellerstein and Stonebraker, "Predicate
Migration", 1993). A stage that rejects nothing comes last, unless another stage uses its results. Copies of a clip are
found only at the end, over the whole corpus. So the rejections of `duplicates` are listed, but they save no other stage
any work, wherever it stands.

UNDERSTUDY_FOOTAGE names a folder of real videos to use in place of the generated footage.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.curate import Costs, measure_all, table
from data_manifests.storage import Storage
from tasks.cutting.clip_plan import plan_clips
from tasks.cutting.clip_writer import write_clips
from tasks.cutting.ingest import ingest
from tasks.cutting.shots import find_shots
from tasks.media.clip import ClipRecord
from tasks.media.decode import MediaError
from tasks.policy.copies import copies
from tasks.recipe import Recipe, load_recipe
from tasks.stages.registry import STAGES
from tasks.synthetic import make

GROUPS = ["demo", "faults"]


def clip_costs(paths: list[Path], recipe: Recipe, folder: Path) -> tuple[Costs, list[ClipRecord]]:
    """Measure all clips of some footage with every stage of a recipe. Returns the clips in the order of the costs."""
    storage = Storage(str(folder))
    stages = {name: STAGES[name](settings) for name, settings in recipe.measure.items()}
    costs, clips = Costs(), list[ClipRecord]()
    for path in paths:
        try:
            info = ingest(str(path))
            shots = find_shots(path, recipe.scenes)
        except MediaError:
            continue  # some of the footage is broken on purpose
        records, _ = plan_clips(info, shots.shots, shots.holes, recipe.clips)
        records = write_clips(info, path, records, recipe.clips, storage) if records else []
        measure_all(records, storage, stages, costs)
        clips += records
    return costs, clips


def copied(recipe: Recipe, costs: Costs, records: list[ClipRecord]) -> float:
    """The share of clips that are copies of other clips, without regard to rules."""
    import pandas as pd

    bounds = recipe.policy.near_duplicates
    if bounds is None or not records:
        return 0.0
    hashes = pd.DataFrame([measurement.columns for measurement in costs.found["duplicates"]])
    about = {"duration_s": [r.duration_s for r in records], "source_id": [r.source_id for r in records]}
    order = np.argsort([r.clip_id for r in records])
    return float((copies(hashes.assign(**about).iloc[order], bounds.picture_bits, bounds.sound_bits) >= 0).mean())


def rejected(recipe: Recipe, stage: str, costs: Costs) -> float:
    """The share of clips that the rules of a stage drop."""
    rules = [rule for _, rule in recipe.policy.judged_at(stage)]
    dropped = 0
    for measurement in costs.found[stage]:
        values = [(rule, measurement.columns[rule.column]) for rule in rules]
        dropped += any(rule.missing == "reject" if value is None else not rule.passes(value) for rule, value in values)
    return dropped / len(costs.found[stage])


def main() -> None:
    recipe = load_recipe(sys.argv[1] if len(sys.argv) > 1 else "active_mind")
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as name:
        folder = Path(name)
        real = os.environ.get("UNDERSTUDY_FOOTAGE")
        if not real:
            make(folder / "footage", groups=GROUPS)
        paths = sorted(path for path in Path(real or folder / "footage").iterdir() if path.suffix != ".csv")
        costs, clips = clip_costs(paths, recipe, folder / "out")
    clip_seconds = sum(record.duration_s for record in clips)
    worth = {}
    for stage in recipe.measure:
        cost, share = 1000 * costs.seconds[stage] / clip_seconds, rejected(recipe, stage, costs)
        at_the_end = copied(recipe, costs, clips) if stage == "duplicates" else 0.0
        shown = f"{at_the_end:.0%} at the end" if at_the_end else f"{share:.0%}"
        worth[stage] = (cost / share if share else float("inf"), cost, shown)
    best = sorted(worth, key=lambda stage: worth[stage])
    rows = [
        [stage, f"{cost:.1f}", shown, f"{ratio:.0f}" if ratio < float("inf") else "-", str(best.index(stage) + 1)]
        for stage, (ratio, cost, shown) in worth.items()
    ]
    table(
        f"{recipe.name}, in its own order ({clip_seconds:.0f} s of clips)",
        ["stage", "CPU ms a clip second", "rejects", "cost over rejection", "place by that"],
        rows,
    )


if __name__ == "__main__":
    main()
