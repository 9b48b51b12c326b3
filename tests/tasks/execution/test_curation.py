"""What a second run of a curation repeats, and what it does not. Runs without Prefect."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_manifests.dataset import DatasetManifest
from data_manifests.sources import SourceRow
from data_manifests.storage import Storage, StoreError
from tasks.execution.curation import Curation
from tasks.execution.outcome import Outcome, ShardError
from tasks.execution.work import Unit, Work
from tasks.execution.worker_pool import WorkerPool
from tasks.recipe import load_recipe, parse_curation
from tasks.review.run_folder import RunFolder

Run = Callable[..., tuple[dict[str, int], Outcome]]


@pytest.fixture(scope="module")
def pool() -> Any:
    with WorkerPool(workers=2) as pool:
        yield pool


@pytest.fixture
def run(pool: WorkerPool, tmp_path: Path) -> Run:
    """Curates uris, with their metadata, into a folder, and writes the shards.

    Returns the number of units done, by step, and the outcome.
    """

    def run(
        uris: dict[str, dict[str, str]],
        retry_errors: bool = False,
        out: str = "out",
        limits: dict[str, float] | None = None,
        **clips: float,
    ) -> tuple[dict[str, int], Outcome]:
        recipe = load_recipe("tests/three_stages.yaml")
        run_settings = recipe.run.model_copy(update={"time_limits": limits or {}})
        recipe = recipe.model_copy(update={"clips": recipe.clips.model_copy(update=clips), "run": run_settings})
        rows = [SourceRow(uri, metadata, "manifest") for uri, metadata in uris.items()]
        curation = Curation(recipe, Storage(str(tmp_path / out)), rows, pool, retry_errors)
        totals = curation.run(curation.everything())
        outcome = Outcome(curation)
        plans = [plan for p in range(curation.view.partitions) for plan in outcome.plan_shards(p)]
        outcome.write_shards(plans)
        return {name: total.done for name, total in totals.items()}, outcome

    return run


def test_an_unreadable_address_is_an_error_of_its_own_row_alone(run: Run, world: Any, tmp_path: Path) -> None:
    good = str(world.path("talk_3s.mp4"))
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    bad = [f"{good}/inside.mp4", "/" + "x" * 300 + ".mp4", str(tmp_path / "loop.mp4"), str(tmp_path / "pipe.mp4")]
    bad += [str(tmp_path), str(tmp_path / "nowhere.mp4"), "foo://bar/a.mp4", str(tmp_path / 'a "\r" return.mp4')]
    done, outcome = run({uri: {} for uri in [good, *bad]})
    assert done["sources"] == 1 + len(bad) and done["clips"] == 1
    assert {row["uri"]: row["status"] for row in outcome.sources} == {good: "ok"} | dict.fromkeys(bad, "error")
    assert all(row["reason"] for row in outcome.sources if row["status"] == "error")
    outcome.record(DatasetManifest.of(outcome.recipe_name, "uris", []))
    assert [row["uri"] for row in RunFolder(str(tmp_path / "out")).sources] == [good, *bad]


def test_a_store_that_does_not_answer_stops_the_run_without_error_rows(
    pool: WorkerPool, tmp_path: Path, s3_folder: str
) -> None:
    from s3fs import S3FileSystem

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # no server listens there
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        S3FileSystem.clear_instance_cache()  # connections are kept by address, not by endpoint
        rows = [SourceRow("s3://elsewhere/talk.mp4", {}, "manifest")]
        curation = Curation(load_recipe("tests/three_stages.yaml"), Storage(str(tmp_path / "out")), rows, pool)
        with pytest.raises(StoreError, match="look at the footage"):
            next(curation.schedule.sources())
        unit = Unit("sources", rows[0].uri, "1-a", rows[0].uri)
        work = Work("sources", curation.steps["sources"].job, ("sources",), [0], [unit])
        with pytest.raises(StoreError), WorkerPool(workers=1) as new_pool:  # its workers get the patched environment
            curation.runner.pool = new_pool
            curation.runner.run(work)
        assert not curation.view.ledger.rows("sources", curation.steps["sources"].fingerprint)
    S3FileSystem.clear_instance_cache()


def test_a_stage_over_its_time_limit_gives_one_error_row(run: Run, world: Any, tmp_path: Path) -> None:
    uris: dict[str, dict[str, str]] = {str(world.path("talk_3s.mp4")): {}, str(world.path("nobody.mp4")): {}}
    done, outcome = run(uris, limits={"speech": 0.001})
    assert done == {"sources": 2, "scenes": 2, "clips": 2, "people": 2, "motion": 1, "speech": 1}
    (failed,) = outcome.decisions[outcome.decisions["verdict"] == "error"].to_dict("records")
    assert failed["stage"] == "speech" and failed["error"] == "took longer than 0.001 s"
    assert run(uris, retry_errors=True)[0] == {"speech": 1}
    run(uris, out="unlimited")

    def written(out: str) -> dict[str, bytes]:
        files = (path for kind in ("ledger", "features", "shards") for path in (tmp_path / out / kind).rglob("*.*"))
        return {str(path.relative_to(tmp_path / out)): path.read_bytes() for path in files}

    assert written("out") == written("unlimited")


def test_a_source_over_its_time_limit_is_tried_again_step_by_step(run: Run, world: Any) -> None:
    uris: dict[str, dict[str, str]] = {str(world.path("talk_medium.mp4")): {}}
    done, outcome = run(uris, limits={"scenes": 0.001, "clips": 0.001})
    # a fast machine may have found the shots before the worker pool looks at the time; it has not cut the clips then
    steps = ["scenes", "clips", "people", "motion", "speech"]
    stopped = steps.index("clips" if "clips" in done else "scenes")
    assert done == dict.fromkeys(["sources", *steps[: stopped + 1]], 1)
    (source,) = outcome.sources
    assert source["status"] == "error" and source["reason"] == "took longer than 0.001 s"
    assert run(uris, retry_errors=True)[0] == dict.fromkeys(steps[stopped:], 1)


def test_a_missing_audio_file_of_a_clip_is_made_again_on_retry(run: Run, world: Any, tmp_path: Path) -> None:
    uri = str(world.path("talk_3s.mp4"))
    run({uri: {}})
    (audio,) = (tmp_path / "out" / "clips").rglob("*.flac")
    before = audio.read_bytes()
    audio.unlink()
    assert run({uri: {}}, retry_errors=True)[0] == {"clips": 1}
    assert audio.read_bytes() == before


def test_rows_that_a_failing_store_did_not_take_are_made_by_the_next_try(
    pool: WorkerPool, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [SourceRow(str(world.path("talk_3s.mp4")), {}, "manifest")]
    curation = Curation(load_recipe("tests/three_stages.yaml"), Storage(str(tmp_path)), rows, pool)
    for work in curation.everything():
        if work.name == "measure":
            break
        curation.runner.run(work)
    write = curation.view.ledger.write

    def fails(table: str, *rest: Any) -> None:
        if table == "motion":
            raise OSError(5, "Input/output error")
        write(table, *rest)

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="ledger of motion"):
        patch.setattr(curation.view.ledger, "write", fails)
        curation.runner.run(work)
    assert list(curation.runner.run(work)) == ["people", "motion", "speech"]
    assert not any(curation.schedule.units(name, work.partitions) for name in curation.view.stages)


def test_a_clip_with_several_missing_files_is_measured_once_on_retry(
    pool: WorkerPool, world: Any, tmp_path: Path
) -> None:
    section = {"clips": {"fps": 25, "short_side": 128, "min_s": 2}, "measure": {"speech": {}, "latents": {}}}
    rows = [SourceRow(str(world.path("talk_3s.mp4")), {}, "manifest")]

    def done(retry_errors: bool) -> dict[str, int]:
        recipe = parse_curation({**section, "name": "two"}, "here")
        curation = Curation(recipe, Storage(str(tmp_path)), rows, pool, retry_errors)
        totals = curation.run(curation.everything())
        return {name: total.done for name, total in totals.items()}

    done(False)
    shutil.rmtree(tmp_path / "features")
    assert done(True) == {"speech": 1, "latents": 1}
    assert done(True) == {}


def test_a_changed_caption_repeats_only_the_stages_that_read_captions(run: Run, world: Any) -> None:
    uri = str(world.path("talk_3s.mp4"))
    first, _ = run({uri: {"caption": "a man speaks"}})
    assert first == {"sources": 1, "scenes": 1, "clips": 1, "people": 1, "motion": 1, "speech": 1}
    assert run({uri: {"caption": "a man speaks", "shelf": "7"}})[0] == {}
    done, outcome = run({uri: {"caption": "a medium shot of a man who speaks", "shelf": "7"}})
    assert done == {"people": 1}
    assert list(outcome.decisions["verdict"]) == ["keep"]


def test_clips_that_are_the_same_under_other_bounds_are_not_measured_again(run: Run, world: Any) -> None:
    uri = str(world.path("cuts_plain.mp4"))
    first, _ = run({uri: {}}, min_s=2.0)
    assert first["people"] > 1
    assert run({uri: {}}, min_s=1.5)[0] == {"clips": 1}


def test_deleted_outputs_are_an_error_and_are_made_again_on_retry(run: Run, world: Any, tmp_path: Path) -> None:
    uri, out = str(world.path("talk_3s.mp4")), tmp_path / "out"
    run({uri: {}})
    before = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    shutil.rmtree(out / "clips")
    shutil.rmtree(out / "shards")
    shutil.rmtree(out / "features")
    with pytest.raises(ShardError, match="--retry-errors"):
        run({uri: {}})
    done, _ = run({uri: {}}, retry_errors=True)
    assert done == {"clips": 1, "speech": 1}
    assert {path.name: path.read_bytes() for path in (out / "shards").iterdir()} == before


def test_errors_are_retried_only_with_retry_errors(run: Run, world: Any, tmp_path: Path) -> None:
    broken = str(world.path("truncated.mp4"))
    assert run({broken: {}})[0] == {"sources": 1}
    assert run({broken: {}})[0] == {}
    assert run({broken: {}}, retry_errors=True)[0] == {"sources": 1}


@pytest.mark.parametrize("recipe", ["demo", "tests/three_stages.yaml"])
def test_a_run_has_at_most_200_tasks_for_any_number_of_sources_and_stages(recipe: str, tmp_path: Path) -> None:
    loaded = load_recipe(recipe)
    loaded = loaded.model_copy(update={"shards": loaded.shards.model_copy(update={"partitions": 4096})})
    curation = Curation(loaded, Storage(str(tmp_path)), [], WorkerPool())
    for sources in (1, 40, 900):  # in each partition
        schedule, view = curation.schedule, curation.view
        view.sources = lambda _, n=sources: [None] * n  # type: ignore[assignment,misc]
        schedule.units = lambda step, partitions: []  # type: ignore[method-assign]
        groups = schedule.groups()
        tasks = len(groups)  # one task for each group's shards
        for work in curation.everything():
            tasks += 1
            if work.fused:  # the worst that can happen: each partition loses a unit
                work.lost.update(f"{number:08x}01234567" for number in work.partitions)
        assert len(groups) > 1 and tasks <= 200
        assert [p for group in groups for p in group] == list(range(4096))


def test_backend_versions_are_read_once_a_stage_and_not_once_a_clip(
    run: Run, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.stages.motion.stage import Motion

    asked = []
    known = Motion.backend_version
    monkeypatch.setattr(Motion, "backend_version", lambda self: asked.append(1) or known(self))
    run({str(world.path("cuts_plain.mp4")): {}})
    assert len(asked) <= 4
