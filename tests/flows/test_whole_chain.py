"""The demo's recipe, with every stage, on footage with one fault a file."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_manifests.dataset import DatasetManifest, verify
from data_manifests.sources import SourceRow
from data_manifests.storage import Storage
from flows.report import TIMES
from tasks.curation import Curation
from tasks.engine import Engine
from tasks.outcome import Outcome
from tasks.recipe import load_recipe
from tasks.stages import STAGES
from tasks.work import Joint
from tests.golden import machine, record

# file: the verdict, and the rule behind a drop or the use of the sound
EXPECTED = {
    "clean_a.mp4": ("keep", "usable"),
    "late_0.4_a.mp4": ("keep", "unusable"),
    "subtitles_a.mp4": ("drop", "subtitles"),
    "copy_small_a.mp4": ("drop", "near_duplicate"),
    "two_people_a.mp4": ("drop", "one_speaker"),
}

Run = Callable[[int], tuple[Path, Outcome]]


@pytest.fixture(scope="module")
def run(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Curates the files with some number of workers; gives the folder and the outcome."""
    done: dict[int, tuple[Path, Outcome]] = {}

    def run(workers: int) -> tuple[Path, Outcome]:
        if workers not in done:
            out = tmp_path_factory.mktemp(f"workers-{workers}")
            # by relative names, since lineage holds the address and its bytes are recorded
            rows = [SourceRow(world.path(name).name, {}, "manifest") for name in EXPECTED]
            with pytest.MonkeyPatch.context() as patch, Engine(workers) as engine:
                patch.chdir(world.folder)
                curation = Curation(load_recipe("demo"), Storage(str(out)), rows, engine)
                for work, group in curation.walk():
                    # by one worker step by step, as when a source or a clip has ended its worker
                    joint = workers == 1 and isinstance(work, Joint)
                    for part in [curation.step[name] for name in work.steps] if joint else [work]:
                        results = curation.run(part, part.units(group))
                        assert not any(result.errors for result in results.values())
                outcome = Outcome(curation)
                plans = [plan for p in range(curation.partitions) for plan in outcome.plan_shards(p)]
                outcome.record(DatasetManifest.of(outcome.recipe_name, "manifest", outcome.write_shards(plans)))
            done[workers] = out, outcome
        return done[workers]

    return run


def test_each_fault_is_found_and_nothing_else(run: Run) -> None:
    _, outcome = run(2)
    names = {row["source_id"]: Path(row["uri"]).name for row in outcome.sources}
    found = {
        names[clip_id[:16]]: (row["verdict"], row["rule"] if row["verdict"] == "drop" else row["audio"])
        for clip_id, row in outcome.decisions.to_dict("index").items()
    }
    # which of two copies is kept goes by their digests
    copies = {"clean_a.mp4", "copy_small_a.mp4"}
    assert {found[name] for name in copies} == {EXPECTED[name] for name in copies}
    assert {k: v for k, v in found.items() if k not in copies} == {k: v for k, v in EXPECTED.items() if k not in copies}


def test_a_sample_has_what_every_stage_gives(run: Run) -> None:
    out, outcome = run(2)
    assert list(outcome.curation.stages) and set(outcome.curation.stages) == set(STAGES)
    report = verify(str(out / "dataset.json"))
    assert not report.faults
    shard = next(out.glob("shards/*.tar"))
    members = {name.partition(".")[2] for name in names_in(shard)}
    arrays = {"log_mel", "face_box", "lips", "crop_box", "pose", "latent", "text_embedding"}
    assert members == {"mp4", "flac", "json", "guidance.json", *(f"{array}.npy" for array in arrays)}


def names_in(shard: Path) -> list[str]:
    import tarfile

    with tarfile.open(shard) as tar:
        return tar.getnames()


def test_ledger_and_shards_are_those_of_the_golden_record(run: Run) -> None:
    out, outcome = run(2)
    names = {row["source_id"]: row["uri"] for row in outcome.sources}
    scores = {
        f"{names[clip_id[:16]]} {clip_id[17:25]} {score}": value
        for clip_id, row in outcome.frame.to_dict("index").items()
        for score, value in row.items()
        if isinstance(value, float | int) and value == value and not score.startswith("clips.")
    }
    # rows of sources hold the date of the footage, which is made anew in each session
    files = {name: digest for name, digest in written(out).items() if not name.startswith("ledger/sources/")}
    found = {"machine": machine(), "scores": scores, "files": files}
    expected = record("whole_chain", found)
    assert found["scores"] == pytest.approx(expected["scores"], rel=0.05, abs=0.05)
    if found["machine"] == expected["machine"]:
        assert found["files"] == expected["files"]


def written(out: Path) -> dict[str, str]:
    files = [path for path in out.rglob("*") if path.is_file() and path.name != TIMES]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_worker_step_by_step_and_two_with_joint_steps_make_the_same_bytes(run: Run) -> None:
    (one, _), (two, _) = run(1), run(2)
    assert written(one) == written(two)
