"""YAML nodes → the values that the schema asks for, with every mistake written down on the way.

Nothing here stops at the first mistake: a wrong value becomes ``BAD``, the caller puts a stand-in in its place, and
the cross-key checks skip what depends on it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Final, Literal, get_args, get_origin

from trainkit.recipe.foreign_names import LEAVE_OUT, MAIN_KEYS, meaning_here, our_word
from trainkit.recipe.keys import Bounds, Key, all_keys, choices_of, in_words, keys_of, members, nearest
from trainkit.recipe.schema import Source
from trainkit.recipe.yaml_nodes import Items, Mapping, Mistake, Node, Place, Scalar, reading_of_yaml_1_1, shown

MAX_WHOLE_NUMBER = 2**63
WIDTH_OF_KEYS = 93
SUGGESTIONS_UP_TO = 100  # mistakes; a file with more of them is not a recipe with slips

SOURCES = tuple[Source, ...]
NO_BOUNDS = Bounds()


class _Bad:
    """The type of BAD."""


BAD: Final = _Bad()


@dataclass
class Notes:
    """What reading a recipe finds besides the values themselves."""

    root: Mapping
    mistakes: list[Mistake] = field(default_factory=list)
    warnings: list[Mistake] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)  # of every key that is given
    bad: set[str] = field(default_factory=set)

    def wrong(self, place: Place, key: str, message: str) -> _Bad:
        """Write a mistake down; what comes back stands for the value."""
        self.mistakes.append(Mistake(place, key, message))
        self.bad.add(key)
        return BAD

    def warn(self, key: str, message: str) -> None:
        """Write down what is accepted, but may not be what is meant."""
        self.warnings.append(Mistake(self.places[key], key, message))

    def is_bad(self, key: str) -> bool:
        """Whether this key, a section around it or something inside it has a mistake."""
        around = [key[: dot.start()] for dot in re.finditer(r"[.\[]", key)]
        inside = (key + ".", key + "[")
        return any(bad == key or bad in around or bad.startswith(inside) for bad in self.bad)


def section_of(node: Mapping, section: type, prefix: str, notes: Notes) -> Any:
    """The dataclass ``section`` built from ``node``; keys with mistakes hold a stand-in."""
    start = f"{prefix}." if prefix else ""
    known = keys_of(section)
    for name, entry in node.entries.items():
        if name in known:
            notes.places[start + name] = entry.place
        else:
            notes.wrong(entry.place, start + shown(name), unknown_key(name, entry.node, start, known, notes))
    values = {}
    for name, key in known.items():
        if name in node.entries:
            value = value_of(node.entries[name].node, key.hint, start + name, notes, key.bounds)
        elif key.required:
            doc = f"; {key.doc}" if key.section is None else ""
            value = notes.wrong(node.place, start + name, f"is missing{doc}")
        else:
            value = key.default
        values[name] = stand_in(key) if value is BAD else value
    return section(**values)


def stand_in(key: Key) -> Any:
    """A value of about the right shape, so that the rest of a recipe with mistakes can still be checked."""
    if not key.required:
        return key.default
    if key.section:
        return key.section(**{name: stand_in(inner) for name, inner in keys_of(key.section).items()})
    return () if key.hint == SOURCES else "?"


def unknown_key(name: str, node: Node, start: str, known: dict[str, Key], notes: Notes) -> str:
    """The sentence for a key that the section does not have: what is meant, as far as one can tell."""
    if len(notes.mistakes) > SUGGESTIONS_UP_TO:
        return "unknown key"
    meant = nearest(name, tuple(known))
    foreign = meaning_here(name, node, notes.root)
    elsewhere = [
        dotted
        for dotted in all_keys()
        if dotted.rpartition(".")[2] == name and dotted.rpartition(".")[0] + "." != start
    ]
    if meant and meant.lower() == name.lower():
        return f"unknown key; keys are written small: `{meant}`"
    if foreign and not elsewhere:
        return foreign
    if elsewhere:
        sections = [f"`{dotted.rpartition('.')[0]}`" if "." in dotted else "no section" for dotted in elsewhere]
        return f"unknown key here; it belongs under {' or '.join(sections)}"
    if meant:
        return f"unknown key; did you mean `{meant}`?"
    leaves = {dotted.rpartition(".")[2]: dotted for dotted in reversed(all_keys())}
    if far := nearest(name, tuple(leaves)):
        return f"unknown key; did you mean `{leaves[far]}`?"
    return f"unknown key; the keys here are {_some_of(list(known))}"


def _some_of(names: list[str]) -> str:
    """The names, or as many of them as a line has room for."""
    fitting = len(names)
    while fitting > 1 and len(", ".join(names[:fitting])) > WIDTH_OF_KEYS:
        fitting -= 1
    return ", ".join(names[:fitting]) + (", …" if fitting < len(names) else "")


def value_of(node: Node, hint: Any, key: str, notes: Notes, bounds: Bounds = NO_BOUNDS) -> Any:
    """The value of ``node`` as ``hint`` asks, or BAD with the mistake written down."""
    options = members(hint)
    if SOURCES in options and not _is_number_or_null(node, options):
        return _sources(node, key, notes)
    section = next((option for option in options if is_dataclass(option)), None)
    if section and isinstance(section, type) and isinstance(node, Mapping):
        return section_of(node, section, key, notes)
    if isinstance(node, Scalar):
        return _scalar(node, hint, key, notes, bounds)
    if isinstance(node, Items):
        inner = next((get_args(option)[0] for option in options if get_origin(option) is tuple), None)
        return _list(node, inner, key, notes, bounds) if inner else _wrong_kind(node, hint, key, notes)
    inner = next((get_args(option)[1] for option in options if get_origin(option) is dict), None)
    return _table(node, inner, key, notes, bounds) if inner else _wrong_kind(node, hint, key, notes)


def _is_number_or_null(node: Node, options: tuple[Any, ...]) -> bool:
    """Whether `data.eval` is given as a share or as null, not as sources."""
    if float not in options or not isinstance(node, Scalar):
        return False
    return not isinstance(node.value, str) or _number_in_text(node.value) is not None


def _sources(node: Node, key: str, notes: Notes) -> Any:
    """A path, a source or a list of them, as a tuple of sources."""
    if isinstance(node, Items):
        if not node.items:
            return notes.wrong(node.place, key, "an empty list; give at least one path or source")
        found = []
        for index, item in enumerate(node.items):
            notes.places[f"{key}[{index}]"] = item.place
            found.append(_source(item, f"{key}[{index}]", notes))
        return BAD if BAD in found else tuple(found)
    # One source is a list of one, so that every source has the same name in messages.
    notes.places[f"{key}[0]"] = node.place
    source = _source(node, f"{key}[0]" if isinstance(node, Mapping) else key, notes)
    return BAD if source is BAD else (source,)


def _source(node: Node, key: str, notes: Notes) -> Any:
    if isinstance(node, Mapping):
        return section_of(node, Source, key, notes)
    path = value_of(node, str, key, notes)
    return BAD if path is BAD else Source(path=path)


def _list(node: Items, inner: Any, key: str, notes: Notes, bounds: Bounds) -> Any:
    values: list[Any] = []
    for index, item in enumerate(node.items):
        value = value_of(item, inner, f"{key}[{index}]", notes, bounds)
        if value is not BAD and value in values:
            value = notes.wrong(item.place, f"{key}[{index}]", f"`{shown(str(value))}` stands in the list twice")
        values.append(value)
    return BAD if BAD in values else tuple(values)


def _table(node: Mapping, inner: Any, key: str, notes: Notes, bounds: Bounds) -> Any:
    values = {}
    for name, entry in node.entries.items():
        notes.places[f"{key}.{name}"] = entry.place
        values[name] = value_of(entry.node, inner, f"{key}.{shown(name)}", notes, bounds)
    return BAD if BAD in values.values() else values


def _scalar(node: Scalar, hint: Any, key: str, notes: Notes, bounds: Bounds) -> Any:
    """A single value: the first member of the hint that it is an instance of."""
    value = node.value
    for option in members(hint):
        found = _as(option, value)
        if found is BAD:
            continue
        if isinstance(found, float) and not math.isfinite(found):
            return notes.wrong(node.place, key, f"must be a finite number; got {shown(node.text)}")
        if isinstance(found, (int, float)) and not isinstance(found, bool) and not _inside(found, option, bounds):
            within = bounds.in_words() or f"smaller than {MAX_WHOLE_NUMBER}"
            return notes.wrong(node.place, key, f"must be {within}; got {shown(node.text)}{_range_hint(key, found)}")
        if option is str and value == "":
            return notes.wrong(node.place, key, "is empty")
        _warn_of_yaml_1_1(node, found, key, notes)
        return found
    return _wrong_kind(node, hint, key, notes)


def _inside(number: float, option: Any, bounds: Bounds) -> bool:
    return bounds.hold(number) and (option is float or abs(number) < MAX_WHOLE_NUMBER)


def _as(option: Any, value: Any) -> Any:
    """``value`` as an ``option`` (no union), or BAD. ``1e3`` is a whole number; true is none."""
    if option is type(None):
        return None if value is None else BAD
    if get_origin(option) is Literal:
        return value if isinstance(value, str) and value in get_args(option) else BAD
    if option is bool or option is str:
        return value if type(value) is option else BAD
    if type(value) not in (int, float) or option not in (int, float):
        return BAD
    if option is float:
        try:
            return float(value)
        except OverflowError:
            return math.inf
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else BAD
    return value


def _range_hint(key: str, value: float) -> str:
    if key == "data.eval" and value == 0:
        return "; leave the key out for no evaluation"
    if key == "training.steps" and value < 0:
        return "; leave the key out and give `epochs`"
    return ""


def _warn_of_yaml_1_1(node: Scalar, value: Any, key: str, notes: Notes) -> None:
    other = None if node.quoted else reading_of_yaml_1_1(node.text)
    if other is not None:
        taken = f"the text `{shown(node.text)}`" if isinstance(value, str) else f"{value}"
        message = f"`{shown(node.text)}` is read as {taken}; tools that follow YAML 1.1 read {other}"
        notes.warnings.append(Mistake(node.place, key, message))


def _wrong_kind(node: Node, hint: Any, key: str, notes: Notes) -> _Bad:
    message = f"expected {in_words(hint)}; got {_what_stands_there(node)}"
    return notes.wrong(node.place, key, message + _hint_for_kind(node, hint, key))


def _what_stands_there(node: Node) -> str:
    if isinstance(node, Items):
        return "a list"
    if isinstance(node, Mapping):
        return "a section"
    if node.value is None:
        return "nothing" if node.text == "" else "null"
    text = f"`{shown(node.text)}`"
    if isinstance(node.value, bool):
        return text
    if isinstance(node.value, str):
        return f"the quoted text {text}" if node.quoted else f"the text {text}"
    return f"the number {text}"


def _hint_for_kind(node: Node, hint: Any, key: str) -> str:
    """What to write instead, where that can be told; starts with its own punctuation."""
    if isinstance(node, Scalar) and node.value is not None:
        return _hint_for_scalar(node, hint, key)
    if isinstance(node, Scalar):
        plain = re.sub(r"\[\d+\]", "", key)
        known = all_keys().get(plain)
        return "; leave the key out for its default" if known and not known.required else ""
    if isinstance(node, Items) and str in members(hint):
        return "; give one value without brackets"
    return ""


def _hint_for_scalar(node: Scalar, hint: Any, key: str) -> str:
    options = members(hint)
    text = shown(node.text)
    plain = re.sub(r"\[\d+\]", "", key).replace("data.eval.", "data.train.")
    if any(is_dataclass(option) for option in options):
        return _hint_for_section(node, plain)
    word = our_word(plain, node.text)
    if word:
        return f"; write `{word}`"
    if str in options:
        return f'; put it in quotes: "{text}"'
    numeric = int in options or float in options
    if numeric and isinstance(node.value, str) and (number := _number_in_text(node.value)):
        return f"; write {shown(number)}" + (" without quotes" if node.quoted else "")
    if int in options and isinstance(node.value, float) and plain == "training.warmup_steps":
        return "; a share of the steps is `warmup_ratio`"
    if bool in options and node.text.lower() in ("yes", "on", "no", "off", "1", "0", "true", "false"):
        return f"; write {'true' if node.text.lower() in ('yes', 'on', '1', 'true') else 'false'}"
    if isinstance(node.value, str) and (meant := nearest(node.value, choices_of(hint))):
        return f"; did you mean `{meant}`?"
    if isinstance(node.value, str) and any(get_origin(option) is tuple for option in options):
        return f"; write [{text}]"
    return ""


def _hint_for_section(node: Scalar, key: str) -> str:
    main = MAIN_KEYS.get(key)
    if main is None:
        return ""
    word = our_word(f"{key}.{main}", node.text)
    if word == LEAVE_OUT:
        return "; leave the section out"
    return f"; write `{key}: {{{main}: {word or shown(node.text)}}}`"


def _number_in_text(text: str) -> str | None:
    """The number that a text is meant to be: quoted, or with separators between its digits.

    >>> _number_in_text("1_000"), _number_in_text("0.5"), _number_in_text("65,536"), _number_in_text("three")
    ('1000', '0.5', '65536', None)
    """
    digits = re.sub(r"(?<=\d)[_, ](?=\d{3})", "", text.strip())
    return digits if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", digits, re.ASCII) else None
