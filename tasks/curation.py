"""A curation of one corpus into one folder: which units still want a row in which table, and what comes of the rows.

Everything here can be run again at any moment: what has a row is not done twice, whatever was killed in between.
"""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from data_manifests.sources import SourceRow
from data_manifests.storage import Storage
from data_manifests.strict import Strict
from tasks import clips as clips_stage
from tasks import ingest as ingest_stage
from tasks import scenes as scenes_stage
from tasks.clip import ClipRecord
from tasks.engine import TOO_LONG, Engine, Outcome, store_access
from tasks.findings import Finding, file_name
from tasks.ingest import SourceInfo, signature
from tasks.jobs import CutSource, FindShots, Source, SourceToCut, WriteClips, ingest_source
from tasks.ledger import Ledger, partition_of, schema_for
from tasks.measure import ClipToMeasure, MeasureClip, StagePlan
from tasks.policy import alive, join
from tasks.recipe import Recipe
from tasks.stage import MissingBackend, Stage, fingerprint
from tasks.stages import STAGES
from tasks.stages import upstream as upstream_of
from tasks.weights import require
from tasks.work import Joint, Made, Progress, Run, Step, StepResult, Unit, Work, shared_out

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


CUT = "cut"  # shots and clips together
CUTTING = ("scenes", "clips")
MEASURE = "measure"  # the work of all stages together

_FLUSH_S = 20.0  # a kill costs at most this much work, and what is under way
_GRACE_S = 10.0
_GROUP_SOURCES = 200  # partitions with fewer sources share a task
_MOST_TASKS = 200  # a run: what Prefect's UI and server bear


