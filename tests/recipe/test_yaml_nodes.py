"""The YAML layer: what a scalar means, where it stands, and what is refused before anything costs time."""

from __future__ import annotations

import math
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trainkit.recipe import yaml_nodes
from trainkit.recipe.yaml_nodes import (
    Items,
    Mapping,
    Mistake,
    Place,
    Scalar,
    UnreadableYaml,
    decoded,
    parse_yaml,
    reading_of_yaml_1_1,
    scalar_value,
    shown,
)


def place_at(line: int, column: int) -> Place:
    return Place("r.yaml", line, column)


def tree_of(text: str) -> object:
    mistakes: list[Mistake] = []
    tree = parse_yaml(text, place_at, mistakes)
    assert not mistakes
    return tree


def refusal_of(text: str) -> str:
    mistakes: list[Mistake] = []
    with pytest.raises(UnreadableYaml) as caught:
        parse_yaml(text, place_at, mistakes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2.0e-4", 2e-4),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("+3", 3),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        *[(text, text) for text in ("no", "on", "Yes", "1:30", "1_000", "0b11", "e5", "1e", "--1", "tRue", "١٢")],
    ],
)
def test_a_plain_scalar_follows_yaml_1_2(text: str, value: object) -> None:
    read = scalar_value(text)
    assert read == value
    assert type(read) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(float(scalar_value(".nan") or 0))


def test_thousands_of_digits_are_no_crash() -> None:
    assert scalar_value("9" * 5000) == math.inf


@pytest.mark.parametrize("text", ["no", "off", "on", "YES", "010", "-017", "1_000", "1:30", "0b11"])
def test_what_yaml_1_1_reads_differently_is_noticed(text: str) -> None:
    assert reading_of_yaml_1_1(text) is not None
    assert yaml.safe_load(text) != scalar_value(text)


@given(st.floats(allow_nan=False) | st.integers(-(10**20), 10**20))
def test_numbers_of_json_are_read_as_json_reads_them(number: float) -> None:
    assert scalar_value(repr(number).replace("inf", ".inf")) == number


def test_every_value_knows_its_place() -> None:
    tree = tree_of("a:\n  - x\n  - {b: 'y'}\n")
    assert isinstance(tree, Mapping)
    items = tree.entries["a"].node
    assert isinstance(items, Items)
    assert items.items[0] == Scalar(Place("r.yaml", 2, 5), "x", "x")
    inner = items.items[1]
    assert isinstance(inner, Mapping)
    assert inner.entries["b"].place == Place("r.yaml", 3, 6)
    assert inner.entries["b"].node == Scalar(Place("r.yaml", 3, 9), "y", "y", quoted=True)


def test_quoted_and_block_scalars_stay_text() -> None:
    tree = tree_of("a: '1'\nb: \"true\"\nc: |-\n  2\n")
    assert isinstance(tree, Mapping)
    assert [entry.node.value for entry in tree.entries.values() if isinstance(entry.node, Scalar)] == ["1", "true", "2"]


def test_keys_are_text_whatever_they_look_like() -> None:
    tree = tree_of("on: 1\n2: x\nnull: y\n")
    assert isinstance(tree, Mapping)
    assert list(tree.entries) == ["on", "2", "null"]


def test_no_document_is_no_tree() -> None:
    assert tree_of("# nothing\n") is None


def test_an_alias_gives_the_same_value() -> None:
    tree = tree_of("a: &x [1, 2]\nb: *x\n")
    assert isinstance(tree, Mapping)
    assert tree.entries["a"].node == tree.entries["b"].node


def test_both_lines_of_a_duplicate_key_are_named() -> None:
    mistakes: list[Mistake] = []
    tree = parse_yaml("t:\n  a: 1\n  b: 2\n  a: 3\n", place_at, mistakes)
    assert list(map(str, mistakes)) == ["r.yaml:4:3: t.a: given twice: first in line 2, again in line 4; keep one"]
    assert isinstance(tree, Mapping)


