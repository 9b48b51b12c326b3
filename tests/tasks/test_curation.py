"""What a curation does again and what it does not; told without Prefect."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_manifests.sources import SourceRow
from data_manifests.storage import Storage
from tasks.curation import MEASURE, Curation
from tasks.engine import Engine, StoreError
from tasks.outcome import Outcome, ShardError
from tasks.recipe import load_recipe, recipe_of
from tasks.work import Unit

Run = Callable[..., tuple[dict[str, int], Outcome]]


@pytest.fixture(scope="module")
def engine() -> Any:
    with Engine(workers=2) as engine:
        yield engine


@pytest.fixture
def run(engine: Engine, tmp_path: Path) -> Run:
    """Curate uris with their metadata into a folder; gives units done by step, and the outcome with shards written."""

    def run(
        uris: dict[str, dict[str, str]],
        retry_errors: bool = False,
        out: str = "out",
        limits: dict[str, float] | None = None,
        **clips: float,
    ) -> tuple[dict[str, int], Outcome]:
        recipe = load_recipe("tests/three_stages.yaml")
        how = recipe.run.model_copy(update={"time_limits": limits or {}})
        recipe = recipe.model_copy(update={"clips": recipe.clips.model_copy(update=clips), "run": how})
        rows = [SourceRow(uri, metadata, "manifest") for uri, metadata in uris.items()]
        curation = Curation(recipe, Storage(str(tmp_path / out)), rows, engine, retry_errors)
        results = curation.everything()
        outcome = Outcome(curation)
        plans = [plan for p in range(curation.partitions) for plan in outcome.plan_shards(p)]
        outcome.write_shards(plans)
        return {name: result.done for name, result in results.items()}, outcome

    return run


def test_an_address_that_leads_nowhere_costs_only_its_own_row(run: Run, world: Any, tmp_path: Path) -> None:
    good = str(world.path("talk_3s.mp4"))
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    odd = [f"{good}/inside.mp4", "/" + "x" * 300 + ".mp4", str(tmp_path / "loop.mp4"), str(tmp_path / "pipe.mp4")]
    odd += [str(tmp_path), str(tmp_path / "nowhere.mp4"), "foo://bar/a.mp4"]
    done, outcome = run({uri: {} for uri in [good, *odd]})
    assert done["sources"] == 1 + len(odd) and done["clips"] == 1
    assert {row["uri"]: row["status"] for row in outcome.sources} == {good: "ok"} | dict.fromkeys(odd, "error")
    assert all(row["reason"] for row in outcome.sources if row["status"] == "error")


def test_a_store_that_does_not_answer_is_no_fault_of_the_footage(
    engine: Engine, tmp_path: Path, s3_folder: str
) -> None:
    from s3fs import S3FileSystem

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        S3FileSystem.clear_instance_cache()  # connections are kept by address, not by endpoint
        rows = [SourceRow("s3://elsewhere/talk.mp4", {}, "manifest")]
        curation = Curation(load_recipe("tests/three_stages.yaml"), Storage(str(tmp_path / "out")), rows, engine)
        with pytest.raises(StoreError, match="look at the footage"):
            curation.step["sources"].units(range(curation.partitions))
        unit = Unit("sources", rows[0].uri, "1-a", rows[0].uri)
        with pytest.raises(StoreError), Engine(workers=1) as cut_off:  # its workers see the same environment
            curation.engine = cut_off
            curation.run(curation.step["sources"], [unit])
        assert not curation.ledger.rows("sources", curation.step["sources"].fingerprint)
    S3FileSystem.clear_instance_cache()


def test_a_stage_that_takes_too_long_costs_its_own_row(run: Run, world: Any, tmp_path: Path) -> None:
    uris: dict[str, dict[str, str]] = {str(world.path("talk_3s.mp4")): {}, str(world.path("nobody.mp4")): {}}
    done, outcome = run(uris, limits={"speech": 0.001})
    assert done == {"sources": 2, "scenes": 2, "clips": 2, "people": 2, "motion": 1, "speech": 1}
    (slow,) = outcome.decisions[outcome.decisions["verdict"] == "error"].to_dict("records")
    assert slow["stage"] == "speech" and slow["error"] == "took longer than 0.001 s"
    assert run(uris, retry_errors=True)[0] == {"speech": 1}
    run(uris, out="undisturbed")

    def written(out: str) -> dict[str, bytes]:
        files = (path for kind in ("ledger", "features", "shards") for path in (tmp_path / out / kind).rglob("*.*"))
        return {str(path.relative_to(tmp_path / out)): path.read_bytes() for path in files}

    assert written("out") == written("undisturbed")


def test_a_source_that_takes_too_long_is_tried_step_by_step(run: Run, world: Any) -> None:
    uris: dict[str, dict[str, str]] = {str(world.path("talk_3s.mp4")): {}}
    done, outcome = run(uris, limits={"scenes": 0.001, "clips": 0.001})
    assert done == {"sources": 1, "scenes": 1}
    (source,) = outcome.sources
    assert source["status"] == "error" and source["reason"] == "took longer than 0.001 s"
    assert run(uris, retry_errors=True)[0] == {"scenes": 1, "clips": 1, "people": 1, "motion": 1, "speech": 1}


def test_sound_that_is_gone_from_the_output_is_made_again(run: Run, world: Any, tmp_path: Path) -> None:
    uri = str(world.path("talk_3s.mp4"))
    run({uri: {}})
    (sound,) = (tmp_path / "out" / "clips").rglob("*.flac")
    before = sound.read_bytes()
    sound.unlink()
    assert run({uri: {}}, retry_errors=True)[0] == {"clips": 1}
    assert sound.read_bytes() == before


def test_rows_that_a_failing_store_has_cost_are_made_by_the_next_try(
    engine: Engine, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [SourceRow(str(world.path("talk_3s.mp4")), {}, "manifest")]
    curation = Curation(load_recipe("tests/three_stages.yaml"), Storage(str(tmp_path)), rows, engine)
    for work, group in curation.walk():
        units = work.units(group)
        if work.name == MEASURE:
            break
        curation.run(work, units)
    write = curation.ledger.write

    def fails(table: str, *rest: Any) -> None:
        if table == "motion":
            raise OSError(5, "Input/output error")
        write(table, *rest)

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="ledger of motion"):
        patch.setattr(curation.ledger, "write", fails)
        curation.run(work, units)
    assert list(curation.run(work, units)) == ["people", "motion", "speech"]
    assert not any(step.units(group) for name, step in curation.step.items() if name in curation.stages)


def test_a_clip_whose_files_are_gone_is_taken_through_its_stages_once(
    engine: Engine, world: Any, tmp_path: Path
) -> None:
    section = {"clips": {"fps": 25, "short_side": 128, "min_s": 2}, "measure": {"speech": {}, "latents": {}}}
    rows = [SourceRow(str(world.path("talk_3s.mp4")), {}, "manifest")]

    def done(retry_errors: bool) -> dict[str, int]:
        recipe = recipe_of({**section, "name": "two"}, "here")
        curation = Curation(recipe, Storage(str(tmp_path)), rows, engine, retry_errors)
        results = curation.everything()
        return {name: result.done for name, result in results.items()}

    done(False)
    shutil.rmtree(tmp_path / "features")
    assert done(True) == {"speech": 1, "latents": 1}
    assert done(True) == {}


def test_a_new_caption_is_measured_again_and_nothing_else(run: Run, world: Any) -> None:
    uri = str(world.path("talk_3s.mp4"))
    first, _ = run({uri: {"caption": "a man speaks"}})
    assert first == {"sources": 1, "scenes": 1, "clips": 1, "people": 1, "motion": 1, "speech": 1}
    assert run({uri: {"caption": "a man speaks", "shelf": "7"}})[0] == {}
    done, outcome = run({uri: {"caption": "a medium shot of a man who speaks", "shelf": "7"}})
    assert done == {"people": 1}
    assert list(outcome.decisions["verdict"]) == ["keep"]


def test_clips_that_stay_under_other_bounds_keep_their_measurements(run: Run, world: Any) -> None:
    uri = str(world.path("cuts_plain.mp4"))
    first, _ = run({uri: {}}, min_s=2.0)
    assert first["people"] > 1
    assert run({uri: {}}, min_s=1.5)[0] == {"clips": 1}


def test_what_is_gone_from_the_output_is_said_and_can_be_made_again(run: Run, world: Any, tmp_path: Path) -> None:
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


def test_errors_are_tried_again_only_on_demand(run: Run, world: Any, tmp_path: Path) -> None:
    broken = str(world.path("truncated.mp4"))
    assert run({broken: {}})[0] == {"sources": 1}
    assert run({broken: {}})[0] == {}
    assert run({broken: {}}, retry_errors=True)[0] == {"sources": 1}


@pytest.mark.parametrize("recipe", ["demo", "tests/three_stages.yaml"])
def test_a_run_has_at_most_200_tasks_however_many_sources_and_stages(recipe: str, tmp_path: Path) -> None:
    many = load_recipe(recipe)
    many = many.model_copy(update={"shards": many.shards.model_copy(update={"partitions": 4096})})
    curation = Curation(many, Storage(str(tmp_path)), [], Engine())
    for sources in (1, 40, 900):  # in each partition
        curation.sources = lambda _, n=sources: [None] * n  # type: ignore[assignment,misc]
        groups = curation.groups()
        curation._lost = {"0123456789abcdef-00000000-01234567"}  # a clip that has ended its worker
        tasks = sum(1 for _ in curation.walk()) + len(groups)  # and one for each group's shards
        assert len(groups) > 1 and tasks <= 200
        assert [p for group in groups for p in group] == list(range(4096))


def test_backends_are_asked_once_a_stage_not_once_a_clip(run: Run, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.motion import Motion

    asked = []
    known = Motion.backend_version
    monkeypatch.setattr(Motion, "backend_version", lambda self: asked.append(1) or known(self))
    run({str(world.path("cuts_plain.mp4")): {}})
    assert len(asked) <= 4
