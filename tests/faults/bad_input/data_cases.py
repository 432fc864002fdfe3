"""Data that cannot be trained on."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.bad_input.room import GOOD_LINES, Case, Room, both, conversation


def without_data(room: Room) -> None:
    room.data.rename(room.folder / "trian.jsonl")


def folder_without_data(room: Room) -> None:
    (room.folder / "empty").mkdir()
    (room.folder / "empty" / "notes.pdf").write_text("")
    room.set("data.train", "empty")


def broken_line(room: Room) -> None:
    lines = (GOOD_LINES * 1000)[:10_000]
    room.write_lines(*lines, '{"messages": [{"role": "user", content: 1}]}', *GOOD_LINES)


def broken_parquet(room: Room) -> None:
    (room.folder / "train.parquet").write_bytes(b"PAR1" + bytes(100))
    room.set("data.train", "train.parquet")


def mixed_schemas(room: Room) -> None:
    room.write_lines(*GOOD_LINES[:6], {"prompt": "a", "completion": "b"}, *GOOD_LINES[6:])


def mixed_kinds(room: Room) -> None:
    room.write_lines(*GOOD_LINES[:6], json.dumps("plain text"))


def wrong_type(room: Room) -> None:
    room.write_lines(*[{"text": "the quick brown fox"}] * 150, {"text": 5})


def content_is_a_number(room: Room) -> None:
    room.write_lines(*GOOD_LINES, {"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "a"}]})


def message(room: Room, **turn: str) -> None:
    room.write_lines(*GOOD_LINES, {"messages": [turn, {"role": "assistant", "content": "yes"}]})


def all_masked(room: Room) -> None:
    masked = [conversation(number) for number in range(12)]
    for one in masked:
        one["messages"][1]["weight"] = 0
    room.write_lines(*masked)


def endless_turns(room: Room) -> None:
    room.template("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    room.set("packing.separator", "none")


def prompt_fills_the_row(room: Room) -> None:
    long = [conversation(number) for number in range(12)]
    for one in long:
        one["messages"][0]["content"] += " the dog" * 200
    room.write_lines(*long)
    room.set("packing.long_documents", "truncate")
    room.take_out("packing.overlap")
    room.take_out("data.eval")  # of equal prompts' examples none might be held out


def document_too_long(room: Room) -> None:
    room.write_lines(*GOOD_LINES, conversation(12, "the lazy dog " * 200))
    room.set("packing.long_documents", "error")
    room.take_out("packing.overlap")


def mostly_empty_answers(room: Room) -> None:
    room.write_lines(*({"prompt": f"{number}?", "completion": "b" * (number % 2)} for number in range(20)))


DATA_CASES = [
    Case("data file missing", without_data, 3, r"train\.jsonl: no such file.*trian\.jsonl"),
    Case("folder without data", folder_without_data, 3, r"empty is a folder without data files .*notes\.pdf"),
    Case("empty file", lambda room: room.data.write_text(""), 3, r"train\.jsonl has 0 examples"),
    Case("blank lines only", lambda room: room.data.write_text("\n\n"), 3, r"train\.jsonl has 0 examples"),
    Case("broken JSON at line 10,001", broken_line, 3, r"train\.jsonl:10001: .*content: 1"),
    Case(
        "last line cut off",
        lambda room: room.data.write_text("\n".join(GOOD_LINES)[:-20]),
        3,
        r"train\.jsonl:12: the last line is cut off.*copy the file again",
    ),
    Case(
        "a byte that is not UTF-8",
        lambda room: room.data.write_bytes("\n".join(GOOD_LINES).replace("lazy", "l\xe4zy").encode("latin-1")),
        3,
        r"train\.jsonl:1: byte 0xe4 at offset [0-9]+ is not UTF-8",
    ),
    Case(
        "UTF-16",
        lambda room: room.data.write_text("\n".join(GOOD_LINES), encoding="utf-16"),
        3,
        r"train\.jsonl is UTF-16, not UTF-8; convert it",
    ),
    Case(
        "a key twice in one object",
        lambda room: room.write_lines(*GOOD_LINES, '{"messages": [], "messages": []}'),
        3,
        r"train\.jsonl:13: the key .?messages.? stands twice",
    ),
    Case("NaN in JSON", lambda room: room.write_lines(*GOOD_LINES, '{"messages": NaN}'), 3, r"train\.jsonl:13: NaN"),
    Case("truncated parquet", broken_parquet, 3, r"train\.parquet is no intact parquet file \(104 bytes\)"),
    Case(
        "unknown columns",
        lambda room: room.write_lines({"x": "a", "y": "b"}, {"x": "c", "y": "d"}),
        3,
        r"train\.jsonl: no format fits the columns .?x.?, .?y",
    ),
    Case(
        "missing column",
        lambda room: room.set("data.train", {"path": "train.jsonl", "format": "text"}),
        3,
        r"train\.jsonl: text needs a column `text`, and there are messages",
    ),
    Case("mixed schemas", mixed_schemas, 3, r"train\.jsonl:7: no column .?messages.?, only prompt, completion"),
    Case("mixed kinds", mixed_kinds, 3, r"train\.jsonl:7: a string, but the first examples were of another kind"),
    Case("a number for a text", wrong_type, 3, r"train\.jsonl:151: `text` must be text, not "),
    Case("a number for a message", content_is_a_number, 3, r"train\.jsonl:13.* message 1.*content.*number"),
    Case(
        "unknown role",
        lambda room: message(room, role="asistant", content="x"),
        3,
        r"train\.jsonl:13.* message 1: unknown role .?asistant.?; roles are .*did you mean .?assistant",
    ),
    Case(
        "rol for role",
        lambda room: message(room, rol="user", content="x"),
        3,
        r"train\.jsonl:13.* message 1 has no `role`, only rol, content",
    ),
    Case("all masked", all_masked, 3, r"train\.jsonl:1: 0 of [0-9,]+ tokens .* are trained"),
    Case(
        "turns without an end",
        endless_turns,
        3,
        r"train\.jsonl:1: the end of 12 trained turns is not trained.*packing\.separator: eos",
    ),
    Case(
        "prompts fill their rows",
        prompt_fills_the_row,
        3,
        r"of [0-9]+ documents none has a trained token",
    ),
    Case(
        "a document too long",
        document_too_long,
        3,
        r"train\.jsonl:13: [0-9]+ tokens, and packing\.sequence_length is 128.*long_documents: split",
    ),
    Case("half of the answers empty", mostly_empty_answers, 3, r"10 of 20 .*empty completion: 10.*max_dropped"),
    Case(
        "a data set of the hub without network",
        lambda room: room.set("data.train", "owner/data"),
        3,
        r"owner/data is no local file or folder.*hub cannot be reached",
    ),
]


def lines(*examples: str | dict[str, Any] | list[Any]) -> Callable[[Room], object]:
    """A data file of the good lines and then these."""
    return lambda room: room.write_lines(*GOOD_LINES, *map(as_line, examples))


def only(*examples: object) -> Callable[[Room], object]:
    """A data file of these examples."""
    return lambda room: room.write_lines(*map(as_line, examples))


def as_line(example: object) -> str:
    return example if isinstance(example, str) else json.dumps(example)


def source(**keys: object) -> Callable[[Room], object]:
    """The good file, with more said of it."""
    return lambda room: room.set("data.train", {"path": "train.jsonl", **keys})


def turn(**keys: object) -> Callable[[Room], object]:
    """A thirteenth example whose assistant says something that has these keys."""
    said = {key: value for key, value in ({"role": "assistant", "content": "yes"} | keys).items() if value != "absent"}
    return lines({"messages": [{"role": "user", "content": "is it?"}, said]})


def pairs(**keys: object) -> Callable[[Room], object]:
    """Twelve pairs of prompt and completion, and one of these keys."""
    good = [{"prompt": f"{number}?", "completion": "yes"} for number in range(12)]
    return only(
        *good,
        {key: value for key, value in ({"prompt": "is it?", "completion": "yes"} | keys).items() if value != "absent"},
    )


def alpaca(**keys: object) -> Callable[[Room], object]:
    good = [{"instruction": f"say {number}", "input": "", "output": "the dog"} for number in range(12)]
    return only(*good, {"instruction": "say it", "input": "", "output": "the fox"} | keys)


def sharegpt(*turns: object) -> Callable[[Room], object]:
    good = {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "the fox"}]}
    return only(*[good] * 12, {"conversations": list(turns)})


def file(name: str, content: str | bytes) -> Callable[[Room], object]:
    """Another data file, of these very bytes."""

    def write(room: Room) -> None:
        (room.folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        room.set("data.train", name)

    return write


def parquet(**columns: list[Any]) -> Callable[[Room], object]:
    def write(room: Room) -> None:
        pq.write_table(pa.table(columns), room.folder / "train.parquet")
        room.set("data.train", "train.parquet")

    return write


def parquet_cut(room: Room) -> None:
    parquet(text=["the fox"] * 1000)(room)
    path = room.folder / "train.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def folder(**files: str) -> Callable[[Room], object]:
    """A folder of data files; a name's `_` stands for its dot."""

    def write(room: Room) -> None:
        (room.folder / "data").mkdir()
        for name, content in files.items():
            (room.folder / "data" / name.replace("_", ".")).write_text(content)
        room.set("data.train", "data")

    return write


