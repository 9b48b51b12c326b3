"""What a worker does for one unit of each step: read a source, find its shots, write its clips, write a shard; clips
are measured by tasks.measure.

Jobs are small picklable values; each returns the columns of a ledger row, and raises when its unit cannot be done.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_manifests.dataset import ShardEntry
from data_manifests.storage import Storage, local_copy
from tasks.clip import ClipRecord
from tasks.clips import ClipSettings, plan, write_clips
from tasks.engine import StoreError, store_access
from tasks.ingest import SourceInfo, ingest, of_the_file
from tasks.scenes import ScenesSettings, Shot, Span, find_shots
from tasks.shards import ShardPlan, write_shard


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
class WriteShard:
    storage: Storage

    def __call__(self, plan: ShardPlan) -> ShardEntry:
        with store_access(f"write {plan.name}"):
            return write_shard(plan, self.storage)
