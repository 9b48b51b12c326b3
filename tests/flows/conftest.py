"""What the tests that look at a finished run share."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from data_manifests.dataset import DatasetManifest
from data_manifests.sources import BadRow, SourceRow
from data_manifests.storage import Storage
from flows.report import add_times
from tasks.curation import Curation, StepResult
from tasks.engine import Engine
from tasks.outcome import Outcome
from tasks.recipe import Recipe, load_recipe

FILES = ["talk_3s.mp4", "cuts_plain.mp4", "frozen.mp4", "shake.mp4", "nobody.mp4", "truncated.mp4"]
HOSTILE = "<img src=x onerror=alert(1)>\"'&{{7*7}}.mp4"

Curate = Callable[..., Outcome]


@pytest.fixture(scope="session")
def curate() -> Iterator[Curate]:
    """Curates files into a folder as the flow does, but for Prefect; gives the outcome."""
    with Engine(workers=2) as engine:

        def curate(files: list[Path], out: Path, recipe: Recipe, bad_rows: tuple[BadRow, ...] = ()) -> Outcome:
            storage = Storage(str(out))
            rows = [SourceRow(str(file), {}, f"footage.csv:{at}") for at, file in enumerate(files, 2)]
            curation = Curation(recipe, storage, rows, engine)
            results: dict[str, StepResult] = {}
            for step, group in curation.walk():
                units = step.units(group)
                if units:
                    result = curation.run(step, units)
                    results[step.name] = results[step.name] + result if step.name in results else result
            outcome = Outcome(curation, bad_rows)
            plans = [plan for p in range(curation.partitions) for plan in outcome.plan_shards(p)]
            outcome.record(DatasetManifest.of(outcome.recipe_name, "footage.csv", outcome.write_shards(plans)))
            add_times(storage, curation, results)
            return outcome

        yield curate


@pytest.fixture(scope="session")
def footage(world: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Some talk, some faults, a broken file, and a name that means harm."""
    folder = tmp_path_factory.mktemp("footage")
    shutil.copy(world.path("talk_medium.mp4"), folder / HOSTILE)
    return [folder / HOSTILE, *(world.path(name) for name in FILES)]


@pytest.fixture(scope="session")
def finished(curate: Curate, footage: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Outcome]:
    """A finished run of the demo's recipe, to be looked at only; and the outcome that it told."""
    out = tmp_path_factory.mktemp("finished")
    bad = BadRow("footage.csv:9", "no uri", False)
    return str(out), curate(footage, out, load_recipe("tests/three_stages.yaml"), (bad,))


FRAME = """<meta charset=utf-8>
<iframe id=f style="border:0;width:{width}px;height:900px" src="{page}"></iframe><pre></pre>
<script>
f.onload = async () => {{
  const page = f.contentDocument, view = f.contentWindow;
  let said;
  try {{ said = await (async () => {{ {script} }})(); }} catch (error) {{ said = `failed: ${{error}}`; }}
  document.querySelector("pre").textContent = encodeURIComponent(JSON.stringify(said));
}};
</script>"""
Browse = Callable[[Path, int, str], Any]


@pytest.fixture(scope="session")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Browse:
    """Opens a page in a real browser, this wide, and gives what a script with `page`, its document, and `view` says."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium here")
    folder = tmp_path_factory.mktemp("browser")

    def browse(page: Path, width: int, script: str) -> Any:
        frame = folder / "frame.html"
        frame.write_text(FRAME.format(width=width, page=page.as_uri(), script=script))
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
        options += [
            "--virtual-time-budget=600000",
            "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1400,1000",
        ]
        command = [browser, *options, "--dump-dom", frame.as_uri()]
        for _ in range(5):  # on a busy machine it may print the page before the script has come to its end
            shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            said = re.search("<pre>(.+?)</pre>", shown.stdout)
            if said:
                return json.loads(unquote(said[1]))
        raise AssertionError(shown.stdout[-2000:] + shown.stderr[-2000:])

    return browse
