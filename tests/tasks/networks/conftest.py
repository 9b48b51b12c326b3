"""What the tests of the networks share."""

from pathlib import Path

import pytest

from tests import tiny_weights
from tests.one_thread import one_thread  # noqa: F401


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder, where weights are looked for, of the network that a module of tests names as its NETWORK."""
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    folder = tmp_path / request.module.NETWORK
    folder.mkdir()
    return folder


@pytest.fixture
def published(folder: Path) -> Path:
    """That folder, with the small network in it as the published one is laid out."""
    tiny_weights.WRITERS[folder.name](folder)
    return folder
