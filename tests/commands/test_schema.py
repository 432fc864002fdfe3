"""`trainkit schema` prints JSON."""

from __future__ import annotations

import json

from trainkit.commands.schema import schema
from trainkit.recipe.json_schema import json_schema


def test_it_is_the_schema_as_json() -> None:
    assert json.loads(schema()) == json_schema()
