"""JSON that means one thing: no key twice, no NaN, no number without end, and an error that knows its line."""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import TYPE_CHECKING, Any

from trainkit.data.wording import shown, type_name
from trainkit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

# A single JSON object whose only list stands under one of these holds the examples; under any other name it is
# itself one example (as {"messages": [...]} is).
WRAPPERS = ("data", "examples", "rows", "items", "instances", "train")

_WHITESPACE = re.compile(r"[ \t\r\n]*")


class _RefusedJsonError(ValueError):
    """JSON that Python would accept and that does not mean one thing."""


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _RefusedJsonError(f"the key {shown(twice)} stands twice in one object; which one is meant?")
    return value


def _no_constant(constant: str) -> Any:
    raise _RefusedJsonError(f"{constant} is no JSON value; write null or a number")


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise _RefusedJsonError(f"the number {shown(literal, 20)} is too large; write it as text")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object_of, parse_constant=_no_constant, parse_float=_finite)


def parse_json(text: str) -> Any:
    """The one JSON value in ``text``. Raises ValueError, also for duplicate keys, NaN and too deep nesting."""
    start = _end_of_whitespace(text, 0)
    value, end = _raw_decode(text, start)
    end = _end_of_whitespace(text, end)
    if end < len(text):
        raise json.JSONDecodeError("more text after the JSON value", text, end)
    return value


def _raw_decode(text: str, start: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, start)
    except RecursionError as error:
        raise _RefusedJsonError("nested too deeply; mend it, or remove it") from error
    except (json.JSONDecodeError, _RefusedJsonError):
        raise
    except ValueError as error:  # Python's limit on the digits of an integer
        raise _RefusedJsonError("a number with thousands of digits; write it as text") from error


def _end_of_whitespace(text: str, start: int) -> int:
    match = _WHITESPACE.match(text, start)
    assert match is not None
    return match.end()


def fault_in_strings(value: object) -> str | None:
    """What makes a string anywhere inside ``value`` unfit for training: a NUL or a lone surrogate; None if nothing."""
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            if "\0" in part:
                return "a NUL character in the text; remove it"
            try:
                part.encode()
            except UnicodeEncodeError as error:
                return (
                    f"a lone surrogate (\\u{ord(part[error.start]):04x}) in the text, which is no character; remove it"
                )
        elif isinstance(part, dict):
            pending.extend(part.keys())
            pending.extend(part.values())
        elif isinstance(part, list):
            pending.extend(part)
    return None


def checked_record(value: Any, place: str, *, escapes: bool) -> object:
    """``value`` if it can be an example; ``escapes`` says whether its JSON text holds an escaped character.

    Raises DataError for a number, a boolean or null, and for a string that holds a NUL or a lone surrogate.
    """
    if not isinstance(value, (dict, list, str)):
        raise DataError(f"{place}: an example is an object, a list of messages or a string, not {type_name(value)}")
    # Text that was decoded from UTF-8 holds a NUL or a surrogate only where an escape wrote one.
    fault = fault_in_strings(value) if escapes else None
    if fault:
        raise DataError(f"{place}: {fault}")
    return value


def broken(error: json.JSONDecodeError, place: str) -> DataError:
    """The message for JSON that does not parse: what, where in the line, and the text around it."""
    at = min(error.pos, len(error.doc.rstrip()))  # not behind the end of the line
    line_start = error.doc.rfind("\n", 0, at) + 1
    what = error.msg.removesuffix(" at").removesuffix(" starting")
    if at < error.pos or at == len(error.doc.rstrip()):
        what = "it ends too early"
    near = error.doc[max(line_start, at - 20) : at + 20].strip()
    return DataError(
        f"{place}: broken JSON at column {at - line_start + 1:,} near {shown(near)}: {what}; mend it, or remove it"
    )


def json_records(text: str, name: str) -> Iterator[tuple[str, object]]:
    """(place, record) of every example in the text of a ``.json`` file: the items of its list, or the one object.

    Items are decoded one by one, so that each place names a line. An object whose only list stands under one of
    ``WRAPPERS`` holds the examples in it. Raises DataError.
    """
    start = _end_of_whitespace(text, 0)
    if text.startswith("[", start):
        yield from _items_of_list(text, start, name)
    elif start < len(text):
        yield from _records_of_value(text, name)


def _items_of_list(text: str, start: int, name: str) -> Iterator[tuple[str, object]]:
    """The items of the JSON list that starts at ``text[start]``, decoded one by one to know the line of each."""
    counted, line = 0, 1
    position = _end_of_whitespace(text, start + 1)
    more = not text.startswith("]", position)
    for item in itertools.count(1):
        if not more:
            break
        line += text.count("\n", counted, position)
        counted = position
        place = f"{name}:{line} (item {item:,})"
        try:
            value, end = _raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _broken_list(error, name, item) from error
        except ValueError as error:
            raise DataError(f"{place}: {error}") from error
        yield place, checked_record(value, place, escapes=text.find("\\u", position, end) >= 0)
        position = _end_of_whitespace(text, end)
        if not text.startswith((",", "]"), position):
            raise _broken_list(json.JSONDecodeError("a comma or ] is missing", text, position), name, item)
        more = text[position] == ","
        if more:
            position = _end_of_whitespace(text, position + 1)
    end = _end_of_whitespace(text, position + 1)
    if end < len(text):
        extra = json.JSONDecodeError("more text after the list", text, end)
        raise broken(extra, f"{name}:{extra.lineno}")


def _broken_list(error: json.JSONDecodeError, name: str, item: int) -> DataError:
    place = f"{name}:{error.lineno}"
    if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string"):
        return DataError(f"{place}: the file is cut off inside or after item {item:,} of its list; copy it again")
    return broken(error, place)


def _records_of_value(text: str, name: str) -> Iterator[tuple[str, object]]:
    """The examples of a ``.json`` file that holds one value which is no list."""
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        if error.pos >= len(error.doc.rstrip()):
            raise DataError(f"{name}:{error.lineno}: the file is cut off; copy it again") from error
        raise broken(error, f"{name}:{error.lineno}") from error
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error
    escapes = "\\u" in text
    lists = [key for key, part in value.items() if isinstance(part, list)] if isinstance(value, dict) else []
    if len(lists) == 1 and lists[0] in WRAPPERS:
        for item, part in enumerate(value[lists[0]], start=1):
            place = f"{name} (item {item:,} of {lists[0]})"
            yield place, checked_record(part, place, escapes=escapes)
    else:
        yield f"{name}:1", checked_record(value, f"{name}:1", escapes=escapes)
