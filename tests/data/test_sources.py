from __future__ import annotations

import gzip
import json
import re
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data.sources import Example, read_source, source_files
from trainkit.errors import DataError
from trainkit.recipe.schema import Source

if TYPE_CHECKING:
    from collections.abc import Callable

GOOD = '{"text": "one"}\n'


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | bytes], str]:
    """Write a file into the working folder and return its name, as a recipe would give it."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return write_file


def read(path: str, **keys: Any) -> list[Example]:
    return list(read_source(Source(path=path, **keys)))


def refusal(path: str, **keys: Any) -> str:
    """The message of the DataError that reading ends in; one line."""
    with pytest.raises(DataError) as caught:
        read(path, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what is read --------------------------------------------------------------------------------------------------


def test_jsonl_with_blank_lines_and_byte_order_mark(write: Any) -> None:
    name = write("a.jsonl", b'\xef\xbb\xbf{"text": " a "}\r\n\n   \n[{"role": "user"}]\n"bare"')
    assert read(name) == [
        Example("a.jsonl:1", {"text": " a "}),
        Example("a.jsonl:4", [{"role": "user"}]),
        Example("a.jsonl:5", "bare"),
    ]


def test_json_list_names_line_and_item(write: Any) -> None:
    name = write("a.json", '\n[\n {"text": "a"},\n {\n "text": "b"}, {"text": "c"}\n]\n')
    assert [(example.place, example.record) for example in read(name)] == [
        ("a.json:3 (item 1)", {"text": "a"}),
        ("a.json:4 (item 2)", {"text": "b"}),
        ("a.json:5 (item 3)", {"text": "c"}),
    ]


@pytest.mark.parametrize(
    ("content", "records"),
    [
        ('{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}', [{"text": "a"}, {"text": "b"}]),
        ('{"messages": [{"role": "user"}]}', [{"messages": [{"role": "user"}]}]),
        ('{"text": "a"}\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}]),
        ('[{"role": "user"}]\n\n[{"role": "user"}]', [[{"role": "user"}], [{"role": "user"}]]),
        ('{\n"text": "a"\n}', [{"text": "a"}]),
        ('[["turn"]]', [["turn"]]),
    ],
    ids=["object around a list", "one example", "really jsonl", "jsonl of lists", "one object, indented", "one line"],
)
def test_json_of_other_shapes(write: Any, content: str, records: list[object]) -> None:
    assert [example.record for example in read(write("a.json", content))] == records


def test_csv_counts_lines_through_quoted_newlines(write: Any) -> None:
    name = write("a.csv", 'prompt,completion\n"a\r\n\nb","c ""d"""\n\nx,\n')
    assert read(name) == [
        Example("a.csv:2", {"prompt": "a\r\n\nb", "completion": 'c "d"'}),
        Example("a.csv:6", {"prompt": "x", "completion": ""}),
    ]


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")])
def test_csv_with_another_delimiter(write: Any, name: str, mark: str) -> None:
    content = f"prompt{mark}completion\na, b{mark}c\n"
    assert read(write(name, content))[0].record == {"prompt": "a, b", "completion": "c"}


def test_csv_field_of_a_megabyte(write: Any) -> None:
    assert read(write("a.csv", "text\n" + "x" * 2**20 + "\n"))[0].record == {"text": "x" * 2**20}


def test_txt_is_one_example_exactly_as_it_stands(write: Any) -> None:
    assert read(write("a.txt", "\ufeff  one\r\n\ntwo\x0c \n")) == [Example("a.txt:1", "  one\r\n\ntwo\x0c \n")]


