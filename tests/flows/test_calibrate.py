"""From clips near a threshold over a person's marks to the threshold that agrees best."""

import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.calibrate import CalibrationError, Marks, ask, calibrate, default_page, read_marks
from flows.cli import app
from flows.pages import write_page as write
from tasks.clip import Clip
from tasks.outcome import Outcome
from tasks.recipe import load_recipe, recipe_of
from tasks.run_folder import RunFolder
from tests.flows.conftest import Browse, Curate

Finished = tuple[str, Outcome]


@pytest.fixture(scope="module")
def page(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("page") / "page.html"
    made = CliRunner().invoke(app, ["calibrate", finished[0], "--rule", "spoken", "--clips", "4", "--page", str(page)])
    assert made.exit_code == 0 and "4 clips to mark" in made.output
    return page


def test_a_person_marks_by_mouse_and_by_keys_and_the_marks_come_back(
    finished: Finished, page: Path, browse: Browse, tmp_path: Path
) -> None:
    told = browse(
        page,
        390,
        """
        const press = key => page.dispatchEvent(new view.KeyboardEvent('keydown', {key}));
        view.localStorage.clear();
        page.querySelectorAll('fieldset')[2].querySelector('[value=bad]').click();
        press('j'); press('g'); press('b'); press('k'); press('k'); press('g');
        const videos = [...page.querySelectorAll('video')];
        videos.forEach(video => { video.preload = 'auto'; video.load(); });
        // the browser's clock runs ahead of its decoders
        for (let i = 0; i < 50000 && videos.some(v => v.readyState < 2 && !v.error); i++)
            await new Promise(done => setTimeout(done, 1));
        const plays = videos.map(video => video.videoWidth > 0 && video.duration > 1);
        return {csv: page.getElementById('csv').value, count: page.getElementById('count').textContent, plays,
                stored: Object.values(view.localStorage), wide: page.documentElement.scrollWidth}
        """,
    )
    assert told["plays"] == [True] * 4
    assert told["wide"] == 390 and told["count"] == "3" and len(told["stored"]) == 1
    lines = told["csv"].splitlines()
    assert lines[0] == "rule,bound,clip_id,mark"
    assert [line.rpartition(",")[2] for line in lines[1:]] == ["good", "bad", "bad"]
    marks = tmp_path / "marks.csv"
    marks.write_text(told["csv"])
    shown = CliRunner().invoke(app, ["calibrate", finished[0], "--rule", "spoken", "--marks", str(marks)])
    assert shown.exit_code == 0 and "3 clips marked, 1 of them good" in shown.output and "kappa" in shown.output


def test_a_page_holds_one_clip_at_a_time(tmp_path: Path) -> None:
    class Card(dict[str, str]):
        """One that a weak reference can be had to."""

    made: list[weakref.ref[Card]] = []
    held: list[int] = []

    def cards() -> Iterator[Card]:
        for number in range(20):
            card = Card(id=f"clip-{number}", poster="data:,", video="data:,")
            made.append(weakref.ref(card))
            held.append(sum(ref() is not None for ref in made))
            yield card

    about = {"rule": "r", "bound": "min", "score": "a.b", "storage_key": "k", "count": 20}
    write(tmp_path / "page.html", "calibrate.html", clips=cards(), **about)
    assert (tmp_path / "page.html").read_text().count("<fieldset") == len(held) == 20
    assert max(held) <= 3


def test_the_page_tells_nobody_what_was_measured_and_needs_no_network(finished: Finished, page: Path) -> None:
    text = page.read_text()
    measured = RunFolder(finished[0]).frame["speech.fraction"].dropna()
    assert not [value for value in measured if str(value) in text or f"{value:.3f}" in text]
    assert "default-src 'none'" in text
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href|poster)="([^"]*)"', text))
    assert "://" not in re.sub(r"data:[^\"]*", "", text)


