"""Source manifests: every format is read the same way, and a bad row is reported with its place and reason."""

import csv
import json
import os
from pathlib import Path, PurePosixPath

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_manifests.sources import BadRow, ManifestError, SourceRow, read_sources


def write(path: Path, rows: list[dict[str, str]], columns: list[str]) -> None:
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([(c, pa.string()) for c in columns])), path)


def good(address: object) -> list[SourceRow]:
    rows = list(read_sources(str(address)))
    assert all(isinstance(row, SourceRow) for row in rows), rows
    return [row for row in rows if isinstance(row, SourceRow)]


text = st.text(st.characters(codec="utf-8"), max_size=30)
uris = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30).filter(str.strip)
columns = st.lists(text.filter(bool), max_size=3, unique=True).map(lambda c: ["uri", *(x for x in c if x != "uri")])


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[dict[str, str]]]:
    names = draw(columns)
    row = st.fixed_dictionaries({name: uris if name == "uri" else text for name in names})
    return names, draw(st.lists(row, max_size=4, unique_by=lambda r: str(PurePosixPath("/x") / r["uri"])))


@pytest.mark.parametrize("extension", [".csv", ".jsonl", ".parquet"])
@given(table=tables())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_written_comes_back(tmp_path: Path, extension: str, table: tuple[list[str], list[dict]]) -> None:
    names, rows = table
    path = tmp_path / f"manifest{extension}"
    write(path, rows, names)
    found = good(path)
    for row, source in zip(rows, found, strict=True):
        given_uri = row["uri"]
        scheme, separator, _ = given_uri.partition("://")
        is_address = separator and scheme.isascii() and scheme[:1].isalpha() and scheme.isalnum()
        assert source.uri == (given_uri if is_address else str(PurePosixPath(tmp_path) / given_uri))
        assert source.metadata == {name: row[name] for name in names if name != "uri"}


def test_every_row_has_its_place(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(b'\xef\xbb\xbfuri,caption\r\n"two\nlines.mp4","a ""quoted"" word\r\nand more"\r\n\r\nb.mp4,\r\n')
    first, second = good(path)
    assert first == SourceRow(f"{tmp_path}/two\nlines.mp4", {"caption": 'a "quoted" word\r\nand more'}, f"{path}:2")
    assert second == SourceRow(f"{tmp_path}/b.mp4", {"caption": ""}, f"{path}:6")


def test_a_bad_row_is_reported_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(
        b"uri,caption\n"
        b"a.mp4,fine\n"
        b"b.mp4\n"  # 3
        b",no name\n"  # 4
        b"c.mp4,caf\xe9\n"  # 5
        b'd.mp4,"never closed\n'  # 6
        b"e.mp4,fine\n"
        b"nul\0.mp4,x\n"  # 8
        b"a.mp4,again\n"  # 9
        b'"x"y,z\n'  # 10
        b"f.mp4," + b"x" * 140_000 + b"\n"  # 11
        b"g.mp4," + b"x" * (1 << 21) + b"\n"  # 12
        b"../up.mp4,fine\n"
    )
    rows = list(read_sources(str(path)))
    bad = {row.where.rpartition(":")[2]: row.reason for row in rows if isinstance(row, BadRow)}
    assert [row.uri for row in rows if isinstance(row, SourceRow)] == [
        f"{tmp_path}/a.mp4",
        f"{tmp_path}/e.mp4",
        f"{tmp_path.parent}/up.mp4",
    ]
    expected = {
        "3": "1 cells, where the header has 2",
        "4": "no uri",
        "5": "not UTF-8",
        "6": "not CSV",
        "8": "NUL",
        "9": f"the same uri as {path}:2",
        "10": "not CSV",
        "11": "field larger than field limit",
        "12": "line 12 is longer than",
    }
    assert bad.keys() == expected.keys()
    assert all(words in bad[line] for line, words in expected.items()), bad


def test_an_unclosed_quote_costs_only_its_own_row(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    lines = [f"{k}.mp4,c" for k in range(5000)]
    lines[100] = '100.mp4,"open'
    path.write_text("uri,caption\n" + "\n".join(lines))
    rows = list(read_sources(str(path)))
    assert [row.where for row in rows if isinstance(row, BadRow)] == [f"{path}:102"]
    assert len(rows) == 5000


def test_jsonl_keeps_values_as_text_and_reports_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    deep = "[" * 100_000
    path.write_bytes(
        b'{"uri": "a.mp4", "fps": 25, "ok": true, "none": null, "tags": ["x", "\xc3\xa9"], "hours": 1.5}\n'
        b"\n"
        b"{not json}\n[1]\n"
        b'{"url": "b.mp4"}\n'
        b'{"uri": 7}\n'
        b'{"uri": "\\ud800.mp4"}\n'
        b'{"uri": "s3://bucket/b.mp4"}\r\n' + f'{{"uri": "c.mp4", "x": {deep}}}'.encode()
    )
    rows = list(read_sources(str(path)))
    assert [row for row in rows if isinstance(row, SourceRow)] == [
        SourceRow(f"{tmp_path}/a.mp4", {"fps": "25", "ok": "true", "tags": '["x", "é"]', "hours": "1.5"}, f"{path}:1"),
        SourceRow("s3://bucket/b.mp4", {}, f"{path}:8"),
    ]
    bad = {row.where.rpartition(":")[2]: row.reason for row in rows if isinstance(row, BadRow)}
    assert list(bad) == ["3", "4", "5", "6", "7", "9"]
    assert "did you mean 'url'?" in bad["5"]
    assert "not the name" in bad["6"]


def test_parquet_types_become_text(tmp_path: Path) -> None:
    import datetime

    path = tmp_path / "m.parquet"
    table = pa.table(
        {
            "uri": pa.array([b"a.mp4", b"b\xff.mp4", None, b"c.mp4"]),
            "day": pa.array([datetime.date(2026, 1, 2)] * 4),
            "n": pa.array([1, None, 3, 4]),
            "who": pa.array(["x", "y", "z", "z"]).dictionary_encode(),
        }
    )
    pq.write_table(table, path, row_group_size=2)
    rows = list(read_sources(str(path)))
    assert rows[0] == SourceRow(f"{tmp_path}/a.mp4", {"day": "2026-01-02", "n": "1", "who": "x"}, f"{path}:row 1")
    assert [type(row) for row in rows] == [SourceRow, BadRow, BadRow, SourceRow]
    assert rows[3].where == f"{path}:row 4"


def test_a_damaged_part_of_a_parquet_file_is_reported_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    table = pa.table({"uri": [f"{os.urandom(8).hex()}.mp4" for _ in range(3000)]})
    pq.write_table(table, path, row_group_size=1000, use_dictionary=False, compression="zstd")
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    middle = group.data_page_offset + group.total_compressed_size // 2
    data[middle - 500 : middle + 500] = bytes(1000)
    path.write_bytes(data)
    rows = list(read_sources(str(path)))
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert len(bad) == 1
    assert "to 2000 cannot be read" in bad[0].reason
    assert sum(isinstance(row, SourceRow) for row in rows) >= 2000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.csv", b"url,caption\na,b\n", "did you mean 'url'?"),
        ("m.csv", b"URI\na\n", "did you mean 'URI'?"),
        ("m.csv", b"uri;caption\na;b\n", "separated by commas"),
        ("m.csv", b"uri,x,x\n", "'x' twice"),
        ("m.csv", b"", "empty"),
        ("m.csv", "uri\na.mp4\n".encode("utf-16"), "UTF-16"),
        ("m.xlsx", b"PK", "known: .csv, .jsonl, .ndjson, .parquet"),
        ("m", b"uri\n", "no extension"),
        ("a.mp4", b"", "give its folder"),
        ("m.parquet", b"PAR1", "not a Parquet file"),
    ],
)
def test_a_manifest_that_cannot_be_read_says_why(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ManifestError, match=r"^.*$") as error:
        list(read_sources(str(tmp_path / name)))
    assert str(tmp_path / name) in str(error.value)
    assert words in str(error.value)


