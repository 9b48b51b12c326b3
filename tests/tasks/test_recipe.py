"""Recipes: the bundled ones are valid, and a fault is reported by file, key and nearest match."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_manifests.strict import RecipeError
from tasks.recipe import Recipe, bundled_recipes, load_recipe, recipe_hash
from tasks.stages.registry import STAGES

BASE: dict[str, Any] = {
    "name": "mine",
    "curation": {
        "clips": {"fps": 25, "short_side": 256, "min_s": 2, "max_s": 10},
        "measure": {"people": {"backend": "mediapipe"}, "motion": {"backend": "dis"}, "speech": {}},
        "policy": {
            "rules": {
                "person": {"score": "people.person_share", "backend": "mediapipe", "min": 0.5},
                "near": {"score": "people.framing", "backend": "mediapipe", "one_of": ["medium"]},
                "calm": {"score": "motion.chaotic_fraction", "backend": "dis", "max": 0.5},
            },
            "tiers": {"main": {}, "hq": {"hours": 1, "rank": {"motion.speed": 1}}},
        },
        "run": {"time_limits": {"motion": 20}},
    },
}


def at(content: dict[str, Any], place: str) -> tuple[dict[str, Any], str]:
    *folders, key = place.split("/")
    for folder in folders:
        content = content.setdefault(folder, {})
    return content, key


def put(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        section, key = at(content, place)
        section[key] = value

    return edit


def load(folder: Path, edit: Callable[[dict[str, Any]], None] | None = None) -> Recipe:
    content = copy.deepcopy(BASE)
    if edit is not None:
        edit(content)
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_recipe(path)


@pytest.mark.parametrize(
    ("name", "fps", "short_side", "min_s", "max_s", "on_unusable"),
    [
        ("active_mind", 24, 480, 5, 20, "keep"),
        ("physavatar", 25, 720, 3, 15, "drop"),
        ("physavatar_paper", 25, 720, 3, 15, "drop"),
        ("active_mind_paper", 24, 480, 5, 20, "keep"),
        ("demo", 25, 256, 2, 10, "keep"),
    ],
)
def test_recipes_that_come_along_say_what_the_papers_say(
    name: str, fps: int, short_side: int, min_s: float, max_s: float, on_unusable: str
) -> None:
    recipe = load_recipe(name)
    clips = recipe.clips
    assert (recipe.name, clips.fps, clips.short_side, clips.min_s, clips.max_s) == (name, fps, short_side, min_s, max_s)
    assert recipe.policy.on_unusable == on_unusable
    assert set(STAGES) - {"pose"} <= set(recipe.measure)
    assert name in bundled_recipes()


@pytest.mark.parametrize("name", ["active_mind", "physavatar", "active_mind_paper", "physavatar_paper"])
def test_every_number_of_a_papers_recipe_has_its_source_beside_it(name: str) -> None:
    """The source stands in a comment on the same line, or at the head of its part of a section."""
    from tasks import recipe as module

    heading, after_code = "", False
    for line in (module._folder() / f"{name}.yaml").read_text().splitlines():
        code, _, comment = line.partition("#")
        if any(character.isdigit() for character in code.partition(":")[2]):
            assert any(mark in comment + heading for mark in ("[A]", "[B]", "[M]", "[O]", "[t]", "[own]")), line
        if code.strip():
            heading = "" if code.strip().endswith(":") else heading
        else:
            heading = comment if after_code else heading + comment
        after_code = bool(code.strip())


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("curaton", {}, "unknown key 'curaton'; did you mean 'curation'?"),
        ("curation", None, "it has no `curation` section"),
        ("name", 3, "name: a recipe's name is text, this is 3"),
        ("curation/clip", {}, "clip: unknown key 'clip'; did you mean 'clips'?"),
        ("curation/clips/fsp", 3, "clips.fsp: unknown key 'fsp'; did you mean 'fps'?"),
        ("curation/clips/fps", "fast", "clips.fps: Input should be a valid integer"),
        ("curation/clips/max_s", 1, "max_s"),
        ("curation/scenes/thresh", 3, "scenes.thresh: unknown key 'thresh'"),
        ("curation/measure/motoin", {}, "measure.motoin: unknown stage 'motoin'; did you mean 'motion'?"),
        ("curation/measure/motion/ratehz", 3, "measure.motion: ratehz: unknown key 'ratehz'; did you mean 'rate_hz'?"),
        ("curation/measure/people/backend", "yol", "people: backend: unknown backend 'yol'; did you mean 'yolo'?"),
        ("curation/measure", [], "measure: it must map stages to their settings"),
        ("curation/policy/rules/calm/mx", 3, "policy.rules.calm.mx: unknown key 'mx'; did you mean 'max'?"),
        ("curation/policy/rules/calm/score", "motion.chaos", "rules.calm: motion.chaos: motion has no column 'chaos'"),
        ("curation/policy/rules/calm/score", "moton.speed", "does not measure 'moton'; did you mean 'motion'?"),
        ("curation/policy/rules/calm/score", "sync.offset", "measure 'sync'; known here: motion, people, speech"),
        ("curation/policy/rules/calm/backend", "raft", "are for motion by 'raft', but the recipe measures it by 'dis'"),
        ("curation/policy/rules/near/one_of", [3], "people.framing is text, and can never be 3"),
        ("curation/policy/rules/calm/score", "people.framing", "the recipe measures it by 'mediapipe'"),
        ("curation/policy/rules/near", {"score": "people.framing", "backend": "mediapipe", "min": 1}, "use one_of"),
        ("curation/policy/rules/near/score", "people.face_share", "use min and max"),
        ("curation/policy/tiers/hq/rank", {"motion.sped": 1}, "tiers.hq.rank: motion.sped: motion has no column"),
        ("curation/policy/tiers/hq/rank", {"people.framing": 1}, "has no order to rank by"),
        ("curation/policy/tiers/hq/hour", 3, "policy.tiers.hq.hour: unknown key 'hour'; did you mean 'hours'?"),
        ("curation/run/time_limits", {"moton": 3}, "unknown step 'moton'; did you mean 'motion'?"),
        ("curation/run/time_limits", {"motion": 0}, "run.time_limits.motion: 0 s leaves no time"),
        ("curation/shards/max_sample", 3, "did you mean 'max_samples'?"),
        ("curation/name", "x", "name: it belongs at the top of the file"),
    ],
)
def test_a_fault_is_reported_by_file_key_and_nearest_match(
    tmp_path: Path, place: str, value: Any, message: str
) -> None:
    with pytest.raises(RecipeError) as refusal:
        load(tmp_path, put(place, value))
    assert message in str(refusal.value)
    assert all(line.startswith(f"{tmp_path / 'mine.yaml'}: ") for line in str(refusal.value).splitlines())


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        rules = content["curation"]["policy"]["rules"]
        rules["calm"]["backend"] = "raft"
        rules["person"]["score"] = "people.share"

    with pytest.raises(RecipeError) as refusal:
        load(tmp_path, edit)
    assert len(str(refusal.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "cannot be read as YAML"),
        ("name: a\nname: b\n", "'name' stands twice"),
        ("curation: {policy: {rules: {a: 1, a: 2}}}", "'a' stands twice"),
        ("- a", "a recipe is a mapping of sections, this is list"),
        ("day: 2024-13-45", "cannot be read as YAML"),
        ("[" * 2000, "cannot be read as YAML"),
        ("1: 2", "unknown key '1'"),
        ("", "this is NoneType"),
        ("a: \x00", "cannot be read as YAML"),
        ("a: !!python/object:os.system {}", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as refusal:
        load_recipe(str(path))
    assert str(refusal.value).startswith(f"{path}: ") and message in str(refusal.value)


def test_a_missing_recipe_is_reported_with_the_nearest_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, message in {
        "active_mnd": "did you mean 'active_mind'?",
        "demo.yaml": "the bundled one is called 'demo'",
        "nowhere/else.yaml": "no such recipe",
        "": "no recipe of that name",
        "a\0b": "no recipe of that name",
        "x" * 5000: "no recipe of that name",
    }.items():
        with pytest.raises(RecipeError, match="recipe") as refusal:
            load_recipe(name)
        assert message in str(refusal.value)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe("folder.yaml")


def test_the_hash_follows_what_changes_a_result_and_nothing_else(tmp_path: Path) -> None:
    before = recipe_hash(load(tmp_path))
    assert before == recipe_hash(load(tmp_path, put("curation/run/workers", 3)))
    assert before == recipe_hash(load(tmp_path, put("description", "another")))
    assert before == recipe_hash(load(tmp_path, put("training", {"steps": 3})))
    assert before == recipe_hash(load(tmp_path, put("curation/clips/min_s", 2.0)))
    assert before == recipe_hash(load(tmp_path, put("curation/scenes", None)))

    def swap(content: dict[str, Any]) -> None:  # another stage may then be the one that drops a clip
        measure = content["curation"]["measure"]
        measure["people"] = measure.pop("people")

    edits = [swap, put("name", "b"), put("curation/clips/fps", 24), put("curation/measure/motion/rate_hz", 6)]
    edits += [put("curation/policy/rules/calm/max", 0.4), put("curation/shards/max_samples", 3)]
    hashes = {recipe_hash(load(tmp_path, edit)) for edit in edits}
    assert len(hashes) == len(edits) and before not in hashes


def test_time_limits_are_by_step(tmp_path: Path) -> None:
    run = load(tmp_path).run
    assert run.time_limit("motion") == 20 and run.time_limit("people") == run.time_limit_s
    assert run.time_limit("scenes") > run.time_limit_s


def keys_of(content: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(content, dict):
        return []
    return [(*path, k) for k in content] + [p for k, v in content.items() for p in keys_of(v, (*path, k))]


JUNK = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.none(), max_size=2)


@given(st.sampled_from(keys_of(BASE)), JUNK | st.dictionaries(st.text(max_size=5), JUNK, max_size=2))
@settings(max_examples=150, deadline=None)
def test_any_wrong_value_anywhere_gives_a_recipe_or_one_clear_refusal(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[str, ...], value: Any
) -> None:
    try:
        recipe = load(tmp_path_factory.getbasetemp(), put("/".join(place), value))
    except RecipeError as refusal:
        assert str(refusal).startswith(str(tmp_path_factory.getbasetemp() / "mine.yaml"))
    else:
        assert len(recipe_hash(recipe)) == 12


def test_recipes_are_read_without_the_heavy_libraries() -> None:
    heavy = ("av", "cv2", "mediapipe", "onnxruntime", "pandas", "pyarrow", "scenedetect", "torch", "transformers")
    code = f"import sys, tasks.recipe as r; r.load_recipe('demo'); print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
