"""What a curation has still to do, in which order.

Work to do is what has no row in the ledger. That is the whole of resuming, retrying, backfilling and adding footage:
every piece of work can be asked for and run again at any moment.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data_manifests.storage import store_access
from tasks.cutting.ingest import signature
from tasks.cutting.shots import shots_of_row
from tasks.execution.jobs import SourceToCut
from tasks.execution.ledger import partition_of
from tasks.execution.ledger_view import LiveView
from tasks.execution.measure import ClipToMeasure
from tasks.execution.steps import CUT, SOURCES, Steps
from tasks.execution.work import Unit, Work
from tasks.policy.decide import alive

_GROUP_SOURCES = 200  # partitions with fewer sources share a group
_MAX_TASKS = 200  # tasks of one run that Prefect's UI and server bear


class Schedule:
    """The work of a curation.

    Each method below yields pieces of work. The caller runs each piece before it asks for the next one: what one piece
    leaves to do decides what the next one is.
    """

    def __init__(self, steps: Steps, view: LiveView) -> None:
        self._steps, self._view = steps, view
        self._lost_clips: set[str] = set()

    def sources(self) -> Iterator[Work]:
        """Hash and probe the footage, all of it first: copies of one file may lie in different partitions."""
        yield self._work(SOURCES, range(self._view.partitions))

    def groups(self) -> list[range]:
        """The partitions, neighbours put together until each group has sources enough for a task of its own.

        Groups go depth first: one is cut, measured and done before the next, so that scratch space does not grow with
        the corpus.
        """
        view = self._view
        groups: list[range] = []
        counts = [len(view.sources(partition)) for partition in range(view.partitions)]
        # One task for the sources, and one a stage for lost clips. A group has five: cutting, measuring and shards, and
        # scenes and clips for lost sources.
        most = max(1, (_MAX_TASKS - 1 - len(view.stages)) // 5)
        enough = max(_GROUP_SOURCES, -(-sum(counts) // most))
        start = count = 0
        for partition in range(view.partitions):
            count += counts[partition]
            if count >= enough or partition == view.partitions - 1:
                if count:
                    groups.append(range(start, partition + 1))
                start, count = partition + 1, 0
        return groups

    def cut(self, group: Sequence[int]) -> Iterator[Work]:
        """Find shots and write clips; then, step by step, for sources that have ended their worker in this."""
        work = Work("cut", self._steps.cut_job(), CUT, group, self._first_missing(CUT, group), fused=True)
        yield work
        for name in CUT if work.lost else ():
            yield self._of_the_lost(name, group, work.lost)

    def measure(self, group: Sequence[int]) -> Iterator[Work]:
        """Take the clips through the stages."""
        names = tuple(self._view.stages)
        work = Work("measure", self._steps.measure_job(), names, group, self._first_missing(names, group), fused=True)
        yield work
        self._lost_clips |= work.lost

    def measure_lost(self) -> Iterator[Work]:
        """Stage by stage, the clips of all groups that have ended their worker."""
        partitions = sorted({partition_of(key, self._view.partitions) for key in self._lost_clips})
        for name in self._view.stages if partitions else ():
            yield self._of_the_lost(name, partitions, self._lost_clips)

    def units(self, step: str, partitions: Sequence[int]) -> list[Unit]:
        """The units of these partitions that lack a row of a step. Raises StoreError."""
        if step == SOURCES:
            return self._source_units(partitions)
        if step == "scenes":
            return self._scenes_units(partitions)
        if step == "clips":
            return self._clips_units(partitions)
        return [unit for partition in partitions for unit in self._stage_units(step, partition)]

    # ---- pieces of work ----

    def _work(self, step: str, partitions: Sequence[int]) -> Work:
        return Work(step, self._steps[step].job, (step,), partitions, self.units(step, partitions))

    def _first_missing(self, names: Sequence[str], partitions: Sequence[int]) -> list[Unit]:
        """Each unit once, with the first step whose row it lacks. Several steps list a unit whose files are gone."""
        found: dict[str, Unit] = {}
        for name in names:
            for unit in self.units(name, partitions):
                found.setdefault(unit.key, unit)
        return list(found.values())

    def _of_the_lost(self, step: str, partitions: Sequence[int], lost: set[str]) -> Work:
        work = self._work(step, partitions)
        return dataclasses.replace(work, units=[unit for unit in work.units if unit.key in lost])

    # ---- units ----

    def _source_units(self, partitions: Sequence[int]) -> list[Unit]:
        view, wanted = self._view, set(partitions)
        uris = list(dict.fromkeys(r.uri for r in view.rows if partition_of(r.uri, view.partitions) in wanted))
        # each file's size and date tell whether it is still the same; its bytes are not read for that
        with store_access("look at the footage"), ThreadPoolExecutor(16) as threads:
            signatures = list(threads.map(signature, uris))
        found = [Unit(SOURCES, uri, tag, uri) for uri, tag in zip(uris, signatures, strict=True)]
        return view.missing(SOURCES, partitions, found)

    def _scenes_units(self, partitions: Sequence[int]) -> list[Unit]:
        sources = (source for partition in partitions for source in self._view.sources(partition))
        units = (Unit("scenes", source.info.source_id, "", SourceToCut(source)) for source in sources)
        return self._view.missing("scenes", partitions, units)

    def _clips_units(self, partitions: Sequence[int]) -> list[Unit]:
        found: list[Unit] = []
        for partition in partitions:
            scenes = self._view.rows_of("scenes", partition)
            for source in self._view.sources(partition):
                row = scenes.get(source.info.source_id)
                if row is not None and row["status"] == "ok":
                    found.append(Unit("clips", source.info.source_id, "", SourceToCut(source, *shots_of_row(row))))
        return self._view.missing("clips", partitions, found)

    def _stage_units(self, stage: str, partition: int) -> Iterator[Unit]:
        """Clips that the stages before this one have measured and let through."""
        view, stages = self._view, self._view.stages
        before = stages[: stages.index(stage)]
        let_through = alive(view.read_frame(partition, before), view.recipe.policy, before)
        inputs = {s.info.source_id: self._steps.inputs(stage, s.metadata) for s in view.sources(partition)}
        wanted = [Unit(stage, key, inputs[key[:16]], key) for key in let_through.index[let_through]]
        missing = {unit.key: unit for unit in view.missing(stage, [partition], wanted)}
        if not missing:
            return
        tables: dict[str, dict[str, dict[str, Any]]] = {name: view.rows_of(name, partition, missing) for name in stages}
        for record in view.records(partition):
            if record.clip_id in missing:
                payload = ClipToMeasure(record, view.known(record, tables))
                yield dataclasses.replace(missing[record.clip_id], payload=payload)