def test_a_missing_manifest_is_reported_by_its_address() -> None:
    for address in ("nowhere.csv", "nowhere/", "nosuch://x/m.csv", "zip://m.csv::x.zip"):
        with pytest.raises(ManifestError, match=address):
            list(read_sources(address))


def test_a_folder_gives_its_media_files_in_order(tmp_path: Path) -> None:
    names = ["b.mp4", "a/z.MOV", "a/y.webm", "ü ' \"\n.mkv", "notes.txt", ".hidden.mp4", ".trash/x.mp4", "labels.csv"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "linked.mp4").symlink_to(tmp_path / "b.mp4")
    (tmp_path / os.fsdecode(b"\xff.mp4")).touch()
    rows = list(read_sources(str(tmp_path)))
    found = [str(Path(row.uri).relative_to(tmp_path)) for row in rows if isinstance(row, SourceRow)]
    assert found == ["b.mp4", "linked.mp4", "ü ' \"\n.mkv", "a/y.webm", "a/z.MOV"]
    assert [row.reason for row in rows if isinstance(row, BadRow)] == [
        f"not UTF-8 text: {os.fspath(tmp_path / os.fsdecode(bytes([255]) + b'.mp4'))!r}"
    ]


def test_a_remote_manifest_is_read_and_may_not_name_local_files(s3) -> None:
    uris = {
        "a.mp4": "s3://footage/in/a.mp4",
        "../b.mp4": "s3://footage/b.mp4",
        "s3://other/c.mp4": "s3://other/c.mp4",
        "https://host/d.mp4": "https://host/d.mp4",
        "/etc/passwd": None,
        "FILE:///etc/passwd": None,
        "local:///etc/passwd": None,
        "simplecache::/etc/passwd": None,
        "reference://x": None,
        "../../other/x.mp4": None,
        "..": None,
    }
    for extension in ("csv", "jsonl", "parquet"):
        address = f"{s3.address}/in/m.{extension}"
        table = pa.table({"uri": list(uris)})
        with fsspec.open(address, "wb") as file:
            if extension == "parquet":
                pq.write_table(table, file)
            elif extension == "csv":
                file.write(("uri\n" + "\n".join(uris)).encode())
            else:
                file.write("\n".join(json.dumps({"uri": uri}) for uri in uris).encode())
        rows = list(read_sources(address))
        assert [row.uri if isinstance(row, SourceRow) else None for row in rows] == list(uris.values())


def test_a_remote_folder_is_listed(s3) -> None:
    fs, _ = fsspec.core.url_to_fs(s3.address)
    for name in ("b.mp4", "deep/er/a.mkv", "deep/n.txt", "c ü.mp4"):
        fs.pipe(f"{s3.bucket}/listed/{name}", b"x")
    names = ["b.mp4", "c ü.mp4", "deep/er/a.mkv"]
    assert [row.uri for row in good(f"{s3.address}/listed")] == [f"{s3.address}/listed/{name}" for name in names]


def test_memory_stays_flat(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "m.csv"
    with path.open("w") as file:
        file.write("uri,caption\n")
        file.writelines(f"s3://bucket/{k:032d}.mp4,{'words ' * 300}\n" for k in range(4_000))
    tracemalloc.start()
    count = sum(1 for _ in read_sources(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4_000
    assert peak < 3e6  # the file has 7 MB
