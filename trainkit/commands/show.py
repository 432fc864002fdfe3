"""``trainkit show``: the recipe as trainkit reads it, every key with where its value comes from and what it means."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trainkit.recipe.keys import all_keys
from trainkit.recipe.reader import recipe_as_yaml

if TYPE_CHECKING:
    from trainkit.recipe.reader import ReadRecipe


def show(read: ReadRecipe) -> str:
    """The resolved recipe as YAML that can be run; behind every key its origin, unit and meaning."""
    width = max(map(len, read.origins.values()))

    def comment(key: str) -> str:
        plain = re.sub(r"\[\d+\]", "", key).replace("data.eval.", "data.train.")
        known = all_keys()[plain]
        unit = f"[{known.unit}] " if known.unit else ""
        return f"{read.origins[key]:<{width}}  {unit}{known.doc}"

    return recipe_as_yaml(read.recipe, comment)
