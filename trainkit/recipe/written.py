"""A recipe → YAML that reads back to the equal recipe, by any YAML reader, 1.1 or 1.2."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from trainkit.recipe.checks import inert_keys
from trainkit.recipe.keys import all_keys
from trainkit.recipe.yaml_nodes import reading_of_yaml_1_1, scalar_value

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainkit.recipe.schema import Recipe

PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./+-]*|\.{1,2}/[A-Za-z0-9_./+-]*")
WIDTH_OF_VALUES = 44  # comments are aligned up to here; a longer value moves only its own comment


def recipe_as_yaml(recipe: Recipe, comment: Callable[[str], str] | None = None) -> str:
    """Every key of ``recipe`` in the schema's order, one a line, with ``comment(dotted key)`` behind it.

    A key that has no effect beside the others and has its default anyway is written as a comment.
    """
    inert = inert_keys(recipe)
    lines: list[tuple[str, str]] = []
    for key, text, value in _lines(recipe, "", 0):
        known = all_keys().get(key)
        reason = inert.get(key)
        if reason and known and value == known.default:
            lines.append((_commented(text), f"no effect: {reason}"))
        else:
            lines.append((text, comment(key) if comment and key else ""))
    widths = [len(text) for text, said in lines if said and len(text) <= WIDTH_OF_VALUES]
    width = max(widths, default=0)
    return "".join(f"{text:<{width}}  # {said}\n" if said else f"{text}\n" for text, said in lines)


def _commented(text: str) -> str:
    indented = len(text) - len(text.lstrip())
    return f"{text[:indented]}# {text[indented:]}"


def _lines(section: Any, start: str, depth: int) -> list[tuple[str, str, Any]]:
    """(dotted key, line, value) of a section; the key is empty where a line only opens something."""
    lines: list[tuple[str, str, Any]] = []
    indent = "  " * depth
    for field in fields(section):
        key, value = start + field.name, getattr(section, field.name)
        if is_dataclass(value):
            lines += [("", f"{indent}{field.name}:", None), *_lines(value, f"{key}.", depth + 1)]
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            lines.append(("", f"{indent}{field.name}:", None))
            for index, item in enumerate(value):
                inner = _lines(item, f"{key}[{index}].", depth + 2)
                # the first line of an item carries the dash
                first = (inner[0][0], f"{indent}  - {inner[0][1].lstrip()}", inner[0][2])
                lines += [first, *inner[1:]]
        else:
            lines.append((key, f"{indent}{field.name}: {value_as_yaml(value)}", value))
    return lines


def value_as_yaml(value: Any) -> str:
    """A value on one line.

    >>> value_as_yaml(1e-8), value_as_yaml(("q_proj", "no")), value_as_yaml({"a b": 4}), value_as_yaml(None)
    ('1.0e-08', '[q_proj, "no"]', '{"a b": 4}', 'null')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # YAML 1.1 reads 1e-08 as text; it wants the point
        text = repr(value)
        return text.replace("e", ".0e", 1) if "e" in text and "." not in text else text
    if isinstance(value, int):
        return str(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(value_as_yaml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{text_as_yaml(name)}: {value_as_yaml(inner)}' for name, inner in value.items())}}}"
    return text_as_yaml(value)


def text_as_yaml(text: str) -> str:
    r"""Text as a plain scalar where every reader takes it for text, else in double quotes.

    >>> text_as_yaml("runs/a"), text_as_yaml("no"), text_as_yaml("1e-4"), text_as_yaml('a"b')
    ('runs/a', '"no"', '"1e-4"', '"a\\"b"')
    """
    if PLAIN.fullmatch(text) and isinstance(scalar_value(text), str) and reading_of_yaml_1_1(text) is None:
        return text
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    code = ord(character)
    if character in '"\\':
        return "\\" + character
    if character.isprintable() and code != 0xFEFF:
        return character
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
