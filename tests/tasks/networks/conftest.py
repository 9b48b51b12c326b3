"""Fixtures of the networks' tests."""

from pathlib import Path

import pytest

from tests import tiny_weights


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty weights folder of the network that the test module names as NETWORK."""
    monkeypatch.setenv("UNDERSTUDY_WEIGHTS", str(tmp_path))
    folder = tmp_path / request.module.NETWORK
    folder.mkdir()
    return folder


@pytest.fixture
def published(folder: Path) -> Path:
    """The same folder with a small network in the published layout."""
    tiny_weights.WRITERS[folder.name](folder)
    return folder
