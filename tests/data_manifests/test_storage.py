"""Storage: writes are complete or leave nothing, and names stay inside the folder."""

from pathlib import Path

import pytest

from data_manifests.storage import Storage


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        storage.write("a/b.bin", fail)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_sweep_removes_the_half_written_files_of_a_killed_run(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("a/kept.tmp.bin", b"1")
    (tmp_path / "a" / ".0123456789abcdef.tmp").write_bytes(b"half")
    storage.sweep(["a"])
    assert storage.files("a") == ["a/kept.tmp.bin"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["kept.tmp.bin"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd"])
def test_no_name_leaves_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a name inside"):
        Storage(str(tmp_path)).write_bytes(name, b"")


def test_an_object_store_behaves_like_a_folder(s3_folder: str) -> None:
    storage = Storage(s3_folder)
    assert storage.files("a") == []
    storage.write_bytes("a/b.bin", b"123")
    assert storage.files("a") == ["a/b.bin"]
    assert storage.exists("a/b.bin") and storage.size("a/b.bin") == 3
    with storage.local("a/b.bin") as path:
        assert path.read_bytes() == b"123"
    assert not path.exists()
