"""The ledger: what was measured, in Parquet on any fsspec storage, one table a stage, one folder a fingerprint.

    ledger/<table>/<fingerprint>/about.json                    what the fingerprint stands for, for people
    ledger/<table>/<fingerprint>/part-00003-of-00016.parquet   rows, sorted by key

Each row has `key` (a clip_id, source_id or uri), `status` ("ok" or "error"), `error` (why, "" when ok), `inputs` (a
short hash of the manifest fields the row depends on, "" when none) and then the table's own columns. The same rows give
the same bytes, in whatever order and however often they were written.
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

_FILE = re.compile(r"part-(\d{5})-of-(\d{5})\.parquet")
_CONTENT_KEY = re.compile(r"[0-9a-f]{16}(-|$)")  # a source_id, or a clip_id, which starts with one


class LedgerError(RuntimeError):
    """The ledger cannot be used as it is; the message names the file and what to do."""


def partition_of(key: str, partitions: int) -> int:
    """The partition of a row: by the source's content for source_ids and clip_ids, by a hash of a uri."""
    digits = (
        key[:8] if _CONTENT_KEY.match(key) else hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    )
    return int(digits, 16) % partitions


def schema_for(columns: dict[str, Any]) -> "pa.Schema":
    """The schema of a table with these columns after the ones that every row has.

    columns: for each name one of float, int, bool, str (or one of them `| None`), or a pyarrow type as it is.
    """
    import pyarrow as pa

    clash = sorted(set(columns) & set(ROW_COLUMNS))
    if clash:
        raise ValueError(f"every row has {', '.join(clash)} already; give the column another name")
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
    """The tables of one run's storage, split into `partitions` by `partition_of`.

    Rows that were written under another number of partitions are found as well. Where two files hold the same key, the
    one written under the present number counts, then a row without an error.

    A file that is damaged is moved aside to `<name>.damaged` with a warning in the log: its rows count as never
    measured, and are measured again.
    """

    def __init__(self, storage: Storage, partitions: int) -> None:
        if partitions < 1:
            raise ValueError(f"a ledger has at least one partition, not {partitions}")
        self.storage, self.partitions = storage, partitions

    def read(
        self, table: str, fingerprint: str, partition: int | None = None, columns: Sequence[str] | None = None
    ) -> "pd.DataFrame":
        """Rows of one partition or, with None, of all, by partition and key.

        columns: which columns to read; all when None. `key` always comes along.

        Returns: one row a key. Missing values are NaN in float and null in Int64, boolean and str columns; lists
        come as arrays. A frame of no rows, with the asked columns, when nothing was written yet.
        """
        import pandas as pd
        import pyarrow as pa

        nullable = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
        found = self._read(table, fingerprint, partition, columns)
        # self_destruct frees each column once it is converted
        return found.to_pandas(types_mapper=nullable.get, split_blocks=True, self_destruct=True)

    def read_list(
        self,
        table: str,
        fingerprint: str,
        column: str,
        partition: int | None = None,
        fields: Sequence[str] | None = None,
    ) -> "pd.DataFrame":
        """The elements of a list<struct> column, one row each, without a Python object for any of them.

        fields: which of the struct's fields to return; all when None.

        Returns: the fields as columns after `key`, the key of the row the element stands in.
        """
        import pandas as pd
        import pyarrow as pa
        import pyarrow.compute as pc

        found = self._read(table, fingerprint, partition, [column])
        if column not in found.column_names or not pa.types.is_list(found.schema.field(column).type):
            return pd.DataFrame(columns=["key", *(fields or [])])
        lists = found[column].combine_chunks()
        elements = pc.list_flatten(lists)
        wanted = fields if fields is not None else [f.name for f in elements.type]
        keys = found["key"].combine_chunks().take(pc.list_parent_indices(lists))
        columns = {"key": keys} | {name: pc.struct_field(elements, name) for name in wanted}
        return pa.table(columns).to_pandas(split_blocks=True, self_destruct=True)

    def rows(
        self, table: str, fingerprint: str, partition: int | None = None, keys: Iterable[str] | None = None
    ) -> list[dict[str, Any]]:
        """What `read` gives, as Python values, with None for a missing one; only the rows of `keys` where given."""
        import pyarrow as pa
        import pyarrow.compute as pc

        found = self._read(table, fingerprint, partition, None)
        if keys is not None:
            found = found.filter(pc.is_in(found["key"], value_set=pa.array(list(keys), pa.string())))
        rows: list[dict[str, Any]] = found.to_pylist()
        return rows

    def keys(
        self, table: str, fingerprint: str, partition: int | None = None, with_errors: bool = True
    ) -> dict[str, str]:
        """The keys that have a row, each with the hash of the inputs it was made from; without errors on demand."""
        import pyarrow.compute as pc

        found = self._read(table, fingerprint, partition, ["status", "inputs"])
        if not with_errors:
            found = found.filter(pc.equal(found["status"], "ok"))
        return dict(zip(found["key"].to_pylist(), found["inputs"].to_pylist(), strict=True))

    def write(
        self, table: str, fingerprint: str, partition: int, rows: Iterable[dict[str, Any]], schema: "pa.Schema"
    ) -> None:
        """Add rows to a partition, each taking the place of an earlier row of its key; all of them appear or none.

        Values that a row does not give are null. Only the partition's own rows are held in memory.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        latest = {row["key"]: row for row in rows}
        if not latest:
            return
        strays = [key for key in latest if partition_of(key, self.partitions) != partition]
        assert not strays, f"{strays[0]} is not of partition {partition}"
        new = pa.Table.from_pylist(list(latest.values()), schema=schema)
        name = self._name(table, fingerprint, partition, self.partitions)
        before = self._read_file(name, None)
        if before is not None:
            before = before.filter(pc.invert(pc.is_in(before["key"], value_set=new["key"].combine_chunks())))
            new = pa.concat_tables([_as_schema(before, schema, name), new])
        self.storage.write(name, lambda path: _write_parquet(new.sort_by("key"), path))

    def describe(self, table: str, fingerprint: str, about: dict[str, Any]) -> None:
        """Keep beside the rows what their fingerprint stands for (stage, backend, versions, settings); only once."""
        name = f"{_folder(table, fingerprint)}/about.json"
        if not self.storage.exists(name):
            self.storage.write_bytes(name, json.dumps(about, indent=1, sort_keys=True).encode() + b"\n")

    def fingerprints(self, table: str) -> dict[str, dict[str, Any]]:
        """The fingerprints a table has rows under, each with what `describe` kept of it; {} for one without."""
        found = self.storage.folders(_folder(table))
        return {fingerprint: self._about(table, fingerprint) for fingerprint in found}

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
        """Files that can hold rows of the partition, and whether they are of another partitioning; ours first."""
        others: list[tuple[int, int, str]] = []
        for path in self.storage.files(_folder(table, fingerprint)):
            match = _FILE.fullmatch(path.rsplit("/", 1)[-1])
            if not match:
                continue
            part, parts = int(match[1]), int(match[2])
            if parts == self.partitions:
                if partition in (None, part):
                    yield path, False
            elif partition is None or (part - partition) % math.gcd(parts, self.partitions) == 0:
                others.append((parts, part, path))
        yield from ((path, True) for _, _, path in sorted(others))

    def _read(self, table: str, fingerprint: str, partition: int | None, columns: Sequence[str] | None) -> "pa.Table":
        """One row a key, the asked columns after `key`."""
        import pyarrow as pa

        wanted = None if columns is None else ["key", *(c for c in dict.fromkeys(columns) if c != "key")]
        files = list(self._files(table, fingerprint, partition))
        mixed = any(foreign for _, foreign in files)
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
        """A file's rows; None when it is not there, or was damaged and is now out of the way."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        # fetched whole before parsing, so that a disk or network at fault is never taken for a damaged file
        try:
            data = self.storage.read_bytes(name)
        except FileNotFoundError:
            return None
        try:
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            held = file.schema_arrow.names
            if set(ROW_COLUMNS) <= set(held):
                return file.read(columns=None if columns is None else [c for c in columns if c in held])
            reason = "it lacks the columns of a ledger"
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
        self._move_aside(name, reason)
        return None

    def _move_aside(self, name: str, reason: str) -> None:
        place = f"{self.storage.address.rstrip('/')}/{name}"
        try:
            self.storage.move(name, f"{name}.damaged")
        except OSError as error:
            raise LedgerError(
                f"{place} is damaged ({reason}) and cannot be moved aside ({error}); delete it: its rows are made again"
            ) from error
        log.warning("%s was damaged (%s); it is now %s.damaged and its rows are made again", place, reason, name)


