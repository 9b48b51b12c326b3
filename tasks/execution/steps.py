"""The steps of a recipe: sources, scenes and clips, then its stages. Each has a ledger table and a fingerprint."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from data_manifests.storage import Storage
from data_manifests.strict import Strict
from tasks.cutting import clip_plan, ingest, shots
from tasks.cutting.ingest import SourceInfo
from tasks.execution.jobs import CutSource, FindShots, WriteClips, ingest_source
from tasks.execution.ledger import Ledger, schema_for
from tasks.execution.measure import MeasureClip, StagePlan
from tasks.execution.stage_results import file_name
from tasks.execution.work import Step
from tasks.recipe import Recipe
from tasks.stages.base import Stage, fingerprint
from tasks.stages.registry import STAGES
from tasks.stages.registry import upstream as upstream_of
from tasks.weights.missing import MissingBackend
from tasks.weights.store import require

SOURCES = "sources"
CUT = ("scenes", "clips")


class Steps:
    """The steps of a recipe, and the jobs that make their rows.

    Raises MissingBackend when published weights that the recipe needs are not here: their hashes are a part of the
    fingerprints.
    """

    def __init__(self, recipe: Recipe, storage: Storage) -> None:
        require(recipe.networks())
        self.recipe, self.storage = recipe, storage
        self.stages: dict[str, Stage[Any]] = {name: STAGES[name](s) for name, s in recipe.measure.items()}
        self.upstream = {name: upstream_of(self.stages, name) for name in self.stages}
        """Stage -> the stages before it that its measurement starts from."""
        self.reads: dict[str, tuple[str, ...]] = {}
        """Stage -> the manifest fields that its measurement depends on, also through the stages that it starts from."""
        for name, stage in self.stages.items():
            read = {*stage.reads, *(field for other in self.upstream[name] for field in self.reads[other])}
            self.reads[name] = tuple(sorted(read))
        self._plans: dict[str, StagePlan] = {}
        self.by_name: dict[str, Step] = {}
        for step in (self._sources_step, self._scenes_step, self._clips_step):
            self._add(step())
        for name in self.stages:
            self._add(self._stage_step(name))

    def _add(self, step: Step) -> None:
        self.by_name[step.name] = step

    def __getitem__(self, name: str) -> Step:
        return self.by_name[name]

    @property
    def fingerprints(self) -> dict[str, str]:
        """By step."""
        return {name: step.fingerprint for name, step in self.by_name.items()}

    def check(self) -> None:
        """See that every stage can run. Raises MissingBackend, with a line for each that cannot, before any work has
        started."""
        faults = []
        for stage in self.stages.values():
            try:
                stage.check()
            except MissingBackend as error:
                faults.append(str(error))
        if faults:
            raise MissingBackend("\n".join(dict.fromkeys(faults)))

    def inputs(self, stage: str, metadata: Mapping[str, str]) -> str:
        """A short hash of the manifest fields that a stage's measurement depends on; "" when it depends on none."""
        fields = self.reads[stage]
        if not fields:
            return ""
        read = json.dumps([metadata.get(name) for name in fields])
        return hashlib.sha256(read.encode()).hexdigest()[:12]

    def time_limit_s(self, names: Sequence[str]) -> float:
        """Seconds that one unit may take in these steps together."""
        return sum(self.recipe.run.time_limit(name) for name in names)

    # ---- jobs of several steps ----

    def cut_job(self) -> CutSource:
        """Finds a source's shots and writes its clips: the source is fetched and decoded once for both."""
        return CutSource(self.recipe.scenes, WriteClips(self.recipe.clips, self.storage), self._keep_bytes)

    def measure_job(self) -> MeasureClip:
        """Takes a clip through all stages: the clip is fetched and decoded once for all of them."""
        limits = {name: self.recipe.run.time_limit(name) for name in self.stages}
        return MeasureClip(tuple(self._plans.values()), self.recipe.policy, self.storage, limits, self._keep_bytes)

    @property
    def _keep_bytes(self) -> int:
        return self.recipe.run.keep_frames_mb * 1_000_000

    # ---- single steps ----

    def _sources_step(self) -> Step:
        made = fingerprint(SOURCES, SourceInfo.VERSION, "", Strict())
        return Step(SOURCES, ingest_source, made, schema_for(ingest.COLUMNS), {"version": SourceInfo.VERSION})

    def _scenes_step(self) -> Step:
        settings = self.recipe.scenes
        backend = f"{shots.backend_version()}, {_decoder()}"
        made = fingerprint("scenes", shots.VERSION, backend, settings, self[SOURCES].fingerprint)
        about = _about(shots.VERSION, backend, settings)
        return Step("scenes", FindShots(settings), made, schema_for(shots.COLUMNS), about)

    def _clips_step(self) -> Step:
        settings, storage = self.recipe.clips, self.storage
        made = fingerprint("clips", clip_plan.VERSION, _decoder(), settings, self["scenes"].fingerprint)
        about = _about(clip_plan.VERSION, _decoder(), settings)

        def gone(row: dict[str, Any]) -> bool:
            names = (clip[kind] for clip in row["clips"] for kind in ("video", "audio") if clip[kind])
            return not all(map(storage.exists, names))

        return Step("clips", WriteClips(settings, storage), made, schema_for(clip_plan.COLUMNS), about, gone)

    def _stage_step(self, name: str) -> Step:
        stage, storage, policy = self.stages[name], self.storage, self.recipe.policy
        upstream = " ".join(f"{other}:{self[other].fingerprint}" for other in self.upstream[name])
        version = stage.backend_version()
        made = fingerprint(name, stage.version, version, stage.settings, upstream)
        self._plans[name] = StagePlan(name, stage.settings, made, tuple(self.upstream[name]))
        # the stages before it are in the job, since a clip goes through what is known of it
        job = MeasureClip(tuple(self._plans.values()), policy, storage, {name: self.recipe.run.time_limit(name)})
        names = pa.list_(pa.string())
        schema = schema_for({**stage.columns, "arrays": names, "arrays_bytes": int, "files": names, "files_bytes": int})

        def gone(row: dict[str, Any]) -> bool:
            files = [f"{array}.npy" for array in row["arrays"]] + list(row["files"] or ())
            return not all(storage.exists(file_name(name, made, row["key"], file)) for file in files)

        return Step(name, job, made, schema, _about(stage.version, version, stage.settings), gone)


def changes(steps: Steps, ledger: Ledger) -> list[str]:
    """The steps whose existing rows are out of date, each with the setting or version that changed."""
    lines = []
    for step in steps.by_name.values():
        known = ledger.fingerprints(step.name)
        others = [about for made, about in known.items() if made != step.fingerprint and about]
        if step.fingerprint in known or not others:
            continue
        nearest = min(map(step.differences, others), key=len)
        lines.append(f"{step.name}: made anew, because {', '.join(nearest) or 'what it starts from'} changed")
    return lines


def _decoder() -> str:
    from importlib.metadata import version

    return f"pyav {version('av')}"


def _about(version: object, backend_version: str, settings: Strict) -> dict[str, Any]:
    return {"version": version, "backend_version": backend_version, "settings": settings.model_dump(mode="json")}
