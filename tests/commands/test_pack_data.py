"""`trainkit pack-data` through the command line: its numbers, and that it is the same work as fine-tune's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainkit.cli import run
from trainkit.commands.pack_data import StageClock
from trainkit.data.packed_store import PackedRows
from trainkit.data.sealed_folder import verify

KEYS = {
    "documents",
    "tokens",
    "trained_tokens",
    "rows",
    "sequence_length",
    "lower_bound_rows",
    "fill",
    "padding_waste_before",
    "ledger",
    "seconds",
    "output",
}
STAGES = ["tokenizer", "checking", "encoding", "packing", "opening", "total"]

Said = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def recipe(small_recipe: dict[str, Any], tmp_path: Path) -> str:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_recipe))
    return "recipe.yaml"


def packed(recipe: str, capsys: Said, *arguments: str) -> dict[str, Any]:
    """What `pack-data --json` prints."""
    capsys.readouterr()
    code = run(["pack-data", recipe, "--json", *arguments])
    said = capsys.readouterr()
    assert code == 0, said.err
    result: dict[str, Any] = json.loads(said.out)
    return result


@pytest.fixture
def letters(tiny_model_folder: Path, tmp_path: Path) -> str:
    """Three texts of 3, 5 and 6 tokens: a letter each and the separator. Rows have 8 slots."""
    model = tmp_path / "tokenizer"
    model.mkdir()
    for path in tiny_model_folder.glob("token*"):
        shutil.copy(path, model)
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("12", "1234", "12345"))
    )
    (tmp_path / "letters.yaml").write_text(
        "model: {name: tokenizer}\ndata: {train: texts.jsonl}\npacking: {sequence_length: 8, overlap: 1}\n"
        "training: {epochs: 1}\noutput_dir: run\n"
    )
    return "letters.yaml"


def test_the_numbers_of_three_texts(letters: str, capsys: Said) -> None:
    result = packed(letters, capsys)
    assert result.keys() >= KEYS
    assert (result["documents"], result["tokens"], result["trained_tokens"]) == (3, 14, 11)
    assert (result["rows"], result["sequence_length"], result["lower_bound_rows"]) == (2, 8, 2)  # 3 + 5, and 6
    assert result["fill"] == 14 / 16
    assert result["padding_waste_before"] == pytest.approx(
        {"to_sequence_length": 10 / 24, "batches_of_8": 4 / 18, "batches_of_32": 4 / 18}
    )
    assert result["attention_pairs"] == {"whole_rows": 2 * 64, "isolated": 9 + 25 + 36}
    bands = [(band["shortest"], band["longest"], band["documents"]) for band in result["document_lengths"]["histogram"]]
    assert bands == [(3, 3, 1), (4, 4, 0), (5, 5, 1), (6, 6, 1)]
    assert (result["document_lengths"]["longest"], result["document_lengths"]["median"]) == (6, 5)
    assert result["evaluation_ledger"] is None
    assert result["ledger"]["padding"] == 2
    assert list(result["seconds"]) == STAGES
    assert sum(result["seconds"].values()) == pytest.approx(2 * result["seconds"]["total"])
    rows = PackedRows.open(Path(result["output"]))
    assert sorted(sorted(rows.row(index).segment_lengths.tolist()) for index in range(2)) == [[3, 5], [6]]


def test_split_documents_count_as_pieces_and_their_lengths_as_documents(letters: str, capsys: Said) -> None:
    with Path("texts.jsonl").open("a") as file:
        file.write('{"text": "1234567890"}\n')
    result = packed(letters, capsys)
    # 11 tokens are 8, and 4 of which the first is there again
    assert (result["documents"], result["tokens"], result["lower_bound_rows"]) == (4, 3 + 5 + 6 + 8 + 4, 4)
    assert result["ledger"]["overlap"] == 1
    assert result["padding_waste_before"]["to_sequence_length"] == pytest.approx(14 / 40)
    assert result["attention_pairs"]["isolated"] == 9 + 25 + 36 + 64 + 16
    assert result["document_lengths"]["longest"] == 11


def test_the_report_says_it_to_a_person(letters: str, capsys: Said) -> None:
    assert run(["pack-data", letters]) == 0
    shown = capsys.readouterr().out
    assert "texts.jsonl: text" in shown
    assert "train: 3 documents, 14 tokens (11 trained) in 2 rows of 8, 87.5% full\n" in shown
    assert re.search(r"^trained targets +11  78.6% of the tokens$", shown, re.MULTILINE)
    assert "padded, random batches of 8      18  22.22%   1.12\n" in shown
    assert "padded to 8                      24  41.67%   1.50\n" in shown
    assert "rows: 2, 87.50% full; 0 above the 2 that the tokens need at least\n" in shown
    assert "attention: 54.7% of the token pairs of whole rows remain (70 of 128)\n" in shown
    assert "\n3  1  ████████████████████████████████████████\n4  0\n5  1  ██" in shown
    assert "\nseconds: tokenizer " in shown


def test_without_isolation_the_saving_is_only_what_could_be(letters: str, capsys: Said) -> None:
    assert run(["pack-data", letters, "--set", "packing.isolate_documents=false"]) == 0
    assert "whole rows remain if packing.isolate_documents were true (70 of 128)" in capsys.readouterr().out


def test_weights_show_as_shares(letters: str, tmp_path: Path, capsys: Said) -> None:
    (tmp_path / "more.jsonl").write_text('{"text": "123456"}\n')
    sources = "data.train=[{path: texts.jsonl, weight: 1}, {path: more.jsonl, weight: 1}]"
    assert run(["pack-data", letters, "--set", sources]) == 0
    shown = capsys.readouterr().out
    assert "texts.jsonl: 11 trained tokens, 47.8% of the mix, 1.00 passes" in shown
    assert "more.jsonl: 12 trained tokens, 52.2% of the mix, 2.00 passes" in shown


def test_fine_tune_finds_the_very_same_rows(recipe: str, capsys: Said) -> None:
    first = packed(recipe, capsys)
    assert not first["found_again"]
    assert run(["fine-tune", recipe, "--set", "training.steps=1"]) == 0
    assert f"found again in {first['output']}" in capsys.readouterr().out
    ledger = json.loads(Path("run/ledger.json").read_text())
    assert ledger == first["ledger"]
    again = packed(recipe, capsys)
    assert again["found_again"]
    assert again["seconds"]["encoding"] == again["seconds"]["packing"] == 0
    different = {"seconds", "found_again"}
    assert {key: again[key] for key in again.keys() - different} == {
        key: first[key] for key in first.keys() - different
    }


def test_pack_data_finds_what_fine_tune_made(recipe: str, capsys: Said) -> None:
    assert run(["fine-tune", recipe, "--set", "training.steps=1"]) == 0
    assert packed(recipe, capsys)["found_again"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_force_makes_the_rows_anew_and_leaves_those_of_others(recipe: str, cache: Path, capsys: Said) -> None:
    first = packed(recipe, capsys)
    other = packed(recipe, capsys, "--set", "packing.sequence_length=64")
    (cache / "notes.txt").write_text("not trainkit's")
    rows = Path(first["output"])
    before, inode = files(rows), rows.stat().st_ino
    forced = packed(recipe, capsys, "--force")
    assert not forced["found_again"]
    assert forced["seconds"]["encoding"] > 0
    assert forced["output"] == first["output"]
    assert files(rows) == before
    assert rows.stat().st_ino != inode
    assert packed(recipe, capsys)["found_again"]
    assert packed(recipe, capsys, "--set", "packing.sequence_length=64")["found_again"]
    assert Path(other["output"]).is_dir()
    assert (cache / "notes.txt").exists()
    assert not list(cache.rglob(".building-*"))


def test_force_replaces_documents_that_are_not_what_the_encoder_says(
    recipe: str, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainkit.data import encoding

    def other_ids(*given: Any) -> Any:
        return [
            encoding.Encoded(one.ids[::-1].copy(), one.trained, one.separator_tokens, one.turns, one.ended_turns)
            for one in encode_many(*given)
        ]

    encode_many = encoding.Encoder.encode_many
    with monkeypatch.context() as patched:
        patched.setattr(encoding.Encoder, "encode_many", other_ids)
        wrong = packed(recipe, capsys)
    tokens = Path(wrong["output"]).parent.parent / "tokens.bin"
    before = tokens.read_bytes()
    assert packed(recipe, capsys)["found_again"]  # the sums are right: only --force looks at the examples again
    assert packed(recipe, capsys, "--force")["output"] == wrong["output"]
    assert tokens.read_bytes() != before
    verify(Path(wrong["output"]), "rows", Path(wrong["output"]).name)
    assert packed(recipe, capsys)["found_again"]


def test_no_weights_are_read(letters: str, capsys: Said) -> None:
    assert sorted(path.name for path in Path("tokenizer").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert packed(letters, capsys)["rows"] == 2


def test_bad_data_is_refused_as_a_run_would(letters: str, tmp_path: Path, capsys: Said) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "1"}\n{"text": \n')
    assert run(["pack-data", letters]) == 3
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("error: texts.jsonl:2: ")
    assert said.err.count("error") == 1
    assert said.out == ""


def test_real_conversations(material: Path, tmp_path: Path, capsys: Said) -> None:
    (tmp_path / "real.yaml").write_text(
        f"model: {{name: {material}/tokenizers/qwen2}}\n"
        f"data: {{train: {material}/data/dolly_hhrlhf_1000.jsonl, max_dropped: 0.02, chat_template: plain}}\n"
        "training: {epochs: 1}\noutput_dir: run\n"
    )
    result = packed("real.yaml", capsys)
    assert result["documents"] > 950
    assert result["lower_bound_rows"] <= result["rows"] <= result["lower_bound_rows"] + 2
    padding = result["padding_waste_before"]
    assert (
        1 - result["fill"] < 0.02 < padding["batches_of_8"] < padding["batches_of_32"] < padding["to_sequence_length"]
    )
    assert result["attention_pairs"]["isolated"] < 0.3 * result["attention_pairs"]["whole_rows"]
    assert sum(band["documents"] for band in result["document_lengths"]["histogram"]) == result["documents"]


def test_time_belongs_to_the_stage_that_worked(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.5, 1.5, 3.5, 7.5, 8.0, 16.0, 16.25])
    told: list[tuple[str, int, int | None]] = []
    with monkeypatch.context() as patched:
        patched.setattr("time.perf_counter", lambda: next(now))
        clock = StageClock(lambda *said: told.append(said))
        clock.end("tokenizer")
        clock.progress("checking files", 0, 1)
        clock.progress("checking files", 1, 1)
        clock.progress("encoding a.jsonl", 9, None)
        clock.progress("packing", 0, 1)
        clock.progress("packing", 1, 1)
        clock.end("opening")
    seconds = {"tokenizer": 1.5, "checking": 2.0, "encoding": 4.5, "packing": 8.0, "opening": 0.25, "total": 16.25}
    assert clock.seconds() == seconds
    assert told[2] == ("encoding a.jsonl", 9, None)
