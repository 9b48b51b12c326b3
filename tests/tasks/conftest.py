"""Fixtures of the stages' tests."""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from data_manifests.storage import Storage
from tasks.cutting.clip_plan import ClipSettings, plan_clips
from tasks.cutting.clip_writer import write_clips
from tasks.cutting.ingest import ingest
from tasks.cutting.shots import Shot
from tasks.media.clip import Clip, ClipRecord


@pytest.fixture(scope="session")
def clip_of(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Clip]:
    """Cuts a generated file of one shot into one clip that is as long as the file."""
    storage = Storage(str(tmp_path_factory.mktemp("clips")))

    @cache
    def write(name: str, fps: int, short_side: int) -> ClipRecord:
        path, end_s = world.path(name), world.truth(name).duration_s
        source, settings = ingest(str(path)), ClipSettings(fps=fps, short_side=short_side, min_s=0.2, max_s=600)
        (record,), _ = plan_clips(source, [Shot(0.0, end_s, 0.0, end_s, False, False)], [], settings)
        (record,) = write_clips(source, path, [record], settings, storage)
        return record

    def cut(name: str, fps: int = 25, short_side: int = 480, caption: str = "") -> Clip:
        record = dataclasses.replace(write(name, fps, short_side), metadata={"caption": caption})
        return Clip(
            record, Path(storage.path(record.video)), Path(storage.path(record.audio)) if record.audio else None
        )

    return cut
