"""The `curate` flow: footage in, WebDataset shards out, one task a piece of work and group of partitions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.utilities.annotations import opaque
from pydantic import BaseModel, Field

from data_manifests.dataset import DatasetManifest, ShardEntry
from data_manifests.sources import BadRow, ManifestError, SourceRow, path_of, read_sources
from data_manifests.storage import Storage
from data_manifests.strict import RecipeError
from flows.leftovers import end_server_with_us
from flows.progress import StepProgress, say
from flows.report import add_times, write_report
from flows.summary import Summary, funnel_rows, summarise, to_markdown
from tasks.curation import Curation
from tasks.engine import Engine, StoreError, describe
from tasks.exclusive import OWN_FOLDERS, OutputError, exclusive
from tasks.ledger import LedgerError
from tasks.outcome import Outcome, ShardError
from tasks.recipe import load_recipe
from tasks.shards import ShardPlan, read_entry
from tasks.stage import MissingBackend
from tasks.work import StepResult, Unit, Work

# What a user can mend: shown as one message, without a traceback.
USER_ERRORS = (ManifestError, RecipeError, MissingBackend, StoreError, OutputError, LedgerError, ShardError)


T = TypeVar("T")


class CurateParameters(BaseModel):
    """What to curate, how, and where to put it."""

    manifest: str = Field(
        title="Footage",
        description="Address of a manifest (CSV, JSONL or Parquet with a `uri` column) or of a folder of videos. "
        "An absolute path on the worker's machine, s3://bucket/key, or any fsspec address.",
        json_schema_extra={"position": 1},
    )
    recipe: str = Field(
        "active_mind",
        title="Recipe",
        description="Name of a recipe that comes along (active_mind, physavatar, demo) or the path of a YAML file: "
        "clip length, frame rate, what to measure and which thresholds to keep.",
        json_schema_extra={"position": 2},
    )
    out: str = Field(
        title="Output folder",
        description="Where ledger, clips and shards are kept: an absolute path or an address. Give the same folder "
        "again to go on from where a run stopped, to add footage or to try other thresholds: only new work costs time.",
        json_schema_extra={"position": 3},
    )
    workers: int | None = Field(
        None,
        ge=1,
        title="Workers",
        description="Worker processes on the machine that runs the flow; all of its cores when left empty. "
        "It changes nothing but the speed.",
        json_schema_extra={"position": 4},
    )
    retry_errors: bool = Field(
        False,
        title="Retry errors",
        description="Try again the sources and clips that ended in an error, such as a time limit.",
        json_schema_extra={"position": 5},
    )


def _is_io(_task: Any, _run: Any, state: Any) -> bool:
    """Only a store that did not answer is worth another try: everything else would end the same way."""
    try:
        state.result()
    except StoreError:
        return True
    except Exception:
        return False
    return False


# what has a row or a shard is kept anyway, so Prefect is to cache nothing
_TASK: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [10, 60, 300],
    "retry_condition_fn": _is_io,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}


@task(task_run_name="{name} {group}", **_TASK)
def run_step(name: str, group: str, curation: Curation, work: Work, units: list[Unit]) -> dict[str, StepResult]:
    """One piece of work over a group of partitions. `name` and `group` are for the UI."""
    return curation.run(work, units, StepProgress(name, len(units)))


@task(task_run_name="shards {group}", **_TASK)
def write_shards(group: str, outcome: Outcome, plans: list[ShardPlan]) -> list[ShardEntry]:
    """Write those shards of a group of partitions that are not there yet."""
    return outcome.write_shards(plans, StepProgress("shards", len(plans)))


@flow(name="curate", description=__doc__, flow_run_name="{parameters.manifest} by {parameters.recipe}")
def curate(parameters: CurateParameters) -> Summary:
    """Curate the footage that a manifest lists into WebDataset shards.

    Raises one of USER_ERRORS when the manifest, the recipe, a backend or the store cannot be used.
    """
    end_server_with_us()
    _check_paths(parameters)
    recipe = load_recipe(parameters.recipe)
    storage = Storage(parameters.out)
    logger = get_run_logger()
    with exclusive(storage), Engine(parameters.workers or recipe.run.workers) as engine:
        rows, bad_rows = _read(parameters.manifest, storage)
        curation = Curation(recipe, storage, rows, engine, parameters.retry_errors)
        curation.check()
        changes = curation.changes()
        for line in changes:
            logger.info(line)
            say(line)  # before the hours that it may cost

        def as_task(work: Work, group: Sequence[int], units: list[Unit]) -> dict[str, StepResult]:
            return run_step(work.name, f"{group[0]}-{group[-1]}", curation, work, _unseen(units))

        results = curation.everything(as_task)
        outcome = Outcome(curation, bad_rows)
        written = 0
        entries: list[ShardEntry] = []
        for group in curation.groups():
            plans = [plan for partition in group for plan in outcome.plan_shards(partition)]
            there = {plan.name: read_entry(plan, storage) for plan in plans}
            missing = [plan for plan in plans if there[plan.name] is None]
            entries += [entry for entry in there.values() if entry is not None]
            written += len(missing)
            if missing:
                entries += write_shards(f"{group[0]}-{group[-1]}", outcome, _unseen(missing))
        manifest = DatasetManifest.of(outcome.recipe_name, parameters.manifest, entries)
        outcome.record(manifest)
        add_times(storage, curation, results)
        summary = summarise(outcome, results, manifest, changes, written, _report(parameters.out))
    try:
        create_table_artifact(table=funnel_rows(summary), key="funnel", description="Clips and hours, step by step")
        create_markdown_artifact(markdown=to_markdown(summary), key="summary", description="What came of this run")
    except Exception as error:  # the shards are written, whatever the server says
        logger.warning("funnel and summary are not shown in the UI: %s", error)
    return summary


def _report(out: str) -> str:
    """The report's address; "" when there is none, since what it would tell of is done all the same."""
    try:
        return write_report(out)
    except Exception as error:
        get_run_logger().warning("no report: %s", describe(error))
        return ""


