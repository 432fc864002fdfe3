"""The recipe as JSON Schema (draft 2020-12), generated from the same classes that the reader checks against.

For editors: completion, descriptions, and most mistakes while typing. What only holds between keys is the reader's.
"""

from __future__ import annotations

from dataclasses import MISSING, is_dataclass
from typing import Any, Literal, get_args, get_origin

from trainkit.recipe.keys import Bounds, Key, keys_of, members
from trainkit.recipe.schema import Recipe, Source

SIMPLE = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file."""
    recipe = _section(Recipe)
    required = recipe.pop("required")
    extends = {"type": "string", "minLength": 1, "description": "a recipe to start from; relative to this file"}
    complete: dict[str, Any] = {"required": required, "properties": {}}
    # what a recipe must have, it may also have from the one that it extends
    for name, key in keys_of(Recipe).items():
        section = _section_in(recipe["properties"][name])
        if "required" in section:
            needed = section.pop("required")
            if key.required:
                complete["properties"][name] = {"required": needed}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "trainkit recipe",
        "description": (Recipe.__doc__ or "").strip(),
        "type": "object",
        "properties": {"extends": extends, **recipe["properties"]},
        "additionalProperties": False,
        "if": {"required": ["extends"]},
        "else": complete,
        "$defs": {"source": _section(Source)},
    }


def _section(section: type) -> dict[str, Any]:
    keys = keys_of(section)
    schema: dict[str, Any] = {
        "type": "object",
        "description": (section.__doc__ or "").strip(),
        "properties": {name: _key(key) for name, key in keys.items()},
        "additionalProperties": False,
    }
    required = [name for name, key in keys.items() if key.required]
    return schema | ({"required": required} if required else {})


def _section_in(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of the section itself, inside one that also allows null."""
    return next((option for option in schema.get("anyOf", ()) if option.get("type") == "object"), schema)


def _key(key: Key) -> dict[str, Any]:
    options = [_option(member, key.bounds) for member in members(key.hint)]
    schema = options[0] if len(options) == 1 else {"anyOf": options}
    if key.section is None:
        schema |= {"description": f"{key.doc} [{key.unit}]" if key.unit else key.doc}
    if key.default is not MISSING and not (key.section and key.default is not None):
        schema |= {"default": list(key.default) if isinstance(key.default, tuple) else key.default}
    return schema


def _option(hint: Any, bounds: Bounds) -> dict[str, Any]:
    """One member of a type."""
    if hint == tuple[Source, ...]:
        source: dict[str, Any] = {"anyOf": [{"type": "string", "minLength": 1}, {"$ref": "#/$defs/source"}]}
        return {"anyOf": [*source["anyOf"], {"type": "array", "minItems": 1, "items": source}]}
    if is_dataclass(hint) and isinstance(hint, type):
        return _section(hint)
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    if get_origin(hint) is tuple:
        items = {"anyOf": [_option(member, bounds) for member in members(get_args(hint)[0])]}
        inner = items["anyOf"][0] if len(items["anyOf"]) == 1 else items
        return {"type": "array", "items": inner, "uniqueItems": True}
    if get_origin(hint) is dict:
        return {"type": "object", "additionalProperties": _option(get_args(hint)[1], bounds)}
    schema: dict[str, Any] = {"type": SIMPLE[hint]}
    if hint is str:
        schema["minLength"] = 1
    return schema | (_range(bounds) if hint in (int, float) else {})


def _range(bounds: Bounds) -> dict[str, float]:
    named = {
        "minimum": bounds.at_least,
        "exclusiveMinimum": bounds.above,
        "maximum": bounds.at_most,
        "exclusiveMaximum": bounds.below,
    }
    return {name: bound for name, bound in named.items() if bound is not None}
