"""Pieces of the user's data, fit for a message of one line."""

from __future__ import annotations

import difflib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def shown(value: object, limit: int = 40) -> str:
    """A piece of the user's data for a message: JSON on one line, cut to ``limit`` characters, text in quotes."""
    if isinstance(value, str):
        cut = _cut(value, limit)
        if '"' in cut and "'" not in cut:
            return repr(cut)  # readable where JSON stands in JSON
        return json.dumps(cut, ensure_ascii=not cut.isprintable())
    try:
        return _cut(json.dumps(value, default=str), limit)
    except RecursionError:
        return f"{type_name(value)}, deeply nested"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "…"


def type_name(value: object) -> str:
    """What JSON calls the type of ``value``, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an object" if isinstance(value, dict) else "a list" if isinstance(value, (list, tuple)) else "binary data"


def listed(names: Sequence[str], limit: int = 12) -> str:
    """Names for a message, cut to the first ``limit``."""
    cut = [shown(name)[1:-1] for name in names[:limit]]
    return ", ".join(cut) + (f", … ({len(names)} in all)" if len(names) > limit else "")


def counted(number: int, noun: str) -> str:
    """``1 field``, ``2 fields``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def nearest(word: str, words: Sequence[str]) -> str | None:
    """The word that was most likely meant, if any is near."""
    close = difflib.get_close_matches(word, words, n=1)
    return close[0] if close else None


def did_you_mean(word: str, words: Sequence[str]) -> str:
    """``; did you mean "x"?``, or nothing.

    >>> did_you_mean("asistant", ["user", "assistant"]), did_you_mean("narrator", ["user", "assistant"])
    ('; did you mean "assistant"?', '')
    """
    close = nearest(word, words)
    return "" if close is None else f"; did you mean {shown(close)}?"