def test_parquet_leaves_out_null_fields_of_structs(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": [turns, None], "id": [1, None]}), path)
    assert read(str(path)) == [
        Example(f"{path}: row 1", {"messages": turns, "id": 1}),
        Example(f"{path}: row 2", {"messages": None, "id": None}),
    ]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.JSON.gz", "a.txt.gz"])
def test_gzip(write: Any, name: str) -> None:
    assert len(read(write(name, gzip.compress(GOOD.encode())))) == 1


def test_folder_in_the_order_of_names(write: Any) -> None:
    write("data/b.txt", "two")
    write("data/a.txt", "one")
    write("data/README.md", "about")
    write("data/.gitattributes", "")
    assert [(example.place, example.record) for example in read("data/")] == [
        ("data/a.txt:1", "one"),
        ("data/b.txt:1", "two"),
    ]
    assert source_files(Source(path="data")) == (Path("data/a.txt").absolute(), Path("data/b.txt").absolute())


def test_split_picks_files_of_a_folder(write: Any) -> None:
    for name in ("train-0001.jsonl", "train.jsonl", "training.jsonl", "test.jsonl"):
        write(f"data/{name}", GOOD)
    files = source_files(Source(path="data", split="train"))
    assert [file.name for file in files] == ["train-0001.jsonl", "train.jsonl"]
    assert "for the split eval" in refusal("data", split="eval")


def test_shipped_data_set_and_its_splits() -> None:
    train, held_out = (source_files(Source(path="quickstart", split=split)) for split in (None, "eval"))
    assert [file.name for file in (*train, *held_out)] == ["train.jsonl", "eval.jsonl"]
    assert train[0].parent.parts[-4:] == ("trainkit", "shipped", "data", "quickstart")
    assert "train and eval" in refusal("quickstart", split="test")


def test_reading_twice_gives_the_same(write: Any) -> None:
    name = write("a.jsonl", GOOD * 3)
    assert read(name) == read(name)


def test_memory_is_bounded_by_a_block(write: Any) -> None:
    name = write("a.jsonl", ('{"prompt": "' + "p" * 400 + '", "completion": "' + "c" * 400 + '"}\n') * 15_000)
    size = Path(name).stat().st_size
    examples = read_source(Source(path=name))
    next(examples)
    tracemalloc.start()
    try:
        count = sum(1 for _ in examples)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 14_999
    assert size > 12_000_000
    assert peak < 8_000_000


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [1, 10_001, 700_001])
def test_broken_line_has_its_true_number(write: Any, line: int) -> None:
    filled = min(line - 1, 5_000)
    name = write("a.jsonl", "[]\n" * filled + "\n" * (line - 1 - filled) + '{"text": "one}\n' + GOOD)
    assert re.match(rf"a\.jsonl:{line}: broken JSON at column \d+ near ", refusal(name))


@pytest.mark.parametrize("end", ['{"text": "on', '{"text": "one"', "{", '{"text": tru', '{"x": [{"text": "a"}'])
def test_last_line_cut_off(write: Any, end: str) -> None:
    message = refusal(write("a.jsonl", GOOD * 2 + end))
    assert message.startswith("a.jsonl:3: the last line is cut off")
    assert "cut off" not in refusal(write("a.jsonl", GOOD * 2 + end + "\n" + GOOD))


def test_last_line_cut_off_inside_a_character(write: Any) -> None:
    message = refusal(write("a.jsonl", GOOD.encode() + '{"text": "é'.encode()[:-1]))
    assert message.startswith("a.jsonl:2: byte 0xc3 at offset 26 is not UTF-8; the file seems cut off inside a char")


def test_last_line_without_newline_that_is_broken_inside(write: Any) -> None:
    assert refusal(write("a.jsonl", GOOD + '{"text" "one"}')).startswith("a.jsonl:2: broken JSON at column 9")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a", "n": NaN}', "NaN is no JSON value"),
        (b'{"text": "a", "n": -Infinity}', "-Infinity is no JSON value"),
        (b'{"text": "a", "n": 1e999}', "too large"),
        (b'{"n": ' + b"9" * 5000 + b"}", "thousands of digits"),
        (b'{"text": "a", "text": "b"}', 'the key "text" stands twice'),
        (b'{"text": "a\\u0000b"}', "NUL character"),
        (b'{"text": "a\\ud800b"}', "lone surrogate (\\ud800)"),
        (b'{"a\\uDFFFb": ["x"]}', "lone surrogate"),
        (b'{"text": "a\0b"}', "NUL byte at offset 27"),
        (b'{"text": "caf\xe9"}', "byte 0xe9 at offset 29 is not UTF-8; if it is latin-1"),
        (b'{"text": "\x93hi\x94"}', "byte 0x93 at offset 26 is not UTF-8; if it is Windows-1252"),
        (b'{"text": "\xff"}', "is not UTF-8; if it is latin-1"),
        (b"12", "not a number"),
        (b"null", "not null"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"text": "a"},', "more text after the JSON value"),
    ],
)
def test_line_that_does_not_mean_one_thing(write: Any, line: bytes, said: str) -> None:
    message = refusal(write("a.jsonl", GOOD.encode() + line + b"\n"))
    assert message.startswith("a.jsonl:2: ")
    assert said in message
    assert len(message) <= 200


