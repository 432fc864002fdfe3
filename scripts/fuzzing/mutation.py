"""Files that are nearly right: a good one, with a few places in it changed.

An input depends on its kind, the seed and its number, so that any can be made again.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainkit.recipe.reader import shipped_recipes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MOST_CHANGES = 4
LONGEST_CUT = 60

IN_ANY = (
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r\n",
    b"\t",
    b" ",
    "\u2028🦊e\u0301".encode(),
    b"null",
    b"-1",
    b"0",
)
IN_RECIPES = (
    b"[", b"{", b"}", b"]", b": ", b"- ", b"&a ", b"*a", b"!!python/object:os.system ", b"|", b">", b"'", b'"', b"#",
    b"---\n", b"...\n", b"<<: ", b"? ", b"%YAML 1.1\n", b".nan", b".inf", b"1e999", b"9" * 5000, b"1_000", b"0x10",
    b"no", b"true", b"auto", b"[" * 100, b"extends: recipe.yaml\n", b"steps: 1\n", b"packing: {sequence_length: 8}\n",
)  # fmt: skip
IN_DATA = (
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u0000", b"\\ud800", b"NaN", b"1e999", b"9" * 5000,
    b"[" * 5000, b"true", b'""', b"{}", b"[]", b'"text": "a"', b'"messages": []', b"<|end|>", b"<|im_end|>",
    b"assistant", b"system", b"tool_calls", b"function_call", b"weight", b"name", b"content", b"value",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """What is mutated: good files, what is put into them, and the command line that reads the result."""

    file: str
    good: Callable[[], Sequence[bytes]]
    hostile: Sequence[bytes]
    arguments: Sequence[str]


def good_recipes() -> list[bytes]:
    """The recipes that ship with trainkit."""
    return [path.read_bytes() for path in shipped_recipes().values()]


def good_data() -> list[bytes]:
    """A few examples of every format."""
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": '{"at": "fox"}'}}]}
    said = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a fox", "weight": 1}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    examples: list[list[object]] = [
        [{"messages": said}, {"messages": [{"role": "system", "content": "be short"}, *said, *said]}],
        [{"messages": [*said, {"role": "user", "content": "look"}, called], "tools": tools}],
        [
            {
                "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a dog"}],
                "system": "be kind",
            }
        ],
        [{"instruction": "say it", "input": "", "output": "a fox", "history": [["before", "that"]]}],
        [{"prompt": "it is", "completion": " a fox"}, {"prompt": [said[0]], "completion": [said[1]]}],
        [{"text": "the quick brown fox"}, {"text": "jumps over the lazy dog"}],
        ["the quick brown fox", "jumps"],
        [said, said],
    ]
    return ["".join(json.dumps(example) + "\n" for example in some * 2).encode() for some in examples]


KINDS = {
    "recipes": Kind("recipe.yaml", good_recipes, (*IN_ANY, *IN_RECIPES), ("show", "recipe.yaml")),
    "data": Kind("train.jsonl", good_data, (*IN_ANY, *IN_DATA), ("inspect-data", "recipe.yaml", "--examples", "1")),
}


def mutated(kind: str, seed: int, number: int) -> bytes:
    """Input ``number`` of a kind.

    >>> mutated("data", 0, 7) == mutated("data", 0, 7) != mutated("data", 0, 8)
    True
    """
    draw = random.Random(f"{kind} {seed} {number}")
    content = draw.choice(KINDS[kind].good())
    for _ in range(draw.randint(1, MOST_CHANGES)):
        content = _changed(content, draw, KINDS[kind].hostile)
    return content


def _changed(content: bytes, draw: random.Random, hostile: Sequence[bytes]) -> bytes:
    """One place changed: something put in, taken out, said twice, moved, flipped, or all that follows cut off."""
    at = draw.randint(0, len(content))
    end = min(len(content), at + draw.randint(0, LONGEST_CUT))
    match draw.randrange(8):
        case 0 | 1 | 2:
            return content[:at] + draw.choice(hostile) + content[end if draw.random() < 0.5 else at :]
        case 3:
            return content[:at] + content[end:]
        case 4:
            return content[:end] + content[at:end] + content[end:]
        case 5:
            to = draw.randint(0, len(content))
            return content[:to] + content[at:end] + content[to:]
        case 6:
            flipped = bytearray(content)
            if at < len(flipped):
                flipped[at] ^= 1 << draw.randrange(8)
            return bytes(flipped)
        case _:
            return content[:at]
