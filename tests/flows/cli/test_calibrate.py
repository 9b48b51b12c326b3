"""`understudy calibrate`: clips near a threshold, a person's marks, and the threshold that agrees best with them."""

import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli.calibrate import CalibrationError, Marks, ask, calibrate, default_page, read_marks
from flows.cli.main import app
from flows.report.pages import write_page as write
from tasks.execution.outcome import Outcome
from tasks.media.clip import Clip
from tasks.recipe import load_recipe, parse_curation
from tasks.review.run_folder import RunFolder
from tests.flows.conftest import Browse, Curate

Finished = tuple[str, Outcome]


@pytest.fixture(scope="module")
def page(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("page") / "page.html"
    made = CliRunner().invoke(app, ["calibrate", finished[0], "--rule", "spoken", "--clips", "4", "--page", str(page)])
    assert made.exit_code == 0 and "4 clips to mark" in made.output
    return page


def test_marks_made_by_mouse_and_keyboard_can_be_read_back(
    finished: Finished, page: Path, browse: Browse, tmp_path: Path
) -> None:
    shown = browse(
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
    assert shown["plays"] == [True] * 4
    assert shown["wide"] == 390 and shown["count"] == "3" and len(shown["stored"]) == 1
    lines = shown["csv"].splitlines()
    assert lines[0] == "rule,bound,clip_id,mark"
    assert [line.rpartition(",")[2] for line in lines[1:]] == ["good", "bad", "bad"]
    marks = tmp_path / "marks.csv"
    marks.write_text(shown["csv"])
    printed = CliRunner().invoke(app, ["calibrate", finished[0], "--rule", "spoken", "--marks", str(marks)])
    assert printed.exit_code == 0 and "3 clips marked, 1 of them good" in printed.output and "kappa" in printed.output


def test_writing_a_page_holds_few_clips_in_memory_at_a_time(tmp_path: Path) -> None:
    class Card(dict[str, str]):
        """A dict that can have weak references."""

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


def test_the_page_hides_measured_values_and_needs_no_network(finished: Finished, page: Path) -> None:
    text = page.read_text()
    measured = RunFolder(finished[0]).frame["speech.fraction"].dropna()
    assert not [value for value in measured if str(value) in text or f"{value:.3f}" in text]
    assert "default-src 'none'" in text
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href|poster)="([^"]*)"', text))
    assert "://" not in re.sub(r"data:[^\"]*", "", text)


def test_a_clip_is_shown_as_the_rules_stage_saw_it_and_not_as_cropped_later(
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
    curate([world.path("talk_3s.mp4")], tmp_path / "out", parse_curation(section, "here"))
    shown: list[tuple[int, int]] = []

    def still(clip: Clip, _: int) -> bytes:
        shown.append((clip.record.width, clip.record.height))
        return b""

    monkeypatch.setattr("flows.cli.calibrate.still", still)
    for rule in ("person", "inside", "spoken"):
        assert ask(str(tmp_path / "out"), rule, None, 2, tmp_path / "page.html") == 1
    assert shown[0][0] > shown[0][1] == 256 and shown[1:] == [(128, 128)] * 2


def test_marks_by_a_hidden_threshold_lead_back_to_that_threshold(finished: Finished, tmp_path: Path) -> None:
    run = RunFolder(finished[0])
    values = run.frame["speech.fraction"].dropna().sort_values()
    hidden = sorted({*values})[2]
    marks = Marks("min", {clip_id: bool(value >= hidden) for clip_id, value in values.items()})
    found = calibrate(run, "spoken", marks)
    assert found.best.kappa == 1.0 and found.present.kappa != 1.0
    below = max(value for value in values if value < hidden)
    assert below < found.best.threshold < hidden
    assert [row.threshold for row in found.table] == sorted(row.threshold for row in found.table)
    name, _, number = found.setting.partition("=")
    assert name == "spoken.min" and float(number) == found.best.threshold
    # what-if takes the suggested setting as it is
    assert CliRunner().invoke(app, ["what-if", finished[0], "--set", found.setting]).exit_code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line must be rule,bound,clip_id,mark"),
        ("clip_id,mark\na,good\n", "the first line must be"),
        ("rule,bound,clip_id,mark\n", "there are no marks in this file"),
        ("rule,bound,clip_id,mark\nspoken,min,a,fine\nspoken,b\n", ":2: each line must be rule,bound,clip_id,mark"),
        (
            "rule,bound,clip_id,mark\nperson,min,a,good\n",
            "csv:2: this mark is for the rule 'person' (min), not for 'spoken' (min)",
        ),
        (
            "rule,bound,clip_id,mark\nspoken,min,a,good\n\nspoken,min,a,bad\n",
            "marks.csv:4: a is marked both good and bad",
        ),
        (
            "rule,bound,clip_id,mark\nspoken,max,a,good\nspoken,min,b,good\n",
            "for the rule 'spoken' (min), not for 'spoken' (max)",
        ),
        ("rule,bound,clip_id,mark\n" + "x\n" * 50, "and 40 more"),
        ("rule,bound,clip_id,mark\nspoken,min," + "a" * 200_000 + ",good\n", "cannot be read as CSV"),
    ],
)
def test_invalid_marks_are_refused_with_their_line_number(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "marks.csv"
    path.write_text(text)
    with pytest.raises(CalibrationError) as refusal:
        read_marks(path, "spoken", None)
    assert message in str(refusal.value)


def test_marks_saved_by_a_spreadsheet_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "marks.csv"
    path.write_bytes("\ufeffrule,bound,clip_id,mark\r\nspoken,min, a ,good\r\n,,\r\nspoken,min,b,bad\r\n".encode())
    assert read_marks(path, "spoken", None) == Marks("min", {"a": True, "b": False})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "spokn"], "did you mean 'spoken'?"),
        (["--rule", "spoken", "--bound", "max"], "has no max, only a min"),
        (["--rule", "spoken", "--marks", "{tmp}/nothing.csv"], "cannot be read"),
        (["--rule", "spoken", "--marks", "{tmp}/strange.csv"], "has no clip 'elsewhere'"),
    ],
)
def test_a_calibration_with_wrong_options_is_refused_with_a_hint(
    finished: Finished, tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "strange.csv").write_text("rule,bound,clip_id,mark\nspoken,min,elsewhere,good\n")
    refused = CliRunner().invoke(app, ["calibrate", finished[0], *(o.format(tmp=tmp_path) for o in options)])
    assert refused.exit_code == 2 and message in refused.output


def test_the_default_page_is_a_file_in_the_current_folder_for_any_name_of_a_rule() -> None:
    assert default_page("../../etc/x y") == Path("calibrate-..-..-etc-x-y.html")
