"""A clip taken through the measuring stages, its picture fetched and decoded once for all of them."""

import contextlib
import functools
import math
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_manifests.storage import Storage
from tasks.clip import Clip, ClipRecord
from tasks.clip_frames import Decoded
from tasks.engine import store_access, unit_error
from tasks.findings import Finding, file_name, npy_bytes
from tasks.policy import alive, join
from tasks.rules import Policy
from tasks.stage import Measurement, Stage, StageSettings
from tasks.stages import STAGES
from tasks.work import Made

_LONGEST_S = 1e8  # that a timer can be set to


@dataclass(frozen=True)
class StagePlan:
    """One stage of a recipe.

    fingerprint: of the rows that it makes. upstream: the stages whose findings it starts from.
    """

    name: str
    settings: StageSettings
    fingerprint: str
    upstream: tuple[str, ...]


@dataclass(frozen=True)
class ClipToMeasure:
    """A clip as it was cut, and what is known of it by stage; None where a stage could not measure it."""

    record: ClipRecord
    known: Mapping[str, Finding | None]


@dataclass(frozen=True)
class MeasureClip:
    """Measure a clip with one stage after the other, as far as nothing is known of it, until one of them cannot measure
    it or the policy lets it go no further. What the stages give is kept; the ledger rows are the caller's to write.

    time_limits: seconds by stage, after which SIGALRM ends the worker. keep_bytes: memory for a clip's decoded frames.
    """

    stages: tuple[StagePlan, ...]
    policy: Policy
    storage: Storage
    time_limits: Mapping[str, float] = field(default_factory=dict)
    keep_bytes: int = 0

    def __call__(self, unit: ClipToMeasure) -> dict[str, Made]:
        """The new rows, by stage. Raises StoreError when the storage or the machine fails."""
        record, made = unit.record, {}
        found: dict[str, Measurement] = {}
        with _Files(self.storage, self.keep_bytes) as files:
            for plan in self.stages:
                if plan.name in unit.known:
                    finding = unit.known[plan.name]
                    if finding is None:
                        break
                    found[plan.name] = finding.measurement(self.storage, record.clip_id)
                else:
                    started = time.perf_counter()
                    try:
                        with _within(self.time_limits.get(plan.name)):
                            clip = files.clip(record, {name: found[name] for name in plan.upstream})
                            found[plan.name], finding = self._measure(plan, clip)
                    except Exception as error:
                        row = {"status": "error", "error": unit_error(error)}
                        made[plan.name] = Made(row, time.perf_counter() - started)
                        break
                    row = {"status": "ok", "error": "", **finding.row()}
                    made[plan.name] = Made(row, time.perf_counter() - started)
                if not _let_through(unit.record, finding, self.policy):
                    break
                if STAGES[plan.name].remakes_clip:
                    record = finding.remake(record)
        return made

    def _measure(self, plan: StagePlan, clip: Clip) -> tuple[Measurement, Finding]:
        stage, clip_id = _stage(plan.name, plan.settings), clip.record.clip_id
        measurement = stage.measure(clip)
        _check(stage, measurement, clip.record)
        arrays = {f"{name}.npy": npy_bytes(array) for name, array in measurement.arrays.items()}
        for name, data in (arrays | dict(measurement.files)).items():
            with store_access(f"write the {name} of {clip_id}"):
                self.storage.write_bytes(file_name(plan.name, plan.fingerprint, clip_id, name), data)
        # as the ledger gives them back, whatever number a stage has put there
        columns = {
            name: None if measurement.columns[name] is None else kind(measurement.columns[name])
            for name, kind in stage.columns.items()
        }
        return Measurement(columns, measurement.arrays, measurement.files), Finding(
            plan.name,
            plan.fingerprint,
            columns,
            tuple(sorted(measurement.arrays)),
            sum(map(len, arrays.values())),
            tuple(sorted(measurement.files)),
            sum(map(len, measurement.files.values())),
        )


class _Files(contextlib.ExitStack):
    """The local copies of a clip's picture and sound, and the decoded frames, until the clip is remade."""

    def __init__(self, storage: Storage, keep_bytes: int) -> None:
        super().__init__()
        self._storage, self._keep_bytes = storage, keep_bytes
        self._paths: dict[str, Any] = {}
        self._decoded: tuple[str, Decoded] | None = None

    def clip(self, record: ClipRecord, found: Mapping[str, Measurement]) -> Clip:
        video = self._path(record.video)
        if self._decoded is None or self._decoded[0] != record.video:
            self._decoded = record.video, Decoded(video, self._keep_bytes)
        audio = self._path(record.audio) if record.audio else None
        return Clip(record, video, audio, found, self._decoded[1])

    def _path(self, name: str) -> Any:
        if name not in self._paths:
            with store_access(f"fetch {name}"):
                self._paths[name] = self.enter_context(self._storage.local(name))
        return self._paths[name]


@contextlib.contextmanager
def _within(seconds: float | None) -> Iterator[None]:
    """End the worker process when the context takes longer: nothing else ends a stage that hangs.

    By the kernel's alarm and not by a thread, which native code that holds the interpreter's lock would keep waiting.
    """
    if seconds is not None:
        signal.setitimer(signal.ITIMER_REAL, min(seconds, _LONGEST_S))
    try:
        yield
    finally:
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _let_through(record: ClipRecord, finding: Finding, policy: Policy) -> bool:
    """Whether the policy lets a clip go on, for all that this stage found."""
    if all(rule.stage != finding.stage for rule in (*policy.rules.values(), *policy.audio.values())):
        return True
    import pandas as pd

    clips = pd.DataFrame({"duration_s": [record.duration_s], "audio": [record.audio]}, index=[record.clip_id])
    row = {"key": record.clip_id, "status": "ok", "error": "", **finding.columns}
    frame = join(clips, {finding.stage: pd.DataFrame([row])})
    return bool(alive(frame, policy, [finding.stage]).iloc[0])


def _check(stage: Stage[Any], measurement: Measurement, record: ClipRecord) -> None:
    """Hold a measurement against what its stage declares. Raises ValueError: the stage is at fault, not the clip."""
    odd = set(measurement.columns) ^ set(stage.columns)
    if odd:
        raise ValueError(f"stage {stage.name}: {', '.join(sorted(odd))} is either not declared or not measured")
    for name, value in measurement.columns.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"stage {stage.name}: {name} is {value}; a value that has no meaning is None")
    for name, array in measurement.arrays.items():
        if name not in stage.unaligned and array.shape[:1] != (record.frames,):
            raise ValueError(f"stage {stage.name}: {name} has shape {array.shape} for {record.frames} frames")


@functools.cache
def _stage(name: str, settings: StageSettings) -> Stage[Any]:
    """A worker's stage, made once: its models stay loaded."""
    return STAGES[name](settings)
