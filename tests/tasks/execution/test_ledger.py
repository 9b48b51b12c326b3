"""The ledger keeps one row a key, on any storage. Its bytes do not depend on the order of the writes."""

import hashlib
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_manifests.storage import Storage
from tasks.execution.ledger import Ledger, LedgerError, partition_of, schema_for

SCHEMA = schema_for({"speed": float, "frames": int | None, "calm": bool, "framing": str})


def row(number: int, speed: float | None = 0.5, **others: Any) -> dict[str, Any]:
    source_id = hashlib.sha256(str(number).encode()).hexdigest()[:16]
    base = {"key": f"{source_id}-{number:08d}-abcdef01", "status": "ok", "error": "", "inputs": ""}
    return base | {"speed": speed, "frames": number, "calm": True, "framing": "long"} | others


def write(ledger: Ledger, rows: list[dict[str, Any]], fingerprint: str = "f") -> None:
    parts: dict[int, list[dict[str, Any]]] = {}
    for r in rows:
        parts.setdefault(partition_of(r["key"], ledger.partitions), []).append(r)
    for partition, some in parts.items():
        ledger.write("motion", fingerprint, partition, some, SCHEMA)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "local":
        yield Storage(str(tmp_path))
    else:
        yield Storage(f"{request.getfixturevalue('s3').address}/ledger-{tmp_path.name}")


def test_rows_come_back_with_their_types_on_any_storage(storage: Storage) -> None:
    ledger = Ledger(storage, 3)
    assert ledger.read("motion", "f").empty and ledger.keys("motion", "f") == {} and ledger.fingerprints("motion") == {}
    failed = {"key": row(9)["key"], "status": "error", "error": "it broke", "inputs": "abc"}
    write(ledger, [row(1), row(2, None), row(3, float(np.float32(0.25)), calm=None, framing=""), failed])
    ledger.describe("motion", "f", {"backend": "dis"})
    ledger.describe("motion", "f", {"backend": "not this"})
    frame = ledger.read("motion", "f").set_index("key").sort_values("frames")
    assert frame["status"].tolist() == ["ok", "ok", "ok", "error"]
    assert frame["speed"].isna().tolist() == [False, True, False, True]
    assert [str(frame[c].dtype) for c in ("speed", "frames", "calm", "framing")] == [
        "float64",
        "Int64",
        "boolean",
        "str",
    ]
    assert ledger.keys("motion", "f") == {row(n)["key"]: "" for n in (1, 2, 3)} | {failed["key"]: "abc"}
    assert {r["key"]: r["frames"] for r in ledger.rows("motion", "f")}[failed["key"]] is None
    assert [r["frames"] for r in ledger.rows("motion", "f", keys=[row(2)["key"], "unknown"])] == [2]
    assert ledger.rows("motion", "f", keys=[]) == []
    assert list(ledger.read("motion", "f", 1, ["speed"]).columns) == ["key", "speed"]
    assert ledger.fingerprints("motion") == {"f": {"backend": "dis"}}


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0, 1)), max_size=40), st.integers(1, 6), st.randoms())
@settings(max_examples=25, deadline=None)
def test_the_bytes_of_the_ledger_depend_on_its_rows_alone(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[int, float]], partitions: int, order: random.Random
) -> None:
    """The rows may be split over any number of writes, and may have replaced other rows."""
    folders = [tmp_path_factory.mktemp("ledger") for _ in range(2)]
    for n, speed in written:
        write(Ledger(Storage(str(folders[0])), partitions), [row(n, speed)])
    latest = list(dict(written).items())
    order.shuffle(latest)
    write(Ledger(Storage(str(folders[1])), partitions), [row(n, speed) for n, speed in latest])
    assert contents(folders[0]) == contents(folders[1])


