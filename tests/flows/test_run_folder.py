"""A finished run is read back from its folder. What is missing or damaged is one clear message."""

import shutil
from pathlib import Path
from typing import Any

import av
import pytest

from data_manifests.storage import Storage
from tasks.cutting.ingest import ingest
from tasks.execution.outcome import Outcome
from tasks.recipe import load_recipe
from tasks.review.refusal import Refused
from tasks.review.run_folder import RunFolder, UnreadableRun
from tests.flows.conftest import Curate

Finished = tuple[str, Outcome]


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The bytes and the time of change of each file in a folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def test_a_run_folder_gives_the_decisions_and_counts_of_the_run(finished: Finished) -> None:
    out, outcome = finished
    run = RunFolder(out)
    counts = {what: count for what, count, _ in run.funnel()}
    hours = {what: hours for what, _, hours in run.funnel()}
    kept = outcome.decisions["verdict"] == "keep"
    assert hours["clips"] == pytest.approx(outcome.frame["clips.duration_s"].sum() / 3600)
    assert hours["kept"] == pytest.approx(outcome.frame.loc[kept[kept].index, "clips.duration_s"].sum() / 3600)
    assert counts["rows of the manifest"] == len(outcome.sources) and counts["clips"] == len(outcome.decisions)
    assert counts["kept"] == (outcome.decisions["verdict"] == "keep").sum() > 0
    assert counts["  tier main"] == counts["kept"] and counts["  bad rows"] == 1
    assert len(run.problems()) == 2
    expected = outcome.decisions.sort_index()
    assert list(run.decisions.index) == list(expected.index)
    for column in expected:
        assert run.decisions[column].tolist() == expected[column].tolist(), column


def test_a_run_folder_in_an_object_store_gives_the_same_funnel(finished: Finished, s3_folder: str) -> None:
    out, _ = finished
    copy = Storage(s3_folder)
    for path in Path(out).rglob("*"):
        name = str(path.relative_to(out))
        if path.is_file() and not name.startswith(("clips/", "features/", "shards/")):
            copy.write_bytes(name, path.read_bytes())
    assert RunFolder(s3_folder).funnel() == RunFolder(out).funnel()


@pytest.mark.parametrize(
    "name", ["dataset.json", "sources.csv", "clips.parquet", "recipes/*.json", "recipes/*.steps.json"]
)
@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_missing_or_damaged_file_of_a_run_is_named_in_the_error(
    finished: Finished, tmp_path: Path, name: str, how: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("clips", "features", "shards"))
    file = min(out.glob(name), key=lambda path: len(path.name))
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(b"\x00no such format\n")
    with pytest.raises(UnreadableRun) as refusal:
        RunFolder(str(out))
    message = str(refusal.value)
    assert file.name in message and str(out) in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("foo://bar", "this address cannot be read"),
        ("memory://nothing", "there is no finished run here"),
        ("", "there is no finished run here"),
        ("{out}/clips.parquet", "clips.parquet/dataset.json: cannot be read"),
    ],
)
def test_an_address_without_a_finished_run_is_refused(finished: Finished, address: str, message: str) -> None:
    with pytest.raises(UnreadableRun, match=message):
        RunFolder(address.format(out=finished[0]))
    assert RunFolder(f"{finished[0]}/dataset.json").address == finished[0]


def test_a_damaged_ledger_file_is_named_in_the_error_and_left_unchanged(finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("clips", "features", "shards"))
    part = next((out / "ledger" / "motion").rglob("*.parquet"))
    part.write_bytes(b"PAR1" + bytes(50))
    before = files(out)
    with pytest.raises(UnreadableRun, match=f"{part.name} is damaged"):
        RunFolder(str(out))
    assert files(out) == before


