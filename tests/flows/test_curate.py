"""The flow `curate` on real files, with a real Prefect server. The command runs in a process of its own."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.logging import disable_run_logger
from typer.testing import CliRunner

from data_manifests.dataset import DatasetManifest, verify
from data_manifests.storage import Storage
from flows.cli.main import app
from flows.curate import curate
from flows.parameters import CurateParameters
from flows.summary import Summary
from tasks.execution.curation import Curation
from tasks.execution.footage import read_footage
from tasks.execution.outcome import Outcome
from tasks.execution.worker_pool import WorkerPool
from tasks.recipe import load_recipe
from tests.flows.conftest import FLOW_FILES, Server

DEMO = "tests/three_stages.yaml"


pytestmark = pytest.mark.usefixtures("server")


@pytest.fixture
def footage(folder_of_footage: Path) -> Path:
    return folder_of_footage


def run(footage: Path | str, out: Path | str, recipe: str = DEMO) -> Summary:
    """Run the flow with one worker, since a second one takes longer to start than these runs take."""
    return curate(CurateParameters(manifest=str(footage), recipe=recipe, out=str(out), workers=1))


def shards(out: Path) -> dict[str, bytes]:
    listed = json.loads((out / "dataset.json").read_text())["shards"]
    return {"dataset.json": (out / "dataset.json").read_bytes()} | {
        s["name"]: (out / s["name"]).read_bytes() for s in listed
    }


def test_every_file_and_every_clip_is_accounted_for(footage: Path, curated: tuple[Path, Summary]) -> None:
    import pandas as pd

    out, summary = curated
    with (out / "sources.csv").open(newline="", encoding="utf-8") as file:
        rows = {Path(row["uri"]).name: row for row in csv.DictReader(file)}
    assert set(rows) == {*FLOW_FILES, "copy of the first.mp4"}
    assert rows["truncated.mp4"]["status"] == "error" and "truncated" in rows["truncated.mp4"]["reason"]
    assert sorted(r["status"] for r in rows.values()) == ["duplicate", "error", "ok", "ok", "ok", "ok"]
    clips = pd.read_parquet(out / "clips.parquet")
    assert set(clips["verdict"]) <= {"keep", "drop", "error"}
    assert (clips[clips["verdict"] == "drop"][["rule", "value", "threshold"]] != "").all().all()
    nobody = clips[clips["clip_id"].str.startswith(rows["nobody.mp4"]["source_id"])]
    assert len(nobody) and set(nobody["verdict"]) == {"drop"}
    report = verify(str(out / "dataset.json"))
    assert not report.faults and report.samples == (clips["verdict"] == "keep").sum() == summary.samples > 0
    assert summary.errors == 1


def test_a_rerun_does_nothing_and_changes_nothing(
    footage: Path, curated: tuple[Path, Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first = curated
    before = shards(out)
    asked: list[int] = []
    started = WorkerPool.__init__
    monkeypatch.setattr(WorkerPool, "__init__", lambda self, n, *rest: asked.append(n) or started(self, n, *rest))
    again = run(footage, out)
    assert asked == [1]
    assert first.new and not again.new
    assert shards(out) == before
    assert again.funnel == first.funnel


def test_a_report_that_cannot_be_written_does_not_fail_the_run(
    footage: Path, curated: tuple[Path, Summary], tmp_path: Path
) -> None:
    assert "cuts_plain.mp4" in Path(curated[1].report).read_text()
    times = json.loads((curated[0] / "times.json").read_text())
    assert {name: step["units"] for name, step in times.items()} == curated[1].new
    out = tmp_path / "out"
    shutil.copytree(curated[0], out)
    (out / "report.html").unlink()
    (out / "report.html").mkdir()
    again = run(footage, out)
    assert again.report == "" and again.samples == curated[1].samples and again.funnel == curated[1].funnel


def test_a_finished_run_that_cannot_be_read_back_has_a_summary_all_the_same(
    footage: Path, curated: tuple[Path, Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.review.run_folder import RunFolder

    def fails(self: RunFolder) -> None:
        raise OSError(5, "Input/output error")

    out = tmp_path / "dataset.json"  # a name that is also the manifest's
    shutil.copytree(curated[0], out)
    assert run(footage, out).funnel == curated[1].funnel
    monkeypatch.setattr(RunFolder, "_read", fails)
    again = run(footage, out)
    assert again.report == "" and again.funnel == [] and again.samples == curated[1].samples
    assert again.errors == curated[1].errors > 0


def test_one_worker_without_prefect_writes_the_same_shards_as_the_flow(
    footage: Path, curated: tuple[Path, Summary], tmp_path: Path
) -> None:
    storage = Storage(str(tmp_path))
    rows, bad_rows = read_footage(str(footage), storage)
    with WorkerPool(workers=1) as pool:
        curation = Curation(load_recipe(DEMO), storage, rows, pool)
        curation.run(curation.everything())
        outcome = Outcome(curation, bad_rows)
        plans = [plan for partition in range(curation.view.partitions) for plan in outcome.plan_shards(partition)]
        outcome.record(DatasetManifest.of(outcome.recipe_name, str(footage), outcome.write_shards(plans)))
    assert shards(tmp_path) == shards(curated[0])


def test_only_new_footage_is_processed(footage: Path, curated: tuple[Path, Summary], world, tmp_path: Path) -> None:
    more, out = tmp_path / "more", tmp_path / "out"
    shutil.copytree(curated[0], out)
    more.mkdir()
    shutil.copy(world.path("talk_3s.mp4"), more)
    manifest = tmp_path / "all.csv"
    uris = [*sorted(footage.glob("*.mp4")), more / "talk_3s.mp4"]
    manifest.write_text("uri,shelf\n" + "".join(f'"{uri}",7\n' for uri in uris))
    summary = run(manifest, out)
    assert summary.new["sources"] == summary.new["scenes"] == summary.new["clips"] == 1


def test_a_changed_setting_repeats_only_the_steps_that_depend_on_it(
    footage: Path, curated: tuple[Path, Summary], tmp_path: Path
) -> None:
    import yaml

    out = tmp_path / "out"
    shutil.copytree(curated[0], out)
    recipe = yaml.safe_load(Path(DEMO).read_text())
    changed = tmp_path / "changed.yaml"

    recipe["curation"]["policy"]["rules"]["not_static"]["max"] = 0.99
    changed.write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert run(footage, out, recipe=str(changed)).new == {}

    recipe["curation"]["measure"]["motion"]["rate_hz"] = 5.0
    changed.write_text(yaml.safe_dump(recipe, sort_keys=False))
    summary = run(footage, out, recipe=str(changed))
    assert set(summary.new) == {"motion"}
    assert summary.changes == ["motion: made anew, because rate_hz 12.0 -> 5.0 changed"]


def test_footage_in_an_object_store_is_curated_into_an_object_store(footage: Path, s3_folder: str) -> None:
    raw = Storage(f"{s3_folder}/raw")
    for path in sorted(footage.iterdir()):
        raw.write_bytes(path.name, path.read_bytes())
    raw.write_bytes("footage.jsonl", b'{"uri": "talk_medium.mp4", "language": "en"}\n{"uri": "truncated.mp4"}\n')
    summary = run(f"{s3_folder}/raw/footage.jsonl", f"{s3_folder}/out")
    assert summary.samples and summary.errors == 1
    assert not verify(f"{s3_folder}/out/dataset.json").faults
    assert not run(f"{s3_folder}/raw/footage.jsonl", f"{s3_folder}/out").new


def test_exit_codes_are_0_for_done_1_for_errors_and_2_for_failed(footage: Path, server: Server, tmp_path: Path) -> None:
    sound, out = tmp_path / "sound", tmp_path / "out"
    sound.mkdir()
    shutil.copy(footage / "talk_medium.mp4", sound)

    def curate_line(footage: Path, out: Path) -> list[str]:
        return ["curate", str(footage), "--recipe", DEMO, "--workers", "1", "--out", str(out)]

    line = [sys.executable, "-m", "flows.cli.main", *curate_line(sound, out)]
    clean = subprocess.run(line, capture_output=True, text=True, env=server.env)
    assert clean.returncode == 0
    assert re.findall(r"^(\w+): (\d+ of \d+)", clean.stderr, re.M)[:2] == [("sources", "1 of 1"), ("cut", "1 of 1")]
    shutil.copy(footage / "truncated.mp4", sound)
    with_errors = CliRunner().invoke(app, curate_line(sound, out))
    assert with_errors.exit_code == 1 and "truncated.mp4" in with_errors.stdout
    failed = CliRunner().invoke(app, curate_line(tmp_path / "nothing", out))
    assert failed.exit_code == 2
    assert "no such file or folder" in failed.stderr and "Traceback" not in failed.stderr
    (tmp_path / "file").touch()
    failed = CliRunner().invoke(app, curate_line(sound, tmp_path / "file"))
    assert failed.exit_code == 2
    assert "cannot be written to" in failed.stderr and "Traceback" not in failed.stderr


def test_bad_and_duplicate_manifest_rows_are_listed_in_sources_csv(footage: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "footage.csv"
    uri = footage / "talk_medium.mp4"
    manifest.write_text(f"uri,caption\n{uri},fine\n,no name\n{uri},again\n" + "x\n" * 25)
    summary = run(manifest, tmp_path / "out")
    with (tmp_path / "out" / "sources.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["ok", "bad row", "duplicate", *["bad row"] * 25]
    assert rows[1]["where"] == f"{manifest}:3" and rows[1]["reason"]
    assert summary.errors == 26


def test_clips_of_runs_inside_the_footage_folder_are_not_footage(
    footage: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(world.path("talk_3s.mp4"), tmp_path)
    assert run(tmp_path, tmp_path / "elsewhere" / ".." / "out").samples == 1
    assert run(tmp_path, tmp_path / "elsewhere" / ".." / "out").new == {}
    with disable_run_logger():
        # it is not footage for another run either
        assert len(read_footage(str(tmp_path), Storage(str(tmp_path / "another")))[0]) == 1
        monkeypatch.setenv("HOME", str(tmp_path.parent))
        assert len(read_footage(f"~/{tmp_path.name}", Storage(str(tmp_path / "another")))[0]) == 1
        # unless the manifest names the folder of clips itself
        (clip,), _ = read_footage(str(tmp_path / "out" / "clips"), Storage(str(tmp_path / "another")))
    assert clip.uri.startswith(str(tmp_path / "out" / "clips"))
