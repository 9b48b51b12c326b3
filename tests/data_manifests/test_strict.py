"""Strict sections: an unknown key is refused with the key that was meant."""

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from pydantic import Field

from data_manifests.strict import RecipeError, Strict, validate


class Inner(Strict):
    renamed: ClassVar[Mapping[str, str]] = {"recompute": "activation_checkpointing", "activation": "activity"}

    activation_checkpointing: bool = False
    activity: int = 0


class Outer(Strict):
    run: Inner = Inner()
    optional: Inner | None = None
    by_name: dict[str, Inner] = Field(default={})
    listed: list[Inner] = Field(default=[])


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"run": {"recompute": True}}, "run"),
        ({"optional": {"recompute": True}}, "optional"),
        ({"by_name": {"a": {"recompute": True}}}, "by_name.a"),
        ({"listed": [{"recompute": True}]}, "listed.0"),
    ],
)
def test_a_renamed_key_is_refused_with_its_new_name(content: dict[str, Any], place: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        validate(Outer, content, "mine.yaml: in training")
    assert str(refusal.value) == (
        f"mine.yaml: in training: {place}.recompute: "
        "unknown key 'recompute'; it is now called 'activation_checkpointing'"
    )


def test_the_new_name_comes_before_the_nearest_match() -> None:
    with pytest.raises(RecipeError, match="unknown key 'activation'; it is now called 'activity'"):
        validate(Outer, {"run": {"activation": 3}}, "mine.yaml")


def test_a_key_renamed_in_one_section_is_an_ordinary_unknown_key_in_another() -> None:
    with pytest.raises(RecipeError, match=r"recompute: unknown key 'recompute'; known here: by_name, listed"):
        validate(Outer, {"recompute": True}, "mine.yaml")


def test_renamed_is_no_key_itself() -> None:
    assert "renamed" not in Inner.model_fields and "renamed" not in Inner().model_dump()
    with pytest.raises(RecipeError, match="unknown key 'renamed'"):
        validate(Inner, {"renamed": {}}, "mine.yaml")
