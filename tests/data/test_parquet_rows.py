"""Rows in parquet files are the rows of the store, for `datasets` and for TRL, and are there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainkit.data import parquet_rows
from trainkit.data.encoding import Encoder
from trainkit.data.packed_store import PackedRows, Part
from trainkit.data.parquet_rows import is_intact, rows_in_file, write_rows_file, write_rows_files
from trainkit.data.preparation import PreparedData, prepare
from trainkit.errors import MachineError, UsageError
from trainkit.recipe.reader import read_recipe

FILES: dict[Part, Path] = {"train": Path("out/train.parquet"), "evaluation": Path("out/evaluation.parquet")}


def nothing(*_: object) -> None:
    pass


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def prepared(tiny_tokenizer: Any, conversations_file: Path, tmp_path: Path) -> Callable[..., PreparedData]:
    """`prepared(key=value, ...)`: rows of 64 tokens with long documents, a part held out."""

    def make(*settings: str) -> PreparedData:
        (tmp_path / "recipe.yaml").write_text(
            f"model: {{name: tiny}}\ndata: {{train: {conversations_file}, eval: 0.2}}\n"
            "packing: {sequence_length: 64, overlap: 8}\ntraining: {epochs: 1}\noutput_dir: run\n"
        )
        recipe = read_recipe("recipe.yaml", settings).recipe
        return prepare(recipe, Encoder(tiny_tokenizer, recipe.data, recipe.packing), tmp_path / "cache", nothing)

    return make


def parts_of(data: PreparedData) -> dict[Part, PackedRows]:
    assert data.evaluation is not None
    return {"train": data.train, "evaluation": data.evaluation}


def expected(rows: PackedRows, index: int) -> dict[str, Any]:
    row = rows.row(index)
    return {
        "input_ids": row.ids_T.tolist(),
        "labels": [
            token if trained else -100 for token, trained in zip(row.ids_T.tolist(), row.trained_T, strict=True)
        ],
        "seq_lengths": row.segment_lengths.tolist(),
        "documents": list(rows.documents_of(index)),
    }


def test_datasets_reads_the_very_rows(prepared: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import load_dataset

    monkeypatch.setattr(parquet_rows, "TOKENS_IN_GROUP", 5 * 64)  # several groups, the last one short
    data = prepared()
    kept = write_rows_files(FILES, parts_of(data), data.key, nothing, replace=False)
    assert kept == {"train": False, "evaluation": False}
    files = {part: str(path) for part, path in FILES.items()}
    read = load_dataset("parquet", data_files=files, cache_dir=str(folder / "hf"))
    for part, rows in parts_of(data).items():
        assert len(read[part]) == len(rows) > 6
        assert pq.ParquetFile(FILES[part]).num_row_groups == -(-len(rows) // 5)
        for index in range(len(rows)):
            assert read[part][index] == expected(rows, index)
    assert any(len(lengths) > 1 for lengths in read["train"]["seq_lengths"])
    assert max(len(ids) for ids in read["train"]["input_ids"]) == 64


def test_the_file_says_whose_rows_it_holds(prepared: Any) -> None:
    data = prepared()
    write_rows_file(Path("new/folder/rows.parquet"), data.train, "train", data.key, nothing)
    said = rows_in_file(Path("new/folder/rows.parquet"))
    assert said is not None
    assert (said["format"], said["key"], said["part"]) == (1, data.key, "train")
    assert said["ledger"] == data.train.ledger.to_json()
    assert Path("new/folder/rows.parquet").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_trl_makes_the_same_batch(prepared: Any) -> None:
    """Its padding-free collator: the same tokens and targets, and positions that start anew in every segment."""
    sft_trainer = pytest.importorskip("trl.trainer.sft_trainer")
    from datasets import Dataset

    data = prepared()
    write_rows_file(Path("rows.parquet"), data.train, "train", data.key, nothing)
    records = list(Dataset.from_parquet("rows.parquet"))[:4]
    batch = sft_trainer.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(records)
    rows = [data.train.row(index) for index in range(4)]
    ids, trained = np.concatenate([row.ids_T for row in rows]), np.concatenate([row.trained_T for row in rows])
    lengths = np.concatenate([row.segment_lengths for row in rows])
    assert batch["input_ids"].tolist() == [ids.tolist()]
    assert batch["labels"].tolist() == [np.where(trained, ids, -100).tolist()]
    assert batch["position_ids"].tolist() == [[place for length in lengths for place in range(length)]]
    assert batch["cu_seq_lens_q"].tolist() == [0, *np.cumsum(lengths).tolist()]


def test_transformers_keeps_the_segments_of_trls_batch_apart(prepared: Any, tiny_model_folder: Path) -> None:
    """As TRL calls the model: a segment in the batch and alone have the same logits."""
    sft_trainer = pytest.importorskip("trl.trainer.sft_trainer")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    data = prepared()
    write_rows_file(Path("rows.parquet"), data.train, "train", data.key, nothing)
    records = list(Dataset.from_parquet("rows.parquet"))[:3]
    batch = sft_trainer.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(records)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    ends = batch["cu_seq_lens_q"].tolist()
    ids = batch["input_ids"]
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits[0]
        apart = [model(ids[:, begin:end]).logits[0] for begin, end in itertools.pairwise(ends)]
    assert len(apart) > 3
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=1e-5)


def test_the_same_rows_stay_and_are_checked(prepared: Any) -> None:
    data = prepared()
    write_rows_files(FILES, parts_of(data), data.key, nothing, replace=False)
    before = {path: path.stat().st_ino for path in FILES.values()}
    kept = write_rows_files(FILES, parts_of(data), data.key, nothing, replace=False)
    assert kept == {"train": True, "evaluation": True}
    assert {path: path.stat().st_ino for path in FILES.values()} == before
    FILES["train"].unlink()  # a process was killed between the two
    kept = write_rows_files(FILES, parts_of(data), data.key, nothing, replace=False)
    assert kept == {"train": False, "evaluation": True}

    content = bytearray(FILES["train"].read_bytes())
    content[len(content) // 3] ^= 1
    FILES["train"].write_bytes(content)
    assert not is_intact(FILES["train"])
    with pytest.raises(UsageError, match=r"out/train\.parquet: has changed since .*--force"):
        write_rows_files(FILES, parts_of(data), data.key, nothing, replace=False)
    write_rows_files(FILES, parts_of(data), data.key, nothing, replace=True)
    assert is_intact(FILES["train"])


def test_other_rows_are_replaced_only_on_demand(prepared: Any) -> None:
    data = prepared()
    write_rows_files(FILES, parts_of(data), data.key, nothing, replace=False)
    before = {path: path.read_bytes() for path in FILES.values()}
    other = prepared("training.seed=7", "data.eval=null")
    with pytest.raises(UsageError, match=r"out/train\.parquet: holds other rows .*--force replaces"):
        write_rows_files(FILES, {"train": other.train}, other.key, nothing, replace=False)
    assert {path: path.read_bytes() for path in FILES.values()} == before
    write_rows_files(FILES, {"train": other.train}, other.key, nothing, replace=True)
    assert [path.name for path in Path("out").iterdir()] == ["train.parquet"]  # no held-out rows of another packing
    assert (rows_in_file(FILES["train"]) or {})["key"] == other.key


@pytest.mark.parametrize("make", [lambda path: path.write_text("precious"), lambda path: path.mkdir()])
def test_what_is_not_ours_is_never_replaced(prepared: Any, make: Callable[[Path], object]) -> None:
    data = prepared()
    Path("out").mkdir()
    make(FILES["evaluation"])
    with pytest.raises(UsageError, match=r"out/evaluation\.parquet: lies there already and is no file that trainkit"):
        write_rows_files(FILES, parts_of(data), data.key, nothing, replace=True)
    assert [path.name for path in Path("out").iterdir()] == ["evaluation.parquet"]


def test_a_parquet_file_of_others_is_not_ours(prepared: Any) -> None:
    pq.write_table(pa.table({"input_ids": [[1]]}), "a.parquet")
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({"trainkit": "[]"}), "b.parquet")
    assert rows_in_file(Path("a.parquet")) is rows_in_file(Path("b.parquet")) is None


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_breaks_off_leaves_nothing(prepared: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    data = prepared()
    monkeypatch.setattr(parquet_rows, "TOKENS_IN_GROUP", 64)

    def break_off(done: int, _: int | None) -> None:
        if done == 3:
            raise error

    with pytest.raises((MachineError, KeyboardInterrupt)) as raised:
        write_rows_file(Path("out/rows.parquet"), data.train, "train", "key", break_off)
    if isinstance(error, OSError):
        assert str(raised.value).startswith("out/rows.parquet: cannot be written: No space left on device; make room")
    assert not Path("out").exists()
    Path("out").mkdir()
    with pytest.raises((MachineError, KeyboardInterrupt)):
        write_rows_file(Path("out/rows.parquet"), data.train, "train", "key", break_off)
    assert list(Path("out").iterdir()) == []


def test_a_disk_that_is_full_leaves_the_file_that_was_there(prepared: Any) -> None:
    """In a process of its own, because the largest file that it may write is one of its own limits."""
    data = prepared()
    write_rows_file(Path("rows.parquet"), data.train, "train", data.key, nothing)
    before = Path("rows.parquet").read_bytes()
    code = f"""