@pytest.mark.parametrize("name", ["clips/*/{}.mp4", "clips/*/{}.flac", "features/speech/*/{}.log_mel.npy"])
@pytest.mark.parametrize("how", ["truncated", "another format"])
def test_a_damaged_file_of_a_clip_is_an_error_that_names_the_clip_and_the_remedy(
    finished: Finished, tmp_path: Path, name: str, how: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("shards"))
    run = RunFolder(str(out))
    clip_id = run.decisions.index[run.decisions["verdict"] == "keep"][0]
    (file,) = out.glob(name.format(clip_id))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3] if how == "truncated" else b"no such format")
    ((record, results),) = run.clips([clip_id])
    with pytest.raises(UnreadableRun, match=f"{clip_id}.*--retry-errors"), run.open(record, results) as clip:
        assert len(list(clip.frames())) == record.frames
        samples = clip.samples()
        assert samples is not None and len(samples) * record.fps == record.frames * 16_000
        assert len(clip.found["speech"].arrays["log_mel"]) == record.frames


def test_ledger_rows_that_the_run_did_not_count_are_ignored(finished: Finished, tmp_path: Path) -> None:
    """Such rows belong to footage that the manifest no longer lists, or to a later run that was killed."""
    import pandas as pd

    out = tmp_path / "out"
    shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("clips", "features", "shards"))
    clips = pd.read_parquet(out / "clips.parquet")
    nobody = clips["clip_id"][clips["rule"] == "person"].item()
    clips.loc[clips["clip_id"] == nobody, "people.status"] = None
    clips.to_parquet(out / "clips.parquet", index=False)
    assert RunFolder(str(out)).decisions.loc[nobody, ["verdict", "stage"]].tolist() == ["pending", "people"]


def test_a_clip_is_found_by_the_beginning_of_its_clip_id(finished: Finished) -> None:
    run = RunFolder(finished[0])
    first, *others = run.frame.index
    assert run.find(first) == run.find(first[:12]) == first
    assert others
    for prefix, message in (("", "clips begin with"), ("no such clip", "no clip of")):
        with pytest.raises(Refused, match=message):
            run.find(prefix)


def test_a_misspelt_clip_id_is_refused_with_the_most_similar_one(finished: Finished) -> None:
    run = RunFolder(finished[0])
    for clip_id in run.frame.index:
        other = "z" if clip_id[0] != "z" else "y"
        for misspelt, meant in (
            (other + clip_id[1:], clip_id),
            (clip_id[:-1] + other, clip_id),
            (clip_id[:5] + other + clip_id[6:12], clip_id[:16]),  # all clips of the source begin so
        ):
            with pytest.raises(Refused, match=f"did you mean {meant}"):
                run.find(misspelt)


def test_a_source_without_a_stated_duration_counts_with_the_duration_that_was_decoded(
    curate: Curate, world: Any, tmp_path: Path
) -> None:
    unclosed = tmp_path / "recording.mkv"
    live = {"live": "1"}
    with (
        av.open(str(world.path("talk_3s.mp4"))) as given,
        av.open(str(unclosed), "w", format="matroska", options=live) as made,
    ):
        streams = [made.add_stream_from_template(stream) for stream in given.streams]
        for packet in given.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                made.mux(packet)
    assert not ingest(str(unclosed)).duration_s
    curate([unclosed], tmp_path / "out", load_recipe("tests/three_stages.yaml"))
    hours = {what: hours for what, _, hours in RunFolder(str(tmp_path / "out")).funnel()}
    assert hours["sources"] == pytest.approx(3 / 3600, rel=0.05)


def test_an_opened_clip_has_its_files_and_all_results_of_stages(finished: Finished) -> None:
    run = RunFolder(finished[0])
    kept = list(run.decisions.index[run.decisions["verdict"] == "keep"])
    opened = {}
    for record, results in run.clips(reversed(kept)):
        with run.open(record, results) as clip:
            opened[record.clip_id] = clip.found["speech"].columns["fraction"]
            assert sum(1 for _ in clip.keyframes()) > 0
            assert all(len(array) for stage in clip.found.values() for array in stage.arrays.values())
    assert list(opened) == kept[::-1]
    assert opened == {clip_id: run.frame.at[clip_id, "speech.fraction"] for clip_id in opened}
