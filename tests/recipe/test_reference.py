"""The page in docs/ is the one that the schema makes."""

from __future__ import annotations

from pathlib import Path

from trainkit.recipe.keys import all_keys
from trainkit.recipe.reference import reference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipe.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python -m trainkit.recipe.reference > docs/recipe.md"


def test_every_key_is_on_the_page() -> None:
    page = reference()
    assert [dotted for dotted in all_keys() if f"`{dotted.rpartition('.')[2]}`" not in page] == []
