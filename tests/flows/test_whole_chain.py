"""The recipe `demo`, with every stage, on files with one fault each."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_manifests.dataset import DatasetManifest, verify
from data_manifests.sources import SourceRow
from data_manifests.storage import Storage
from flows.report.times import TIMES
from tasks.execution.curation import Curation
from tasks.execution.outcome import Outcome
from tasks.execution.work import Work
from tasks.execution.worker_pool import WorkerPool
from tasks.recipe import load_recipe
from tasks.stages.registry import STAGES
from tests.golden import machine, record

# by file: the verdict, and the rule that dropped it or, if it is kept, the use of its audio
EXPECTED = {
    "clean_a.mp4": ("keep", "usable"),
    "late_0.4_a.mp4": ("keep", "unusable"),
    "subtitles_a.mp4": ("drop", "subtitles"),
    "copy_small_a.mp4": ("drop", "near_duplicate"),
    "two_people_a.mp4": ("drop", "one_speaker"),
}
FEW = ("clean_a.mp4", "subtitles_a.mp4")  # for tests that are not slow

Run = Callable[..., tuple[Path, Outcome]]


@pytest.fixture(scope="module")
def run(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Curates files with a number of workers. Returns the output folder and the outcome."""
    done: dict[tuple[int, tuple[str, ...]], tuple[Path, Outcome]] = {}

    def run(workers: int, files: tuple[str, ...] = FEW) -> tuple[Path, Outcome]:
        if (workers, files) not in done:
            out = tmp_path_factory.mktemp(f"workers-{workers}")
            # relative names, since the lineage holds the address, and its bytes are in the golden record
            rows = [SourceRow(world.path(name).name, {}, "manifest") for name in files]
            with pytest.MonkeyPatch.context() as patch, WorkerPool(workers) as pool:
                patch.chdir(world.folder)
                curation = Curation(load_recipe("demo"), Storage(str(out)), rows, pool)
                for work in curation.everything():
                    # one worker does fused work step by step, as after a source or a clip has ended its worker
                    single_steps = workers == 1 and work.fused
                    for part in step_by_step(curation, work) if single_steps else [work]:
                        totals = curation.runner.run(part)
                        assert not any(total.errors for total in totals.values())
                outcome = Outcome(curation)
                plans = [plan for p in range(curation.view.partitions) for plan in outcome.plan_shards(p)]
                outcome.record(DatasetManifest.of(outcome.recipe_name, "manifest", outcome.write_shards(plans)))
            done[workers, files] = out, outcome
        return done[workers, files]

    return run


def step_by_step(curation: Curation, work: Work) -> Iterator[Work]:
    """Fused work as single steps, one after the other."""
    for name in work.steps:
        units = curation.schedule.units(name, work.partitions)
        yield Work(name, curation.steps[name].job, (name,), work.partitions, units)


def verdicts(outcome: Outcome) -> dict[str, tuple[str, str]]:
    """By file: as EXPECTED."""
    names = {row["source_id"]: Path(row["uri"]).name for row in outcome.sources}
    return {
        names[clip_id[:16]]: (row["verdict"], row["rule"] if row["verdict"] == "drop" else row["audio"])
        for clip_id, row in outcome.decisions.to_dict("index").items()
    }


def test_a_clean_clip_is_kept_and_one_with_subtitles_is_dropped(run: Run) -> None:
    assert verdicts(run(2)[1]) == {name: EXPECTED[name] for name in FEW}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_each_fault_is_found_and_nothing_else(run: Run) -> None:
    found = verdicts(run(2, tuple(EXPECTED))[1])
    # the digests of two copies decide which one is kept
    copies = {"clean_a.mp4", "copy_small_a.mp4"}
    assert {found[name] for name in copies} == {EXPECTED[name] for name in copies}
    assert {k: v for k, v in found.items() if k not in copies} == {k: v for k, v in EXPECTED.items() if k not in copies}


def test_a_sample_has_what_every_stage_gives(run: Run) -> None:
    out, outcome = run(2)
    assert list(outcome.curation.steps.stages) and set(outcome.curation.steps.stages) == set(STAGES)
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


def test_ledger_and_shards_equal_the_golden_record(run: Run) -> None:
    out, outcome = run(2)
    names = {row["source_id"]: row["uri"] for row in outcome.sources}
    scores = {
        f"{names[clip_id[:16]]} {clip_id[17:25]} {score}": value
        for clip_id, row in outcome.frame.to_dict("index").items()
        for score, value in row.items()
        if isinstance(value, float | int) and value == value and not score.startswith("clips.")
    }
    # rows of sources hold the date of the footage, which each session generates anew
    files = {name: digest for name, digest in written(out).items() if not name.startswith("ledger/sources/")}
    found = {"machine": machine(), "scores": scores, "files": files}
    expected = record("whole_chain", found)
    assert found["scores"] == pytest.approx(expected["scores"], rel=0.05, abs=0.05)
    if found["machine"] == expected["machine"]:
        assert found["files"] == expected["files"]


def written(out: Path) -> dict[str, str]:
    """The sha256 of each file of a run, except the one that holds its times."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != TIMES]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_single_steps_by_one_worker_and_fused_steps_by_two_write_the_same_bytes(run: Run) -> None:
    (one, _), (two, _) = run(1, tuple(EXPECTED)), run(2, tuple(EXPECTED))
    assert written(one) == written(two)
