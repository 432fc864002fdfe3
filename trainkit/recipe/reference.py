"""The reference of all recipe keys as Markdown: ``python -m trainkit.recipe.reference > docs/recipe.md``."""

from __future__ import annotations

import sys
from typing import Any

from trainkit.recipe.keys import Key, in_words, keys_of
from trainkit.recipe.schema import Recipe, Source
from trainkit.recipe.written import value_as_yaml

INTRODUCTION = """\
# The recipe, key by key

Generated from `trainkit/recipe/schema.py` by `python -m trainkit.recipe.reference > docs/recipe.md`.

A recipe is one YAML file that says what to train; it never names a machine. `trainkit show RECIPE` prints it with every
default filled in and where each value comes from; `trainkit schema` prints the JSON Schema for editors.

- Values follow YAML 1.2: `1e-4` is a number, `no` and `on` are text, `010` is 10. Tags and merge keys (`<<`) are
  refused.
- `extends: base.yaml` starts from another recipe, relative to this file: sections merge key by key, lists and values
  replace, `null` takes away.
- `--set section.key=value` overrides a key on the command line; the value is YAML.
- Paths of data and models are relative to the folder that the command runs in.
- A key that is unknown, given twice, of the wrong type or out of range is an error; one that has no effect beside the
  others is a warning.
"""


def reference() -> str:
    """The whole page."""
    top = [key for key in keys_of(Recipe).values() if key.section is None]
    parts = [INTRODUCTION, "## Top level\n", _table(top)]
    for name, key in keys_of(Recipe).items():
        if key.section is not None:
            parts += [f"## `{name}`\n", f"{_doc(key.section)}\n", _table(list(keys_of(key.section).values()))]
        if name == "data":
            parts += ["### A source (in `data.train` and `data.eval`)\n", f"{_doc(Source)}\n"]
            parts.append(_table(list(keys_of(Source).values())))
    return "\n".join(parts)


def _doc(section: Any) -> str:
    return " ".join((section.__doc__ or "").split())


def _table(keys: list[Key]) -> str:
    lines = ["| key | type | default | range | meaning |", "|---|---|---|---|---|"]
    for key in keys:
        default = "**required**" if key.required else f"`{value_as_yaml(key.default)}`"
        unit = f" [{key.unit}]" if key.unit else ""
        cells = (f"`{key.name}`", in_words(key.hint), default, key.bounds.in_words(), f"{key.doc}{unit}")
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
