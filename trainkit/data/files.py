"""Files of examples: bytes on disk → records, one at a time, each with its place.

jsonl, csv, parquet and txt are read as a stream: memory holds a block of about a megabyte (one line where that is
longer, one file for txt, one row group for parquet), never the file. A ``.json`` file that holds one list is read as
text in full; its items are decoded one by one. Text must be UTF-8 (a byte order mark is fine). ``.gz`` may stand behind
every text type.

Whatever does not read exactly as written is a DataError of one line that starts with ``file:line``.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal, cast

from trainkit.data.strict_json import broken, checked_record, fault_in_strings, json_records, parse_json
from trainkit.data.wording import counted, listed, shown
from trainkit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Kind = Literal["jsonl", "json", "csv", "tsv", "txt", "parquet"]

KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".parquet": "parquet",
}

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_PARQUET_BATCH_ROWS = 512
BLOCK_BYTES = 2**20
BLOCK_RECORDS = 2048
_LARGEST_CSV_FIELD_CHARACTERS = 2**31 - 1


def kind_of(path: Path) -> Kind | None:
    """How the file is read, from its name; None for a name that says nothing.

    >>> from pathlib import Path
    >>> kind_of(Path("a.b/train.JSONL.gz")), kind_of(Path("train.parquet")), kind_of(Path("notes.docx"))
    ('jsonl', 'parquet', None)
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] == [".gz"]:
        kind = KINDS.get(suffixes[0]) if len(suffixes) == 2 else None
        return None if kind == "parquet" else kind
    return KINDS.get(suffixes[-1]) if suffixes else None


def read_file_blocks(path: Path, name: str) -> Iterator[LinesBlock | RecordsBlock]:
    """The file in blocks, in order; ``name`` is what places call the file.

    A block's ``records()`` are (place, record); a record is a dict, a list or a string. Blank lines of a jsonl file are
    no examples. A txt file is one example. Raises DataError for what cannot be read, and for a file without examples;
    lines of jsonl are decoded, and found broken, only by ``records()``.
    """
    kind = kind_of(path)
    assert kind is not None, f"{path} has no known type"
    found = False
    with _opened(path, name) as file:
        for block in _blocks(kind, file, name):
            found = found or block.holds_something
            yield block
    if not found:
        raise DataError(f"{name} has 0 examples")


def _blocks(kind: Kind, file: IO[bytes], name: str) -> Iterator[LinesBlock | RecordsBlock]:
    if kind == "jsonl" or (kind == "json" and _starts_as_jsonl(file, name)):
        file.seek(0)
        yield from _jsonl_blocks(file, name)
        return
    file.seek(0)
    records: list[tuple[str, object]] = []
    size = 0
    for place, record in _records(kind, file, name):
        records.append((place, record))
        size += characters(record)
        if len(records) == BLOCK_RECORDS or size >= BLOCK_BYTES:
            yield RecordsBlock(records)
            records, size = [], 0
    if records:
        yield RecordsBlock(records)


@dataclass(frozen=True, slots=True)
class RecordsBlock:
    """Records that are decoded already, each with its place."""

    decoded: list[tuple[str, object]]

    @property
    def holds_something(self) -> bool:
        """Always: no empty block is made."""
        return True

    @property
    def bytes_of_lines(self) -> int:
        """None that are known."""
        return 0

    def records(self) -> Iterator[tuple[str, object]]:
        """(place, record) of every example."""
        yield from self.decoded


def characters(record: object) -> int:
    """About how much text a record holds.

    >>> characters({"messages": [{"role": "user", "content": "hello"}]})
    9
    """
    if isinstance(record, str):
        return len(record)
    if isinstance(record, dict):
        return sum(map(characters, record.values()))
    return sum(map(characters, record)) if isinstance(record, list) else 0


# --- bytes → text --------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    """The file's (unpacked) bytes; everything that the file system or gzip refuses becomes a DataError."""
    try:
        with path.open("rb") as raw:
            if raw.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise DataError(f"{name} is a Git LFS pointer, not the data; run `git lfs pull` where it was cloned")
            raw.seek(0)
            if path.suffix.lower() == ".gz":
                with gzip.open(raw) as unpacked:
                    yield cast("IO[bytes]", unpacked)
            else:
                yield raw
    except EOFError as error:
        raise DataError(f"{name} is cut off: its gzip data ends too early ({_size(path)}); copy it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name} is no intact gzip file ({_size(path)}): {error}") from error
    except PermissionError as error:
        raise DataError(f"{name} cannot be read: permission denied") from error
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from error


