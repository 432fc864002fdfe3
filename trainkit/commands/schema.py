"""``trainkit schema``: the recipe as JSON Schema, for editors."""

from __future__ import annotations

import json

from trainkit.recipe.json_schema import json_schema


def schema() -> str:
    """The JSON Schema (draft 2020-12) of a recipe, indented."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False)