def _check_paths(parameters: CurateParameters) -> None:
    """A deployed run works in a folder that its worker removes afterwards, and all that was written there with it."""
    for name in ("manifest", "out"):
        path = getattr(parameters, name)
        if runtime.deployment.id and "://" not in path and not Path(path).is_absolute():
            raise OutputError(f"{name} {path!r}: a deployed run needs an absolute path or an address such as s3://...")


def _unseen(values: list[T]) -> list[T]:
    """A list that Prefect passes on as it is, instead of looking through every member for results of other tasks."""
    return cast(list[T], opaque(values))


def _read(manifest: str, storage: Storage) -> tuple[list[SourceRow], list[BadRow]]:
    """The manifest's rows. Where the footage is a folder, what runs have put into it is passed by, also other runs."""
    ours = tuple(f"{root}/{name}/" for root in (storage.root, storage.address.rstrip("/")) for name in OWN_FOLDERS)
    rows: list[SourceRow] = []
    bad: list[BadRow] = []
    footage = path_of(manifest).rstrip("/")
    runs: dict[str, bool] = {}
    others = 0
    for row in read_sources(manifest):
        if isinstance(row, BadRow):
            bad.append(row)
        elif row.where != manifest:
            rows.append(row)
        elif not row.uri.startswith(ours):
            if _of_a_run(row.uri, footage, runs):
                others += 1
            else:
                rows.append(row)
    if others:
        get_run_logger().warning("%s: %d files in it are what other runs have made, and no footage", manifest, others)
    if not rows:
        first = f"; the first of {len(bad)} bad rows: {bad[0].where}: {bad[0].reason}" if bad else ""
        raise ManifestError(f"{manifest}: no footage in it{first}")
    return rows, bad


def _of_a_run(uri: str, footage: str, runs: dict[str, bool]) -> bool:
    """Whether a file lies in the output of a run that lies in the footage. runs: what is known of folders, to be kept
    from call to call."""
    for name in OWN_FOLDERS:
        folder, between, _ = uri.rpartition(f"/{name}/")
        if between:
            if folder not in runs:
                run = Storage(folder)
                # clips that somebody names as footage are footage
                runs[folder] = f"{run.root}/".startswith(f"{footage}/") and bool(run.folders("ledger"))
            if runs[folder]:
                return True
    return False
