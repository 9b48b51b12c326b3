"""Recipes' training sections: what cannot be trained is refused by name, before any work."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_manifests.strict import RecipeError, validate
from tests.training.loop.tiny import recipe
from training.config import OptimizerSettings, TrainingRecipe, check_training, load_training
from training.loop.phases import settings_of

ROOT = Path(__file__).parents[2]


def section(**changes: Any) -> dict[str, Any]:
    """A training section as in a YAML file, with changes: phases__main__tier stands for phases.main.tier."""
    content = recipe().model_dump(mode="json", exclude={"name"})
    for place, value in changes.items():
        *above, last = place.split("__")
        here = content
        for key in above:
            here = here[key]
        if value is None:
            del here[last]
        else:
            here[last] = value
    return content


def refusal(**changes: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        validate(TrainingRecipe, {**section(**changes), "name": "tiny"}, "tiny.yaml: in training")
    return str(caught.value)


def test_a_phase_starts_from_earlier_phases_only() -> None:
    assert refusal(phases__warmup__weights__video="main").endswith(
        "phases.warmup.weights.video: no earlier phase 'main'; known here: base, new"
    )
    assert "no earlier phase 'warmpu'; did you mean 'warmup'?" in refusal(phases__main__weights__audio="warmpu")
    assert "weights: audio is missing; give new, or an earlier phase" in refusal(phases__main__weights__audio=None)
    assert "'base.hands' is unknown; give an earlier phase, such as base" in refusal(
        phases__warmup__weights__audio="base.hands"
    )


def test_a_phase_may_start_from_a_file() -> None:
    content = section(phases__base__weights__video="/models/wan.base.safetensors")
    assert validate(TrainingRecipe, {**content, "name": "tiny"}, "").phases["base"].weights["video"].startswith("/")


def test_what_does_not_fit_is_said_with_what_would() -> None:
    assert "33 or 37 in place of 35" in refusal(data__frames=35)
    assert "unknown size 'debg'; did you mean 'debug'?" in refusal(size="debg")
    assert "unknown tier 'mian'; did you mean 'main'?" in refusal(phases__hq__tier="mian")
    assert "phases.Main/../x" in refusal(phases={**section()["phases"], "Main/../x": section()["phases"]["base"]})
    assert "run.shardin: unknown key 'shardin'; did you mean 'sharding'?" in refusal(run={"shardin": "fsdp"})
    assert "optimizer.learning_rate" in refusal(optimizer__learning_rate=-1.0)


def test_an_old_recipes_key_is_refused_with_its_new_name() -> None:
    assert refusal(run={"recompute": True}) == (
        "tiny.yaml: in training: run.recompute: unknown key 'recompute'; it is now called 'activation_checkpointing'"
    )


def test_a_recipe_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"curation": {}, "training": section()}, sort_keys=False))
    read = load_training(path)
    assert read == recipe().model_copy(update={"name": "mine"})
    assert list(read.phases) == ["base", "warmup", "main", "hq"]
    path.write_text("curation: {}\n")
    with pytest.raises(RecipeError, match="has no `training` section, so there is nothing to train"):
        load_training(path)


def test_a_model_that_cannot_be_trained_yet_is_refused_once_its_section_is_sound(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"physavatar.yaml: in training: model: physavatar cannot be trained yet"):
        load_training("physavatar")
    content = yaml.safe_load((ROOT / "data_manifests" / "physavatar.yaml").read_text())
    content["training"]["adapters"]["rnak"] = 128
    content["training"]["physical_state"]["block"] = 31
    path = tmp_path / "physavatar.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(RecipeError, match=r"adapters.rnak: unknown key 'rnak'; did you mean 'rank'") as caught:
        load_training(path)
    assert "physical_state.block: Input should be less than or equal to 30" in str(caught.value)


def test_phases_are_trained_in_the_recipes_order() -> None:
    assert recipe().chosen(["hq", "warmup"]) == ["warmup", "hq"]
    assert recipe().chosen(None) == recipe().chosen([]) == ["base", "warmup", "main", "hq"]
    with pytest.raises(RecipeError, match="unknown phase 'man'; did you mean 'main'"):
        recipe().chosen(["man"])


def test_the_digest_is_over_all_that_changes_what_is_learnt() -> None:
    same = recipe(keep=9, micro_batch=1).model_copy(update={"name": "other"})
    assert same.digest() == recipe().digest()
    assert recipe().model_copy(update={"seed": 1}).digest() != recipe().digest()


def test_reading_a_recipe_needs_no_torch() -> None:
    code = "import sys, training.config; print([m for m in ('torch', 'ray', 'prefect', 'av') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_the_learning_rate_rises_then_stays_or_falls_to_nothing() -> None:
    stays = OptimizerSettings(learning_rate=1.0, warmup_steps=4)
    assert [stays.share_of_rate(step, 10) for step in (1, 2, 4, 10)] == [0.25, 0.5, 1.0, 1.0]
    falls = OptimizerSettings(learning_rate=1.0, decay="cosine")
    shares = [falls.share_of_rate(step, 100) for step in range(1, 101)]
    assert shares[0] == 1.0 and shares[50] == pytest.approx(0.5) and 0 < shares[-1] < 1e-3
    assert shares == sorted(shares, reverse=True)


def test_a_phase_can_be_made_longer_unless_its_learning_rate_falls_towards_the_end() -> None:
    for decay, same in (("none", True), ("cosine", False)):
        content = section(optimizer__decay=decay)
        short = validate(TrainingRecipe, {**content, "name": "tiny"}, "")
        content["phases"]["base"]["steps"] += 1
        long = validate(TrainingRecipe, {**content, "name": "tiny"}, "")
        before, now = (settings_of(recipe, "base", "0" * 64) for recipe in (short, long))
        assert (before == now) == same


def test_a_fault_in_the_training_section_is_found_before_a_curation(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("curation: {}\ntraining: {model: physavatar, optimiser: {}}")
    with pytest.raises(RecipeError, match=r"in training: optimiser: unknown key 'optimiser'; did you mean 'optimizer'"):
        check_training(path)
    path.write_text("curation: {}\n")
    check_training(path)
    check_training("physavatar")  # it cannot be trained here, but nothing is wrong with it
