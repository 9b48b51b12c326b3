"""A curation of one corpus into one folder: its steps, what is still to do, and running it."""

from collections.abc import Iterable, Iterator

from data_manifests.sources import SourceRow
from data_manifests.storage import Storage
from tasks.execution.ledger import Ledger
from tasks.execution.ledger_view import LiveView
from tasks.execution.runner import Runner
from tasks.execution.schedule import Schedule
from tasks.execution.steps import Steps, changes
from tasks.execution.work import Totals, Work, add_totals
from tasks.execution.worker_pool import WorkerPool
from tasks.recipe import Recipe


class Curation:
    """The curation of a manifest's rows into a storage by a recipe.

    Raises MissingBackend when published weights are not here, StoreError when the storage does not answer.
    """

    def __init__(
        self, recipe: Recipe, storage: Storage, rows: list[SourceRow], pool: WorkerPool, retry_errors: bool = False
    ) -> None:
        """retry_errors: do again what ended in an error, and what names files that are gone from the storage."""
        self.recipe, self.storage = recipe, storage
        self.steps = Steps(recipe, storage)
        self.view = LiveView(Ledger(storage, recipe.shards.partitions), self.steps, rows, retry_errors)
        self.schedule = Schedule(self.steps, self.view)
        self.runner = Runner(self.steps, self.view, pool)

    def changes(self) -> list[str]:
        """The steps whose existing rows are out of date, each with the setting or version that changed."""
        return changes(self.steps, self.view.ledger)

    def run(self, works: Iterable[Work]) -> Totals:
        """Run pieces of work one after the other in this process, as far as they have units."""
        totals: Totals = {}
        for work in works:
            if work.units:
                add_totals(totals, self.runner.run(work))
        return totals

    def everything(self) -> Iterator[Work]:
        """All work in the order of flows/curate.py, for callers without Prefect."""
        yield from self.schedule.sources()
        for group in self.schedule.groups():
            yield from self.schedule.cut(group)
            yield from self.schedule.measure(group)
        yield from self.schedule.measure_lost()
