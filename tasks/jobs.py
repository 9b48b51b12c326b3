"""What a worker does for one unit of each step: read a source, find its shots, write its clips, measure a clip.

Jobs are small picklable values; each returns the columns of a ledger row, and raises when its unit cannot be done.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_manifests.dataset import ShardEntry
from data_manifests.storage import Storage, local_copy
from tasks.clip import Clip, ClipRecord
from tasks.clips import ClipSettings, plan, write_clips
from tasks.engine import StoreError, store_access
from tasks.findings import Finding, file_name, npy_bytes
from tasks.ingest import SourceInfo, ingest, of_the_file
from tasks.scenes import ScenesSettings, Shot, Span, find_shots
from tasks.shards import ShardPlan, write_shard
from tasks.stage import Measurement, Stage, StageSettings
from tasks.stages import STAGES


@dataclass(frozen=True)
class Source:
    """One piece of footage, named by its content, with the manifest's fields for it."""

    info: SourceInfo
    metadata: dict[str, str]


@contextlib.contextmanager
def _reading(uri: str) -> Iterator[None]:
    """Tell a file that is missing or not ours to read from a store that does not answer, which is worth another try."""
    from av import FFmpegError

    try:
        yield
    except FFmpegError:
        raise
    except OSError as error:
        if isinstance(error, StoreError) or of_the_file(error):
            raise
        raise StoreError(error.errno, f"cannot read {uri}: {error}") from error


def ingest_source(uri: str) -> dict[str, Any]:
    """Hash and probe one source."""
    with _reading(uri):
        return dataclasses.asdict(ingest(uri))


@dataclass(frozen=True)
class FindShots:
    settings: ScenesSettings

    def __call__(self, source: Source) -> dict[str, Any]:
        with _reading(source.info.uri), local_copy(source.info.uri) as path:
            return dataclasses.asdict(find_shots(path, self.settings))


@dataclass(frozen=True)
class WriteClips:
    settings: ClipSettings
    storage: Storage

    def __call__(self, unit: tuple[Source, list[Shot], list[Span]]) -> dict[str, Any]:
        source, shots, holes = unit
        records, skipped = plan(source.info, shots, holes, self.settings)
        if records:
            with _reading(source.info.uri), local_copy(source.info.uri) as path:
                records = write_clips(source.info, path, records, self.settings, self.storage)
        kept = [f.name for f in dataclasses.fields(ClipRecord) if f.name != "metadata"]
        return {
            "clips": [{name: getattr(record, name) for name in kept} for record in records],
            "skipped": [dataclasses.asdict(part) for part in skipped],
        }


@dataclass(frozen=True)
class MeasureClip:
    """Measure a clip with one stage and keep what it gives; the ledger row is the caller's to write, after that."""

    stage: str
    settings: StageSettings
    fingerprint: str
    storage: Storage

    def __call__(self, unit: tuple[ClipRecord, list[Finding]]) -> dict[str, Any]:
        record, findings = unit
        stage = _stage(self.stage, self.settings)
        found = {finding.stage: finding.measurement(self.storage, record.clip_id) for finding in findings}
        with contextlib.ExitStack() as files:
            with store_access(f"fetch {record.video}"):
                video = files.enter_context(self.storage.local(record.video))
                audio = files.enter_context(self.storage.local(record.audio)) if record.audio else None
            measurement = stage.measure(Clip(record, video, audio, found))
        _check(stage, measurement, record)
        arrays = {f"{name}.npy": npy_bytes(array) for name, array in measurement.arrays.items()}
        for name, data in (arrays | dict(measurement.files)).items():
            with store_access(f"write the {name} of {record.clip_id}"):
                self.storage.write_bytes(file_name(self.stage, self.fingerprint, record.clip_id, name), data)
        return {
            **measurement.columns,
            "arrays": sorted(measurement.arrays),
            "arrays_bytes": sum(map(len, arrays.values())),
            "files": sorted(measurement.files),
            "files_bytes": sum(map(len, measurement.files.values())),
        }


@dataclass(frozen=True)
class WriteShard:
    storage: Storage

    def __call__(self, plan: ShardPlan) -> ShardEntry:
        with store_access(f"write {plan.name}"):
            return write_shard(plan, self.storage)


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