def _size(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes"


def _check_start(start: bytes, name: str) -> None:
    """Refuse UTF-16 and UTF-32 by name, with or without their byte order mark."""
    marked = start.startswith((b"\xff\xfe", b"\xfe\xff"))
    if marked or (len(start) >= 4 and start.count(0) * 3 > len(start)):
        raise DataError(f"{name} is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 IN > OUT")


def _decode(data: bytes, name: str, line: int, offset: int) -> str:
    """``data`` as text; it starts at the given line and byte offset of the file. NUL bytes are refused."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        before = data[:at]
        raise DataError(
            f"{name}:{line + before.count(10)}: byte 0x{data[at]:02x} at offset {offset + at:,} is not UTF-8; "
            f"{_likely_encoding(error)}"
        ) from error
    if "\0" in text:
        at = data.index(0)
        raise DataError(
            f"{name}:{line + data[:at].count(10)}: NUL byte at offset {offset + at:,}; the file is damaged or no text"
        )
    return text


def _likely_encoding(error: UnicodeDecodeError) -> str:
    """What to do about the first byte that cannot be decoded."""
    if error.reason == "unexpected end of data":
        return "the file seems cut off inside a character; copy it again"
    if error.object[error.start] >= 0xA0:
        return "if it is latin-1, convert it: iconv -f latin1 -t UTF-8 IN > OUT"
    return "if it is Windows-1252, convert it: iconv -f cp1252 -t UTF-8 IN > OUT"


def _whole_text(file: IO[bytes], name: str) -> str:
    data = file.read()
    _check_start(data[:64], name)
    return _decode(data, name, 1, 0).removeprefix("\ufeff")


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text with its newline) of every line."""
    offset = 0
    for number, data in enumerate(file, start=1):
        if number == 1:
            _check_start(data[:64], name)
        text = _decode(data, name, number, offset)
        offset += len(data)
        yield number, text.removeprefix("\ufeff") if number == 1 else text


# --- the types of files ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinesBlock:
    """Whole lines of a jsonl file as they lie there, to be decoded wherever there is a free processor."""

    name: str
    first_line: int
    first_byte: int
    data: bytes

    @property
    def bytes_of_lines(self) -> int:
        """How much of the file it is."""
        return len(self.data)

    @property
    def holds_something(self) -> bool:
        """Whether a line is not blank."""
        return bool(self.data.strip(b" \t\r\n\xef\xbb\xbf"))

    def records(self) -> Iterator[tuple[str, object]]:
        """(place, record) of every line that is not blank. Raises DataError."""
        for number, line in self._lines():
            if line.strip(" \t\r\n"):
                place = f"{self.name}:{number}"
                yield place, _record_of_line(line, place)

    def _lines(self) -> Iterator[tuple[int, str]]:
        """(number, text with its newline) of every line. What does not decode is found when its line comes."""
        try:
            text = _decode(self.data, self.name, self.first_line, self.first_byte)
        except DataError:
            offset = self.first_byte
            for number, data in enumerate(io.BytesIO(self.data), start=self.first_line):
                yield number, _decode(data, self.name, number, offset)
                offset += len(data)
            return
        if self.first_byte == 0:
            text = text.removeprefix("\ufeff")
        yield from enumerate(io.StringIO(text, newline="\n"), start=self.first_line)


def _jsonl_blocks(file: IO[bytes], name: str) -> Iterator[LinesBlock]:
    """The lines of a jsonl file in blocks of about ``BLOCK_BYTES``. Raises DataError for UTF-16."""
    line, offset = 1, 0
    while data := file.read(BLOCK_BYTES):
        data += file.readline()
        if offset == 0:
            _check_start(data[:64], name)
        yield LinesBlock(name, line, offset, data)
        line += data.count(b"\n")
        offset += len(data)


def _record_of_line(line: str, place: str) -> object:
    try:
        value = parse_json(line)
    except json.JSONDecodeError as error:
        written = line.rstrip()
        if not line.endswith("\n") and (error.pos >= len(written) or not written.endswith(("}", "]"))):
            raise DataError(
                f"{place}: the last line is cut off: its JSON breaks near {shown(line[-40:])} and no newline "
                "follows; copy the file again, or remove the line"
            ) from error
        raise broken(error, place) from error
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error
    return checked_record(value, place, escapes="\\u" in line)


def _starts_as_jsonl(file: IO[bytes], name: str) -> bool:
    """Whether the first line is a whole JSON value and another value follows on a line of its own."""
    filled = (line for _, line in _lines(file, name) if line.strip(" \t\r\n"))
    first = next(filled, "")
    if not first.lstrip().startswith(("{", "[", '"')):
        return False
    try:
        parse_json(first)
    except ValueError:
        return False
    return next(filled, None) is not None


def _csv_records(file: IO[bytes], name: str, delimiter: str | None) -> Iterator[tuple[str, object]]:
    """One record a row, named by the header in the first line; the place is the line where the row starts."""
    csv.field_size_limit(_LARGEST_CSV_FIELD_CHARACTERS)
    lines = (line for _, line in _lines(file, name))
    first = next(lines, "")
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter or _delimiter(first), strict=True)
    header: list[str] | None = None
    while True:
        place = f"{name}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            what = (
                "a quote is opened and never closed; close it"
                if "unexpected end" in str(error)
                else f"broken csv: {error}"
            )
            raise DataError(f"{place}: {what}") from error
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = _header(row, place)
        elif len(row) != len(header):
            raise DataError(
                f"{place}: {counted(len(row), 'field')}, but the header has {len(header)} "
                f"({listed(header)}); put quotes around a field that holds the delimiter"
            )
        else:
            yield place, dict(zip(header, row, strict=True))


