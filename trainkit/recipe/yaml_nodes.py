"""YAML text → a small tree in which every value knows where it stands, read by the rules of YAML 1.2.

PyYAML's parser finds the structure; what a scalar means is decided here, because PyYAML follows YAML 1.1, where
``1e-4`` is text, ``no`` is false, ``010`` is 8 and ``1:30`` is 90. Tags, merge keys and everything that could make a
small file cost much time or memory are refused. Nothing here knows the recipe's keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from trainkit.recipe.secrets import holds_secret, secrets_of_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_ALIASES = 1000
MAX_VALUES = 20_000  # with every alias written out; bounds the time that any file can take

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

INT = re.compile(r"[-+]?[0-9]+")
INT_OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)")
NOT_A_NUMBER = re.compile(r"\.(nan|NaN|NAN)")
NULLS = frozenset({"", "~", "null", "Null", "NULL"})
BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}

# What YAML 1.1 (and so most Python tools) reads differently.
BOOLEANS_OF_1_1 = {"yes": "true", "on": "true", "no": "false", "off": "false"}
OCTAL_OF_1_1 = re.compile(r"[-+]?0[0-7]+")
NUMBER_OF_1_1 = re.compile(
    r"[-+]?(0b[01_]+|[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)"
)

NOT_FOR_A_RECIPE = (
    "holds what looks like an access token or a password; a recipe is copied into the run folder and the model card, "
    "so give it through the environment"
)
NOT_PRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Place:
    """Where something stands: a file with line and column (from 1), or an option of the command line (line 0).

    ``order`` sorts places of different files: the recipe itself, the files it extends, the options.
    """

    label: str
    line: int = 0
    column: int = 0
    order: int = 0

    def __str__(self) -> str:
        return f"{self.label}:{self.line}:{self.column}" if self.line else self.label

    @property
    def origin(self) -> str:
        """The short form for `trainkit show`: ``recipe.yaml:12``, ``--set`` or another option."""
        return f"{self.label}:{self.line}" if self.line else self.label.partition(" ")[0]


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong with a recipe."""

    place: Place
    key: str
    message: str

    def __str__(self) -> str:
        """One line: place, key, what is wrong.

        >>> str(Mistake(Place("recipe.yaml", 4, 3), "training.seed", "given twice"))
        'recipe.yaml:4:3: training.seed: given twice'
        >>> str(Mistake(Place("--set training.seed"), "training.seed", "must be at least 0"))
        '--set training.seed: must be at least 0'
        """
        label = self.place.label
        said_by_place = not self.key or label == f"--set {self.key}" or (label.startswith("--") and " " not in label)
        return f"{self.place}: {self.message}" if said_by_place else f"{self.place}: {self.key}: {self.message}"


class UnreadableYaml(Exception):  # noqa: N818 — it carries a mistake, it is none of trainkit's
    """The text has no tree: broken syntax, or beyond a limit."""

    def __init__(self, mistake: Mistake) -> None:
        super().__init__(str(mistake))
        self.mistake = mistake


@dataclass(frozen=True)
class Scalar:
    """A single value: ``value`` by YAML 1.2, ``text`` as written (without quotes)."""

    place: Place
    value: str | int | float | bool | None
    text: str
    quoted: bool = False


@dataclass(frozen=True)
class Items:
    """A list."""

    place: Place
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Entry:
    """A key of a mapping, where the key stands, and its value."""

    place: Place
    node: Node


@dataclass(frozen=True)
class Mapping:
    """Keys and values; keys are always text, whatever they look like."""

    place: Place
    entries: dict[str, Entry] = field(default_factory=dict)


Node: TypeAlias = Scalar | Items | Mapping


