"""The `curate` flow: footage in, WebDataset shards out. One task for each piece of work and group of partitions."""

from collections.abc import Iterable
from typing import Any, TypeVar, cast

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.utilities.annotations import opaque

from data_manifests.dataset import DatasetManifest, ShardEntry
from data_manifests.sources import ManifestError
from data_manifests.storage import Storage, StoreError, describe
from data_manifests.strict import RecipeError
from flows.parameters import CurateParameters, check_paths
from flows.progress import StepProgress, say
from flows.report.report import write_report
from flows.report.times import add_times
from flows.server_guard import end_server_with_us
from flows.summary import Summary, funnel_rows, summarise, summary_markdown
from tasks.execution.curation import Curation
from tasks.execution.footage import read_footage
from tasks.execution.ledger import LedgerError
from tasks.execution.outcome import Outcome, ShardError
from tasks.execution.run_lock import OutputError, exclusive
from tasks.execution.work import Totals, Work, add_totals
from tasks.execution.worker_pool import WorkerPool
from tasks.recipe import load_recipe
from tasks.review.funnel import FunnelLine, list_problems
from tasks.review.run_folder import RunFolder
from tasks.shards import ShardPlan, read_entry
from tasks.weights.missing import MissingBackend
from training.config import check_training

# What a user can mend: shown as one message, without a traceback.
USER_ERRORS = (ManifestError, RecipeError, MissingBackend, StoreError, OutputError, LedgerError, ShardError)

T = TypeVar("T")


@flow(name="curate", description=__doc__, flow_run_name="{parameters.manifest} by {parameters.recipe}")
def curate(parameters: CurateParameters) -> Summary:
    """Curate the footage that a manifest lists into WebDataset shards.

    Raises one of USER_ERRORS when the manifest, the recipe, a backend or the store cannot be used.
    """
    end_server_with_us()
    check_paths(parameters)
    recipe = load_recipe(parameters.recipe)
    check_training(parameters.recipe)
    storage = Storage(parameters.out)
    with exclusive(storage), WorkerPool(parameters.workers or recipe.run.workers) as pool:
        rows, bad_rows = read_footage(parameters.manifest, storage)
        curation = Curation(recipe, storage, rows, pool, parameters.retry_errors)
        curation.steps.check()
        changes = _say_changes(curation)
        schedule, done = curation.schedule, Totals()
        run_all(curation, schedule.sources(), done)
        for group in schedule.groups():
            run_all(curation, schedule.cut(group), done)
            run_all(curation, schedule.measure(group), done)
        run_all(curation, schedule.measure_lost(), done)
        outcome = Outcome(curation, bad_rows)
        manifest, written = make_shards(outcome, parameters.manifest)
        add_times(storage, curation.steps.fingerprints, done)
        funnel, report = _read_back(storage)
        problems = list_problems(outcome.sources, outcome.decisions)
        summary = summarise(storage.address, funnel, problems, done, manifest, changes, written, report)
    _show(summary)
    return summary


# ---- the tasks ----


def _is_io(_task: Any, _run: Any, state: Any) -> bool:
    """Retry a task only after a StoreError. Any other error would occur again."""
    try:
        state.result()
    except StoreError:
        return True
    except Exception:
        return False
    return False


# Rows and shards are kept in the storage, so Prefect caches and persists nothing.
_TASK: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [10, 60, 300],
    "retry_condition_fn": _is_io,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}


@task(task_run_name="{name} {group}", **_TASK)
def run_work(name: str, group: str, curation: Curation, work: Work) -> Totals:
    """One piece of work over a group of partitions. The UI shows `name` and `group`."""
    return curation.runner.run(work, StepProgress(name, len(work.units)))


@task(task_run_name="shards {group}", **_TASK)
def write_shards(group: str, outcome: Outcome, plans: list[ShardPlan]) -> list[ShardEntry]:
    """Write those shards of a group of partitions that are not there yet. The UI shows `group`."""
    return outcome.write_shards(plans, StepProgress("shards", len(plans)))


def run_all(curation: Curation, works: Iterable[Work], done: Totals) -> None:
    """Run each piece of work that has units as one Prefect task, in order. done: their totals are added to it."""
    for work in works:
        if work.units:
            add_totals(done, run_work(work.name, work.group, curation, _unseen(work)))


def make_shards(outcome: Outcome, created_from: str) -> tuple[DatasetManifest, int]:
    """Write the shards that are missing, then the tables and the dataset manifest.

    created_from: address of the source manifest. Returns: the dataset manifest, and how many shards were written.
    """
    curation, written = outcome.curation, 0
    entries: list[ShardEntry] = []
    for group in curation.schedule.groups():
        plans = [plan for partition in group for plan in outcome.plan_shards(partition)]
        there = {plan.name: read_entry(plan, curation.storage) for plan in plans}
        missing = [plan for plan in plans if there[plan.name] is None]
        entries += [entry for entry in there.values() if entry is not None]
        written += len(missing)
        if missing:
            entries += write_shards(f"{group[0]}-{group[-1]}", outcome, _unseen(missing))
    manifest = DatasetManifest.of(outcome.recipe_name, created_from, entries)
    outcome.record(manifest)
    return manifest, written


def _unseen(value: T) -> T:
    """A value that Prefect passes on as it is, without looking through its members for results of other tasks."""
    return cast(T, opaque(value))


# ---- what is shown ----


def _say_changes(curation: Curation) -> list[str]:
    """Log which steps must be measured again, before that work starts."""
    changes = curation.changes()
    for line in changes:
        get_run_logger().info(line)
        say(line)
    return changes


def _read_back(storage: Storage) -> tuple[list[FunnelLine], str]:
    """Read the finished run, and write its report.

    Returns: the funnel, and the address of the report. Each is empty when a store fails now: the shards are written.
    """
    funnel: list[FunnelLine] = []
    try:
        run = RunFolder(f"{storage.address.rstrip('/')}/dataset.json")
        funnel = run.funnel()
        return funnel, write_report(run)
    except Exception as error:
        get_run_logger().warning("no report: %s", describe(error))
        return funnel, ""


def _show(summary: Summary) -> None:
    try:
        create_table_artifact(table=funnel_rows(summary), key="funnel", description="Clips and hours, step by step")
        create_markdown_artifact(markdown=summary_markdown(summary), key="summary", description="What came of this run")
    except Exception as error:  # the shards are written, whatever the server says
        get_run_logger().warning("funnel and summary are not shown in the UI: %s", error)
