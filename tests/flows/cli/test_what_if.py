"""`understudy what-if` predicts what curating with another policy decides, and changes nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from data_manifests.strict import RecipeError
from flows.cli.main import app
from tasks.execution.outcome import Outcome
from tasks.recipe import Recipe, load_recipe
from tasks.review.run_folder import RunFolder
from tasks.review.what_if import WhatIf, WhatIfError, compare, with_changes
from tests.flows.conftest import Curate
from tests.flows.test_run_folder import files

RECIPE = "tests/three_stages.yaml"

Finished = tuple[str, Outcome]


@pytest.fixture(scope="module")
def run(finished: Finished) -> RunFolder:
    return RunFolder(finished[0])


def what_if(run: RunFolder, *changes: str) -> WhatIf:
    return compare(run, with_changes(run.recipe, changes))


def flips(found: WhatIf) -> dict[str, tuple[str, str]]:
    """The outcomes (before, after) of the clips that flip, by the name of the source file."""
    names = found.flips["uri"].map(lambda uri: Path(uri).name)
    return dict(zip(names, zip(found.flips["before"], found.flips["after"], strict=True), strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        ["not_static.max=0.2"],
        ["not_chaotic=off"],
        ["person.min=0", "not_chaotic.max=0.9"],
        ["spoken.min=0.85", "on_unusable=drop"],
        ["tiers.hq.hours=0.01", "tiers.hq.rank.motion.speed=-3"],
        ["people.framing.one_of=[upper body]"],
    ],
)
def test_what_if_predicts_what_curating_with_the_policy_decides(
    finished: Finished, footage: list[Path], curate: Curate, tmp_path: Path, changes: list[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    recipe = with_changes(load_recipe(RECIPE), changes)
    before = RunFolder(str(out))
    predicted = compare(before, recipe)
    curate(footage, out, recipe)
    after = RunFolder(str(out))
    flipped = predicted.flips.set_index("clip_id")
    waiting = flipped["after"].str.startswith("would be measured")
    assert len(flipped)
    # clips that are not measured yet may push others out of a tier, so tiers are not compared then
    columns = ["verdict", "audio"] if waiting.any() else ["verdict", "audio", "tier"]
    was, came = (run.decisions[columns].astype(str) for run in (before, after))
    differs = (was != came).any(axis=1) & ((came["verdict"] == "keep") | (was["verdict"] != came["verdict"]))
    assert set(differs.index[differs]) - set(flipped.index[waiting]) == set(flipped.index[~waiting])
    for clip_id, row in flipped[~waiting].iterrows():
        decision = after.decisions.loc[clip_id]
        assert row["after"].startswith(str(decision["verdict"]))
        assert waiting.any() or not decision["tier"] or f"tier {decision['tier']}" in row["after"]
    for clip_id, row in flipped[waiting].iterrows():
        stage = row["after"].removeprefix("would be measured by ")
        assert pd.isna(before.frame.at[clip_id, f"{stage}.status"])
        assert after.frame.at[clip_id, f"{stage}.status"] == "ok"
    if not waiting.any():
        kept = next(line for line in predicted.funnel if line.label == "kept")
        assert kept.clips[1] == (after.decisions["verdict"] == "keep").sum()


def test_a_clip_that_a_removed_rule_had_dropped_would_be_measured_first(run: RunFolder) -> None:
    found = what_if(run, "person=off")
    assert flips(found) == {"nobody.mp4": ("drop", "would be measured by motion")}
    row = found.flips.iloc[0]
    assert (row["stage"], row["rule"], row["value"], row["threshold"]) == ("people", "person", "0", ">= 0.5")
    lines = {line.label.strip(): line.clips for line in found.funnel}
    assert lines["dropped: fails person >= 0.5 (gone)"] == (1, 0)
    assert lines["motion: not measured yet"] == (0, 1)


def test_a_flip_names_the_rule_the_value_and_the_new_threshold(run: RunFolder) -> None:
    found = what_if(run, "not_static.max=0.2")
    assert flips(found) == {"frozen.mp4": ("keep, tier main", "drop")}
    row = found.flips.iloc[0]
    assert (row["stage"], row["rule"], row["threshold"]) == ("motion", "not_static", "<= 0.2")
    assert float(row["value"]) == run.frame.at[row["clip_id"], "motion.static_fraction"]
    assert "  dropped: fails not_static <= 0.5 -> <= 0.2" in [line.label for line in found.funnel]


def test_the_same_policy_flips_no_clip(run: RunFolder) -> None:
    found = compare(run, load_recipe(RECIPE))
    assert not len(found.flips)
    assert all(line.clips[0] == line.clips[1] and line.hours[0] == line.hours[1] for line in found.funnel)


def test_clips_that_come_to_the_same_for_another_reason_are_counted(run: RunFolder) -> None:
    found = what_if(run, "people.face_height.min=10")  # which no clip has, and people comes before motion
    moved = run.decisions[(run.decisions["verdict"] == "drop") & (run.decisions["stage"] == "motion")]
    assert found.other_reasons == len(moved) > 0
    assert not set(moved.index) & set(found.flips["clip_id"])


def policy(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")["policy"]


@pytest.mark.parametrize(
    ("change", "place", "value"),
    [
        ("not_static.max=0.4", "rules.not_static.max", 0.4),
        ("rules.not_static.max=4e-1", "rules.not_static.max", 0.4),
        ("audio.spoken.missing=reject", "audio.spoken.missing", "reject"),
        ("motion.static_fraction.max=0.4", "rules.not_static.max", 0.4),
        ("speech.min=0.5", "audio.spoken.min", 0.5),
        ("speech.max = 0.9", "audio.spoken.max", 0.9),
        ("tiers.hq.hours=1", "tiers.hq.hours", 1.0),
        ("tiers.hq.rank.speech.fraction=2", "tiers.hq.rank.speech.fraction", 2.0),
        ("on_unusable=drop", "on_unusable", "drop"),
    ],
)
def test_a_change_sets_the_named_field_and_nothing_else(change: str, place: str, value: object) -> None:
    def at(policy: Any, path: str) -> Any:
        for key in policy if isinstance(policy, dict) else ():
            if path == key or path.startswith(f"{key}."):
                return at(policy[key], path[len(key) + 1 :])
        assert not path, f"there is no {path}"
        return policy

    before, after = policy(load_recipe(RECIPE)), policy(with_changes(load_recipe(RECIPE), [change]))
    assert at(after, place) == value
    assert before != after
    text = json.dumps(after).replace(json.dumps(at(after, place)), "")
    assert len(text) <= len(json.dumps(before))  # nothing else was added


def test_a_score_without_a_rule_gets_one() -> None:
    recipe = with_changes(load_recipe(RECIPE), ["motion.speed.max=0.1", "motion.speed.min=0.01"])
    rule = recipe.policy.rules["motion.speed"]
    assert (rule.score, rule.backend, rule.min, rule.max) == ("motion.speed", "dis", 0.01, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("motion.max=8", "motion has 2 rules; name one: not_static, not_chaotic"),
        ("nobstatic.max=0.2", "did you mean 'not_static.max'?"),
        ("nope.max=0.2", "its rules are person, not_static, not_chaotic, spoken"),
        ("motion.sped.max=1", "did you mean 'motion.speed.max'?"),
        ("wholly.other=1", "its rules are person, not_static, not_chaotic, spoken"),
        ("not_static.max=high", "not_static.max: Input should be a valid number"),
        ("not_static.max=null", "demands nothing"),
        ("not_static.min=0.9", "no clip can pass"),
        ("not_static.maximum=1", "unknown key 'maximum'"),
        ("not_static.max=[", "is no value"),
        ("not_static.max=" + "[" * 3000, "is no value"),
        ("not_static.max=off", "only a whole rule can be off"),
        ("on_unusable=sell", "on_unusable"),
        ("tiers.top.hours=1", "no tier 'top'; known here: hq, main"),
        ("tiers.hq.hour=1", "did you mean 'hours'?"),
        ("near_duplicates.picture_bits=3", "the recipe's policy has no near_duplicates"),
        ("not_static", "give WHERE=VALUE, such as person.min=0.5"),
        ("=3", "give WHERE=VALUE"),
        ("not_static.max=", "give WHERE=VALUE"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused_with_a_hint(change: str, message: str) -> None:
    with pytest.raises((WhatIfError, RecipeError)) as refusal:
        with_changes(load_recipe(RECIPE), [change])
    assert message in str(refusal.value)
    assert change[:30] in str(refusal.value)


def test_a_stage_that_another_recipe_measures_differently_counts_as_not_measured(run: RunFolder) -> None:
    recipe = load_recipe(RECIPE)
    motion = recipe.measure["motion"].model_copy(update={"rate_hz": 6.0})
    found = compare(run, recipe.model_copy(update={"measure": {**recipe.measure, "motion": motion}}))
    through = run.decisions.index[run.decisions["stage"] != "people"]
    assert set(found.flips["clip_id"]) == set(through)
    assert set(found.flips["after"]) == {"would be measured by motion"}


def test_a_recipe_that_cuts_other_clips_is_refused(run: RunFolder) -> None:
    with pytest.raises(WhatIfError, match=r"cuts the footage into other clips .* \(its `clips` differs\)"):
        compare(run, load_recipe(RECIPE).model_copy(update={"clips": load_recipe("active_mind").clips}))


def test_review_commands_change_nothing_in_the_run_folder(finished: Finished, tmp_path: Path) -> None:
    out = finished[0]
    before = files(Path(out))
    table, card = tmp_path / "flips.csv", tmp_path / "clip.png"
    commands = [
        ["what-if", out, "--set", "not_static.max=0.2", "--set", "person=off", "--table", str(table)],
        ["funnel", out, "--json"],
        ["report", out, "--to", str(tmp_path / "report.html")],
        ["calibrate", out, "--rule", "person", "--clips", "2", "--page", str(tmp_path / "page.html")],
        ["show", out, finished[1].frame.index[0], "--to", str(card)],
        ["show", out, "", "--to", str(tmp_path / "a.png")],  # refused: every clip_id begins with ""
    ]
    codes = [CliRunner().invoke(app, command).exit_code for command in commands]
    assert codes == [0, 0, 0, 0, 0, 2]
    assert files(Path(out)) == before
    assert card.read_bytes().startswith(b"\x89PNG")
    rows = pd.read_csv(table)
    assert {Path(uri).name for uri in rows["uri"]} == {"frozen.mp4", "nobody.mp4"}


def test_the_command_shows_both_funnels_and_what_flips(finished: Finished, run: RunFolder) -> None:
    shown = CliRunner().invoke(app, ["what-if", finished[0], "--set", "not_static.max=0.2"]).output
    kept = finished[1].decisions["verdict"].value_counts()["keep"]
    assert f"{kept} -> {kept - 1} (-1)" in shown
    assert "frozen.mp4 at 0.00 s: keep, tier main -> drop (not_static: 0.4" in shown
    printed = json.loads(CliRunner().invoke(app, ["funnel", finished[0], "--json"]).output)
    assert [(row["what"], row["count"], row["hours"]) for row in printed["funnel"]] == run.funnel()


@pytest.mark.parametrize(
    "arguments",
    [["what-if", "{}", "--set", "motion.max=8"], ["funnel", "{}/nothing"], ["what-if", "{}"], ["show", "{}", "x"]],
)
def test_a_refusal_is_one_message_and_exit_code_2(finished: Finished, arguments: list[str]) -> None:
    refused = CliRunner().invoke(app, [part.format(finished[0]) for part in arguments])
    assert refused.exit_code == 2 and refused.output.strip()
    assert "Traceback" not in refused.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "{}", "--to"],
        ["show", "{}", "", "--to"],
        ["calibrate", "{}", "--rule", "spoken", "--page"],
        ["what-if", "{}", "--set", "not_static.max=0.2", "--table"],
    ],
)
def test_an_output_file_that_cannot_be_written_is_named_in_the_error(
    finished: Finished, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "it.png", tmp_path / "folder.png"):
        refused = CliRunner().invoke(app, [*(part.format(finished[0]) for part in arguments), str(path)])
        assert refused.exit_code == 2 and f"{path} cannot be written" in refused.output