def test_a_tag_is_refused_by_name() -> None:
    mistakes: list[Mistake] = []
    parse_yaml("a: !!python/object/apply:os.system [x]\nb: !mine 3\nc: !!str 3\n", place_at, mistakes)
    said = "\n".join(map(str, mistakes))
    assert "r.yaml:1:4: a: the tag `tag:yaml.org,2002:python/object/apply" in said
    assert "`!mine`" in said
    assert "2002:str`" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n\tb: 1\n", "r.yaml:2:1: a tab stands in the indentation"),
        ("a: [1, 2\nb: 3\n", "the `[` of line 1, column 4 is not closed"),
        ("a: {b: 1\nc: 3\n", "the `{` of line 1, column 4 is not closed"),
        ("a: 'x\n", "r.yaml:2:1: not valid YAML: "),
        ("a: b: c\n", "r.yaml:1:5: not valid YAML: mapping values are not allowed"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1: a second document starts here"),
        ("<<: {a: 1}\n", "merge keys (`<<`) are refused; use `extends:`"),
        ("? [a]\n: 1\n", "a key must be a plain name"),
        ("a: *x\n", "the alias `*x` has no anchor before it"),
        ("a: &x [*x]\n", "the alias `*x` stands inside the value it names"),
        ("a: \x07\n", "r.yaml:1:4: the character U+0007 cannot stand in YAML"),
        ('a: "\\0"\n', "r.yaml:1:4: a: holds a character that no text may hold"),
        ("[" * 65 + "]" * 65, "nested deeper than 64 levels"),
        ("a: [" + "1," * 20_000 + "]", "more than 20000 values"),
        ("a: &x 1\nb: [" + "*x," * 1001 + "]", "more than 1000 aliases"),
    ],
)
def test_what_has_no_tree_is_refused_in_one_line(text: str, message: str) -> None:
    said = refusal_of(text)
    assert message in said
    assert "\n" not in said
    assert len(said) <= 200


def test_sixty_four_levels_are_read() -> None:
    assert isinstance(tree_of("[" * 64 + "]" * 64), Items)


def test_the_python_parser_refuses_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_nodes, "LOADER", yaml.SafeLoader)
    assert "a tab stands in the indentation" in refusal_of("a:\n\tb: 1\n")
    assert "the `[` of line 1, column 4 is not closed" in refusal_of("a: [1, 2\nb: 3\n")
    assert "holds a character that no text may hold" in refusal_of('a: "\\ud800"\n')  # fmt: skip


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text", [bomb(9), "[" * 500_000, "{a: " * 200_000, "- " * 500_000, "a: 1\n" * 200_000, "&a " * 300_000]
)
def test_a_file_made_to_cost_time_costs_none(text: str) -> None:
    start = time.process_time()
    refusal_of(text)
    assert time.process_time() - start < 2


def test_text_is_utf_8_with_or_without_a_mark() -> None:
    assert decoded("é: 1".encode(), "r.yaml") == "é: 1"
    assert decoded("é: 1".encode("utf-8-sig"), "r.yaml") == "é: 1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: é\n".encode("latin-1"), "r.yaml:1:4: byte 0xe9 at offset 3 is not UTF-8; save the file as UTF-8"),
        (b"\xef\xbb\xbfa: 1\nb: \xff", "r.yaml:2:4: byte 0xff at offset 11 is not UTF-8"),
        ("a: 1".encode("utf-16"), "r.yaml:1:1: is UTF-16; save it as UTF-8"),
        ("a: 1".encode("utf-32"), "r.yaml:1:1: is UTF-32; save it as UTF-8"),
        (b"#" * (1 << 20) + b"\n", "is larger than 1 MiB"),
    ],
)
def test_other_encodings_are_refused_with_the_byte(content: bytes, message: str) -> None:
    with pytest.raises(UnreadableYaml) as caught:
        decoded(content, "r.yaml")
    assert message in str(caught.value)


@given(st.text())
def test_what_is_shown_fits_a_line(text: str) -> None:
    assert "\n" not in shown(text)
    assert shown(text).isprintable()
