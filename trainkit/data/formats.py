"""The formats of an example, and how a source's format is recognised from its first examples.

A format has columns by our names. Each goes by one or more names in the data sets of the world; the recipe's
``columns:`` says any other. Recognising looks at the first examples only; ``conversations.parse`` then holds every
example to what was recognised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainkit.data.strict_json import parse_json
from trainkit.data.wording import did_you_mean, listed, nearest, shown, type_name
from trainkit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trainkit.data.sources import Example
    from trainkit.recipe.schema import Source

Format = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text"]
RecordKind = Literal["object", "list", "string"]


@dataclass(frozen=True)
class Shape:
    """The columns of a format: our name → the names that are understood without being told, our own first."""

    required: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]]


SHAPES: dict[Format, Shape] = {
    "messages": Shape(
        {"messages": ("messages", "conversations", "conversation")}, {"system": ("system",), "tools": ("tools",)}
    ),
    "sharegpt": Shape(
        {"conversations": ("conversations", "conversation", "messages")}, {"system": ("system",), "tools": ("tools",)}
    ),
    "alpaca": Shape(
        {"instruction": ("instruction", "question"), "output": ("output", "response", "answer", "completion")},
        {"input": ("input", "context"), "system": ("system", "system_prompt"), "history": ("history",)},
    ),
    "prompt-completion": Shape(
        {"prompt": ("prompt",), "completion": ("completion", "response", "output", "answer")}, {"tools": ("tools",)}
    ),
    "text": Shape({"text": ("text",)}, {}),
}
# A source that fits several formats is the one that says most: turns before pairs, pairs before text.
_RANKS: tuple[tuple[Format, ...], ...] = (("messages", "sharegpt"), ("alpaca", "prompt-completion"), ("text",))
_TURN_KEYS: dict[Format, tuple[str, str]] = {"messages": ("role", "content"), "sharegpt": ("from", "value")}


@dataclass(frozen=True)
class Recognised:
    """What the examples of a source are. ``columns``: our name → the source's; empty where records are no objects."""

    format: Format
    kind: RecordKind
    columns: Mapping[str, str]
    sentence: str


def recognise(source: Source, first: Sequence[Example]) -> Recognised:
    """The format of a source, from its recipe entry and its first examples (a hundred are plenty).

    ``sentence`` tells the user what was seen, which columns are used, and which are not. Raises DataError when no
    format fits or more than one does, and when a named format or column is not there; the message lists what is.
    """
    if not first:
        raise DataError(f"{source.path} has 0 examples")
    kind = record_kind(first[0].record)
    records = [example.record for example in first]
    if kind == "object":
        return _recognise_objects(source, [record for record in records if isinstance(record, dict)])
    if source.columns:
        what = "bare lists" if kind == "list" else "plain text"
        raise DataError(f"{source.path}: `columns:` has no meaning here: the examples are {what}, without columns")
    if kind == "string":
        found: Format = "text"
        details = "each example a string"
    else:
        found = _format_of_turns(source, records, {"messages", "sharegpt"})
        details = f"bare lists, {_roles(records, _TURN_KEYS[found][0])}"
    if source.format not in ("auto", found):
        raise DataError(f"{source.path}: `format: {source.format}`, but the examples are {found} ({details})")
    return Recognised(found, kind, {}, f"{source.path}: {found} ({details})")


def record_kind(record: object) -> RecordKind:
    """Whether a record has columns, is a bare list of messages, or is text."""
    if isinstance(record, str):
        return "string"
    return "list" if isinstance(record, list) else "object"


def turns_of(value: object) -> object:
    """A column of turns as it is meant: csv (and some parquet) files hold the list as JSON text.

    Returns ``value`` itself where it is no text that holds a JSON list.
    """
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


# --- records with columns ------------------------------------------------------------------------------------------