class Curation:
    """The curation of `rows` into `storage` by `recipe`."""

    def __init__(
        self, recipe: Recipe, storage: Storage, rows: list[SourceRow], engine: Engine, retry_errors: bool = False
    ) -> None:
        self.recipe, self.storage, self.rows, self.engine = recipe, storage, rows, engine
        self.retry_errors = retry_errors
        self.partitions = recipe.shards.partitions
        self.ledger = Ledger(storage, self.partitions)
        require(recipe.networks())  # before their hashes are asked for, for the fingerprints
        self.stages: dict[str, Stage[Any]] = {name: STAGES[name](s) for name, s in recipe.measure.items()}
        self._sources: dict[int, list[Source]] | None = None
        self.same_as: dict[str, str] = {}  # uri of a copy -> uri of the file that counts
        self.step: dict[str, Step] = {}
        self._plans: dict[str, StagePlan] = {}
        self._described: set[str] = set()  # tables that the ledger says of what their fingerprint stands for
        self._lost: set[str] = set()  # sources and clips that ended their worker
        asked = recipe.policy.columns()
        self._judged = {name: {c: self.stages[name].columns[c] for c in asked.get(name, ())} for name in self.stages}
        self.upstream: dict[str, list[str]] = {}  # stage -> those before it that its measurement starts from
        self.reads: dict[str, tuple[str, ...]] = {}  # stage -> fields of the manifest that its measurement depends on
        for step in (self._ingest_step, self._scenes_step, self._clips_step):
            self._add(step())
        for name in recipe.measure:
            self._add(self._measuring_step(name))

    def _add(self, step: Step) -> None:
        self.step[step.name] = step

    def check(self) -> None:
        """See that every stage can run. Raises tasks.stage.MissingBackend, with a line for each that cannot, before any
        work has started."""
        faults = []
        for stage in self.stages.values():
            try:
                stage.check()
            except MissingBackend as error:
                faults.append(str(error))
        if faults:
            raise MissingBackend("\n".join(dict.fromkeys(faults)))

    # ---- the steps ----

    def _ingest_step(self) -> Step:
        def units(partitions: Sequence[int]) -> list[Unit]:
            wanted = set(partitions)
            uris = list(dict.fromkeys(r.uri for r in self.rows if partition_of(r.uri, self.partitions) in wanted))
            # a look at each file's size and date, not at its bytes: enough to know it again
            with store_access("look at the footage"), ThreadPoolExecutor(16) as threads:
                signatures = list(threads.map(signature, uris))
            found = [Unit("sources", u, s, u) for u, s in zip(uris, signatures, strict=True)]
            return self._missing("sources", partitions, found)

        made = fingerprint("sources", SourceInfo.VERSION, "", Strict())
        schema = schema_for(ingest_stage.COLUMNS)
        return Step("sources", ingest_source, units, made, schema, {"version": SourceInfo.VERSION})

    def _scenes_step(self) -> Step:
        settings = self.recipe.scenes

        def units(partitions: Sequence[int]) -> list[Unit]:
            every = (source for partition in partitions for source in self.sources(partition))
            return self._missing(
                "scenes", partitions, (Unit("scenes", s.info.source_id, "", SourceToCut(s)) for s in every)
            )

        backend = f"{scenes_stage.backend_version()}, {_decoder()}"
        made = fingerprint("scenes", scenes_stage.VERSION, backend, settings, self.step["sources"].fingerprint)
        about = _about(scenes_stage.VERSION, backend, settings)
        return Step("scenes", FindShots(settings), units, made, schema_for(scenes_stage.COLUMNS), about)

    def _clips_step(self) -> Step:
        settings = self.recipe.clips

        def units(partitions: Sequence[int]) -> list[Unit]:
            found: list[Unit] = []
            for partition in partitions:
                scenes = self.rows_of("scenes", partition)
                for source in self.sources(partition):
                    row = scenes.get(source.info.source_id)
                    if row is not None and row["status"] == "ok":
                        value = SourceToCut(source, *scenes_stage.spans(row))
                        found.append(Unit("clips", source.info.source_id, "", value))
            return self._missing("clips", partitions, found)

        scenes_made = self.step["scenes"].fingerprint
        made = fingerprint("clips", clips_stage.VERSION, _decoder(), settings, scenes_made)
        about = _about(clips_stage.VERSION, _decoder(), settings)
        schema = schema_for(clips_stage.COLUMNS)

        def gone(row: dict[str, Any]) -> bool:
            names = (clip[kind] for clip in row["clips"] for kind in ("video", "audio") if clip[kind])
            return not all(map(self.storage.exists, names))

        return Step("clips", WriteClips(settings, self.storage), units, made, schema, about, gone)

    def _cutting(self) -> Joint:
        """Shots and clips, source by source, so that a source is fetched and decoded once for both."""
        clips = WriteClips(self.recipe.clips, self.storage)
        return self._joint(CUT, CutSource(self.recipe.scenes, clips, self._keep_bytes), CUTTING)

    def _joint(self, name: str, job: Callable[[Any], dict[str, Made]], steps: tuple[str, ...]) -> Joint:
        def units(partitions: Sequence[int]) -> list[Unit]:
            # once each, from the first step that it lacks on; several list it where its files are gone
            found: dict[str, Unit] = {}
            for step in steps:
                for unit in self.step[step].units(partitions):
                    found.setdefault(unit.key, unit)
            return list(found.values())

        return Joint(name, job, units, steps)

    def _measuring_step(self, name: str) -> Step:
        stage = self.stages[name]

        def units(partitions: Sequence[int]) -> list[Unit]:
            found: list[Unit] = []
            for partition in partitions:
                let_through = alive(self.frame(partition, before), self.recipe.policy, before)
                inputs = {s.info.source_id: _inputs(s.metadata, self.reads[name]) for s in self.sources(partition)}
                wanted = [Unit(name, key, inputs[key[:16]], key) for key in let_through.index[let_through]]
                missing = {unit.key: unit for unit in self._missing(name, [partition], wanted)}
                if missing:
                    tables = {other: self.rows_of(other, partition, missing) for other in self.stages}
                    for record in self.records(partition):
                        if record.clip_id in missing:
                            value = ClipToMeasure(record, self._known(record, tables))
                            found.append(dataclasses.replace(missing[record.clip_id], value=value))
            return found

        before = list(self.stages)[: list(self.stages).index(name)]
        self.upstream[name] = upstream_of(self.stages, name)
        # what an earlier stage read from the manifest has gone into what it found
        self.reads[name] = tuple(
            sorted({*stage.reads, *(r for other in self.upstream[name] for r in self.reads[other])})
        )
        upstream = " ".join(f"{other}:{self.step[other].fingerprint}" for other in self.upstream[name])
        made = fingerprint(name, stage.version, stage.backend_version(), stage.settings, upstream)
        self._plans[name] = StagePlan(name, stage.settings, made, tuple(self.upstream[name]))
        limits = {name: self.recipe.run.time_limit(name)}
        job = MeasureClip(tuple(self._plans.values()), self.recipe.policy, self.storage, limits)
        names = pa.list_(pa.string())
        schema = schema_for({**stage.columns, "arrays": names, "arrays_bytes": int, "files": names, "files_bytes": int})
        about = _about(stage.version, stage.backend_version(), stage.settings)

        def gone(row: dict[str, Any]) -> bool:
            files = [f"{array}.npy" for array in row["arrays"]] + list(row["files"] or ())
            return not all(self.storage.exists(file_name(name, made, row["key"], file)) for file in files)

        return Step(name, job, units, made, schema, about, gone)

    def _known(
        self, record: ClipRecord, tables: Mapping[str, Mapping[str, dict[str, Any]]]
    ) -> dict[str, Finding | None]:
        """What stages have found in a clip as it is now; None for those that could not measure it."""
        rows = {}
        for name, table in tables.items():
            row, step = table.get(record.clip_id), self.step[name]
            if row is None or row["inputs"] != _inputs(record.metadata, self.reads[name]):
                continue
            if not self.retry_errors or (row["status"] == "ok" and not step.gone(row)):
                rows[name] = row
        taken = {other for name in self.stages if name not in rows for other in self.upstream[name]}
        known: dict[str, Finding | None] = {}
        for name, row in rows.items():
            # many are held at once: of what nobody starts from, only what the policy asks for
            whole = name in taken or self.stages[name].remakes_clip
            columns = self.stages[name].columns if whole else self._judged[name]
            made = self.step[name].fingerprint
            known[name] = Finding.of(name, made, row, columns) if row["status"] == "ok" else None
        return known

    def _measuring(self) -> Joint:
        """All stages, clip by clip, so that a clip is fetched and decoded once for all of them."""

        limits = {name: self.recipe.run.time_limit(name) for name in self.stages}
        job = MeasureClip(tuple(self._plans.values()), self.recipe.policy, self.storage, limits, self._keep_bytes)
        return self._joint(MEASURE, job, tuple(self.stages))

    @property
    def _keep_bytes(self) -> int:
        return self.recipe.run.keep_frames_mb * 1_000_000

    # ---- running a step ----

    def run(self, work: Work, units: Sequence[Unit], progress: Progress | None = None) -> dict[str, StepResult]:
        """Make the missing rows, keeping what is done every few seconds, also when the run is stopped.

        A unit that ends its worker, or takes too long, while several steps share it gets no row: `walk` comes to it
        again step by step, to tell which of them it was.

        Returns: what was done, by step. Raises StoreError when the storage or the machine fails; the rows made until
        then are kept.
        """
        started = flushed = time.monotonic()
        steps = [self.step[name] for name in work.steps] if isinstance(work, Joint) else [self.step[work.name]]
        # when a task is tried again, what its first try has done counts
        partitions = sorted({partition_of(unit.key, self.partitions) for unit in units})
        by_step = {step.name: [unit for unit in units if unit.step == step.name] for step in steps}
        units = [unit for name, some in by_step.items() if some for unit in self._missing(name, partitions, some)]
        limit_s = sum(self.recipe.run.time_limit(step.name) for step in steps)
        if work.name in self.stages:
            limit_s = 2 * limit_s + _GRACE_S  # the job sets itself an alarm, which is to come first
        by_value = {id(unit.value): unit for unit in units}
        rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
        tally = {step.name: StepResult(0, 0, 0.0) for step in steps}
        done = errors = 0
        try:
            for outcome in self.engine.map(work.job, (u.value for u in units), limit_s):
                unit = by_value[id(outcome.unit)]
                partition = partition_of(unit.key, self.partitions)
                name = _called(unit)
                if outcome.error and isinstance(work, Joint):
                    log.warning("%s: %s; its steps are tried one by one", name, outcome.error)
                    self._lost.add(unit.key)
                for step_name, row, seconds in self._rows(work, unit, outcome):
                    rows.setdefault((step_name, partition), []).append(row)
                    failed = row["status"] == "error"
                    tally[step_name] += StepResult(1, int(failed), seconds)
                    errors += failed
                    if failed:
                        log.warning("%s: %s: %s", step_name, name, row["error"])
                done += 1
                if progress is not None:
                    several = {n: r.done for n, r in tally.items()} if isinstance(work, Joint) else {}
                    progress(done, len(units), errors, several)
                if time.monotonic() - flushed > _FLUSH_S:
                    self._flush(rows)
                    flushed = time.monotonic()
        finally:
            self._flush(rows)
        if work.name == "sources":
            self._sources = None
        return shared_out(tally, time.monotonic() - started)

    def _rows(
        self, work: Work, unit: Unit, outcome: Outcome[Any, dict[str, Made]]
    ) -> Iterator[tuple[str, dict[str, Any], float]]:
        """The rows that a unit gives: of which step, the row, and the seconds that it took."""
        made = outcome.result or {}
        if outcome.error and not isinstance(work, Joint):
            error = outcome.error
            if error == TOO_LONG:
                error = f"took longer than {self.recipe.run.time_limit(work.name):g} s"
            made = {work.name: Made({"status": "error", "error": error}, 0.0)}
        for name, one in made.items():
            inputs = unit.inputs
            if isinstance(unit.value, ClipToMeasure):
                inputs = _inputs(unit.value.record.metadata, self.reads[name])
            yield name, {"key": unit.key, "inputs": inputs, **one.row}, one.seconds

    def _flush(self, rows: dict[tuple[str, int], list[dict[str, Any]]]) -> None:
        # the last stage first: by the row that a unit lacked first it counts as done
        order = list(self.step)
        for (name, partition), some in sorted(rows.items(), key=lambda item: (-order.index(item[0][0]), item[0][1])):
            step = self.step[name]
            with store_access(f"write the ledger of {name}"):
                if name not in self._described:
                    self.ledger.describe(name, step.fingerprint, step.about)
                    self._described.add(name)
                self.ledger.write(name, step.fingerprint, partition, some, step.schema)
        rows.clear()

    def _missing(self, name: str, partitions: Sequence[int], units: Iterable[Unit]) -> list[Unit]:
        """Those units without a row for their present inputs.

        With `retry_errors` also those whose row has an error, or speaks of files that are gone from the storage.
        """
        step = self.step[name]
        done: dict[str, str] = {}
        with store_access(f"read the ledger of {name}"):
            for partition in partitions:
                if self.retry_errors:
                    rows = self.ledger.rows(name, step.fingerprint, partition)
                    done |= {r["key"]: r["inputs"] for r in rows if r["status"] == "ok" and not step.gone(r)}
                else:
                    done |= self.ledger.keys(name, step.fingerprint, partition)
        return [unit for unit in units if done.get(unit.key) != unit.inputs]

    # ---- what the ledger says ----

    def sources(self, partition: int) -> list[Source]:
        """The usable sources of a partition, by source_id; of files with the same content, the manifest's first."""
        if self._sources is None:
            self._sources = self._read_sources()
        return self._sources.get(partition, [])

    def _read_sources(self) -> dict[int, list[Source]]:
        step = self.step["sources"]
        rows = {r["key"]: r for r in self.ledger.rows(step.name, step.fingerprint) if r["status"] == "ok"}
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

    def rows_of(self, name: str, partition: int, keys: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
        """A partition's rows of a step's table, by key; only those of `keys` where given."""
        return {row["key"]: row for row in self.ledger.rows(name, self.step[name].fingerprint, partition, keys)}

    def records(self, partition: int) -> list[ClipRecord]:
        """The clips of a partition's sources, by clip_id."""
        metadata = {source.info.source_id: source.metadata for source in self.sources(partition)}
        found = [
            ClipRecord(**clip, metadata=metadata[source_id])
            for source_id, row in self.rows_of("clips", partition).items()
            if source_id in metadata
            for clip in row["clips"] or ()
        ]
        return sorted(found, key=lambda record: record.clip_id)

    def findings(self, clip_id: str, rows: Mapping[str, Mapping[str, dict[str, Any]]]) -> list[Finding]:
        """What stages found in a clip. rows: by stage, in the recipe's order, and clip_id, all without an error."""
        return [
            Finding.of(name, self.step[name].fingerprint, table[clip_id], self.stages[name].columns)
            for name, table in rows.items()
        ]

    def remade(self, record: ClipRecord, findings: Iterable[Finding]) -> ClipRecord:
        """The clip as the last of those stages that remake it has left it."""
        for finding in findings:
            if self.stages[finding.stage].remakes_clip:
                record = finding.remake(record)
        return record

    def frame(self, partition: int, stages: Iterable[str] | None = None) -> "pd.DataFrame":
        """What the ledger holds of a partition's clips, one row a clip, as tasks.policy reads it.

        stages: whose columns to join, as far as the policy asks for them; all of the recipe's when None.
        """
        step = self.step["clips"]
        metadata = {source.info.source_id: source.metadata for source in self.sources(partition)}
        wanted = ["clip_id", "source_id", "start_s", "end_s", "frames", "fps", "video", "audio"]
        clips = self.ledger.read_list(step.name, step.fingerprint, "clips", partition, wanted)
        clips = clips[clips["source_id"].isin(list(metadata))]
        clips = clips.assign(duration_s=clips["frames"] / clips["fps"]).set_index("clip_id")
        clips = clips[["start_s", "end_s", "duration_s", "video", "audio"]]
        needed = self.recipe.policy.columns()
        tables = {}
        for name in self.stages if stages is None else stages:
            columns = ["status", "error", "inputs", *needed.get(name, ())]
            table = self.ledger.read(name, self.step[name].fingerprint, partition, columns)
            # a row made from a caption that has changed since is no row
            present = {source_id: _inputs(about, self.reads[name]) for source_id, about in metadata.items()}
            tables[name] = table[table["inputs"] == table["key"].str[:16].map(present)]
        return join(clips, tables)

    def everything(self, run: Run | None = None) -> dict[str, StepResult]:
        """Do each piece of work that has units, by `run` where one is given; what was done, by step."""
        results: dict[str, StepResult] = {}
        for work, group in self.walk():
            if units := work.units(group):
                for name, result in (run(work, group, units) if run else self.run(work, units)).items():
                    results[name] = results[name] + result if name in results else result
        return results

    def walk(self) -> Iterator[tuple[Work, Sequence[int]]]:
        """Each piece of work and group of partitions in order, for who runs each before asking for the next: all
        sources first, since the same file may stand in any partition; then depth first, so that scratch space does not
        grow with the corpus, with sources that ended their worker once more, step by step; last, stage by stage, clips
        that did."""
        everything = range(self.partitions)
        yield self.step["sources"], everything
        for group in self.groups():
            yield self._cutting(), group
            for name in CUTTING if self._lost_in(group) else ():
                yield self._of_the_lost(self.step[name]), group
            yield self._measuring(), group
        if partitions := self._lost_in(range(self.partitions)):
            for name in self.stages:
                yield self._of_the_lost(self.step[name]), partitions

    def _lost_in(self, partitions: Sequence[int]) -> list[int]:
        return sorted({partition_of(key, self.partitions) for key in self._lost} & {*partitions})

    def _of_the_lost(self, step: Step) -> Step:
        def units(partitions: Sequence[int]) -> list[Unit]:
            return [unit for unit in step.units(partitions) if unit.key in self._lost]

        return dataclasses.replace(step, units=units)

    def groups(self) -> list[range]:
        """Neighbouring partitions put together until each group is worth a task of its own."""
        groups: list[range] = []
        total = sum(len(self.sources(partition)) for partition in range(self.partitions))
        # one for the sources, one a stage for clips that ended their worker; a group's cutting, measuring, shards, and
        # scenes and clips for sources that did
        most = max(1, (_MOST_TASKS - 1 - len(self.stages)) // 5)
        enough = max(_GROUP_SOURCES, -(-total // most))
        start = count = 0
        for partition in range(self.partitions):
            count += len(self.sources(partition))
            if count >= enough or partition == self.partitions - 1:
                if count:
                    groups.append(range(start, partition + 1))
                start, count = partition + 1, 0
        return groups

    def changes(self) -> list[str]:
        """What this recipe has measured anew, and which setting makes it so, told against what the ledger holds."""
        lines = []
        for step in self.step.values():
            known = self.ledger.fingerprints(step.name)
            others = [about for made, about in known.items() if made != step.fingerprint and about]
            if step.fingerprint in known or not others:
                continue
            nearest = min(map(step.differences, others), key=len)
            lines.append(f"{step.name}: made anew, because {', '.join(nearest) or 'what it starts from'} changed")
        return lines


def _called(unit: Unit) -> str:
    """What a log calls a unit: the address of a source, the clip_id of a clip."""
    return unit.value.source.info.uri if isinstance(unit.value, SourceToCut) else unit.key


def _decoder() -> str:
    from importlib.metadata import version

    return f"pyav {version('av')}"


def _about(version: object, backend_version: str, settings: Strict) -> dict[str, Any]:
    return {"version": version, "backend_version": backend_version, "settings": settings.model_dump(mode="json")}


def _inputs(metadata: Mapping[str, str], reads: Sequence[str]) -> str:
    """A short hash of the manifest fields that a stage reads; "" when it reads none."""
    if not reads:
        return ""
    read = json.dumps([metadata.get(name) for name in reads])
    return hashlib.sha256(read.encode()).hexdigest()[:12]
