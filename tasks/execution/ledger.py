"""The ledger: the rows that the steps of a curation have made, as Parquet files in the run's storage.

Each step has a table. In a table, the rows of each fingerprint have a folder of their own:

    ledger/<table>/<fingerprint>/about.json                    what the fingerprint stands for, for people to read
    ledger/<table>/<fingerprint>/part-00003-of-00016.parquet   the rows of partition 3 of 16, sorted by key

Each row begins with these columns, and the table's own columns follow:

    key      text: a clip_id, source_id or uri; one row a key
    status   "ok" or "error"
    error    why the unit could not be done; "" when the status is ok
    inputs   a short hash of the manifest fields that the row depends on; "" when it depends on none

The bytes of a file depend on its rows alone, not on the order or the number of writes.
"""

import hashlib
import json
import logging
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from data_manifests.storage import Storage

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

log = logging.getLogger(__name__)

ROW_COLUMNS = ("key", "status", "error", "inputs")
"""The columns that every row has."""

_FILE = re.compile(r"part-(\d{5})-of-(\d{5})\.parquet")
_CONTENT_KEY = re.compile(r"[0-9a-f]{16}(-|$)")  # a source_id, or a clip_id, which starts with one


class LedgerError(RuntimeError):
    """The ledger cannot be used as it is. The message names the file and says what to do."""


def partition_of(key: str, partitions: int) -> int:
    """The partition that a row belongs to, 0 to partitions - 1.

    A source_id or clip_id begins with a hash of the source's content, and that hash decides. A source and its clips
    therefore share a partition. A uri is hashed first.
    """
    digits = (
        key[:8] if _CONTENT_KEY.match(key) else hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    )
    return int(digits, 16) % partitions


def schema_for(columns: dict[str, Any]) -> "pa.Schema":
    """The schema of a table: the columns that every row has, then the table's own.

    columns: the type of each column of the table's own, by name: float, int, bool or str, any of them `| None`, or a
        pyarrow type.

    Raises ValueError for a name that every row has already, and for any other type.
    """
    import pyarrow as pa

    clash = sorted(set(columns) & set(ROW_COLUMNS))
    if clash:
        raise ValueError(f"every row has {', '.join(clash)} already; give the table's column another name")
    types_of = {float: pa.float64(), int: pa.int64(), bool: pa.bool_(), str: pa.string()}
    fields = [pa.field(name, pa.string()) for name in ROW_COLUMNS]
    for name, kind in columns.items():
        if isinstance(kind, pa.DataType):
            fields.append(pa.field(name, kind))
            continue
        plain = _without_none(kind)
        if plain not in types_of:
            raise ValueError(f"{name}: {kind!r} is no column type; use float, int, bool, str or a pyarrow type")
        fields.append(pa.field(name, types_of[plain]))
    return pa.schema(fields)


