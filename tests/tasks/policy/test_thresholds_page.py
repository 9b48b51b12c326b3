"""That docs/thresholds.md lists every rule of the bundled recipes with the threshold that stands in the recipe."""

import re
from pathlib import Path

import pytest

from tasks.recipe import load_recipe

PAGE = Path(__file__).parents[3] / "docs" / "thresholds.md"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the third level, without its head."""
    _, _, section = PAGE.read_text(encoding="utf-8").partition(f"\n### {heading}\n")
    lines = re.split(r"\n### ", section)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


@pytest.mark.parametrize("name", ["active_mind", "physavatar", "active_mind_paper", "physavatar_paper"])
def test_the_page_lists_every_rule_with_its_threshold(name: str) -> None:
    rules = load_recipe(name).policy.all_rules()
    expected = [(key, rule.score, rule.demand) for key, rule in rules]
    assert [tuple(row[:3]) for row in rows(f"{name}.yaml")] == expected
    assert all(re.search(r"\[(A|B|t|own)\]", row[3]) for row in rows(f"{name}.yaml"))