import resource, signal, sys
from pathlib import Path
from trainkit.data.packed_store import PackedRows
from trainkit.data.parquet_rows import write_rows_file
rows = PackedRows.open(Path({str(data.folder)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    write_rows_file(Path("rows.parquet"), rows, "train", "other", lambda *_: None)
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = "MachineError rows.parquet: cannot be written: File too large; make room, or give another --output\n"
    assert (done.stdout, done.stderr) == (said, "")
    assert Path("rows.parquet").read_bytes() == before
    assert not list(Path().glob(".rows*"))


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(prepared: Any) -> None:
    abandoned, fresh, held = (Path(f".rows.parquet.building-{name}") for name in ("abandoned", "fresh", "held"))
    for path in (abandoned, fresh, held):
        path.write_bytes(b"PAR1")
    for path in (abandoned, held):
        os.utime(path, (1, 1))
    data = prepared()
    with held.open("rb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        write_rows_file(Path("rows.parquet"), data.train, "train", data.key, nothing)
    assert (abandoned.exists(), fresh.exists(), held.exists()) == (False, True, True)


def test_progress_counts_rows(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows, "TOKENS_IN_GROUP", 4 * 64)
    data = prepared()
    told: list[tuple[str, int, int | None]] = []
    write_rows_files(FILES, parts_of(data), data.key, lambda *said: told.append(said), replace=False)
    number = len(data.train)
    train = [said[1:] for said in told if said[0] == "writing train.parquet"]
    assert train[:2] == [(0, number), (4, number)]
    assert train[-1] == (number, number)
    assert told[0][0] == "writing evaluation.parquet"


def test_memory_is_a_row_group_whatever_the_number_of_rows(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch holds more rows than a group; the writer keeps none of them."""
    monkeypatch.setattr(parquet_rows, "TOKENS_IN_GROUP", 4 * 64)
    data = prepared()
    sizes: list[int] = []
    assemble = parquet_rows._record_batch

    def noted(*given: Any) -> pa.RecordBatch:
        sizes.append(given[2] - given[1])
        return assemble(*given)

    monkeypatch.setattr(parquet_rows, "_record_batch", noted)
    before = pa.total_allocated_bytes()
    write_rows_file(Path("rows.parquet"), data.train, "train", data.key, nothing)
    assert max(sizes) == 4
    assert sum(sizes) == len(data.train)
    assert pa.total_allocated_bytes() <= before + 64 * len(data.train)


def test_the_mark_is_json_that_others_can_read(prepared: Any) -> None:
    data = prepared()
    write_rows_file(Path("rows.parquet"), data.train, "train", data.key, nothing)
    assert json.loads(pq.read_schema("rows.parquet").metadata[b"trainkit"])["ledger"]["rows"] == len(data.train)
