"""The pages in docs/ and the README name only what exists: files, tests, recipe keys; and the index counts its rows."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np
import pytest
import yaml
from pydantic import BaseModel

from data_manifests.storage import Storage
from tasks.media.clip import Clip
from tasks.stages.registry import STAGES, settings_type
from tests.conftest import MakeClip

ROOT = Path(__file__).parent.parent
INDEX = ROOT / "docs" / "papers.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = ("tasks", "training", "flows", "tests", "data_manifests", "docs", "benchmarks")
EXAMPLES = {"tasks/stages/brightness.py"}  # files that a page tells its reader to write
COLUMNS = ["where", "what the paper says", "recipe key", "file", "test", "state"]
STATES = ("done", "in part", "missing")

_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(rf"(?:{'|'.join(ROOMS)})/[\w./-]*")
_TEST = re.compile(r"(tests/[\w./-]+\.py)::(\w+)")


def quoted(text: str) -> list[str]:
    """What stands in backticks."""
    return _CODE.findall(text)


@cache
def names_of_tests(path: Path) -> frozenset[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return frozenset(n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def rows_of(page: Path) -> list[tuple[str, dict[str, str]]]:
    """The rows of the index, each with the paper that its table belongs to."""
    paper, found, inside = "", [], False
    for line in page.read_text().splitlines():
        if line.startswith("## "):
            paper = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")] if line.startswith("|") else []
        if cells == COLUMNS:
            inside = True
        elif not cells:
            inside = False
        elif inside and not set(line) <= set("|- "):
            assert len(cells) == len(COLUMNS), line
            found.append((paper, dict(zip(COLUMNS, cells, strict=True))))
    return found


ROWS = rows_of(INDEX)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = {text for text in quoted(page.read_text()) if _PATH.fullmatch(text)} - EXAMPLES
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    named = {match.groups() for text in quoted(page.read_text()) if (match := _TEST.fullmatch(text))}
    absent = [f"{file}::{name}" for file, name in sorted(named)
              if not (ROOT / file).is_file() or name not in names_of_tests(ROOT / file)]  # fmt: skip
    assert absent == []


def test_every_row_has_files_tests_and_a_state() -> None:
    for _, row in ROWS:
        assert row["where"] and row["what the paper says"], row
        assert row["state"].startswith(STATES), row
        for column, pattern in (("file", _PATH), ("test", _TEST)):
            cell = row[column]
            assert cell == "-" or all(pattern.fullmatch(text) for text in quoted(cell)), row
            assert cell == "-" or ", ".join(f"`{text}`" for text in quoted(cell)) == cell, row
        if row["state"].startswith("done"):
            assert "-" not in (row["file"], row["test"]), f"done, and nothing proves it: {row}"
        if row["state"].startswith("in part"):
            assert row["state"].startswith("in part: "), f"in part, and what is lacking is not told: {row}"


def test_the_counts_are_those_of_the_rows() -> None:
    counted = Counter((paper, next(s for s in STATES if row["state"].startswith(s))) for paper, row in ROWS)
    papers = dict.fromkeys(paper for paper, _ in ROWS)
    lines = []
    for paper in papers:
        by_state = [counted[paper, state] for state in STATES]
        lines.append(f"| {paper} | {sum(by_state)} | " + " | ".join(map(str, by_state)) + " |")
    assert [line for line in INDEX.read_text().splitlines() if line in lines] == lines, "\n".join(lines)


def walk(content: Any, key: str) -> bool:
    """Whether a dotted key leads anywhere in nested mappings."""
    for part in key.split("."):
        if not isinstance(content, dict) or part not in content:
            return False
        content = content[part]
    return True


def is_stage_setting(key: str) -> bool:
    """Whether a key under curation.measure names a field of the stage's settings, also of settings inside them."""
    match key.split("."):
        case ["curation", "measure", stage, *fields] if stage in STAGES and fields:
            settings: type[BaseModel] | None = settings_type(STAGES[stage])
            for name in fields:
                if settings is None or name not in settings.model_fields:
                    return False
                kind = settings.model_fields[name].annotation
                inner = [k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)]
                settings = inner[0] if inner else None
            return True
    return False


def test_every_recipe_key_is_in_a_bundled_recipe() -> None:
    recipes = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "data_manifests").glob("*.yaml"))]
    keys = {text for _, row in ROWS for text in quoted(row["recipe key"])}
    assert keys and all(row["recipe key"] == "-" or quoted(row["recipe key"]) for _, row in ROWS)
    unknown = [key for key in sorted(keys) if not any(walk(r, key) for r in recipes) and not is_stage_setting(key)]
    assert unknown == []


def test_a_key_that_is_none_is_told() -> None:
    assert is_stage_setting("curation.measure.guidance.endpoint.base_url")
    assert not is_stage_setting("curation.measure.guidance.endpoint.base_uri")
    assert not is_stage_setting("curation.measure.guidanc.backend")
    assert not walk({"training": {"data": {"fps": 24}}}, "training.data.fps.more")


# ---- the README's example, and the page of backends ----


def test_the_readmes_stage_measures_a_clip(make_clip: MakeClip, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text().partition("## Add a stage")[2].partition("2. Name it in")[0]
    code = "\n".join(line[7:] for line in text.splitlines() if line.startswith(" " * 7) or not line)
    names: dict[str, Any] = {"__name__": "example"}
    exec(code, names)
    record = make_clip(Storage(str(tmp_path)))
    with av.open(str(tmp_path / "grey.mp4"), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 120, np.uint8), format="rgb24")
        container.mux([*video.encode(picture), *video.encode()])
    stage = names["Brightness"](names["BrightnessSettings"]())
    stage.check()
    found = stage.measure(Clip(record, tmp_path / "grey.mp4", None))
    assert set(found.columns) == set(stage.columns) and found.columns["mean"] == pytest.approx(120, abs=2)
    with pytest.raises(ValueError, match="unknown backend 'median'"):
        names["BrightnessSettings"](backend="median")


def test_the_page_of_backends_says_what_the_code_says() -> None:
    lines = ["| stage | chosen by | backend | published weights | CPU cores | share of a GPU | GB of memory | batch |"]
    lines.append("| --- | --- | --- | --- | ---: | ---: | ---: | ---: |")
    for stage in STAGES.values():
        for field, backends in stage.backends.items():
            for name, backend in backends.items():
                takes = backend.resources
                weights = ", ".join(f"`{network}`" for network in backend.networks) or "-"
                numbers = f"{takes.cpus:g} | {takes.gpu:g} | {takes.memory_gb:g} | {takes.batch}"
                lines.append(f"| {stage.name} | `{field}` | `{name}` | {weights} | {numbers} |")
    table = "\n".join(lines)
    assert table in (ROOT / "docs" / "backends.md").read_text(), f"docs/backends.md is to hold this table:\n{table}"
