"""Sources are named by content, and recognised without being read."""

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from data_manifests.storage import Storage
from tasks.cutting.ingest import COLUMNS, SourceInfo, ingest, signature
from tasks.media.container import MediaError


def test_a_source_is_named_by_its_content(world, tmp_path: Path) -> None:
    original = world.path("fps_25.mp4")
    twin = tmp_path / "näm, 'é\n.mp4"
    shutil.copyfile(original, twin)
    one, two = ingest(str(original)), ingest(str(twin))
    assert one.sha256 == hashlib.sha256(original.read_bytes()).hexdigest()
    assert one.source_id == two.source_id == one.sha256[:16]
    assert one.size_bytes == original.stat().st_size
    assert (one.uri, two.uri) == (str(original), str(twin))


def test_the_ledger_has_a_column_for_every_field(world) -> None:
    row = dataclasses.asdict(ingest(str(world.path("fps_25.mp4"))))
    assert set(row) == set(COLUMNS)
    assert all(type(value) is COLUMNS[name] for name, value in row.items())
    assert SourceInfo(**row) == ingest(row["uri"])


def test_a_changed_file_has_another_signature(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"one")
    before = signature(str(path))
    assert before == signature(str(path))
    os.utime(path, (1, 1))
    assert signature(str(path)) != before
    path.write_bytes(b"longer")
    os.utime(path, (1, 1))
    assert signature(str(path)).startswith("6-")
    assert signature(str(tmp_path / "none.mp4")) == ""


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        ingest(str(tmp_path / "none.mp4"))
    with pytest.raises(MediaError, match="folder"):
        ingest(str(tmp_path))


def test_a_source_in_an_object_store(world, s3_folder: str) -> None:
    Storage(s3_folder).write_bytes("odd name é.mp4", world.path("fps_25.mp4").read_bytes())
    info = ingest(f"{s3_folder}/odd name é.mp4")
    here = ingest(str(world.path("fps_25.mp4")))
    assert info == dataclasses.replace(here, uri=info.uri, signature=info.signature)
    assert info.signature == signature(info.uri)
    assert info.signature.startswith(f"{info.size_bytes}-")
    assert len(info.signature) > len(f"{info.size_bytes}-")
