"""Recipes that cannot be read, or not as they are meant."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

from tests.faults.bad_input.room import Case, Room, added, instead


def text(content: str | bytes) -> Callable[[Room], object]:
    """A recipe of these very bytes."""
    data = content.encode() if isinstance(content, str) else content
    return lambda room: (room.folder / "recipe.yaml").write_bytes(data)


def in_encoding(encoding: str) -> Callable[[Room], object]:
    def write(room: Room) -> None:
        path = room.write_recipe()
        path.write_bytes(("# für alle\n" + path.read_text()).encode(encoding))

    return write


def extending(**files: str) -> Callable[[Room], object]:
    """A recipe that extends `a.yaml`, beside these files."""

    def write(room: Room) -> None:
        for name, content in files.items():
            (room.folder / f"{name}.yaml").write_text(content)
        room.append_to_recipe("extends: a.yaml\n")

    return write


def recipe_is_a_folder(room: Room) -> None:
    (room.folder / "recipe.yaml").mkdir()


def recipe_is_a_pipe(room: Room) -> None:
    os.mkfifo(room.folder / "recipe.yaml")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in itertools.pairwise("abcdefghi")
)

YAML_CASES = [
    Case(
        "a key twice",
        added("output_dir: other\n"),
        2,
        r"^recipe\.yaml:25:1: output_dir: given twice: first in line 15, again in line 25; keep one$",
    ),
    Case(
        "a section twice",
        added("model: {name: tiny}\n"),
        2,
        r"^recipe\.yaml:25:1: model: given twice: first in line 13, again in line 25; keep one$",
    ),
    Case(
        "a key of a section twice",
        instead("  steps: 2", "  steps: 2\n  steps: 3"),
        2,
        r"^recipe\.yaml:24:3: training\.steps: given twice: first in line 23, again in line 24; keep one$",
    ),
    Case(
        "a tab in the indentation",
        instead("  steps: 2", "\tsteps: 2"),
        2,
        r"^recipe\.yaml:23:1: a tab stands in the indentation; YAML indents by spaces only$",
    ),
    Case(
        "a tab between",
        added("evaluate:\n\tevery_steps: 1\n"),
        2,
        r"^recipe\.yaml:26:1: a tab stands in the indentation; YAML indents by spaces only$",
    ),
    Case(
        "a bracket left open",
        added("tracking: [tensorboard\n"),
        2,
        r"^recipe\.yaml:26:1: not valid YAML: the `\[` of line 25, column 11 is not closed before here$",
    ),
    Case(
        "a brace left open",
        added("zzz: {a: 1\n"),
        2,
        r"^recipe\.yaml:26:1: not valid YAML: the `\{` of line 25, column 6 is not closed before here$",
    ),
    Case(
        "a quote left open",
        added('zzz: "a\n'),
        2,
        r"^recipe\.yaml:26:1: not valid YAML: found unexpected.*while scanning a quoted scalar$",
    ),
    Case(
        "a colon too many",
        added("zzz: a: b\n"),
        2,
        r"^recipe\.yaml:25:7: not valid YAML: mapping values are not allowed in this context$",
    ),
    Case(
        "indented too far",
        instead("output_dir", "   output_dir"),
        2,
        r"^recipe\.yaml:15:14: not valid YAML: mapping values are not allowed in this context$",
    ),
    Case(
        "an empty recipe",
        text("\n"),
        2,
        r"^recipe\.yaml:1:1: the recipe is empty; it needs at.*`data`, `training` and `output_dir`$",
    ),
    Case(
        "a recipe of comments",
        text("# nothing yet\n"),
        2,
        r"^recipe\.yaml:1:1: the recipe is empty; it needs at.*`data`, `training` and `output_dir`$",
    ),
    Case(
        "a list at the top",
        text("- model: tiny\n"),
        2,
        r"^recipe\.yaml:1:1: a list stands at the top level; a.*of sections: `model:`, `data:`, .*",
    ),
    Case(
        "a word at the top",
        text("tiny\n"),
        2,
        r"^recipe\.yaml:1:1: a single value stands at the top.*of sections: `model:`, `data:`, .*",
    ),
    Case(
        "two documents",
        added("---\nmodel: tiny\n"),
        2,
        r"^recipe\.yaml:25:1: a second document starts here \(`---`\); a recipe is one document$",
    ),
    Case("UTF-16 recipe", in_encoding("utf-16"), 2, r"^recipe\.yaml:1:1: is UTF-16; save it as UTF-8$"),
    Case("UTF-32 recipe", in_encoding("utf-32"), 2, r"^recipe\.yaml:1:1: is UTF-32; save it as UTF-8$"),
    Case(
        "latin-1 recipe",
        in_encoding("latin-1"),
        2,
        r"^recipe\.yaml:1:4: byte 0xfc at offset 3 is not UTF-8; save the file as UTF-8$",
    ),
    Case(
        "a NUL in the recipe",
        added("zzz: a\0b\n"),
        2,
        r"^recipe\.yaml:25:7: the character U\+0000 cannot stand in YAML; remove it$",
    ),
    Case(
        "a control character in the recipe",
        added("zzz: a\x07b\n"),
        2,
        r"^recipe\.yaml:25:7: the character U\+0007 cannot stand in YAML; remove it$",
    ),
    Case(
        "an alias bomb",
        text(BOMB),
        2,
        r"^recipe\.yaml:5:12: more than 20000 values, with aliases written out; that is no recipe$",
    ),
    Case(
        "an alias of nothing",
        added("zzz: *nothing\n"),
        2,
        r"^recipe\.yaml:25:6: zzz: the alias `\*nothing` has no anchor before it$",
    ),
    Case(
        "an alias of itself",
        added("zzz: &a [*a]\n"),
        2,
        r"^recipe\.yaml:25:10: zzz\[0\]: the alias `\*a` stands inside the value it names$",
    ),
    Case(
        "two thousand nested lists",
        added("zzz: " + "[" * 2000 + "]" * 2000 + "\n"),
        2,
        # The second is what PyYAML's own parser says of it, where it has a limit.
        r"^recipe\.yaml:25:(69: nested deeper than 64 levels|\d+: not valid YAML: exceeded maximum nesting depth.*)$",
    ),
    Case(
        "a recipe of 2 MiB",
        added("# " + "x" * 2**21 + "\n"),
        2,
        r"^recipe\.yaml:1:1: is larger than 1 MiB; that is no recipe$",
    ),
    Case(
        "a merge key",
        added("zzz:\n  <<: {a: 1}\n"),
        2,
        r"^recipe\.yaml:26:3: zzz: merge keys \(`<<`\) are refused; use `extends:`, or write the keys out$",
    ),
    Case(
        "a python tag",
        instead("output_dir: run", "output_dir: !!python/object/apply:os.system [touch pwned]"),
        2,
        r"^recipe\.yaml:15:13: output_dir: the tag.*text, numbers, lists and sections$",
    ),
    Case(
        "a tag of our own",
        instead("output_dir: run", "output_dir: !path run"),
        2,
        r"^recipe\.yaml:15:13: output_dir: the tag `!path` is.*text, numbers, lists and sections$",
    ),
    Case("a key that is a list", added("? [a, b]\n: 1\n"), 2, r"^recipe\.yaml:25:3: a key must be a plain name$"),
    Case("the recipe is a folder", recipe_is_a_folder, 2, r"^recipe\.yaml: is a folder; give a YAML file$"),
    Case("the recipe is a pipe", recipe_is_a_pipe, 2, r"^recipe\.yaml: is no regular file; give a YAML file$"),
    Case(
        "no such recipe",
        text(""),
        2,
        r"^recpie\.yaml: no such recipe; did you mean recipe\.yaml\?$",
        command=("fine-tune", "recpie.yaml"),
    ),
    Case(
        "no such shipped recipe",
        text(""),
        2,
        r"^quikstart: no such recipe; did you mean quickstart\?$",
        command=("fine-tune", "quikstart"),
    ),
    Case(
        "an empty name",
        text(""),
        2,
        r"^an empty name: no such recipe; recipes that ship with trainkit: full, padded, quickstart$",
        command=("fine-tune", ""),
    ),
    Case(
        "extends what is not there",
        added("extends: base.yaml\n"),
        2,
        r"^recipe\.yaml:25:10: extends: base\.yaml does not exist$",
    ),
    Case(
        "extends itself",
        added("extends: recipe.yaml\n"),
        2,
        r"^recipe\.yaml:25:10: extends: goes round in a circle back to recipe\.yaml$",
    ),
    Case(
        "extends in a circle",
        extending(a="extends: b.yaml\nprecision: fp32\n", b="extends: a.yaml\nprecision: fp32\n"),
        2,
        r"^b\.yaml:1:10: extends: goes round in a circle back to a\.yaml$",
    ),
    Case(
        "extends a folder",
        added("extends: model\n"),
        2,
        r"^recipe\.yaml:25:10: extends: model is a folder; give a YAML file$",
    ),
    Case(
        "extends a list",
        added("extends: [a.yaml, b.yaml]\n"),
        2,
        r"^recipe\.yaml:25:10: extends: expected one path, relative to this file$",
    ),
    Case(
        "a mistake in what is extended",
        extending(a="training:\n  learning_rte: 1\n"),
        2,
        r"^a\.yaml:2:3: training\.learning_rte: unknown key; did you mean `learning_rate`\?$",
    ),
]