def test_escaped_pair_of_surrogates_is_a_character(write: Any) -> None:
    assert read(write("a.jsonl", '{"text": "\\ud83d\\ude00 \\\\u0000"}\n'))[0].record == {"text": "😀 \\u0000"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_utf_16_is_named(write: Any, name: str, encoding: str) -> None:
    assert "is UTF-16, not UTF-8" in refusal(write(name, GOOD.encode(encoding)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[\n{"text": "a"},\n{"text": "b"}', "a.json:3: the file is cut off inside or after item 2"),
        ('[\n{"text": "a"},\n{"text": "b', "a.json:3: the file is cut off inside or after item 2"),
        ('[\n{"text": "a"},\n{"text" "b"}]', "a.json:3: broken JSON at column 9"),
        ('[\n{"text": "a"}\n{"text": "b"}]', "a.json:3: broken JSON at column 1 near"),
        ('[\n{"text": "a"},\n\n{"n": 1, "n": 2}]', "a.json:4 (item 2): the key"),
        ('[{"text": "a"},\n5]', "a.json:2 (item 2): an example is an object"),
        ('[{"text": "a"},\n{"text": "\\u0000"}]', "a.json:2 (item 2): a NUL"),
        ('[\n{"text": "a"}]\n]', "a.json:3: broken JSON at column 1"),
        ('[{"text": "a"},]', "a.json:1: broken JSON"),
        ('{"text":\n', "a.json:2: the file is cut off"),
        ('{"text":\nx}', "a.json:2: broken JSON at column 1"),
        ('{\n"data": [1]}', "a.json (item 1 of data): an example is an object"),
        ("NaN", "a.json: NaN is no JSON value"),
        ('{"text": "a"}\n{"text" "b"}\n', "a.json:2: broken JSON at column 9"),
    ],
)
def test_broken_json_file(write: Any, content: str, said: str) -> None:
    assert refusal(write("a.json", content)).startswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n\n1\n", "a.csv:4: 1 field, but the header has 2 (a, b)"),
        ('a,b\n"1\n2",2,3\n', "a.csv:2: 3 fields, but the header has 2"),
        ('a,b\n1,2\n"1,2\n3,4\n', "a.csv:3: a quote is opened and never closed"),
        ('a,b\n1,"2"x\n', "a.csv:2: broken csv"),
        ("a,a\n1,2\n", 'a.csv:1: the first line must name the columns, and it names "a" twice'),
        ("a,\n1,2\n", "a.csv:1: the first line must name the columns, and it has a column without a name"),
        ("a,b\n", "a.csv has 0 examples"),
    ],
)
def test_broken_csv(write: Any, content: str, said: str) -> None:
    assert refusal(write("a.csv", content)).startswith(said)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_empty_file(write: Any, name: str, content: bytes) -> None:
    assert refusal(write(name, content)) == f"{name} has 0 examples"


def test_list_without_items_and_parquet_without_rows(write: Any) -> None:
    assert refusal(write("a.json", " [ ] ")) == "a.json has 0 examples"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), "a.parquet")
    assert refusal("a.parquet") == "a.parquet has 0 examples"


def test_truncated_parquet_says_its_size(write: Any) -> None:
    pq.write_table(pa.table({"text": ["a"] * 1000}), "whole.parquet")
    part = Path("whole.parquet").read_bytes()[:-20]
    message = refusal(write("a.parquet", part))
    assert message.startswith(f"a.parquet is no intact parquet file ({len(part):,} bytes)")


def test_parquet_text_that_is_no_text(write: Any) -> None:
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"text": bad}), "a.parquet")
    assert "no intact parquet file" in refusal("a.parquet")
    pq.write_table(pa.table({"text": ["a", "b\0"]}), "b.parquet")
    assert refusal("b.parquet") == "b.parquet: row 2: a NUL character in the text; remove it"