def _recognise_objects(source: Source, records: list[dict[str, Any]]) -> Recognised:
    available = list(dict.fromkeys(column for record in records for column in record))
    for ours, theirs in source.columns.items():
        if theirs not in available:
            raise DataError(
                f"{source.path}: `columns: {{{ours}: {theirs}}}`: no column {shown(theirs)}; "
                f"there are {listed(available)}{did_you_mean(theirs, available)}"
            )
    if source.format == "auto":
        found = _guess(source, records, available)
    else:
        found = source.format
        _check_names(source, found)
    columns = _columns(source, found, available)
    sample = [record.get(next(iter(columns.values()))) for record in records]
    if found in _TURN_KEYS:
        _check_turns(source, found, sample)
    return Recognised(found, "object", columns, f"{_named(source)}: {_sentence(found, columns, available, sample)}")


def _names(found: Format) -> list[str]:
    return [*SHAPES[found].required, *SHAPES[found].optional]


def _check_names(source: Source, found: Format) -> None:
    for ours in source.columns:
        if ours not in _names(found):
            raise DataError(
                f"{source.path}: `columns:` names {shown(ours)}, which {found} does not have; "
                f"it has {listed(_names(found))}{did_you_mean(ours, _names(found))}"
            )


def _guess(source: Source, records: list[dict[str, Any]], available: list[str]) -> Format:
    """The format whose columns are there, for ``format: auto``."""
    known = [found for rank in _RANKS for found in rank if set(source.columns) <= set(_names(found))]
    if not known:
        raise DataError(
            f"{source.path}: `columns:` names {listed(list(source.columns), 3)}, which no format has; its keys are our "
            f"names, as prompt{_meant(source)}"
        )
    for rank in _RANKS:
        fits = {
            found
            for found in rank
            if found in known
            and all(_candidates(source, ours, names, available) for ours, names in SHAPES[found].required.items())
        }
        if fits and rank == _RANKS[0]:
            column = _column_of_turns(source, available)
            return _format_of_turns(source, [record.get(column) for record in records], fits)
        if len(fits) > 1:
            raise DataError(
                f"{source.path}: could be {' or '.join(sorted(fits))} (columns {listed(available)}); say which with "
                "`format:`"
            )
        if fits:
            return fits.pop()
    raise DataError(
        f"{source.path}: no format fits the columns {listed(available)}; name them, as in "
        "`format: prompt-completion` with `columns: {prompt: ..., completion: ...}`" + _header_hint(source)
    )


def _meant(source: Source) -> str:
    """The column of some format that a key of ``columns:`` is likely to mean."""
    names = list(dict.fromkeys(name for found in SHAPES for name in _names(found)))
    return next((hint for ours in source.columns if (hint := did_you_mean(ours, names)) and ours not in names), "")


def _candidates(source: Source, ours: str, names: Sequence[str], available: list[str]) -> list[str]:
    """The source's columns that could be ours: the one the recipe names, or all that go by a usual name."""
    if ours in source.columns:
        return [source.columns[ours]]
    claimed = source.columns.values()
    return [name for name in names if name in available and name not in claimed]


def _columns(source: Source, found: Format, available: list[str]) -> dict[str, str]:
    """Our name → the source's for every column of the format; an optional one may turn up in later examples only."""
    columns: dict[str, str] = {}
    for ours, names in SHAPES[found].required.items():
        candidates = _candidates(source, ours, names, available)
        if not candidates:
            raise DataError(
                f"{source.path}: {found} needs a column `{ours}`, and there are {listed(available)}"
                f"; name it: `columns: {{{ours}: {nearest(ours, available) or '...'}}}`" + _header_hint(source)
            )
        if len(candidates) > 1 and not (source.format == found and candidates[0] == ours):
            raise _which(source, found, ours, candidates)
        columns[ours] = candidates[0]
    for ours, names in SHAPES[found].optional.items():
        candidates = _candidates(source, ours, names, available) or [ours]
        if candidates[0] not in columns.values():
            columns[ours] = candidates[0]
    return columns


