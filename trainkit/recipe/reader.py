"""The one reader of recipes: a YAML file, the files it extends, and ``--set`` options → a :class:`Recipe`.

All mistakes are reported at once, each with its place. Nothing here loads torch, and no path in a recipe is opened
besides ``extends``: whether data and models exist is for the rooms that read them.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.errors import RecipeErrors
from trainkit.recipe.checks import check
from trainkit.recipe.json_schema import json_schema
from trainkit.recipe.keys import nearest
from trainkit.recipe.schema import Recipe
from trainkit.recipe.values import BAD, Notes, section_of
from trainkit.recipe.written import recipe_as_yaml
from trainkit.recipe.yaml_nodes import (
    MAX_BYTES,
    Entry,
    Mapping,
    Mistake,
    Place,
    Scalar,
    UnreadableYaml,
    decoded,
    parse_yaml,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Mapping as ReadOnly
    from collections.abc import Sequence

__all__ = ["Flag", "ReadRecipe", "json_schema", "read_recipe", "recipe_as_yaml", "shipped_recipes"]

MAX_EXTENDED_FILES = 32
MAX_LINES = 100
ORDER_OF_OPTIONS = 1000  # --set options come behind every file


@dataclass(frozen=True)
class ReadRecipe:
    """A recipe and how it came about.

    ``origins`` says for every dotted key where its value stands: ``default``, ``recipe.yaml:12`` or ``--set``; the
    keys of a source are ``data.train[0].path``. ``warnings`` are complete lines. ``path`` is the file that was read,
    empty where there was none.
    """

    recipe: Recipe
    origins: ReadOnly[str, str]
    warnings: tuple[str, ...]
    path: str


@dataclass(frozen=True)
class Flag:
    """A command-line option that stands for a key of the recipe; ``value`` is YAML, as behind ``--set``."""

    option: str
    key: str
    value: str


def read_recipe(path_or_name: str | None, overrides: Sequence[str] = (), flags: Sequence[Flag] = ()) -> ReadRecipe:
    """Read a recipe file (or a shipped recipe by its name) with ``section.key=value`` overrides.

    ``flags`` come behind the file and before ``overrides``; without a file (None) they are all there is. Raises
    RecipeErrors (exit code 2) with one line for every mistake.
    """
    mistakes: list[Mistake] = []
    path = None if path_or_name is None else _recipe_path(path_or_name)
    given = [(f"{flag.key}={flag.value}", flag.option) for flag in flags]
    given += [(override, f"--set {shown(override.partition('=')[0].strip(), 80)}") for override in overrides]
    try:
        root = Mapping(Place("command line"), {}) if path is None else _with_bases(path, mistakes)
        for index, (override, label) in enumerate(given):
            root = _with_override(root, override, Place(label, order=ORDER_OF_OPTIONS + index), mistakes)
    except UnreadableYaml as error:
        raise _as_error([*mistakes, error.mistake]) from None
    notes = Notes(root, mistakes)
    recipe = section_of(root, Recipe, "", notes)
    assert recipe is not BAD
    check(recipe, notes)
    if "adapter" in notes.places and recipe.adapter is None and _is_blank(root.entries["adapter"]):
        notes.warn("adapter", "nothing stands under it, so every weight is trained; write null or give the keys")
    if notes.mistakes:
        raise _as_error(notes.mistakes)
    origins = {key: _origin(key, notes.places) for key in _keys_with_values(recipe, "")}
    return ReadRecipe(recipe, origins, tuple(map(str, _sorted(notes.warnings))), str(path or ""))


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with trainkit, by name: in the installed package, or in the repository."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "shipped" / "recipes", package.parent / "recipes"):
        found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
        if found:
            return found
    return {}


def _recipe_path(path_or_name: str) -> Path:
    path = Path(path_or_name)
    shipped = shipped_recipes()
    if path_or_name in shipped and not path.is_file():
        return shipped[path_or_name]
    if path_or_name and os.path.lexists(path):
        return path
    meant = nearest(path_or_name, tuple(shipped)) or _nearest_file(path)
    hint = f"did you mean {meant}?" if meant else f"recipes that ship with trainkit: {', '.join(shipped) or 'none'}"
    raise RecipeErrors([f"{shown(path_or_name, 80) or 'an empty name'}: no such recipe; {hint}"])


def _nearest_file(path: Path) -> Path | None:
    """A file beside the missing one with nearly its name, or its name with the other YAML ending."""
    try:
        names = tuple(entry.name for entry in os.scandir(path.parent) if entry.name.endswith((".yaml", ".yml")))
    except OSError:
        return None
    for ending in (".yaml", ".yml") if path.name else ():
        if path.with_suffix(ending).name in names:
            return path.with_suffix(ending)
    meant = nearest(path.name, names)
    return path.with_name(meant) if meant else None


def _with_bases(path: Path, mistakes: list[Mistake]) -> Mapping:
    """The tree of a recipe file, merged over the trees of the files that it extends."""
    trees: list[Mapping] = []
    seen: list[Path] = []
    file, from_place = path, Place(str(path))
    while True:
        resolved = Path(os.path.realpath(file))
        if resolved in seen or len(seen) == MAX_EXTENDED_FILES:
            why = f"goes round in a circle back to {file}" if resolved in seen else "extends too many files in a row"
            raise UnreadableYaml(Mistake(from_place, "extends", why))
        seen.append(resolved)
        tree = _tree_of_file(file, len(trees), from_place, mistakes)
        trees.append(tree)
        extends = tree.entries.pop("extends", None)
        if extends is None:
            break
        from_place = extends.node.place
        if not isinstance(extends.node, Scalar) or not isinstance(extends.node.value, str) or not extends.node.value:
            mistakes.append(Mistake(from_place, "extends", "expected one path, relative to this file"))
            break
        file = Path(os.path.normpath(file.parent / extends.node.value))
    merged = trees.pop()
    while trees:
        merged = _merged(merged, trees.pop())
    return merged


def _tree_of_file(path: Path, order: int, from_place: Place, mistakes: list[Mistake]) -> Mapping:
    label = shown(str(path), 4096)
    key = "extends" if order else ""

    def refuse(message: str, place: Place) -> UnreadableYaml:
        return UnreadableYaml(Mistake(place, key if place is from_place else "", message))

    subject = f"{shown(str(path), 80)} " if order else ""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "is a folder" if path.is_dir() else "is no regular file"
            raise refuse(f"{subject}{kind}; give a YAML file", from_place)
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        meant = _nearest_file(path)
        hint = f"; did you mean {os.path.relpath(meant, Path(from_place.label).parent)}?" if meant else ""
        raise refuse(f"{subject}does not exist{hint}", from_place) from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise refuse(f"{subject}cannot be read: {why}", from_place) from None
    text = decoded(content, label, order)
    root = parse_yaml(text, lambda line, column: Place(label, line, column, order), mistakes)
    start = Place(label, 1, 1, order)
    if root is None or (isinstance(root, Scalar) and root.value is None):
        raise refuse("the recipe is empty; it needs at least `model`, `data`, `training` and `output_dir`", start)
    if not isinstance(root, Mapping):
        stands = "a single value" if isinstance(root, Scalar) else "a list"
        raise refuse(
            f"{stands} stands at the top level; a recipe is made of sections: `model:`, `data:`, …", root.place
        )
    return root


def _with_override(root: Mapping, override: str, place: Place, mistakes: list[Mistake]) -> Mapping:
    """``root`` with one ``section.key=value`` option merged over it; ``place`` is what to call the option."""
    key, equals, text = override.partition("=")
    key = key.strip()
    names = key.split(".")
    wrong = None
    if not equals or not key:
        wrong = "expected section.key=value"
    elif not text.strip():
        wrong = "nothing stands behind the `=`; write null to unset a key"
    elif not all(names):
        wrong = "the key has an empty part between its dots"
    elif key == "extends":
        wrong = "only a file can extend another"
    elif "[" in key:
        wrong = "lists are replaced whole; write the list: data.train=[a.jsonl, b.jsonl]"
    elif len(names) > 8:
        wrong = "the key has too many parts"
    if wrong:
        mistakes.append(Mistake(place, "", wrong))
        return root
    try:
        text.encode()
        node = parse_yaml(text, lambda _line, _column: place, mistakes)
    except UnicodeEncodeError:
        mistakes.append(Mistake(place, "", "the value is not UTF-8"))
        return root
    except UnreadableYaml as error:
        mistakes.append(error.mistake)
        return root
    tree = node if node is not None else Scalar(place, None, "")
    for name in reversed(names):
        tree = Mapping(place, {name: Entry(place, tree)})
    assert isinstance(tree, Mapping)
    return _merged(root, tree)


def _merged(base: Mapping, over: Mapping) -> Mapping:
    """Sections are merged key by key; anything else of ``over`` replaces what ``base`` has."""
    entries = dict(base.entries)
    for name, entry in over.entries.items():
        below = entries.get(name)
        if below and isinstance(below.node, Mapping) and isinstance(entry.node, Mapping):
            entries[name] = Entry(entry.place, _merged(below.node, entry.node))
        else:
            entries[name] = entry
    # a --set option is no place to say that something is missing
    return Mapping(over.place if over.place.line else base.place, entries)


def _is_blank(entry: Entry) -> bool:
    return isinstance(entry.node, Scalar) and entry.node.text == ""


def _keys_with_values(section: Any, start: str) -> list[str]:
    """The dotted name of every key of a recipe that holds a value, not a section."""
    keys: list[str] = []
    for field in fields(section):
        key, value = start + field.name, getattr(section, field.name)
        if is_dataclass(value):
            keys += _keys_with_values(value, f"{key}.")
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            for index, item in enumerate(value):
                keys += _keys_with_values(item, f"{key}[{index}].")
        else:
            keys.append(key)
    return keys


def _origin(key: str, places: ReadOnly[str, Place]) -> str:
    if key in places:
        return places[key].origin
    source, _, name = key.rpartition(".")
    # a source that is given as a bare path has no keys of its own
    bare = name == "path" and source in places
    return places[source].origin if bare else "default"


def _sorted(mistakes: list[Mistake]) -> list[Mistake]:
    """By place; of several of one key in one place only the first, which the others follow from."""

    def position(mistake: Mistake) -> tuple[int, int, int]:
        return (mistake.place.order, mistake.place.line, mistake.place.column)

    first: dict[tuple[Place, str], Mistake] = {}
    for mistake in mistakes:
        first.setdefault((mistake.place, mistake.key), mistake)
    return sorted(first.values(), key=position)


def _as_error(mistakes: list[Mistake]) -> RecipeErrors:
    lines = [str(mistake) for mistake in _sorted(mistakes)]
    more = len(lines) - MAX_LINES
    return RecipeErrors([*lines[:MAX_LINES], f"… and {more} more mistakes"] if more > 0 else lines)