class Ledger:
    """The ledger in the storage of one run.

    Each table is split into partitions, one file each (see `partition_of`). Methods take the name of a table and a
    fingerprint; a table may hold rows of several fingerprints, and these never mix.

    A run may have another number of partitions than earlier runs in the same storage. Rows of the earlier runs are
    still found. When two files hold a row of the same key, the file with the present number of partitions counts. Of
    two files with other numbers, the one whose row has no error counts.

    When a file turns out to be damaged, it is renamed to `<name>.damaged`, with a warning in the log. Its rows count as
    missing, so the next run makes them again.

    Methods raise OSError when the storage fails, and LedgerError when a file can be neither used nor moved aside.
    """

    def __init__(self, storage: Storage, partitions: int) -> None:
        """partitions: how many parts the tables of this run are split into, at least 1."""
        if partitions < 1:
            raise ValueError(f"a ledger has at least one partition, not {partitions}")
        self.storage, self.partitions = storage, partitions

    def read(
        self, table: str, fingerprint: str, partition: int | None = None, columns: Sequence[str] | None = None
    ) -> "pd.DataFrame":
        """Read rows as a pandas frame, in the order of their keys within each partition.

        partition: whose rows to read; those of all partitions when None.
        columns: which columns to read; all when None. `key` is always among them.

        Returns: one row a key. A missing value is NaN in a float column and null in an Int64, boolean or str column.
        A list is a NumPy array. When nothing was written yet, the frame has the columns asked for and no rows.
        """
        import pandas as pd
        import pyarrow as pa

        nullable = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
        rows = self._read(table, fingerprint, partition, columns)
        # self_destruct frees each column once it is converted
        return rows.to_pandas(types_mapper=nullable.get, split_blocks=True, self_destruct=True)

    def read_list(
        self,
        table: str,
        fingerprint: str,
        column: str,
        partition: int | None = None,
        fields: Sequence[str] | None = None,
    ) -> "pd.DataFrame":
        """Read a column of type list<struct>, one row an element. No Python object is made for an element.

        column: such as "clips" of the table `clips`, whose elements are the clips of a source.
        partition: whose rows to read; those of all partitions when None.
        fields: which fields of the struct to return; all when None.

        Returns: columns `key`, the key of the row that holds the element, and the fields.
        """
        import pandas as pd
        import pyarrow as pa
        import pyarrow.compute as pc

        rows = self._read(table, fingerprint, partition, [column])
        if column not in rows.column_names or not pa.types.is_list(rows.schema.field(column).type):
            return pd.DataFrame(columns=["key", *(fields or [])])
        lists = rows[column].combine_chunks()
        elements = pc.list_flatten(lists)
        wanted = fields if fields is not None else [f.name for f in elements.type]
        keys = rows["key"].combine_chunks().take(pc.list_parent_indices(lists))
        columns = {"key": keys} | {name: pc.struct_field(elements, name) for name in wanted}
        return pa.table(columns).to_pandas(split_blocks=True, self_destruct=True)

    def rows(
        self, table: str, fingerprint: str, partition: int | None = None, keys: Iterable[str] | None = None
    ) -> list[dict[str, Any]]:
        """Read rows as Python values, with all columns. A missing value is None.

        partition: whose rows to read; those of all partitions when None.
        keys: which rows to return; all when None.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        found = self._read(table, fingerprint, partition, None)
        if keys is not None:
            found = found.filter(pc.is_in(found["key"], value_set=pa.array(list(keys), pa.string())))
        rows: list[dict[str, Any]] = found.to_pylist()
        return rows

    def keys(self, table: str, fingerprint: str, partition: int | None = None) -> dict[str, str]:
        """The keys that have a row, also one with an error, each with the row's `inputs`.

        partition: whose rows to read; those of all partitions when None.
        """
        rows = self._read(table, fingerprint, partition, ["inputs"])
        return dict(zip(rows["key"].to_pylist(), rows["inputs"].to_pylist(), strict=True))

    def write(
        self, table: str, fingerprint: str, partition: int, rows: Iterable[dict[str, Any]], schema: "pa.Schema"
    ) -> None:
        """Add rows to a partition. Either all of them appear, or none does.

        A row replaces an earlier row of the same key. The partition's file is read, merged with the new rows and
        written anew, so the rows of one partition are held in memory.

        rows: by column name. All keys belong to the partition. A column that a row lacks is null.
        schema: of the table, as `schema_for` makes it.

        Raises LedgerError when earlier rows do not fit the schema.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        latest = {row["key"]: row for row in rows}
        if not latest:
            return
        misplaced = [key for key in latest if partition_of(key, self.partitions) != partition]
        assert not misplaced, f"{misplaced[0]} does not belong to partition {partition}"
        new = pa.Table.from_pylist(list(latest.values()), schema=schema)
        name = self._name(table, fingerprint, partition, self.partitions)
        before = self._read_file(name, None)
        if before is not None:
            before = before.filter(pc.invert(pc.is_in(before["key"], value_set=new["key"].combine_chunks())))
            new = pa.concat_tables([_as_schema(before, schema, name), new])
        self.storage.write(name, lambda path: _write_parquet(new.sort_by("key"), path))

    def describe(self, table: str, fingerprint: str, about: dict[str, Any]) -> None:
        """Write about.json, unless it is there already. about: what the fingerprint is made of."""
        name = f"{_folder(table, fingerprint)}/about.json"
        if not self.storage.exists(name):
            self.storage.write_bytes(name, json.dumps(about, indent=1, sort_keys=True).encode() + b"\n")

    def fingerprints(self, table: str) -> dict[str, dict[str, Any]]:
        """The fingerprints that a table has a folder for, each with its about.json; {} where that file is missing."""
        folders = self.storage.folders(_folder(table))
        return {fingerprint: self._about(table, fingerprint) for fingerprint in folders}

    def _about(self, table: str, fingerprint: str) -> dict[str, Any]:
        try:
            about = json.loads(self.storage.read_bytes(f"{_folder(table, fingerprint)}/about.json"))
        except (FileNotFoundError, ValueError):
            return {}
        return about if isinstance(about, dict) else {}

    # ---- files ----

    def _name(self, table: str, fingerprint: str, partition: int, partitions: int) -> str:
        return f"{_folder(table, fingerprint)}/part-{partition:05d}-of-{partitions:05d}.parquet"

    def _files(self, table: str, fingerprint: str, partition: int | None) -> Iterator[tuple[str, bool]]:
        """The files that can hold rows of a partition, or of all when None, each with whether it is foreign.

        A file is foreign when it was written under another number of partitions. Foreign files come last.
        """
        others: list[tuple[int, int, str]] = []
        for path in self.storage.files(_folder(table, fingerprint)):
            match = _FILE.fullmatch(path.rsplit("/", 1)[-1])
            if not match:
                continue
            part, parts = int(match[1]), int(match[2])
            if parts == self.partitions:
                if partition in (None, part):
                    yield path, False
            # A hash h lies in partition h % n. Two partitions share a hash only if they agree modulo the gcd of both n.
            elif partition is None or (part - partition) % math.gcd(parts, self.partitions) == 0:
                others.append((parts, part, path))
        yield from ((path, True) for _, _, path in sorted(others))

    def _read(self, table: str, fingerprint: str, partition: int | None, columns: Sequence[str] | None) -> "pa.Table":
        """One row a key, with `key` and the columns asked for; all columns when None."""
        import pyarrow as pa

        wanted = None if columns is None else ["key", *(c for c in dict.fromkeys(columns) if c != "key")]
        files = list(self._files(table, fingerprint, partition))
        mixed = any(foreign for _, foreign in files)
        # merging needs to know which rows have an error
        to_read = None if wanted is None else list(dict.fromkeys([*wanted, *(["status"] if mixed else [])]))
        tables = []
        for name, foreign in files:
            part = self._read_file(name, to_read)
            if part is not None and foreign and partition is not None:
                mask = [partition_of(key, self.partitions) == partition for key in part["key"].to_pylist()]
                part = part.filter(pa.array(mask, pa.bool_()))
            if part is not None:
                tables.append((foreign, part))
        if not tables:
            return pa.table({name: pa.array([], pa.string()) for name in wanted or ROW_COLUMNS})
        merged = _merge(tables) if mixed else pa.concat_tables((t for _, t in tables), promote_options="permissive")
        return merged if wanted is None else merged.select([c for c in wanted if c in merged.column_names])

    def _read_file(self, name: str, columns: Sequence[str] | None) -> "pa.Table | None":
        """A file's rows. None when there is no such file, or when it is damaged; a damaged file is moved aside."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        # The whole file is fetched before it is parsed. A fault of the disk or the network is then never taken for a
        # damaged file.
        try:
            data = self.storage.read_bytes(name)
        except FileNotFoundError:
            return None
        try:
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            stored = file.schema_arrow.names
            if set(ROW_COLUMNS) <= set(stored):
                return file.read(columns=None if columns is None else [c for c in columns if c in stored])
            reason = "it lacks the columns of a ledger"
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
        self._move_aside(name, reason)
        return None

    def _move_aside(self, name: str, reason: str) -> None:
        """Rename a damaged file. reason: what is wrong with it."""
        address = f"{self.storage.address.rstrip('/')}/{name}"
        try:
            self.storage.move(name, f"{name}.damaged")
        except OSError as error:
            raise LedgerError(
                f"{address} is damaged ({reason}) and cannot be renamed ({error}); "
                "delete it, and the next run makes its rows again"
            ) from error
        log.warning("%s was damaged (%s); it is now %s.damaged, and its rows are made again", address, reason, name)


def _merge(tables: list[tuple[bool, "pa.Table"]]) -> "pa.Table":
    """Merge the rows of several files into one row a key.

    tables: whether the file is foreign, and its rows. Of rows with the same key, a row of a file that is not foreign
        counts, else the first foreign row without an error, else the first foreign row.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    merged = pa.concat_tables((t for _, t in tables), promote_options="permissive")
    foreign = pa.chunked_array([pa.array([f] * t.num_rows, pa.bool_()) for f, t in tables])
    failed = pc.and_(foreign, pc.not_equal(merged["status"], "ok"))
    order = pa.table(
        {
            "key": merged["key"],
            "rank": pc.add(pc.cast(foreign, pa.int8()), pc.cast(failed, pa.int8())),
            "row": pa.array(range(merged.num_rows), pa.int64()),
        }
    ).sort_by([("key", "ascending"), ("rank", "ascending"), ("row", "ascending")])
    # group_by promises no order
    best = order.group_by("key", use_threads=False).aggregate([("row", "first")]).sort_by("key")
    return merged.take(best["row_first"])


