"""What the ledger holds of one run: its clips, and what was measured of them. One reader, of a run that is under way
and of one that has ended."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

from data_manifests.sources import SourceRow
from data_manifests.storage import store_access
from tasks.cutting.ingest import SourceInfo
from tasks.execution.jobs import Source
from tasks.execution.ledger import Ledger, partition_of
from tasks.execution.stage_results import StageResult
from tasks.execution.steps import SOURCES, Steps
from tasks.execution.work import Unit
from tasks.media.clip import ClipRecord
from tasks.policy.decide import join
from tasks.recipe import Recipe
from tasks.stages.registry import STAGES

if TYPE_CHECKING:
    import pandas as pd

SKIPPED_COLUMNS = ["reason", "start_s", "end_s"]


class LedgerView(ABC):
    """The rows of the ledger that count for one run. Nothing is written."""

    counts_by: ClassVar[tuple[str, ...]] = ()
    """Columns that `counting` needs."""

    def __init__(self, ledger: Ledger, recipe: Recipe, fingerprints: Mapping[str, str]) -> None:
        self.ledger, self.recipe, self.fingerprints = ledger, recipe, fingerprints
        self.stages = list(recipe.measure)
        self.partitions = recipe.shards.partitions

    @abstractmethod
    def clip_table(self, partition: int | None) -> "pd.DataFrame":
        """The clips of a partition, or of all, as tasks.policy.decide.join takes them."""

    @abstractmethod
    def counting(self, stage: str, table: "pd.DataFrame") -> "pd.DataFrame":
        """The rows of a stage's table that count. They are of clips of this run, and were made from the manifest's
        present fields."""

    def rows_of(self, step: str, partition: int, keys: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
        """A partition's rows of a step, by key; only those of `keys` where given."""
        return {row["key"]: row for row in self.ledger.rows(step, self.fingerprints[step], partition, keys)}

    def table(self, stage: str, columns: Sequence[str], partition: int | None = None) -> "pd.DataFrame":
        """Columns of the rows of a stage that count, with `key`; of one partition, or of all."""
        wanted = [*self.counts_by, *columns]
        counted = self.counting(stage, self.ledger.read(stage, self.fingerprints[stage], partition, wanted))
        return counted.drop(columns=[name for name in self.counts_by if name not in columns])

    def read_frame(self, partition: int | None = None, stages: Iterable[str] | None = None) -> "pd.DataFrame":
        """One row a clip, as tasks.policy.decide.join makes it, with the columns that the recipe's policy asks for.

        stages: whose columns to join; all of the recipe's when None.
        """
        needed = self.recipe.policy.columns()
        tables = {
            name: self.table(name, ["status", "error", *needed.get(name, ())], partition)
            for name in (self.stages if stages is None else stages)
        }
        return join(self.clip_table(partition), tables)

    def skipped(self) -> "pd.DataFrame":
        """The parts of the footage that no clip shows: `key` (source_id), reason, start_s, end_s."""
        return self.ledger.read_list("clips", self.fingerprints["clips"], "skipped", None, SKIPPED_COLUMNS)

    def result(self, stage: str, row: Mapping[str, Any]) -> StageResult:
        """The content of a stage's row. The row must not be an error."""
        return StageResult.of(stage, self.fingerprints[stage], row, STAGES[stage].columns)

    @staticmethod
    def remade(record: ClipRecord, results: Iterable[StageResult]) -> ClipRecord:
        """The clip as the last of those stages that remake it, such as the crop, has left it."""
        for result in results:
            if STAGES[result.stage].remakes_clip:
                record = result.remake(record)
        return record


