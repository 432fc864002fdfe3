from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from trainkit.data import document_stream, files, workers
from trainkit.data.bulk_encoding import BulkEncoder
from trainkit.data.document_stream import EncodedBlock, encoded_blocks, recognised_source
from trainkit.data.encoding import Encoder
from trainkit.errors import DataError
from trainkit.recipe.schema import Data, Packing, Source

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


def blocks_of(path: Path, tokenizer: PreTrainedTokenizerBase, **packing: Any) -> list[EncodedBlock]:
    source = Source(path=str(path))
    encoder = Encoder(tokenizer, Data(train=(source,)), Packing(**packing))
    return list(encoded_blocks(source, 3, recognised_source(source), BulkEncoder(encoder), pytest.fail))


def write_lines(path: Path, count: int) -> Path:
    rows = [{"prompt": f"the {number}", "completion": " fox" * (1 + number % 5)} for number in range(count)]
    rows[count // 2]["completion"] = ""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def columns(blocks: list[EncodedBlock]) -> list[Any]:
    documents = [block.documents for block in blocks]
    arrays = ("ids_K", "trained_K", "lengths_N", "separators_N", "has_prompt_N", "examples_N", "digests_N")
    joined = [np.concatenate([getattr(one, name) for one in documents]).tolist() for name in arrays]
    return [*joined, [place for one in documents for place in one.places]]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_many_processes_make_the_same_documents_in_the_same_order(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = write_lines(tmp_path / "x.jsonl", 400)
    if suffix == "json":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path = tmp_path / "x.json"
        path.write_text(json.dumps(rows, indent=1))
    whole = blocks_of(path, tiny_tokenizer)
    assert len(whole) == 1
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(files, "BLOCK_RECORDS", 20)
    in_parts = {}
    for cores in (1, 2):
        monkeypatch.setattr(document_stream, "usable_cores", lambda cores=cores: cores)
        in_parts[cores] = blocks_of(path, tiny_tokenizer)
        assert len(in_parts[cores]) > workers.FEW_ITEMS + 5
        assert columns(in_parts[cores]) == columns(whole)
    examples = columns(whole)[5]
    assert examples == [number for number in range(400) if number != 200]
    dropped = [one for block in in_parts[2] for one in block.dropped]
    assert dropped == list(whole[0].dropped)
    assert [reason for reason, _ in dropped] == ["empty completion"]
    assert sum(block.examples_read for block in in_parts[2]) == 400


def test_the_line_of_a_broken_record_is_true_in_any_block(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "x.jsonl", 400)
    lines = path.read_text().splitlines(keepends=True)
    lines[317] = '{"prompt": "the", "completion": }\n'
    path.write_text("".join(lines))
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    for cores in (1, 2):
        monkeypatch.setattr(document_stream, "usable_cores", lambda cores=cores: cores)
        with pytest.raises(DataError, match=r"x\.jsonl:318: broken JSON at column 33"):
            blocks_of(path, tiny_tokenizer)


def test_lines_end_at_newlines_only(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes('{"text":\r"a\u2028b\x85c"}\r\n\n{"text": "d"}'.encode())
    [block] = blocks_of(path, tiny_tokenizer)
    assert block.documents.places == [f"{path}:1", f"{path}:3"]
