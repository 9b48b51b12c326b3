"""A finished run read back from its folder: what it told, or one message on what is missing."""

import shutil
from pathlib import Path
from typing import Any

import av
import pytest

from data_manifests.storage import Storage
from tasks.ingest import ingest
from tasks.outcome import Outcome
from tasks.recipe import load_recipe
from tasks.run_folder import Refused, RunFolder, UnreadableRun
from tests.flows.conftest import Curate

Finished = tuple[str, Outcome]


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of everything in a folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def test_a_folder_tells_what_the_run_told_at_its_end(finished: Finished) -> None:
    out, outcome = finished
    run = RunFolder(out)
    assert run.funnel() == outcome.funnel()
    assert run.problems() == outcome.problems() and len(run.problems()) == 2
    told = outcome.decisions.sort_index()
    assert list(run.decisions.index) == list(told.index)
    for column in told:
        assert run.decisions[column].tolist() == told[column].tolist(), column


def test_a_folder_is_read_from_anywhere(finished: Finished, s3_folder: str) -> None:
    out, outcome = finished
    there = Storage(s3_folder)
    for path in Path(out).rglob("*"):
        name = str(path.relative_to(out))
        if path.is_file() and not name.startswith(("clips/", "features/", "shards/")):
            there.write_bytes(name, path.read_bytes())
    assert RunFolder(s3_folder).funnel() == outcome.funnel()


@pytest.mark.parametrize(
    "name", ["dataset.json", "sources.csv", "clips.parquet", "recipes/*.json", "recipes/*.steps.json"]
)
@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_a_folder_that_lacks_something_is_refused_by_its_name(
    finished: Finished, tmp_path: Path, name: str, how: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("clips", "features", "shards"))
    hurt = min(out.glob(name), key=lambda path: len(path.name))
    if how == "gone":
        hurt.unlink()
    else:
        hurt.write_bytes(b"\x00nothing of ours\n")
    with pytest.raises(UnreadableRun) as refusal:
        RunFolder(str(out))
    message = str(refusal.value)
    assert hurt.name in message and str(out) in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("foo://bar", "no address that can be read"),
        ("memory://nothing", "no finished run lies here"),
        ("", "no finished run lies here"),
        ("{out}/clips.parquet", "clips.parquet/dataset.json: cannot be read"),
    ],
)
def test_a_place_without_a_run_is_refused(finished: Finished, address: str, message: str) -> None:
    with pytest.raises(UnreadableRun, match=message):
        RunFolder(address.format(out=finished[0]))
    assert RunFolder(f"{finished[0]}/dataset.json").address == finished[0]


def test_a_damaged_ledger_is_told_of_and_left_as_it_is(finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("clips", "features", "shards"))
    part = next((out / "ledger" / "motion").rglob("*.parquet"))
    part.write_bytes(b"PAR1" + bytes(50))
    before = files(out)
    with pytest.raises(UnreadableRun, match=f"{part.name} is damaged"):
        RunFolder(str(out))
    assert files(out) == before


@pytest.mark.parametrize("name", ["clips/*/{}.mp4", "clips/*/{}.flac", "features/speech/*/{}.log_mel.npy"])
@pytest.mark.parametrize("how", ["cut off", "not ours"])
def test_a_damaged_clip_is_told_of_in_one_message(finished: Finished, tmp_path: Path, name: str, how: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("shards"))
    run = RunFolder(str(out))
    clip_id = run.decisions.index[run.decisions["verdict"] == "keep"][0]
    (hurt,) = out.glob(name.format(clip_id))
    hurt.write_bytes(hurt.read_bytes()[: hurt.stat().st_size // 3] if how == "cut off" else b"nothing of ours")
    ((record, findings),) = run.clips([clip_id])
    with pytest.raises(UnreadableRun, match=f"{clip_id}.*--retry-errors"), run.open(record, findings) as clip:
        assert len(list(clip.frames())) == record.frames
        samples = clip.samples()
        assert samples is not None and len(samples) * record.fps == record.frames * 16_000
        assert len(clip.found["speech"].arrays["log_mel"]) == record.frames


def test_rows_that_the_run_did_not_count_are_not_read(finished: Finished, tmp_path: Path) -> None:
    """Such as those of footage that the manifest no longer lists, or of a later run that was killed."""
    import pandas as pd

    out = tmp_path / "out"
    shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("clips", "features", "shards"))
    clips = pd.read_parquet(out / "clips.parquet")
    nobody = clips["clip_id"][clips["rule"] == "person"].item()
    clips.loc[clips["clip_id"] == nobody, "people.status"] = None
    clips.to_parquet(out / "clips.parquet", index=False)
    assert RunFolder(str(out)).decisions.loc[nobody, ["verdict", "stage"]].tolist() == ["pending", "people"]


def test_a_clip_is_found_by_the_beginning_of_its_name(finished: Finished) -> None:
    run = RunFolder(finished[0])
    first, *others = run.frame.index
    assert run.find(first) == run.find(first[:12]) == first
    assert others
    for prefix, message in (("", "clips begin with"), ("no such clip", "no clip of")):
        with pytest.raises(Refused, match=message):
            run.find(prefix)


def test_a_misspelt_name_brings_the_nearest_one(finished: Finished) -> None:
    run = RunFolder(finished[0])
    for clip_id in run.frame.index:
        other = "z" if clip_id[0] != "z" else "y"
        for misspelt, meant in (
            (other + clip_id[1:], clip_id),
            (clip_id[:-1] + other, clip_id),
            (clip_id[:5] + other + clip_id[6:12], clip_id[:16]),  # by which all clips of its source begin
        ):
            with pytest.raises(Refused, match=f"did you mean {meant}"):
                run.find(misspelt)


def test_a_source_that_does_not_tell_its_length_counts_with_what_was_seen_of_it(
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
    outcome = curate([unclosed], tmp_path / "out", load_recipe("tests/three_stages.yaml"))
    hours = {what: hours for what, _, hours in RunFolder(str(tmp_path / "out")).funnel()}
    assert hours["sources"] == pytest.approx(3 / 3600, rel=0.05)
    assert {what: hours for what, _, hours in outcome.funnel()} == hours


def test_a_clip_comes_with_all_that_was_found_in_it(finished: Finished) -> None:
    run = RunFolder(finished[0])
    kept = list(run.decisions.index[run.decisions["verdict"] == "keep"])
    opened = {}
    for record, findings in run.clips(reversed(kept)):
        with run.open(record, findings) as clip:
            opened[record.clip_id] = clip.found["speech"].columns["fraction"]
            assert sum(1 for _ in clip.keyframes()) > 0
            assert all(len(array) for stage in clip.found.values() for array in stage.arrays.values())
    assert list(opened) == kept[::-1]
    assert opened == {clip_id: run.frame.at[clip_id, "speech.fraction"] for clip_id in opened}