def _merge(tables: list[tuple[bool, "pa.Table"]]) -> "pa.Table":
    """Put (from another partitioning, rows) together with one row a key: our own first, then ok, then the earliest."""
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
    # grouping promises no order of its own
    best = order.group_by("key", use_threads=False).aggregate([("row", "first")]).sort_by("key")
    return merged.take(best["row_first"])


def _folder(*parts: str) -> str:
    return "/".join(("ledger", *parts))


def _without_none(kind: Any) -> Any:
    """`int` from `int | None`; anything else as it is."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        others = [k for k in typing.get_args(kind) if k is not type(None)]
        return others[0] if len(others) == 1 else kind
    return kind


def _as_schema(rows: "pa.Table", schema: "pa.Schema", name: str) -> "pa.Table":
    """Earlier rows under the columns of today: what they lack is null, what is no longer declared goes."""
    import pyarrow as pa

    try:
        columns = [
            rows[f.name].cast(f.type) if f.name in rows.column_names else pa.nulls(rows.num_rows, f.type)
            for f in schema
        ]
    except pa.ArrowException as error:
        raise LedgerError(
            f"{name}: its rows do not fit the columns of today ({error}); raise the stage's version, or delete the file"
        ) from error
    return pa.table(columns, schema=schema)


def _write_parquet(table: "pa.Table", path: Any) -> None:
    """Write with every choice that reaches the bytes fixed."""
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
