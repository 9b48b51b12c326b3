"""Taking a clip through the measuring stages. Its files are fetched once, and its frames are decoded once for all."""

import contextlib
import functools
import math
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_manifests.storage import Storage, store_access
from tasks.execution.stage_results import StageResult, file_name, npy_bytes
from tasks.execution.work import RowResult
from tasks.execution.worker_pool import unit_error
from tasks.media.clip import Clip, ClipRecord, Measurement
from tasks.media.frames import FrameCache
from tasks.policy.decide import alive, join
from tasks.policy.rules import Policy
from tasks.stages.base import Stage, StageSettings
from tasks.stages.registry import STAGES

_MAX_TIMER_S = 1e8  # the longest alarm that is set, some three years: a timer does not take any number


@dataclass(frozen=True)
class StagePlan:
    """One stage of a recipe."""

    name: str
    settings: StageSettings
    fingerprint: str
    """The fingerprint of the rows that it makes."""
    upstream: tuple[str, ...]
    """The stages whose results it starts from."""


@dataclass(frozen=True)
class ClipToMeasure:
    """A clip that lacks the row of some stage."""

    record: ClipRecord
    """The clip as it was cut."""
    known: Mapping[str, StageResult | None]
    """The results that it has already, by stage. None for a stage that could not measure it."""


@dataclass(frozen=True)
class MeasureClip:
    """Measures a clip with one stage after the other.

    A stage whose result is known is not run again. The clip goes no further when a stage cannot measure it or the
    policy drops it. Arrays and files are written to the storage here; the caller writes the ledger rows.
    """

    stages: tuple[StagePlan, ...]
    """In the recipe's order."""
    policy: Policy
    storage: Storage
    time_limits: Mapping[str, float] = field(default_factory=dict)
    """Seconds, by stage. A stage that takes longer ends the worker, by SIGALRM."""
    keep_bytes: int = 0
    """Memory for a clip's decoded frames. A clip that takes more is decoded by each stage anew."""

    def __call__(self, unit: ClipToMeasure) -> dict[str, RowResult]:
        """The new rows, by stage. Raises StoreError when the storage or the machine fails."""
        record = unit.record
        rows: dict[str, RowResult] = {}
        found: dict[str, Measurement] = {}
        with _ClipFiles(self.storage, self.keep_bytes) as files:
            for plan in self.stages:
                if plan.name in unit.known:
                    known = unit.known[plan.name]
                    if known is None:
                        break
                    result = known
                    found[plan.name] = result.measurement(self.storage, record.clip_id)
                else:
                    started = time.perf_counter()
                    try:
                        with _within(self.time_limits.get(plan.name)):
                            clip = files.clip(record, {name: found[name] for name in plan.upstream})
                            found[plan.name], result = self._measure(plan, clip)
                    except Exception as error:
                        row = {"status": "error", "error": unit_error(error)}
                        rows[plan.name] = RowResult(row, time.perf_counter() - started)
                        break
                    row = {"status": "ok", "error": "", **result.row()}
                    rows[plan.name] = RowResult(row, time.perf_counter() - started)
                if not _passes(unit.record, result, self.policy):
                    break
                if STAGES[plan.name].remakes_clip:
                    record = result.remake(record)
        return rows

    def _measure(self, plan: StagePlan, clip: Clip) -> tuple[Measurement, StageResult]:
        stage, clip_id = _stage(plan.name, plan.settings), clip.record.clip_id
        measurement = stage.measure(clip)
        _check(stage, measurement, clip.record)
        arrays = {f"{name}.npy": npy_bytes(array) for name, array in measurement.arrays.items()}
        for name, data in (arrays | dict(measurement.files)).items():
            with store_access(f"write the {name} of {clip_id}"):
                self.storage.write_bytes(file_name(plan.name, plan.fingerprint, clip_id, name), data)
        # later stages get the values as the ledger gives them back: a stage may have put a NumPy number there
        columns = {
            name: None if measurement.columns[name] is None else kind(measurement.columns[name])
            for name, kind in stage.columns.items()
        }
        return Measurement(columns, measurement.arrays, measurement.files), StageResult(
            plan.name,
            plan.fingerprint,
            columns,
            tuple(sorted(measurement.arrays)),
            sum(map(len, arrays.values())),
            tuple(sorted(measurement.files)),
            sum(map(len, measurement.files.values())),
        )


class _ClipFiles(contextlib.ExitStack):
    """The local copies of a clip's video and audio, and its decoded frames.

    When a stage remakes the clip, the new video is decoded in place of the old one.
    """

    def __init__(self, storage: Storage, keep_bytes: int) -> None:
        super().__init__()
        self._storage, self._keep_bytes = storage, keep_bytes
        self._paths: dict[str, Any] = {}
        self._decoded: tuple[str, FrameCache] | None = None

    def clip(self, record: ClipRecord, found: Mapping[str, Measurement]) -> Clip:
        video = self._path(record.video)
        if self._decoded is None or self._decoded[0] != record.video:
            self._decoded = record.video, FrameCache(video, self._keep_bytes)
        audio = self._path(record.audio) if record.audio else None
        return Clip(record, video, audio, found, self._decoded[1])

    def _path(self, name: str) -> Any:
        if name not in self._paths:
            with store_access(f"fetch {name}"):
                self._paths[name] = self.enter_context(self._storage.local(name))
        return self._paths[name]


@contextlib.contextmanager
def _within(seconds: float | None) -> Iterator[None]:
    """End the worker process when the context takes longer than `seconds`, since nothing else ends a stage that hangs.

    The kernel's alarm does it. A thread could not: native code that holds the interpreter's lock would keep it waiting.
    """
    if seconds is not None:
        signal.setitimer(signal.ITIMER_REAL, min(seconds, _MAX_TIMER_S))
    try:
        yield
    finally:
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _passes(record: ClipRecord, result: StageResult, policy: Policy) -> bool:
    """Whether the policy lets a clip go on after a stage. Rules on other stages are not applied here."""
    if all(rule.stage != result.stage for rule in (*policy.rules.values(), *policy.audio.values())):
        return True
    import pandas as pd

    clips = pd.DataFrame({"duration_s": [record.duration_s], "audio": [record.audio]}, index=[record.clip_id])
    row = {"key": record.clip_id, "status": "ok", "error": "", **result.columns}
    frame = join(clips, {result.stage: pd.DataFrame([row])})
    return bool(alive(frame, policy, [result.stage]).iloc[0])


def _check(stage: Stage[Any], measurement: Measurement, record: ClipRecord) -> None:
    """Compare a measurement with what its stage declares. Raises ValueError: the stage is at fault, not the clip."""
    differing = set(measurement.columns) ^ set(stage.columns)
    if differing:
        raise ValueError(f"stage {stage.name}: {', '.join(sorted(differing))} is either not declared or not measured")
    for name, value in measurement.columns.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"stage {stage.name}: {name} is {value}; a value that has no meaning is None")
    for name, array in measurement.arrays.items():
        if name not in stage.unaligned and array.shape[:1] != (record.frames,):
            raise ValueError(f"stage {stage.name}: {name} has shape {array.shape} for {record.frames} frames")


@functools.cache
def _stage(name: str, settings: StageSettings) -> Stage[Any]:
    """A stage of this worker. It is made once, so that its networks stay loaded from clip to clip."""
    return STAGES[name](settings)
