"""What the schema says, as the reader, the JSON Schema and the reference ask it: keys, types and ranges in words."""

from __future__ import annotations

import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trainkit.recipe.schema import Recipe, Source


@dataclass(frozen=True)
class Bounds:
    """The range of every number in a value; None where it is open."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def in_words(self) -> str:
        """The range as a person says it, or nothing.

        >>> Bounds(at_least=0, below=1).in_words()
        'at least 0 and below 1'
        """
        named = (("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below))
        return " and ".join(f"{word} {bound}" for word, bound in named if bound is not None)

    def hold(self, number: float) -> bool:
        """Whether ``number`` lies inside."""
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )


@dataclass(frozen=True)
class Key:
    """One key of a section: what the schema says of it."""

    name: str
    hint: Any
    default: Any  # MISSING where the key is required
    doc: str
    unit: str | None
    bounds: Bounds

    @property
    def required(self) -> bool:
        """Whether the key has no default."""
        return self.default is MISSING

    @property
    def section(self) -> Any:
        """The dataclass behind a key that is a section (or a section that may be left out), else None."""
        sections = (member for member in members(self.hint) if is_dataclass(member) and isinstance(member, type))
        return next(sections, None)


@cache
def keys_of(section: Any) -> dict[str, Key]:
    """The keys of a section in the schema's order, by name."""
    hints = get_type_hints(section)
    found = {}
    for field in fields(section):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        said = field.metadata
        bounds = Bounds(said["at_least"], said["above"], said["at_most"], said["below"])
        found[field.name] = Key(field.name, hints[field.name], default, said["doc"], said["unit"], bounds)
    return found


@cache
def all_keys() -> dict[str, Key]:
    """Every key of a recipe by its dotted name; the keys of a source stand under ``data.train``.

    >>> all_keys()["training.seed"].default
    42
    """
    found: dict[str, Key] = {}
    for name, key in keys_of(Recipe).items():
        found[name] = key
        if key.section:
            found |= {f"{name}.{inner}": inner_key for inner, inner_key in keys_of(key.section).items()}
    return found | {f"data.train.{name}": key for name, key in keys_of(Source).items()}


def members(hint: Any) -> tuple[Any, ...]:
    """The members of a union; a hint that is none is its own only member."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def choices_of(hint: Any) -> tuple[str, ...]:
    """The words that a hint allows."""
    return tuple(word for member in members(hint) if get_origin(member) is Literal for word in get_args(member))


def in_words(hint: Any) -> str:
    """A type as a person says it.

    >>> in_words(int | Literal["auto"])
    'a whole number or `auto`'
    >>> in_words(Literal["a", "b", "c"])
    '`a`, `b` or `c`'
    """
    words: list[str] = []
    for member in members(hint):
        words += [f"`{choice}`" for choice in choices_of(member)] or [_member_in_words(member)]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _member_in_words(member: Any) -> str:
    simple = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    if member in simple:
        return simple[member]
    if member == tuple[Source, ...]:
        return "a path, a source or a list of them"
    if get_origin(member) is tuple:
        inner = get_args(member)[0]
        of = {str: "text", int: "whole numbers"}.get(inner) or in_words(inner)
        return f"a list of {of}"
    if get_origin(member) is dict:
        of = {str: "text", int: "whole numbers", float: "numbers"}[get_args(member)[1]]
        return f"a section of names with {of}"
    return "a section"


def nearest(name: str, candidates: tuple[str, ...]) -> str | None:
    """The candidate within edit distance 2 that is nearest to ``name``; a short name must be nearer.

    >>> nearest("learning_rte", ("learning_rate", "seed"))
    'learning_rate'
    >>> nearest("r", ("a", "seed")) is None
    True
    """
    if len(name) > 40:
        return None
    allowed = min(2, len(name) // 3)
    near = [(edit_distance(name.lower(), candidate.lower()), candidate) for candidate in candidates
            if abs(len(name) - len(candidate)) <= allowed]  # fmt: skip
    distance, best = min(near, default=(allowed + 1, ""), key=lambda pair: pair[0])
    return best if distance <= allowed else None


def edit_distance(one: str, other: str) -> int:
    """Insertions, deletions, replacements and swaps of neighbours between two words.

    >>> edit_distance("evla", "eval"), edit_distance("sgd", "adamw")
    (1, 5)
    """
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        above, row = row, [i]
        for j, letter_of_other in enumerate(other, 1):
            cost = min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != letter_of_other))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == letter_of_other:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before = above
    return row[-1]