def scalar_value(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar means in the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema).

    >>> [scalar_value(text) for text in ("1e-4", "010", "0o10", "no", "1:30", "1_000", "~")]
    [0.0001, 10, 8, 'no', '1:30', '1_000', None]
    """
    if text in NULLS:
        return None
    if text in BOOLEANS:
        return BOOLEANS[text]
    if INT.fullmatch(text):
        # Python refuses to convert thousands of digits; as a float such a number is infinite and is refused later
        return int(text) if len(text) < 1000 else float(text)
    if INT_OTHER_BASE.fullmatch(text):
        return int(text[2:], 8 if text[1] == "o" else 16)
    if FLOAT.fullmatch(text):
        return float(text)
    if INFINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    if NOT_A_NUMBER.fullmatch(text):
        return float("nan")
    return text


def reading_of_yaml_1_1(text: str) -> str | None:
    """What YAML 1.1 makes of an unquoted scalar where that surprises, else None.

    >>> [reading_of_yaml_1_1(text) for text in ("no", "010", "1_000", "1:30", "1e-4", "best-fit")]
    ['false', '8', 'a number', 'a number', None, None]
    """
    if text.lower() in BOOLEANS_OF_1_1:
        return BOOLEANS_OF_1_1[text.lower()]
    if OCTAL_OF_1_1.fullmatch(text):
        octal = int(text, 8)
        return str(octal) if octal != scalar_value(text) else None
    return "a number" if NUMBER_OF_1_1.fullmatch(text) and isinstance(scalar_value(text), str) else None


def decoded(content: bytes, label: str, order: int = 0) -> str:
    """The text of a recipe file. Raises UnreadableYaml for anything but UTF-8 (a byte order mark is fine)."""

    def refuse(message: str, line: int = 1, column: int = 1) -> UnreadableYaml:
        return UnreadableYaml(Mistake(Place(label, line, column, order), "", message))

    if len(content) > MAX_BYTES:
        raise refuse("is larger than 1 MiB; that is no recipe")
    for mark, name in (
        (b"\xff\xfe\0\0", "UTF-32"),
        (b"\0\0\xfe\xff", "UTF-32"),
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
    ):
        if content.startswith(mark):
            raise refuse(f"is {name}; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # utf-8-sig counts from behind the byte order mark
        start = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        before = content[:start]
        line, column = before.count(b"\n") + 1, len(before) - (before.rfind(b"\n") + 1) + 1
        message = f"byte {content[start]:#04x} at offset {start} is not UTF-8; save the file as UTF-8"
        raise refuse(message, line, column) from None


@dataclass
class _Builder:
    """Turns parser events into nodes; keeps what must be counted over the whole document."""

    events: Iterator[Any]
    place_at: Callable[[int, int], Place]
    mistakes: list[Mistake]
    anchors: dict[str, tuple[Node, int] | None] = field(default_factory=dict)
    aliases: int = 0
    values: int = 0
    secrets: tuple[str, ...] = field(default_factory=secrets_of_environment)

    def place(self, event: Any) -> Place:
        return self.place_at(event.start_mark.line + 1, event.start_mark.column + 1)

    def fail(self, event: Any, message: str, key: str = "") -> UnreadableYaml:
        return UnreadableYaml(Mistake(self.place(event), key, message))

    def count(self, event: Any, values: int = 1) -> None:
        self.values += values
        if self.values > MAX_VALUES:
            raise self.fail(event, f"more than {MAX_VALUES} values, with aliases written out; that is no recipe")

    def node(self, event: Any, key: str, depth: int) -> Node:
        """The node that starts with ``event``; takes its other events from the stream."""
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, key)
        self.count(event)
        if event.tag is not None:
            message = f"the tag `{shown(event.tag)}` is refused; a recipe holds plain text, numbers, lists and sections"
            self.mistakes.append(Mistake(self.place(event), key, message))
        before = self.values
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        node = self.content(event, key, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = (node, self.values - before + 1)
        return node

    def content(self, event: Any, key: str, depth: int) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            quoted = event.style in ("'", '"', "|", ">")
            value = event.value if quoted else scalar_value(event.value)
            if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
                raise self.fail(event, "holds a character that no text may hold (NUL or half of a surrogate pair)", key)
            if holds_secret(event.value, self.secrets):
                raise self.fail(event, NOT_FOR_A_RECIPE, key)
            return Scalar(self.place(event), value, event.value, quoted)
        if depth >= MAX_DEPTH:
            raise self.fail(event, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(event, key, depth)
        return self.mapping(event, key, depth)

    def alias(self, event: Any, key: str) -> Node:
        self.aliases += 1
        if self.aliases > MAX_ALIASES:
            raise self.fail(event, f"more than {MAX_ALIASES} aliases")
        known = self.anchors.get(event.anchor)
        if known is None:
            why = "stands inside the value it names" if event.anchor in self.anchors else "has no anchor before it"
            raise self.fail(event, f"the alias `*{shown(event.anchor)}` {why}", key)
        node, values = known
        self.count(event, values)
        return node

    def sequence(self, start: Any, key: str, depth: int) -> Items:
        items: list[Node] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, f"{key}[{len(items)}]", depth + 1))
        return Items(self.place(start), tuple(items))

    def mapping(self, start: Any, key: str, depth: int) -> Mapping:
        entries: dict[str, Entry] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            name = self.name(event, key)
            inner = f"{key}.{shown(name)}" if key else shown(name)
            node = self.node(next(self.events), inner, depth + 1)
            place = self.place(event)
            if name in entries:
                lines = f": first in line {entries[name].place.line}, again in line {place.line}" if place.line else ""
                self.mistakes.append(Mistake(place, inner, f"given twice{lines}; keep one"))
            else:
                entries[name] = Entry(place, node)
        return Mapping(self.place(start), entries)

    def name(self, event: Any, key: str) -> str:
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
            raise self.fail(event, "a key must be a plain name", key)
        if event.value == "<<" and not event.style:
            raise self.fail(event, "merge keys (`<<`) are refused; use `extends:`, or write the keys out", key)
        if holds_secret(event.value, self.secrets):
            raise self.fail(event, NOT_FOR_A_RECIPE, key)
        name: str = event.value
        return name


def parse_yaml(text: str, place_at: Callable[[int, int], Place], mistakes: list[Mistake]) -> Node | None:
    """The tree of one YAML document, or None where there is no document.

    ``place_at`` makes a Place of line and column (from 1). Mistakes that leave a tree (a duplicate key, a tag) are
    added to ``mistakes``; raises UnreadableYaml for those that do not.
    """
    if wrong := NOT_PRINTABLE.search(text):
        line = text.count("\n", 0, wrong.start()) + 1
        column = wrong.start() - (text.rfind("\n", 0, wrong.start()) + 1) + 1
        message = f"the character U+{ord(wrong.group()):04X} cannot stand in YAML; remove it"
        raise UnreadableYaml(Mistake(place_at(line, column), "", message))
    builder = _Builder(yaml.parse(text, Loader=LOADER), place_at, mistakes)
    root: Node | None = None
    try:
        for event in builder.events:
            if not isinstance(event, yaml.DocumentStartEvent):
                continue
            if root is not None:
                raise builder.fail(event, "a second document starts here (`---`); a recipe is one document")
            root = builder.node(next(builder.events), "", 0)
    except yaml.MarkedYAMLError as error:
        raise UnreadableYaml(_syntax_mistake(error, text, place_at)) from None
    except yaml.YAMLError as error:
        raise UnreadableYaml(Mistake(place_at(1, 1), "", f"not valid YAML: {shown(str(error), 120)}")) from None
    return root


def _syntax_mistake(error: yaml.MarkedYAMLError, text: str, place_at: Callable[[int, int], Place]) -> Mistake:
    """What PyYAML says over many lines, in one."""
    mark, context = error.problem_mark, error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    lines = text.splitlines()
    here = lines[line - 1] if line <= len(lines) else ""
    if "\t" in here[: len(here) - len(here.lstrip())]:
        tab = here.index("\t") + 1
        return Mistake(place_at(line, tab), "", "a tab stands in the indentation; YAML indents by spaces only")
    if context and error.context and "while parsing a flow" in error.context:
        bracket = "[" if "sequence" in error.context else "{"
        where = f"line {context.line + 1}, column {context.column + 1}"
        return Mistake(
            place_at(line, column), "", f"not valid YAML: the `{bracket}` of {where} is not closed before here"
        )
    problem = " ".join(str(part) for part in (error.problem, error.context) if part)
    return Mistake(place_at(line, column), "", f"not valid YAML: {shown(problem, 120)}")


def shown(text: str, limit: int = 40) -> str:
    r"""``text`` fit for a message: one line, printable, not longer than ``limit`` characters.

    >>> shown("a\nb")
    'a\\nb'
    """
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in cut)