def broken_at(line: int) -> Callable[[Room], object]:
    def write(room: Room) -> None:
        before = (GOOD_LINES * (line // 12 + 1))[: line - 1]
        room.write_lines(*before, '{"messages": [', *GOOD_LINES)

    return write


def unreadable(room: Room) -> None:
    """A link into itself: not even root can read it."""
    room.data.unlink()
    room.data.symlink_to("train.jsonl")


def link_to_nothing(room: Room) -> None:
    room.data.unlink()
    room.data.symlink_to("elsewhere.jsonl")


def data_is_a_pipe(room: Room) -> None:
    room.data.unlink()
    os.mkfifo(room.data)


def trained_answers_too_far_back(room: Room) -> None:
    """Half of the prompts fill their rows, so that truncating leaves their answers out."""
    examples = [conversation(number) for number in range(12)]
    for one in examples[::2]:
        one["messages"][0]["content"] += " the dog" * 200
    room.write_lines(*examples)
    room.set("packing.long_documents", "truncate")
    room.take_out("packing.overlap")
    room.take_out("data.eval")


def nothing_fits(room: Room) -> None:
    room.write_lines(*(conversation(number, "the lazy dog " * 200) for number in range(12)))
    room.set("packing.long_documents", "drop")
    room.take_out("packing.overlap")


def one_document(room: Room) -> None:
    (room.folder / "book.txt").write_text("the quick brown fox " * 50)
    room.set("data.train", "book.txt")


JSON_CASES = [
    Case(
        "broken at line 1",
        broken_at(1),
        3,
        r"^train\.jsonl:1: broken JSON at column 15 near.*too early; mend it, or remove it$",
    ),
    Case(
        "broken at line 2",
        broken_at(2),
        3,
        r"^train\.jsonl:2: broken JSON at column 15 near.*too early; mend it, or remove it$",
    ),
    Case(
        "two values in a line",
        lines('{"messages": []} {"messages": []}'),
        3,
        r"^train\.jsonl:13: broken JSON at column 18 near.*JSON value; mend it, or remove it$",
    ),
    Case(
        "a comma behind the line",
        lines(GOOD_LINES[0] + ","),
        3,
        r"""^train\.jsonl:13: broken JSON at column 112 near '":.*JSON value; mend it, or remove it$""",
    ),
    Case(
        "single quotes",
        lines("{'messages': []}"),
        3,
        r"^train\.jsonl:13: broken JSON at column 2 near.*quotes; mend it, or remove it$",
    ),
    Case(
        "True of Python",
        lines('{"messages": True}'),
        3,
        r"^train\.jsonl:13: broken JSON at column 14 near.*value; mend it, or remove it$",
    ),
    Case(
        "a trailing comma",
        lines('{"messages": [],}'),
        3,
        r"^train\.jsonl:13: broken JSON at column 17 near.*quotes; mend it, or remove it$",
    ),
    Case(
        "a number for a line",
        lines("5"),
        3,
        r"^train\.jsonl:13: an example is an object, a list of messages or a string, not a number$",
    ),
    Case(
        "null for a line",
        lines("null"),
        3,
        r"^train\.jsonl:13: an example is an object, a list of messages or a string, not null$",
    ),
    Case(
        "Infinity in JSON",
        lines('{"messages": -Infinity}'),
        3,
        r"^train\.jsonl:13: -Infinity is no JSON value; write null or a number$",
    ),
    Case(
        "a number that is too large",
        lines('{"messages": 1e999}'),
        3,
        r'^train\.jsonl:13: the number "1e999" is too large; write it as text$',
    ),
    Case(
        "a number of 5,000 digits",
        lines('{"messages": ' + "9" * 5000 + "}"),
        3,
        r"^train\.jsonl:13: a number with thousands of digits; write it as text$",
    ),
    Case(
        "nested too deeply",
        lines('{"messages": ' + "[" * 5000 + "]" * 5000 + "}"),
        3,
        r"^train\.jsonl:13: nested too deeply; mend it, or remove it$",
    ),
    Case(
        "half a surrogate pair",
        turn(content="\ud83e"),
        3,
        r"^train\.jsonl:13: a lone surrogate \(\\ud83e\) in the text, which is no character; remove it$",
    ),
    Case("a NUL as an escape", turn(content="a\0b"), 3, r"^train\.jsonl:13: a NUL character in the text; remove it$"),
    Case(
        "a NUL byte",
        lambda room: room.data.write_text("\n".join(GOOD_LINES).replace("lazy", "la\0y")),
        3,
        r"^train\.jsonl:1: NUL byte at offset 101; the file is damaged or no text$",
    ),
    Case(
        "a control character in a string",
        lines('{"messages": "a\x01b"}'),
        3,
        r"^train\.jsonl:13: broken JSON at column 16 near.*character; mend it, or remove it$",
    ),
    Case(
        "a string left open",
        lines('{"messages": "a}'),
        3,
        r"^train\.jsonl:13: broken JSON at column 17 near.*too early; mend it, or remove it$",
    ),
    Case(
        "latin-1 in the last line",
        lambda room: room.data.write_bytes(("\n".join(GOOD_LINES) + '\n{"text": "\xe4"}\n').encode("latin-1")),
        3,
        r"^train\.jsonl:13: byte 0xe4 at offset 1,356 is not.*iconv -f latin1 -t UTF-8 IN > OUT$",
    ),
    Case(
        "a character cut in two",
        lambda room: room.data.write_bytes("\n".join(GOOD_LINES).encode() + b'\n{"text": "\xc3'),
        3,
        r"^train\.jsonl:13: byte 0xc3 at offset 1,356 is not.*inside a character; copy it again$",
    ),
    Case(
        "UTF-16 without a mark",
        lambda room: room.data.write_bytes("\n".join(GOOD_LINES).encode("utf-16-le")),
        3,
        r"^train\.jsonl is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 IN > OUT$",
    ),
    Case(
        "a list that is cut off",
        file("train.json", "[" + ",\n".join(GOOD_LINES)),
        3,
        r"^train\.json:12: the file is cut off inside or after item 12 of its list; copy it again$",
    ),
    Case(
        "a list that is cut off in an item",
        file("train.json", "[" + ",\n".join(GOOD_LINES)[:-20]),
        3,
        r"^train\.json:12: the file is cut off inside or after item 12 of its list; copy it again$",
    ),
    Case(
        "a list without a comma",
        file("train.json", "[" + "\n".join(GOOD_LINES) + "]"),
        3,
        r"^train\.json:2: broken JSON at column 1 near.*\] is missing; mend it, or remove it$",
    ),
    Case(
        "more behind the list",
        file("train.json", "[" + ",\n".join(GOOD_LINES) + "]\n]"),
        3,
        r'^train\.json:13: broken JSON at column 1 near "\]":.*the list; mend it, or remove it$',
    ),
    Case("an empty list", file("train.json", "[]"), 3, r"^train\.json has 0 examples$"),
    Case("an empty json file", file("train.json", ""), 3, r"^train\.json has 0 examples$"),
    Case(
        "a json file of a number",
        file("train.json", "5"),
        3,
        r"^train\.json:1: an example is an object, a list of messages or a string, not a number$",
    ),
    Case(
        "an item that is a number",
        file("train.json", "[" + GOOD_LINES[0] + ",\n5]"),
        3,
        r"^train\.json:2 \(item 2\): an example is an object, a list of messages or a string, not a number$",
    ),
    Case(
        "a json object that is cut off",
        file("train.json", '{"data": [1,'),
        3,
        r"^train\.json:1: the file is cut off; copy it again$",
    ),
]

FILE_CASES = [
    Case(
        "a folder that is missing",
        lambda room: room.set("data.train", "dataa/train.jsonl"),
        3,
        r"^dataa/train\.jsonl: no such file \(nor is there a folder dataa\)$",
    ),
    Case("a link to nothing", link_to_nothing, 3, r"^train\.jsonl is a link to elsewhere\.jsonl, which is not there$"),
    Case("a link to itself", unreadable, 3, r"^train\.jsonl is a link to train\.jsonl, which is not there$"),
    Case(
        "a pipe", data_is_a_pipe, 3, r"^train\.jsonl is neither a file nor a folder; write what it gives into a file$"
    ),
    Case(
        "an unknown type of file",
        file("train.docx", "PK"),
        3,
        r"^train\.docx: unknown file type; known are \.jsonl,.*\.parquet \(text types also with \.gz\)$",
    ),
    Case(
        "an archive",
        file("train.zip", "PK"),
        3,
        r"^train\.zip: unknown file type; known are \.jsonl,.*\.parquet \(text types also with \.gz\)$",
    ),
    Case(
        "no type of file",
        file("train", "{}"),
        3,
        r"^train: unknown file type; known are \.jsonl,.*\.parquet \(text types also with \.gz\)$",
    ),
    Case(
        "a folder with a stray file",
        folder(a_jsonl=GOOD_LINES[0], b_pdf=""),
        3,
        r"^data: cannot read b\.pdf in this folder \(known are.*or name single files as sources$",
    ),
    Case(
        "an empty folder",
        folder(),
        3,
        r"^data is a folder without data files \(\.jsonl, \.ndjson, \.json, \.csv, \.tsv, \.txt, \.parquet\)$",
    ),
    Case("an empty file in a folder", folder(a_jsonl=GOOD_LINES[0], b_jsonl=""), 3, r"^data/b\.jsonl has 0 examples$"),
    Case(
        "a pointer of Git LFS",
        file("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        3,
        r"^a\.jsonl is a Git LFS pointer, not the data; run `git lfs pull` where it was cloned$",
    ),
    Case(
        "gzip that is none",
        file("a.jsonl.gz", "\n".join(GOOD_LINES)),
        3,
        r"""^a\.jsonl\.gz is no intact gzip file \(1,345 bytes\): Not a gzipped file \(b'\{"'\)$""",
    ),
    Case(
        "gzip that is cut off",
        file("a.jsonl.gz", gzip.compress("\n".join(GOOD_LINES).encode())[:-30]),
        3,
        r"^a\.jsonl\.gz is cut off: its gzip data ends too early \(120 bytes\); copy it again$",
    ),
    Case(
        "gzip that is damaged",
        file("a.jsonl.gz", gzip.compress(b"x" * 999)[:20] + b"\xff" * 20),
        3,
        r"^a\.jsonl\.gz is no intact gzip file \(40 bytes\): Error.*data: invalid distance code$",
    ),
    Case(
        "parquet of no bytes",
        file("train.parquet", b""),
        3,
        r'^train\.parquet is no intact parquet file \(0 bytes\);.*"Parquet file size is 0 bytes"$',
    ),
    Case(
        "parquet that is cut off",
        parquet_cut,
        3,
        r'^train\.parquet is no intact parquet file \(353.*the file is corrupted or this is.*"$',
    ),
    Case("parquet without a row", parquet(text=[]), 3, r"^train\.parquet has 0 examples$"),
    Case(
        "parquet of bytes",
        parquet(text=[b"the fox"] * 3),
        3,
        r"""^train\.parquet: row 1: `text` must be text, not binary data \("b'the fox'"\)$""",
    ),
    Case(
        "parquet of other columns",
        parquet(a=["the fox"] * 3, b=[1, 2, 3]),
        3,
        r"^train\.parquet: no format fits the columns a, b;.*\{prompt: \.\.\., completion: \.\.\.\}`$",
    ),
    Case(
        "parquet with a NUL",
        parquet(text=["the fox", "the\0fox"]),
        3,
        r"^train\.parquet: row 2: a NUL character in the text; remove it$",
    ),
    Case("csv of one line", file("a.csv", "prompt,completion\n"), 3, r"^a\.csv has 0 examples$"),
    Case("csv of nothing", file("a.csv", ""), 3, r"^a\.csv has 0 examples$"),
    Case(
        "csv with a field too many",
        file("a.csv", "prompt,completion\nwhat,it\nis,it,not\n"),
        3,
        r"^a\.csv:3: 3 fields, but the header has 2 \(prompt,.*a field that holds the delimiter$",
    ),
    Case(
        "csv with a field too few",
        file("a.csv", "prompt,completion\nwhat,it\nis\n"),
        3,
        r"^a\.csv:3: 1 field, but the header has 2 \(prompt,.*a field that holds the delimiter$",
    ),
    Case(
        "csv with a quote left open",
        file("a.csv", 'prompt,completion\nwhat,it\n"is,it\nnot,it\n'),
        3,
        r"^a\.csv:3: a quote is opened and never closed; close it$",
    ),
    Case(
        "csv with a column twice",
        file("a.csv", "prompt,prompt\nwhat,it\n"),
        3,
        r'^a\.csv:1: the first line must name the columns, and it names "prompt" twice$',
    ),
    Case(
        "csv with a column without name",
        file("a.csv", "prompt,\nwhat,it\n"),
        3,
        r"^a\.csv:1: the first line must name the columns, and it has a column without a name$",
    ),
    Case(
        "csv without a header",
        file("a.csv", "what is it,the fox\nwhat is it,the dog\n"),
        3,
        r"^a\.csv: no format fits the columns what is it, the.*a csv file is taken as its header\)$",
    ),
    Case(
        "csv in latin-1",
        file("a.csv", "prompt,completion\nwhat,gr\xfcn\n".encode("latin-1")),
        3,
        r"^a\.csv:2: byte 0xfc at offset 25 is not UTF-8; if it.*iconv -f latin1 -t UTF-8 IN > OUT$",
    ),
    Case("a text of nothing", file("a.txt", ""), 3, r"^a\.txt has 0 examples$"),
    Case(
        "a text in UTF-16",
        file("a.txt", "the fox".encode("utf-16")),
        3,
        r"^a\.txt is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 IN > OUT$",
    ),
    Case(
        "a single text to hold out of",
        one_document,
        3,
        r"^book\.txt is one document, so data\.eval: 0\.3 cannot.*or cut the text into several files$",
    ),
    Case(
        "a name of a file",
        source(name="all"),
        3,
        r"^train\.jsonl: `name:` is for a hub data set, and this is a file; leave it out$",
    ),
    Case(
        "a split of a file",
        source(split="test"),
        3,
        r"^train\.jsonl: `split:` is for a hub data set, and this is a file; leave it out$",
    ),
    Case(
        "a split of the shipped data",
        lambda room: room.set("data.train", {"path": "quickstart", "split": "test"}),
        3,
        r"^quickstart: the shipped data set has the splits train and eval, and no `name:`$",
    ),
    Case(
        "held-out file missing",
        lambda room: room.set("data.eval", "eval.jsonl"),
        3,
        r"^eval\.jsonl: no such file; did you mean train\.jsonl\?$",
    ),
    Case(
        "held-out file empty",
        both(lambda room: (room.folder / "e.jsonl").write_text(""), lambda room: room.set("data.eval", "e.jsonl")),
        3,
        r"^e\.jsonl has 0 examples$",
    ),
    Case(
        "a second source is broken",
        both(
            lambda room: (room.folder / "b.jsonl").write_text("{\n"),
            lambda room: room.set("data.train", ["train.jsonl", "b.jsonl"]),
        ),
        3,
        r'^b\.jsonl:1: broken JSON at column 2 near "\{": it ends too early; mend it, or remove it$',
    ),
]

EXAMPLE_CASES = [
    Case(
        "a string for the messages",
        lines({"messages": "hello"}),
        3,
        r'^train\.jsonl:13: expected a list of messages, not a string \("hello"\)$',
    ),
    Case(
        "null for the messages",
        only({"messages": None}),
        3,
        r"^train\.jsonl: expected lists of messages, found.*is another format, say `format:`$",
    ),
    Case(
        "no messages at all",
        only(*[{"messages": []}] * 12),
        3,
        r"^train\.jsonl: expected lists of messages, found.*is another format, say `format:`$",
    ),
    Case(
        "messages of strings",
        lines({"messages": ["hello"]}),
        3,
        r'^train\.jsonl:13: message 1 must be an object with `role`, not a string \("hello"\)$',
    ),
    Case(
        "a message without content",
        turn(content="absent"),
        3,
        r"^train\.jsonl:13: message 2 has no `content`, only role$",
    ),
    Case(
        "a message with null",
        turn(content=None),
        3,
        r"^train\.jsonl:13: message 2: `content` is null; only.*with `tool_calls` may have none$",
    ),
    Case(
        "a message with an object",
        turn(content={"text": "yes"}),
        3,
        r'^train\.jsonl:13: message 2: `content` must be text, not an object \(\{"text": "yes"\}\)$',
    ),
    Case(
        "a message with a picture",
        turn(content=[{"type": "image_url", "image_url": "a.png"}]),
        3,
        r'^train\.jsonl:13: message 2: content part 1 is "image_url"; only text can be trained$',
    ),
    Case(
        "a message with a number as part",
        turn(content=["a", 5]),
        3,
        r"^train\.jsonl:13: message 2: content part 2 must be text, not a number \(5\)$",
    ),
    Case(
        "a role that is a number",
        turn(role=5),
        3,
        r"^train\.jsonl:13: message 2: unknown role 5; roles.*tool, developer, function$",
    ),
    Case(
        "a role in capitals",
        turn(role="Assistant"),
        3,
        r'^train\.jsonl:13: message 2: unknown role.*function; did you mean "assistant"\?$',
    ),
    Case(
        "a weight of a half",
        turn(weight=0.5),
        3,
        r"^train\.jsonl:13: message 2: `weight` is 0\.5; only 0 and 1 are possible: trained or not$",
    ),
    Case(
        "a weight in words",
        turn(weight="no"),
        3,
        r'^train\.jsonl:13: message 2: `weight` is "no"; only 0 and 1 are possible: trained or not$',
    ),
    Case(
        "weights that contradict",
        turn(weight=1, train=False),
        3,
        r"^train\.jsonl:13: message 2: weight, train contradict each other$",
    ),
    Case(
        "a call without a name",
        turn(tool_calls=[{"arguments": "{}"}]),
        3,
        r'^train\.jsonl:13: message 2: a function call needs.*not \{"arguments": "\{\}"\}$',
    ),
    Case(
        "a call with broken arguments",
        turn(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
        3,
        r'^train\.jsonl:13: message 2: the arguments of "f" is.*enclosed in double quotes\): "\{"$',
    ),
    Case(
        "a call with a list of arguments",
        turn(tool_calls=[{"function": {"name": "f", "arguments": [1]}}]),
        3,
        r'^train\.jsonl:13: message 2: the arguments of "f" must be an object, not \[1\]$',
    ),
    Case(
        "tools in broken JSON",
        lines(conversation(1) | {"tools": "[{"}),
        3,
        r'^train\.jsonl:13: `tools` is no JSON \(Expecting property name enclosed in double quotes\): "\[\{"$',
    ),
    Case(
        "tools that are an object",
        lines(conversation(1) | {"tools": {"name": "f"}}),
        3,
        r'^train\.jsonl:13: `tools` must be a list of functions, not \{"name": "f"\}$',
    ),
    Case(
        "a tool without a name",
        lines(conversation(1) | {"tools": [{"a": 1}]}),
        3,
        r'^train\.jsonl:13: a tool needs at least a `name`: \{"a": 1\}$',
    ),
    Case(
        "pictures beside the messages",
        lines(conversation(1) | {"images": ["a.png"]}),
        3,
        r"^train\.jsonl:13: has `images`; only text can be trained$",
    ),
    Case(
        "two system prompts",
        lines(
            conversation(1)
            | {
                "system": "be kind",
                "messages": [
                    {"role": "system", "content": "be short"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ],
            }
        ),
        3,
        r"^train\.jsonl:13: two system prompts: the `system` column, and another one as first message$",
    ),
    Case(
        "a system prompt that is a list",
        lines(conversation(1) | {"system": ["be kind"]}),
        3,
        r'^train\.jsonl:13: `system` must be text, not a list \(\["be kind"\]\)$',
    ),
    Case(
        "no answer anywhere",
        only(*[{"messages": [{"role": "user", "content": "a"}]}] * 12),
        3,
        r"^train\.jsonl: none of 12 examples is left to train on \(no assistant turn: 12\)$",
    ),
    Case(
        "mostly without an answer",
        lambda room: room.write_lines(*GOOD_LINES, *[{"messages": [{"role": "user", "content": "a"}]}] * 3),
        3,
        r"^train\.jsonl: 3 of 15 examples leave nothing to.*0\.01; mend them, or raise it$",
    ),
    Case(
        "sharegpt with a role of its own",
        sharegpt({"from": "humam", "value": "a"}, {"from": "gpt", "value": "b"}),
        3,
        r'^train\.jsonl:13: message 1: unknown role "humam";.*did you mean "human"\?$',
    ),
    Case(
        "sharegpt without a value",
        sharegpt({"from": "human", "text": "a"}),
        3,
        r"^train\.jsonl:13: message 1 has no `value`, only from, text$",
    ),
    Case(
        "sharegpt with a number",
        sharegpt({"from": "human", "value": 5}),
        3,
        r"^train\.jsonl:13: message 1: `value` must be text, not a number \(5\)$",
    ),
    Case(
        "messages said to be sharegpt",
        source(format="sharegpt"),
        3,
        r"^train\.jsonl: sharegpt has from and value, and these.*and content; say `format: messages`$",
    ),
    Case(
        "messages said to be text",
        source(format="text"),
        3,
        r"^train\.jsonl: text needs a column `text`, and there.*name it: `columns: \{text: \.\.\.\}`$",
    ),
    Case("a prompt that is null", pairs(prompt=None), 3, r"^train\.jsonl:13: `prompt` must be text, not null$"),
    Case(
        "a completion that is a number",
        pairs(completion=5),
        3,
        r"^train\.jsonl:13: `completion` must be text, not a number \(5\)$",
    ),
    Case(
        "a completion that is missing",
        pairs(completion="absent"),
        3,
        r'^train\.jsonl:13: no column "completion", only.*of a source; 1 of 13 lack it: 13$',
    ),
    Case(
        "a prompt in messages and a completion in text",
        pairs(prompt=[{"role": "user", "content": "a"}]),
        3,
        r"^train\.jsonl:13: `prompt` and `completion` must both be text, or both lists of messages$",
    ),
    Case(
        "tools beside a text",
        pairs(tools=[{"name": "f"}]),
        3,
        r"^train\.jsonl:13: `tools` need a prompt and a completion that are lists of messages$",
    ),
    Case(
        "an instruction that is a list",
        alpaca(instruction=["a"]),
        3,
        r'^train\.jsonl:13: `instruction` must be text, not a list \(\["a"\]\)$',
    ),
    Case(
        "an output that is an object",
        alpaca(output={"a": 1}),
        3,
        r'^train\.jsonl:13: `output` must be text, not an object \(\{"a": 1\}\)$',
    ),
    Case(
        "a history that is text",
        alpaca(history="before"),
        3,
        r'^train\.jsonl:13: `history` must be a list of \[question, answer\] pairs, not "before"$',
    ),
    Case(
        "a history of triples",
        alpaca(history=[["a", "b", "c"]]),
        3,
        r'^train\.jsonl:13: `history` must be a list of \[question, answer\] pairs, not \[\["a", "b", "c"\]\]$',
    ),
    Case(
        "two columns for one",
        only(*[{"messages": [], "conversations": []}] * 3),
        3,
        r"^train\.jsonl: messages: which column is `messages`:.*say `columns: \{messages: messages\}`$",
    ),
    Case(
        "two formats in one",
        only(*[{"instruction": "a", "output": "b", "prompt": "c", "completion": "d"}] * 3),
        3,
        r"^train\.jsonl: could be alpaca or prompt-completion.*say which with `format:`$",
    ),
    Case(
        "a column that is not there",
        source(format="prompt-completion", columns={"prompt": "question", "completion": "answer"}),
        3,
        r'^train\.jsonl: `columns: \{completion: answer\}`: no column "answer"; there are messages$',
    ),
    Case(
        "a column of ours that is none",
        source(columns={"promt": "messages"}),
        3,
        r'^train\.jsonl: `columns:` names promt, which no.*as prompt; did you mean "prompt"\?$',
    ),
    Case(
        "columns of plain text",
        both(
            lambda room: room.write_lines('"the fox"', '"the dog"'),
            lambda room: room.set("data.train", {"path": "train.jsonl", "columns": {"text": "a"}}),
        ),
        3,
        r"^train\.jsonl: `columns:` has no meaning here: the examples are plain text, without columns$",
    ),
    Case(
        "an object without a key",
        lines({}),
        3,
        r'^train\.jsonl:13: no column "messages", only an empty.*of a source; 1 of 13 lack it: 13$',
    ),
    Case(
        "text that is an object",
        only(*[{"text": "the fox"}] * 150, {"text": {"a": 1}}),
        3,
        r'^train\.jsonl:151: `text` must be text, not an object \(\{"a": 1\}\)$',
    ),
    Case(
        "text that is empty everywhere",
        only(*[{"text": ""}] * 12),
        3,
        r"^train\.jsonl: none of 12 examples is left to train on \(empty text: 12\)$",
    ),
    Case(
        "half of the prompts fill their rows",
        trained_answers_too_far_back,
        3,
        r"^train\.jsonl: 6 of 12 examples leave nothing to.*0\.01; mend them, or raise it$",
    ),
    Case(
        "no document fits a row",
        nothing_fits,
        3,
        r"^train\.jsonl: of 10 documents none has a trained.*and packing\.long_documents$",
    ),
    Case(
        "too few to hold one out",
        both(lambda room: room.write_lines(*GOOD_LINES[:1]), lambda room: room.set("data.eval", 0.01)),
        3,
        r"^train\.jsonl is one document, so data\.eval: 0\.01.*or cut the text into several files$",
    ),
]
