"""What a worker does for one unit of each step: read a source, find its shots, write its clips, write a shard; clips
are measured by tasks.measure.

Jobs are small picklable values; each returns ledger rows by step, and raises when its unit cannot be done.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_manifests.dataset import ShardEntry
from data_manifests.storage import Storage, local_copy
from tasks.clip import ClipRecord
from tasks.clips import ClipSettings, plan
from tasks.cut import write_clips
from tasks.engine import StoreError, store_access, unit_error
from tasks.ingest import SourceInfo, ingest, of_the_file
from tasks.one_pass import find_and_cut
from tasks.scenes import ScenesSettings, Shot, Span, find_shots
from tasks.shards import ShardPlan, write_shard
from tasks.work import Made


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


@contextlib.contextmanager
def _fetched(source: Source) -> Iterator[Path]:
    with _reading(source.info.uri), local_copy(source.info.uri) as path:
        yield path


def ingest_source(uri: str) -> dict[str, Made]:
    """Hash and probe one source."""
    started = time.perf_counter()
    with _reading(uri):
        return {"sources": _made(dataclasses.asdict(ingest(uri)), started)}


@dataclass(frozen=True)
class SourceToCut:
    """A source, and the shots and holes in it where they are known."""

    source: Source
    shots: list[Shot] | None = None
    holes: list[Span] | None = None


@dataclass(frozen=True)
class FindShots:
    settings: ScenesSettings

    def __call__(self, unit: SourceToCut) -> dict[str, Made]:
        started = time.perf_counter()
        with _fetched(unit.source) as path:
            return {"scenes": _made(dataclasses.asdict(find_shots(path, self.settings)), started)}


@dataclass(frozen=True)
class WriteClips:
    settings: ClipSettings
    storage: Storage

    def __call__(self, unit: SourceToCut) -> dict[str, Made]:
        started = time.perf_counter()
        return {"clips": _made(self.columns(unit.source, unit.shots or [], unit.holes or []), started)}

    def columns(self, source: Source, shots: list[Shot], holes: list[Span], path: Path | None = None) -> dict[str, Any]:
        """Write what clips of a source are not there yet. path: the source as a local file, where it is one already."""
        records, skipped = plan(source.info, shots, holes, self.settings)
        if records:
            with contextlib.nullcontext(path) if path is not None else _fetched(source) as local:
                records = write_clips(source.info, local, records, self.settings, self.storage)
        kept = [f.name for f in dataclasses.fields(ClipRecord) if f.name != "metadata"]
        return {
            "clips": [{name: getattr(record, name) for name in kept} for record in records],
            "skipped": [dataclasses.asdict(part) for part in skipped],
        }


@dataclass(frozen=True)
class CutSource:
    """Find a source's shots and write its clips, its file fetched once and decoded once for both.

    keep_bytes: memory for pictures whose clip is not known yet (see tasks.one_pass).
    """

    scenes: ScenesSettings
    clips: WriteClips
    keep_bytes: int

    def __call__(self, unit: SourceToCut) -> dict[str, Made]:
        """The new rows, by step. Raises StoreError when the storage or the machine fails."""
        made: dict[str, Made] = {}
        source, to = unit.source, self.clips
        step, started = "scenes" if unit.shots is None else "clips", time.perf_counter()
        try:
            if unit.shots is not None:
                return to(unit)
            with _fetched(source) as path:
                found, cutting_s = find_and_cut(
                    source.info, path, self.scenes, to.settings, to.storage, self.keep_bytes
                )
                made["scenes"] = _made(dataclasses.asdict(found), started + cutting_s)
                step, started = "clips", time.perf_counter() - cutting_s
                made["clips"] = _made(to.columns(source, found.shots, found.holes, path), started)
        except Exception as error:
            made[step] = Made({"status": "error", "error": unit_error(error)}, time.perf_counter() - started)
        return made


def _made(columns: dict[str, Any], started: float) -> Made:
    return Made({"status": "ok", "error": "", **columns}, time.perf_counter() - started)


@dataclass(frozen=True)
class WriteShard:
    storage: Storage

    def __call__(self, plan: ShardPlan) -> ShardEntry:
        with store_access(f"write {plan.name}"):
            return write_shard(plan, self.storage)