def test_a_clip_is_shown_as_the_stage_saw_it_not_as_it_was_cropped_later(
    curate: Curate, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = load_recipe("tests/three_stages.yaml").model_dump(mode="json", exclude={"measure", "policy"})
    section["measure"] = {"people": {}, "identity": {}, "crop": {"size": 128}, "speech": {}}
    section["policy"] = {
        "rules": {
            "person": {"score": "people.person_share", "backend": "mediapipe", "min": 0.5},
            "inside": {"score": "crop.face_inside", "backend": "upper_body", "min": 0.5},
            "spoken": {"score": "speech.fraction", "backend": "log_mel", "min": 0.1},
        }
    }
    curate([world.path("talk_3s.mp4")], tmp_path / "out", recipe_of(section, "here"))
    shown: list[tuple[int, int]] = []

    def still(clip: Clip, _: int) -> bytes:
        shown.append((clip.record.width, clip.record.height))
        return b""

    monkeypatch.setattr("flows.calibrate.still", still)
    for rule in ("person", "inside", "spoken"):
        assert ask(str(tmp_path / "out"), rule, None, 2, tmp_path / "page.html") == 1
    assert shown[0][0] > shown[0][1] == 256 and shown[1:] == [(128, 128)] * 2


def test_the_best_threshold_is_the_one_that_a_person_meant(finished: Finished, tmp_path: Path) -> None:
    run = RunFolder(finished[0])
    values = run.frame["speech.fraction"].dropna().sort_values()
    meant = sorted({*values})[2]
    found = calibrate(run, "spoken", Marks("min", {clip_id: bool(value >= meant) for clip_id, value in values.items()}))
    assert found.best.kappa == 1.0 and found.present.kappa != 1.0
    below = max(value for value in values if value < meant)
    assert below < found.best.threshold < meant
    assert [row.threshold for row in found.table] == sorted(row.threshold for row in found.table)
    name, _, number = found.setting.partition("=")
    assert name == "spoken.min" and float(number) == found.best.threshold
    # what is suggested can be given on as it is
    assert CliRunner().invoke(app, ["what-if", finished[0], "--set", found.setting]).exit_code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its first line is to be rule,bound,clip_id,mark"),
        ("clip_id,mark\na,good\n", "its first line is to be"),
        ("rule,bound,clip_id,mark\n", "there is no mark in it"),
        ("rule,bound,clip_id,mark\nspoken,min,a,fine\nspoken,b\n", ":2: a line is rule,bound,clip_id,mark"),
        (
            "rule,bound,clip_id,mark\nperson,min,a,good\n",
            "csv:2: this is a mark for 'person' (min), not for 'spoken' (min)",
        ),
        ("rule,bound,clip_id,mark\nspoken,min,a,good\n\nspoken,min,a,bad\n", "marks.csv:4: a is marked good and bad"),
        (
            "rule,bound,clip_id,mark\nspoken,max,a,good\nspoken,min,b,good\n",
            "for 'spoken' (min), not for 'spoken' (max)",
        ),
        ("rule,bound,clip_id,mark\n" + "x\n" * 50, "and 40 more"),
        ("rule,bound,clip_id,mark\nspoken,min," + "a" * 200_000 + ",good\n", "cannot be read as CSV"),
    ],
)
def test_marks_that_cannot_be_meant_are_refused_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "marks.csv"
    path.write_text(text)
    with pytest.raises(CalibrationError) as refusal:
        read_marks(path, "spoken", None)
    assert message in str(refusal.value)


def test_marks_survive_a_spreadsheet(tmp_path: Path) -> None:
    path = tmp_path / "marks.csv"
    path.write_bytes("\ufeffrule,bound,clip_id,mark\r\nspoken,min, a ,good\r\n,,\r\nspoken,min,b,bad\r\n".encode())
    assert read_marks(path, "spoken", None) == Marks("min", {"a": True, "b": False})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "spokn"], "did you mean 'spoken'?"),
        (["--rule", "spoken", "--bound", "max"], "has no max, only min"),
        (["--rule", "spoken", "--marks", "{tmp}/nothing.csv"], "cannot be read"),
        (["--rule", "spoken", "--marks", "{tmp}/strange.csv"], "has no clip 'elsewhere'"),
    ],
)
def test_a_calibration_that_cannot_be_had_is_refused(
    finished: Finished, tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "strange.csv").write_text("rule,bound,clip_id,mark\nspoken,min,elsewhere,good\n")
    refused = CliRunner().invoke(app, ["calibrate", finished[0], *(o.format(tmp=tmp_path) for o in options)])
    assert refused.exit_code == 2 and message in refused.output


def test_a_page_is_a_file_in_this_folder_whatever_the_rule_is_called() -> None:
    assert default_page("../../etc/x y") == Path("calibrate-..-..-etc-x-y.html")