def _delimiter(first_line: str) -> str:
    """A comma, unless the header has none of it and one of the other usual delimiters."""
    return next((mark for mark in (",", "\t", ";") if mark in first_line), ",")


def _header(row: list[str], place: str) -> list[str]:
    twice = {column for column in row if row.count(column) > 1}
    if twice or "" in row:
        what = f"names {shown(min(twice))} twice" if twice else "has a column without a name"
        raise DataError(f"{place}: the first line must name the columns, and it {what}")
    return row


def _txt_records(file: IO[bytes], name: str) -> Iterator[tuple[str, object]]:
    text = _whole_text(file, name)
    if text:
        yield f"{name}:1", text


def _parquet_records(file: IO[bytes], name: str) -> Iterator[tuple[str, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        table = pq.ParquetFile(file)
        columns = table.schema_arrow.names
        if len(set(columns)) < len(columns):
            raise DataError(f"{name}: two columns have the same name ({listed(columns)})")
        for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
            for record in batch.to_pylist():
                row += 1
                fault = fault_in_strings(record)
                if fault:
                    raise DataError(f"{name}: row {row:,}: {fault}")
                yield f"{name}: row {row:,}", without_nested_nulls(record)
    except (pa.ArrowException, OSError, ValueError) as error:
        where = f"after row {row:,}" if row else f"{file.seek(0, 2):,} bytes"
        reason = str(error).split("\n", 1)[0]
        raise DataError(f"{name} is no intact parquet file ({where}); copy it again: {shown(reason, 80)}") from error


def without_nested_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """The record without the null fields of its nested objects.

    An Arrow struct has every field of its column's type, so a null there says that this object never had the field.

    >>> without_nested_nulls({"text": None, "messages": [{"role": "user", "content": "hi", "tool_calls": None}]})
    {'text': None, 'messages': [{'role': 'user', 'content': 'hi'}]}
    """
    return {key: _pruned(value) for key, value in record.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(part) for key, part in value.items() if part is not None}
    return [_pruned(part) for part in value] if isinstance(value, list) else value


def _records(kind: Kind, file: IO[bytes], name: str) -> Iterator[tuple[str, object]]:
    match kind:
        case "jsonl" | "json":
            return json_records(_whole_text(file, name), name)
        case "csv":
            return _csv_records(file, name, None)
        case "tsv":
            return _csv_records(file, name, "\t")
        case "txt":
            return _txt_records(file, name)
        case "parquet":
            return _parquet_records(file, name)
