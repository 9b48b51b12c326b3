"""The report as a browser shows it: complete, safe, and readable on a phone."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from data_manifests.storage import Storage
from flows.report.charts import categories, histogram
from flows.report.report import build_report
from flows.report.times import add_times, read_times
from tasks.execution.outcome import Outcome
from tasks.execution.work import StepTotals
from tasks.policy.rules import Rule
from tasks.recipe import load_recipe
from tasks.review.run_folder import RunFolder
from tests.flows.conftest import HOSTILE, Browse, Curate

Finished = tuple[str, Outcome]


@pytest.fixture(scope="module")
def page(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_bytes(build_report(RunFolder(finished[0])))
    return path


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_whole_report_on_a_phone_and_on_a_desktop(
    finished: Finished, page: Path, browse: Browse, width: int
) -> None:
    shown: dict[str, Any] = browse(
        page,
        width,
        """
        page.querySelector('details').open = true;
        const images = [...page.querySelectorAll('img')];
        images.forEach(image => { image.loading = 'eager'; });
        await Promise.all(images.map(image => image.decode()));
        const text = selector => [...page.querySelectorAll(selector)].map(e => e.textContent.trim());
        const out = [...page.querySelectorAll('main *')].filter(e => !e.closest('.wide') &&
            e.getBoundingClientRect().right > page.documentElement.clientWidth + 0.5);
        return {wide: page.documentElement.scrollWidth, out: out.map(e => e.outerHTML.slice(0, 200)),
                images: images.map(i => i.naturalWidth > 0 && i.alt !== ''), headings: text('h2'),
                scripts: page.querySelectorAll('script, [onerror]').length, sheets: text('.group h3'),
                times: text('#time ~ * tbody tr th'), costs: text('#time ~ * tbody tr td:last-child'),
                names: text('.sheet .name'), charts: text('article h3'), rows: text('#errors ~ * tbody tr'),
                edges: page.querySelectorAll('svg .edge').length,
                bars: [...page.querySelectorAll('.steps i')].map(i => i.getBoundingClientRect().width)}
        """,
    )
    assert shown["wide"] == width and shown["out"] == []
    parts = ["Funnel", "Scores", "Clips", "Composition", "Errors", "Time"]
    assert [heading.partition(",")[0].split()[0] for heading in shown["headings"]] == parts
    decisions = finished[1].decisions
    assert shown["images"] == [True] * len(decisions)  # there are so few clips that each is in a sheet
    assert shown["sheets"] == ["Kept, tier hq", "Kept, tier main", "Dropped by person", "Dropped by not_chaotic"]
    assert HOSTILE in shown["names"] and shown["scripts"] == 0
    assert {"motion.static_fraction", "speech.fraction", "people.framing", "motion.speed"} <= set(shown["charts"])
    assert shown["edges"] == 4  # one for each rule
    assert len(shown["rows"]) == 2 and any("truncated.mp4" in row for row in shown["rows"])
    assert all(width > 0 for width in shown["bars"])
    costs = dict(zip(shown["times"], shown["costs"], strict=True))
    assert list(costs) == ["sources", "scenes", "clips", "people", "motion", "speech"]
    assert {name for name, cost in costs.items() if cost} == {
        "people",
        "motion",
    }  # those that rejected clips


def test_the_report_loads_nothing_from_outside(page: Path) -> None:
    text = page.read_text()
    assert "default-src 'none'" in text and "<script" not in text
    assert all(link.startswith(("data:image/webp", "#")) for link in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert "@import" not in text and "url(" not in text
    assert len(text) < 5_000_000


def test_the_same_run_gives_a_report_of_the_same_bytes(finished: Finished, page: Path) -> None:
    assert build_report(RunFolder(finished[0])) == page.read_bytes()


def test_a_run_without_a_clip_has_a_report(curate: Curate, world: Any, tmp_path: Path) -> None:
    curate([world.path("truncated.mp4")], tmp_path, load_recipe("tests/three_stages.yaml"))
    text = build_report(RunFolder(str(tmp_path))).decode()
    assert "There is no clip." in text and "No clip has a value." in text and "moov" in text


def test_a_clip_whose_files_are_missing_is_in_the_report_without_an_image(finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("shards", "features"))
    videos = sorted((out / "clips").rglob("*.mp4"))
    videos[0].unlink()
    videos[1].write_bytes(b"no video")
    text = build_report(RunFolder(str(out))).decode()
    assert text.count("no image") == 2 and text.count("<img") == len(videos) - 2


def test_the_time_of_a_step_adds_up_over_runs_with_the_same_fingerprint(finished: Finished, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    add_times(storage, {"motion": "a"}, {"motion": StepTotals(3, 0, 1.5)})
    add_times(storage, {"motion": "a"}, {"motion": StepTotals(1, 1, 0.25)})
    assert read_times(storage) == {"motion": {"fingerprint": "a", "units": 4, "seconds": 1.75}}
    add_times(storage, {"motion": "b"}, {"motion": StepTotals(2, 0, 1.0)})
    assert read_times(storage) == {"motion": {"fingerprint": "b", "units": 2, "seconds": 1.0}}
    (tmp_path / "times.json").write_text('{"motion": 3}')
    assert read_times(storage) == {}


def rule(**demand: Any) -> tuple[str, Rule]:
    return "r", Rule(score="a.b", backend="x", **demand)


def test_a_histogram_counts_every_clip_and_marks_the_threshold_where_it_lies() -> None:
    values = pd.Series(np.r_[np.linspace(0, 1, 500), 1e9, np.nan])
    drawn = histogram(values, [rule(min=0.25), rule(max=2.0)])
    assert drawn is not None
    assert sum(bin.count for bin in drawn.bins) == drawn.count == 501  # values beyond the axis are counted at its edge
    low, high = float(drawn.low), float(drawn.high)
    assert low <= 0.01 and 2.0 <= high < 3
    for mark, bound, to in zip(drawn.marks, (0.25, 2.0), (0.0, 100.0), strict=True):
        assert mark.x == pytest.approx(100 * (bound - low) / (high - low), abs=1) and mark.to == to
    assert min(bin.x for bin in drawn.bins) >= 0 and max(bin.x + bin.width for bin in drawn.bins) <= 100.1


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [0.0, 0.0], [-3.0, 1e300]])
def test_equal_and_extreme_values_have_a_histogram(values: list[float]) -> None:
    drawn = histogram(pd.Series(values), [rule(min=0.5)])
    assert drawn is not None and sum(bin.count for bin in drawn.bins) == len(values)
    assert all(0 <= mark.x <= 100 for mark in drawn.marks)


def test_without_values_there_is_no_histogram() -> None:
    assert histogram(pd.Series([np.nan, np.nan]), [rule(min=0.5)]) is None
    assert histogram(pd.Series([None, None], dtype="Int64"), []) is None


def test_words_are_counted_and_those_that_a_rule_rejects_are_told() -> None:
    found = categories(pd.Series(["medium", "long", "medium", "", None]), [rule(one_of=["medium"])])
    assert [(c.name, c.count, c.rejected) for c in found] == [
        ("medium", 2, False), ("not known", 1, True), ("long", 1, True),
    ]  # fmt: skip
    booleans = categories(pd.Series([True, False, True, None], dtype="boolean"), [rule(one_of=[True])])
    assert [(c.name, c.count, c.rejected) for c in booleans] == [("yes", 2, False), ("no", 1, True)]
