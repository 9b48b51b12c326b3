"""Running a piece of work in the worker pool, and keeping its rows."""

import logging
import time
from collections.abc import Iterator
from typing import Any

from data_manifests.storage import store_access
from tasks.execution.jobs import SourceToCut
from tasks.execution.ledger import partition_of
from tasks.execution.ledger_view import LiveView
from tasks.execution.measure import ClipToMeasure
from tasks.execution.steps import SOURCES, Steps
from tasks.execution.work import Progress, RowResult, StepTotals, Totals, Unit, Work, share_seconds
from tasks.execution.worker_pool import TOO_LONG, JobResult, WorkerPool

log = logging.getLogger(__name__)

_FLUSH_S = 20.0  # a kill costs at most the rows of this time, and the units under way
_GRACE_S = 10.0

Rows = dict[tuple[str, int], list[dict[str, Any]]]  # by step and partition


class Runner:
    """Runs the work of a curation. Rows are written while the work goes on, also when it is stopped."""

    def __init__(self, steps: Steps, view: LiveView, pool: WorkerPool) -> None:
        self.pool = pool
        self._steps, self._view = steps, view
        self._described: set[str] = set()  # tables whose fingerprint is described in the ledger

    def run(self, work: Work, progress: Progress | None = None) -> Totals:
        """Make the rows that the units of a piece of work lack.

        A unit of fused work that ends its worker, or takes too long, gets no row and is noted in `work.lost`. The
        schedule gives it out again step by step, which tells the step at fault.

        Returns: what was done, by step. Raises StoreError when the storage or the machine fails; the rows made until
        then are kept.
        """
        started = flushed = time.monotonic()
        units = {unit.key: unit for unit in self._still_missing(work)}
        totals: Totals = {name: StepTotals(0, 0, 0.0) for name in work.steps}
        rows: Rows = {}
        done = errors = 0
        try:
            payloads = ((unit.key, unit.payload) for unit in units.values())
            for result in self.pool.map(work.job, payloads, self._time_limit_s(work)):
                failed = self._take(work, units[result.key], result, rows, totals)
                done, errors = done + 1, errors + failed
                if progress is not None:
                    by_step = {name: total.done for name, total in totals.items()} if work.fused else {}
                    progress(done, len(units), errors, by_step)
                if time.monotonic() - flushed > _FLUSH_S:
                    self._flush(rows)
                    flushed = time.monotonic()
        finally:
            self._flush(rows)
        if SOURCES in work.steps:
            self._view.sources_changed()
        return share_seconds(totals, time.monotonic() - started)

    def _still_missing(self, work: Work) -> list[Unit]:
        """The units without those that an earlier try of the same work has done."""
        partitions = sorted({partition_of(unit.key, self._view.partitions) for unit in work.units})
        by_step = {name: [unit for unit in work.units if unit.step == name] for name in work.steps}
        return [u for name, units in by_step.items() if units for u in self._view.missing(name, partitions, units)]

    def _time_limit_s(self, work: Work) -> float:
        limit_s = self._steps.time_limit_s(work.steps)
        # A single stage's job has its own alarm. The pool's limit must be later.
        alarmed = not work.fused and work.name in self._view.stages
        return 2 * limit_s + _GRACE_S if alarmed else limit_s

    def _take(self, work: Work, unit: Unit, result: JobResult[dict[str, RowResult]], rows: Rows, totals: Totals) -> int:
        """Collect a unit's rows. Returns the number of rows with an error."""
        name, failed = _called(unit), 0
        if result.error and work.fused:
            log.warning("%s: %s; its steps are tried one by one", name, result.error)
            work.lost.add(unit.key)
        partition = partition_of(unit.key, self._view.partitions)
        for step, row, seconds in self._rows(work, unit, result):
            rows.setdefault((step, partition), []).append(row)
            error = row["status"] == "error"
            totals[step] += StepTotals(1, int(error), seconds)
            failed += error
            if error:
                log.warning("%s: %s: %s", step, name, row["error"])
        return failed

    def _rows(
        self, work: Work, unit: Unit, result: JobResult[dict[str, RowResult]]
    ) -> Iterator[tuple[str, dict[str, Any], float]]:
        """Of each row of a unit: the step, the row, and the seconds that it took."""
        made = result.result or {}
        if result.error and not work.fused:
            error = result.error
            if error == TOO_LONG:
                error = f"took longer than {self._steps.time_limit_s(work.steps):g} s"
            made = {work.name: RowResult({"status": "error", "error": error}, 0.0)}
        for step, one in made.items():
            inputs = unit.inputs
            if isinstance(unit.payload, ClipToMeasure):
                inputs = self._steps.inputs(step, unit.payload.record.metadata)
            yield step, {"key": unit.key, "inputs": inputs, **one.row}, one.seconds

    def _flush(self, rows: Rows) -> None:
        # The last step first: a unit counts as done by its row of the first step that it lacked.
        order = list(self._steps.by_name)
        ledger = self._view.ledger
        for (name, partition), some in sorted(rows.items(), key=lambda item: (-order.index(item[0][0]), item[0][1])):
            step = self._steps[name]
            with store_access(f"write the ledger of {name}"):
                if name not in self._described:
                    ledger.describe(name, step.fingerprint, step.about)
                    self._described.add(name)
                ledger.write(name, step.fingerprint, partition, some, step.schema)
        rows.clear()


def _called(unit: Unit) -> str:
    """What a log calls a unit: the address of a source, the clip_id of a clip."""
    return unit.payload.source.info.uri if isinstance(unit.payload, SourceToCut) else unit.key