def _column_of_turns(source: Source, available: list[str]) -> str:
    """The one column that could hold turns, whichever of the two formats they are in."""
    for ours in ("messages", "conversations"):
        if ours in source.columns:
            return source.columns[ours]
    candidates = _candidates(source, "messages", SHAPES["messages"].required["messages"], available)
    if len(candidates) > 1:
        raise _which(source, "messages", "messages", candidates)
    return candidates[0]


def _which(source: Source, found: Format, ours: str, candidates: list[str]) -> DataError:
    return DataError(
        f"{source.path}: {found}: which column is `{ours}`: {' or '.join(candidates)}? "
        f"say `columns: {{{ours}: {candidates[0]}}}`"
    )


def _header_hint(source: Source) -> str:
    csv = source.path.lower().removesuffix(".gz").endswith((".csv", ".tsv"))
    return " (the first line of a csv file is taken as its header)" if csv else ""


def _named(source: Source) -> str:
    """The source's path, with the split where the recipe names one."""
    return source.path if source.split is None else f"{source.path} ({source.split})"


def _sentence(found: Format, columns: Mapping[str, str], available: list[str], sample: list[Any]) -> str:
    used = {ours: theirs for ours, theirs in columns.items() if theirs in available}
    parts = [f"`{theirs}`" if ours == theirs else f"`{theirs}` as {ours}" for ours, theirs in used.items()]
    details = ("columns " if len(parts) > 1 else "column ") + ", ".join(parts)
    if found in _TURN_KEYS:
        details += f", {_roles([turns_of(turns) for turns in sample], _TURN_KEYS[found][0])}"
    unused = [column for column in available if column not in used.values()]
    return f"{found} ({details}" + (f"; not used: {listed(unused)})" if unused else ")")


# --- turns ---------------------------------------------------------------------------------------------------------


def _first_turn(sample: Sequence[object]) -> dict[str, Any] | None:
    lists = (turns_of(value) for value in sample)
    return next((turn for turns in lists if isinstance(turns, list) for turn in turns if isinstance(turn, dict)), None)


def _format_of_turns(source: Source, sample: Sequence[object], fits: set[Format]) -> Format:
    """Which format of turns it is, by the keys of the first turn; ``fits`` are those that the recipe leaves open."""
    turn = _first_turn(sample)
    if turn is None:
        filled = next((value for value in sample if value not in (None, [])), None)
        what = "empty lists" if filled is None else f"{type_name(filled)} ({shown(filled)})"
        raise DataError(
            f"{source.path}: expected lists of messages, found {what}; if that is another format, say `format:`"
        )
    for found, keys in _TURN_KEYS.items():
        if keys[0] in turn and found in fits:
            return found
    for found, keys in _TURN_KEYS.items():
        if keys[1] in turn and found in fits:
            return found
    raise DataError(
        f"{source.path}: a message has the keys {listed(list(turn))}; messages have role and content, "
        "sharegpt has from and value"
    )


def _check_turns(source: Source, found: Format, sample: list[Any]) -> None:
    """Refuse turns that are plainly those of the other format."""
    turn = _first_turn(sample)
    other: Format = "sharegpt" if found == "messages" else "messages"
    if turn is not None and _TURN_KEYS[found][0] not in turn and _TURN_KEYS[other][0] in turn:
        ours, theirs = (" and ".join(_TURN_KEYS[key]) for key in (found, other))
        raise DataError(f"{source.path}: {found} has {ours}, and these messages have {theirs}; say `format: {other}`")


def _roles(sample: Sequence[object], key: str) -> str:
    turns = [turn for value in sample if isinstance(value, list) for turn in value if isinstance(turn, dict)]
    roles = list(dict.fromkeys(role for turn in turns if isinstance(role := turn.get(key), str)))
    return f"roles {listed(roles)}"