def test_gzip_that_is_cut_off_or_none(write: Any) -> None:
    packed = gzip.compress("".join(f'{{"text": "{n}"}}\n' for n in range(1000)).encode())
    assert "is cut off: its gzip data ends too early" in refusal(write("a.jsonl.gz", packed[:-10]))
    assert "no intact gzip file" in refusal(write("b.jsonl.gz", GOOD))
    assert "no intact gzip file" in refusal(write("c.jsonl.gz", packed[:50] + b"\xff" * 20 + packed[70:]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_git_lfs_pointer(write: Any, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    assert "is a Git LFS pointer" in refusal(write(name, pointer))


def test_file_that_may_not_be_read(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    name = write("a.jsonl", GOOD)
    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, who may read everything
    assert refusal(name) == "a.jsonl cannot be read: permission denied"


# --- what a path means ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["data/tran.jsonl", "./data/trian", "data/x/train.jsonl", "/nowhere/at/all", "a b"])
def test_missing_file(write: Any, path: str) -> None:
    write("data/train.jsonl", GOOD)
    assert f"{path}: no such file" in refusal(path)


def test_missing_file_names_the_nearest(write: Any) -> None:
    write("data/train.jsonl", GOOD)
    assert refusal("data/tran.jsonl").endswith("did you mean data/train.jsonl?")
    assert refusal("date/train.jsonl").endswith("(nor is there a folder date)")


def test_path_that_is_no_name(write: Any, tmp_path: Path) -> None:
    assert refusal("") == "the `path:` of a data source is empty"
    assert len(refusal("x" * 5000)) < 200
    assert refusal("a\nb.jsonl").startswith("a\\nb.jsonl: no such file")
    (tmp_path / "link.jsonl").symlink_to("nowhere")
    assert refusal("link.jsonl") == "link.jsonl is a link to nowhere, which is not there"


def test_unknown_file_type(write: Any) -> None:
    assert refusal(write("a.docx", "")).startswith("a.docx: unknown file type; known are .jsonl, ")


def test_folder_without_data_and_with_more_than_data(write: Any) -> None:
    write("data/deep/a.jsonl", GOOD) if Path("data").exists() else Path("data/deep").mkdir(parents=True)
    assert refusal("data").startswith("data is a folder without data files")
    assert refusal("data").endswith("it holds deep/")
    write("data/a.jsonl", GOOD)
    write("data/b.docx", "")
    assert refusal("data").startswith("data: cannot read b.docx, deep/ in this folder")


@pytest.mark.parametrize("key", ["name", "split"])
def test_keys_of_the_hub_are_not_ignored_for_a_file(write: Any, key: str) -> None:
    assert f"`{key}:` is for a hub data set" in refusal(write("a.jsonl", GOOD), **{key: "train"})


def test_special_file() -> None:
    assert refusal("/dev/null") == "/dev/null is neither a file nor a folder; write what it gives into a file"


# --- the hub -------------------------------------------------------------------------------------------------------


def test_hub_without_network_says_how_to_go_on() -> None:
    message = refusal("someone/some-data")
    assert message.startswith("someone/some-data is no local file or folder")
    assert "the hub cannot be reached" in message
    assert message.endswith("give the local folder as `path:`")
    assert source_files(Source(path="someone/some-data")) == ()


def test_hub_id_that_may_be_a_mistyped_folder(write: Any) -> None:
    write("data/train/a.txt", "one") if Path("data").exists() else Path("data/train").mkdir(parents=True)
    assert "did you mean data/train?" in refusal("data/trian")


def test_hub_data_set_is_read_with_its_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(path: str, *, name: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, name, split))
        return [{"text": "a", "meta": {"x": None, "y": 1}}, {"text": "b\0", "meta": None}]

    config = SimpleNamespace(HF_HUB_OFFLINE=True)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, config=config))
    examples = read_source(Source(path="someone/some-data", name="main", split="test"))
    assert next(examples) == Example("someone/some-data: row 1", {"text": "a", "meta": {"y": 1}})
    assert asked == [("someone/some-data", "main", "test")]
    with pytest.raises(DataError, match="some-data: row 2: a NUL"):
        next(examples)


def test_hub_without_such_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise FileNotFoundError("Dataset 'someone/some-data'\ndoesn't exist")

    config = SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, config=config))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    message = refusal("someone/some-data")
    assert message.endswith("and the hub says: Dataset 'someone/some-data' doesn't exist")


def read_or_refused(path: Path) -> list[object] | str:
    """The records, or the message of the DataError."""
    try:
        return [example.record for example in read(str(path))]
    except DataError as error:
        return str(error)


# --- whatever comes ------------------------------------------------------------------------------------------------


@given(
    st.one_of(
        st.binary(max_size=60),
        st.lists(st.sampled_from([b'{"text":', b'"a"', b"}", b"\n", b"[", b"]", b",", b"\xff", b"\\ud800", b"\r"])).map(
            b"".join
        ),
    ),
    st.sampled_from(["jsonl", "json", "csv", "txt", "parquet", "jsonl.gz"]),
)
def test_any_bytes_are_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(content)
    result = read_or_refused(path)
    if isinstance(result, str):
        assert "\n" not in result
        assert result.startswith(str(path))
    else:
        assert result


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NO_NUL = st.characters(codec="utf-8", exclude_characters="\0")


@given(
    st.lists(st.dictionaries(st.text(NO_NUL), st.text(NO_NUL)), min_size=1), st.booleans(), st.sampled_from([0, 1, 2])
)
def test_what_json_wrote_comes_back(
    tmp_path_factory: pytest.TempPathFactory, records: list[Any], as_list: bool, spaces: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "back.json"
    lines = "\n".join(json.dumps(record, ensure_ascii=spaces == 1) for record in records)
    path.write_text(json.dumps(records, indent=spaces or None) if as_list else lines, encoding="utf-8")
    assert [example.record for example in read(str(path))] == records


@settings(max_examples=50)
@given(st.lists(JSON, min_size=1, max_size=4))
def test_any_json_values_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "values.jsonl"
    path.write_text("\n".join(json.dumps(value) for value in values))
    result = read_or_refused(path)
    assert result == values or (isinstance(result, str) and result.startswith(f"{path}:"))