@given(st.sets(st.integers(0, 60), max_size=40), st.integers(1, 7), st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_rows_are_found_under_another_number_of_partitions(
    tmp_path_factory: pytest.TempPathFactory, numbers: set[int], before: int, now: int
) -> None:
    storage = Storage(str(tmp_path_factory.mktemp("ledger")))
    write(Ledger(storage, before), [row(n, 0.1) for n in numbers])
    ledger = Ledger(storage, now)
    write(ledger, [row(n, 0.2) for n in numbers if n % 3 == 0])  # measured again: these rows count
    wanted = {row(n)["key"]: 0.2 if n % 3 == 0 else 0.1 for n in numbers}
    everything = ledger.read("motion", "f", columns=["speed"])
    assert dict(zip(everything["key"], everything["speed"], strict=True)) == wanted
    assert everything["key"].is_unique if numbers else everything.empty
    for partition in range(now):
        part = ledger.read("motion", "f", partition)
        assert part["key"].tolist() == sorted(k for k in wanted if partition_of(k, now) == partition)


def test_of_two_older_rows_the_one_without_an_error_counts(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    write(Ledger(storage, 2), [row(1, status="error", error="out of memory")])
    write(Ledger(storage, 3), [row(1)])
    assert Ledger(storage, 5).rows("motion", "f")[0]["status"] == "ok"


def test_a_source_and_its_clips_are_in_the_same_partition() -> None:
    source_id = "00000011abcdef00"
    assert partition_of(source_id, 16) == partition_of(f"{source_id}-00012000-12345678", 16) == 1
    spread = {partition_of(f"s3://bucket/{n}.mp4", 16) for n in range(300)}
    assert spread == set(range(16))
    assert 0 <= partition_of("a \udcff b.mp4", 7) < 7  # a name that is no valid text


def test_a_list_column_is_read_as_one_row_an_element(tmp_path: Path) -> None:
    clip = pa.struct({"clip_id": pa.string(), "frames": pa.int64()})
    schema = schema_for({"clips": pa.list_(clip)})
    ledger = Ledger(Storage(str(tmp_path)), 1)
    assert ledger.read_list("clips", "f", "clips").empty
    base = {"status": "ok", "error": "", "inputs": ""}
    lists = {"a": [{"clip_id": "a-1", "frames": 5}, {"clip_id": "a-2", "frames": 6}], "b": [], "c": None}
    lists["d"] = [{"clip_id": "d-1", "frames": 7}]
    ledger.write("clips", "f", 0, [{"key": k, "clips": v} | base for k, v in lists.items()], schema)
    frame = ledger.read_list("clips", "f", "clips")
    assert frame.to_dict("list") == {
        "key": ["a", "a", "d"],
        "clip_id": ["a-1", "a-2", "d-1"],
        "frames": [5, 6, 7],
    }
    assert list(ledger.read_list("clips", "f", "clips", 0, ["frames"]).columns) == ["key", "frames"]


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"not Parquet at all", "first half", "last bytes", "one bit"])
def test_a_damaged_file_is_moved_aside_and_its_rows_are_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes | str
) -> None:
    ledger = Ledger(Storage(str(tmp_path)), 1)
    write(ledger, [row(n) for n in range(50)])
    file = tmp_path / "ledger/motion/f/part-00000-of-00001.parquet"
    good = file.read_bytes()
    if damage == "first half":
        damage = good[: len(good) // 2]
    elif damage == "last bytes":
        damage = good[:-40] + bytes(255 - b for b in good[-40:-8]) + good[-8:]
    elif damage == "one bit":  # in the keys
        damage = good[:300] + bytes([good[300] ^ 1]) + good[301:]
    assert isinstance(damage, bytes)
    file.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert ledger.keys("motion", "f") == {}
    assert str(file) in caplog.text and "made again" in caplog.text
    assert file.with_name(f"{file.name}.damaged").read_bytes() == damage
    write(ledger, [row(n) for n in range(50)])
    assert file.read_bytes() == good


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    ledger = Ledger(Storage(str(tmp_path)), 1)
    write(ledger, [row(1)])
    before = contents(tmp_path)
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        ledger.write("motion", "f", 0, [row(2, speed="fast")], SCHEMA)  # type: ignore[arg-type]
    assert contents(tmp_path) == before


def test_a_column_whose_type_changed_without_a_new_version_is_an_error(tmp_path: Path) -> None:
    ledger = Ledger(Storage(str(tmp_path)), 1)
    write(ledger, [row(1)])
    with pytest.raises(LedgerError, match="raise the stage's version"):
        ledger.write("motion", "f", 0, [row(2, framing=1.5)], schema_for({"framing": float}))
    with pytest.raises(ValueError, match="every row has status already"):
        schema_for({"status": str})
    with pytest.raises(ValueError, match="no column type"):
        schema_for({"speed": complex})
