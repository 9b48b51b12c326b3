"""What a worker does with one unit: read a source, find its shots, write its clips, write a shard.

Clips are measured by tasks.execution.measure.

A job is a small value that pickles. Given a unit, it returns ledger rows by step (WriteShard returns a shard's entry).
It raises when the unit cannot be done.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_manifests.dataset import ShardEntry
from data_manifests.storage import Storage, StoreError, local_copy, store_access
from tasks.cutting.clip_plan import ClipSettings, plan_clips
from tasks.cutting.clip_writer import write_clips
from tasks.cutting.ingest import SourceInfo, concerns_one_file, ingest
from tasks.cutting.shots import Interval, ScenesSettings, Shot, find_shots
from tasks.cutting.single_pass import find_and_cut
from tasks.execution.work import RowResult
from tasks.execution.worker_pool import unit_error
from tasks.media.clip import ClipRecord
from tasks.shards import ShardPlan, write_shard


@dataclass(frozen=True)
class Source:
    """One file of footage."""

    info: SourceInfo
    """What ingest found in the file. It holds the source_id, which names the file by its content."""
    metadata: dict[str, str]
    """The source manifest's fields for it."""


@contextlib.contextmanager
def _reading(uri: str) -> Iterator[None]:
    """Raise StoreError when the store does not answer, since another try may succeed.

    An error of this one file, such as a file that is missing or may not be read, passes through unchanged.
    """
    from av import FFmpegError

    try:
        yield
    except FFmpegError:
        raise
    except OSError as error:
        if isinstance(error, StoreError) or concerns_one_file(error):
            raise
        raise StoreError(error.errno, f"cannot read {uri}: {error}") from error


@contextlib.contextmanager
def _fetched(source: Source) -> Iterator[Path]:
    with _reading(source.info.uri), local_copy(source.info.uri) as path:
        yield path


def ingest_source(uri: str) -> dict[str, RowResult]:
    """Hash and probe one source. Raises StoreError when its store does not answer."""
    started = time.perf_counter()
    with _reading(uri):
        return {"sources": _row_result(dataclasses.asdict(ingest(uri)), started)}


@dataclass(frozen=True)
class SourceToCut:
    """A source whose shots or clips are missing."""

    source: Source
    shots: list[Shot] | None = None
    """None when they are not known yet."""
    holes: list[Interval] | None = None
    """The spans that cannot be decoded. None when they are not known yet."""


@dataclass(frozen=True)
class FindShots:
    """Finds the shots of a source."""

    settings: ScenesSettings

    def __call__(self, unit: SourceToCut) -> dict[str, RowResult]:
        started = time.perf_counter()
        with _fetched(unit.source) as path:
            return {"scenes": _row_result(dataclasses.asdict(find_shots(path, self.settings)), started)}


@dataclass(frozen=True)
class WriteClips:
    """Writes the clips of a source whose shots are known."""

    settings: ClipSettings
    storage: Storage
    """Where the clips go: the run's storage."""

    def __call__(self, unit: SourceToCut) -> dict[str, RowResult]:
        started = time.perf_counter()
        return {"clips": _row_result(self.columns(unit.source, unit.shots or [], unit.holes or []), started)}

    def columns(
        self, source: Source, shots: list[Shot], holes: list[Interval], path: Path | None = None
    ) -> dict[str, Any]:
        """Write the clips of a source that are not in the storage yet. Returns the columns of the source's `clips` row.

        path: the source as a local file. When None, the source is fetched.
        """
        records, skipped = plan_clips(source.info, shots, holes, self.settings)
        if records:
            with contextlib.nullcontext(path) if path is not None else _fetched(source) as local_path:
                records = write_clips(source.info, local_path, records, self.settings, self.storage)
        columns = [f.name for f in dataclasses.fields(ClipRecord) if f.name != "metadata"]
        return {
            "clips": [{name: getattr(record, name) for name in columns} for record in records],
            "skipped": [dataclasses.asdict(part) for part in skipped],
        }


@dataclass(frozen=True)
class CutSource:
    """Finds a source's shots and writes its clips. The source is fetched once and decoded once for both.

    Where the shots are known already, only the clips are written.
    """

    scenes: ScenesSettings
    clips: WriteClips
    keep_bytes: int
    """Memory for frames whose clip is not known yet (see tasks.cutting.single_pass)."""

    def __call__(self, unit: SourceToCut) -> dict[str, RowResult]:
        """The new rows, by step. Raises StoreError when the storage or the machine fails."""
        results: dict[str, RowResult] = {}
        source, writer = unit.source, self.clips
        step, started = "scenes" if unit.shots is None else "clips", time.perf_counter()
        try:
            if unit.shots is not None:
                return writer(unit)
            with _fetched(source) as path:
                found, clips_s = find_and_cut(
                    source.info, path, self.scenes, writer.settings, writer.storage, self.keep_bytes
                )
                # the time of the single pass is shared out: clips_s of it went into writing clips
                results["scenes"] = _row_result(dataclasses.asdict(found), started + clips_s)
                step, started = "clips", time.perf_counter() - clips_s
                results["clips"] = _row_result(writer.columns(source, found.shots, found.holes, path), started)
        except Exception as error:
            results[step] = RowResult({"status": "error", "error": unit_error(error)}, time.perf_counter() - started)
        return results


def _row_result(columns: dict[str, Any], started: float) -> RowResult:
    return RowResult({"status": "ok", "error": "", **columns}, time.perf_counter() - started)


@dataclass(frozen=True)
class WriteShard:
    """Writes a shard. Raises StoreError when the storage fails."""

    storage: Storage

    def __call__(self, plan: ShardPlan) -> ShardEntry:
        with store_access(f"write {plan.name}"):
            return write_shard(plan, self.storage)