class LiveView(LedgerView):
    """The ledger of a run that is under way: the clips of the footage that the manifest lists now.

    Raises StoreError when the storage does not answer.
    """

    counts_by = ("inputs",)

    def __init__(self, ledger: Ledger, steps: Steps, rows: list[SourceRow], retry_errors: bool = False) -> None:
        """rows: of the source manifest. retry_errors: whether a row with an error, or one that names files which are
        gone from the storage, counts as missing."""
        super().__init__(ledger, steps.recipe, steps.fingerprints)
        self.steps, self.rows, self.retry_errors = steps, rows, retry_errors
        self.same_as: dict[str, str] = {}
        """Uri of a copy -> uri of the source with the same bytes that counts."""
        self._sources: dict[int, list[Source]] | None = None
        asked = steps.recipe.policy.columns()
        self._judged = {
            name: {column: stage.columns[column] for column in asked.get(name, ())}
            for name, stage in steps.stages.items()
        }

    # ---- sources and clips ----

    def sources(self, partition: int) -> list[Source]:
        """The usable sources of a partition, by source_id. Of files with the same bytes the manifest's first counts."""
        if self._sources is None:
            self._sources = self._read_sources()
        return self._sources.get(partition, [])

    def sources_changed(self) -> None:
        """Let the sources be read from the ledger again."""
        self._sources = None

    def _read_sources(self) -> dict[int, list[Source]]:
        rows = {r["key"]: r for r in self.ledger.rows(SOURCES, self.fingerprints[SOURCES]) if r["status"] == "ok"}
        found: dict[str, Source] = {}
        self.same_as = {}
        for manifest_row in self.rows:
            row = rows.get(manifest_row.uri)
            if row is None:
                continue
            info = SourceInfo(**{f.name: row[f.name] for f in fields(SourceInfo)})
            first = found.setdefault(info.source_id, Source(info, manifest_row.metadata))
            if first.info is not info:
                self.same_as[info.uri] = first.info.uri
        by_partition: dict[int, list[Source]] = {}
        for source_id in sorted(found):
            by_partition.setdefault(partition_of(source_id, self.partitions), []).append(found[source_id])
        return by_partition

    def _metadata(self, partition: int | None) -> dict[str, dict[str, str]]:
        partitions = range(self.partitions) if partition is None else [partition]
        return {s.info.source_id: s.metadata for number in partitions for s in self.sources(number)}

    def records(self, partition: int) -> list[ClipRecord]:
        """The clips of a partition's sources, by clip_id."""
        metadata = self._metadata(partition)
        found = [
            ClipRecord(**clip, metadata=metadata[source_id])
            for source_id, row in self.rows_of("clips", partition).items()
            if source_id in metadata
            for clip in row["clips"] or ()
        ]
        return sorted(found, key=lambda record: record.clip_id)

    def clip_table(self, partition: int | None) -> "pd.DataFrame":
        wanted = ["clip_id", "source_id", "start_s", "end_s", "frames", "fps", "video", "audio"]
        clips = self.ledger.read_list("clips", self.fingerprints["clips"], "clips", partition, wanted)
        clips = clips[clips["source_id"].isin(list(self._metadata(partition)))]
        clips = clips.assign(duration_s=clips["frames"] / clips["fps"]).set_index("clip_id")
        return clips[["start_s", "end_s", "duration_s", "video", "audio"]]

    def counting(self, stage: str, table: "pd.DataFrame") -> "pd.DataFrame":
        partitions = {partition_of(key, self.partitions) for key in table["key"].str[:16].unique()}
        present = {
            source.info.source_id: self.steps.inputs(stage, source.metadata)
            for partition in sorted(partitions)
            for source in self.sources(partition)
        }
        return table[table["inputs"] == table["key"].str[:16].map(present)]

    # ---- what is missing, and what is known ----

    def missing(self, step: str, partitions: Sequence[int], units: Iterable[Unit]) -> list[Unit]:
        """Those units that have no row for their present inputs."""
        made = self.steps[step]
        done: dict[str, str] = {}
        with store_access(f"read the ledger of {step}"):
            for partition in partitions:
                if self.retry_errors:
                    rows = self.ledger.rows(step, made.fingerprint, partition)
                    done |= {r["key"]: r["inputs"] for r in rows if r["status"] == "ok" and not made.gone(r)}
                else:
                    done |= self.ledger.keys(step, made.fingerprint, partition)
        return [unit for unit in units if done.get(unit.key) != unit.inputs]

    def known(
        self, record: ClipRecord, tables: Mapping[str, Mapping[str, dict[str, Any]]]
    ) -> dict[str, StageResult | None]:
        """The results of stages for a clip as it is now, by stage; None for a stage that could not measure it.

        tables: rows by stage and clip_id.
        """
        steps, rows = self.steps, {}
        for name, table in tables.items():
            row = table.get(record.clip_id)
            if row is None or row["inputs"] != steps.inputs(name, record.metadata):
                continue
            if not self.retry_errors or (row["status"] == "ok" and not steps[name].gone(row)):
                rows[name] = row
        started_from = {other for name in self.stages if name not in rows for other in steps.upstream[name]}
        known: dict[str, StageResult | None] = {}
        for name, row in rows.items():
            # many clips are held at once: of a result that no missing stage starts from, the policy's columns alone
            whole = name in started_from or steps.stages[name].remakes_clip
            columns = steps.stages[name].columns if whole else self._judged[name]
            made = self.fingerprints[name]
            known[name] = StageResult.of(name, made, row, columns) if row["status"] == "ok" else None
        return known