def _folder(*parts: str) -> str:
    return "/".join(("ledger", *parts))


def _without_none(kind: Any) -> Any:
    """`int` for `int | None`; any other type as it is."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        others = [k for k in typing.get_args(kind) if k is not type(None)]
        return others[0] if len(others) == 1 else kind
    return kind


def _as_schema(rows: "pa.Table", schema: "pa.Schema", name: str) -> "pa.Table":
    """Earlier rows with the columns of a schema. A column that they lack is null; any other column is left out.

    name: of the rows' file. Raises LedgerError when a column has a type that does not convert.
    """
    import pyarrow as pa

    try:
        columns = [
            rows[f.name].cast(f.type) if f.name in rows.column_names else pa.nulls(rows.num_rows, f.type)
            for f in schema
        ]
    except pa.ArrowException as error:
        raise LedgerError(
            f"{name}: its rows do not fit the table's present columns ({error}); "
            "raise the stage's version, or delete the file"
        ) from error
    return pa.table(columns, schema=schema)


def _write_parquet(table: "pa.Table", path: Any) -> None:
    """Write a Parquet file. Every option that changes the bytes is fixed, whatever the library's defaults become."""
    import pyarrow.parquet as pq

    pq.write_table(
        table.combine_chunks(),
        path,
        version="2.6",
        compression="zstd",
        compression_level=3,
        use_dictionary=True,
        write_statistics=True,
        write_page_checksum=True,
        data_page_version="1.0",
        row_group_size=65_536,
        store_schema=True,
    )
