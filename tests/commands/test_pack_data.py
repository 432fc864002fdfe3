"""`trainkit pack-data` through the command line: its numbers, and that it is the same work as fine-tune's."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer
import yaml

from trainkit.cli import app, run
from trainkit.commands.pack_data import StageClock
from trainkit.data.packed_store import PackedRows
from trainkit.data.parquet_rows import SCHEMA
from trainkit.data.sealed_folder import verify

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "packing.md"
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
    "long_documents",
    "parquet",
    "plot",
}
STAGES = ["tokenizer", "checking", "encoding", "packing", "opening", "writing", "total"]

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


def packed(*arguments: str, capsys: Said) -> dict[str, Any]:
    """What `pack-data --json` prints."""
    capsys.readouterr()
    code = run(["pack-data", *arguments, "--json"])
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
    result = packed(letters, capsys=capsys)
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
    result = packed(letters, capsys=capsys)
    # 11 tokens are 8, and 4 of which the first is there again
    assert (result["documents"], result["tokens"], result["lower_bound_rows"]) == (4, 3 + 5 + 6 + 8 + 4, 4)
    assert result["ledger"]["overlap"] == 1
    assert result["padding_waste_before"]["to_sequence_length"] == pytest.approx(14 / 40)
    assert result["attention_pairs"]["isolated"] == 9 + 25 + 36 + 64 + 16
    assert result["document_lengths"]["longest"] == 11
    assert result["long_documents"] == {"documents": 1, "pieces": 2}


def test_the_report_says_it_to_a_person(letters: str, capsys: Said) -> None:
    assert run(["pack-data", letters]) == 0
    shown = capsys.readouterr().out
    assert "texts.jsonl: text" in shown
    assert "train: 3 documents, 14 tokens (11 trained) in 2 rows of 8, 87.5% full\n" in shown
    assert re.search(r"^trained targets +11  78.6% of the tokens$", shown, re.MULTILINE)
    assert "padded, random batches of 8      18  22.22%   1.12\n" in shown
    assert "padded to 8                      24  41.67%   1.50\n" in shown
    assert "rows: 2, 87.50% full; 0 above the 2 that the tokens need at least\n" in shown
    assert "long documents: none is longer than a row of 8\n" in shown
    assert "attention: 54.7% of the token pairs of whole rows remain (70 of 128)\n" in shown
    assert "\n3  1  ████████████████████████████████████████\n4  0\n5  1  ██" in shown
    assert re.search(r"^seconds: .*total [0-9.]+$", shown, re.MULTILINE)


def test_what_became_of_long_documents_is_said(letters: str, capsys: Said) -> None:
    with Path("texts.jsonl").open("a") as file:
        file.write('{"text": "1234567890"}\n')  # 11 tokens
    said = {}
    for policy in ("split", "truncate", "drop"):
        capsys.readouterr()
        assert run(["pack-data", letters, "--set", f"packing.long_documents={policy}"]) == 0
        said[policy] = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("long"))
    assert said == {  # of 21 tokens read (separators are added) 10 belong to the long one
        "split": "long documents: 1 of 4, in 2 pieces; overlap adds 4.76% (1 tokens)",
        "truncate": "long documents: 1 of 4 truncated, 9.52% of the tokens read (2)",
        "drop": "long documents: 1 dropped, 47.62% of the tokens read (10)",
    }


def test_without_isolation_the_saving_is_only_what_could_be(letters: str, capsys: Said) -> None:
    assert run(["pack-data", letters, "--set", "packing.isolate_documents=false"]) == 0
    assert "whole rows remain if packing.isolate_documents were true (70 of 128)" in capsys.readouterr().out


def test_weights_show_as_shares(letters: str, tmp_path: Path, capsys: Said) -> None:
    (tmp_path / "more.jsonl").write_text('{"text": "123456"}\n')
    sources = "data.train=[{path: texts.jsonl, weight: 1}, {path: more.jsonl, weight: 1}]"
    assert run(["pack-data", letters, "--set", sources]) == 0
    shown = capsys.readouterr().out
    assert "source       documents  trained  wanted  share   passes\n" in shown
    assert "texts.jsonl          3       11  50.00%  47.83%  1.00\n" in shown
    assert "more.jsonl           1       12  50.00%  52.17%  2.00\n" in shown


def test_fine_tune_finds_the_very_same_rows(recipe: str, capsys: Said) -> None:
    first = packed(recipe, capsys=capsys)
    assert not first["found_again"]
    assert run(["fine-tune", recipe, "--set", "training.steps=1"]) == 0
    assert f"found again in {first['output']}" in capsys.readouterr().out
    ledger = json.loads(Path("run/ledger.json").read_text())
    assert ledger == first["ledger"]
    again = packed(recipe, capsys=capsys)
    assert again["found_again"]
    assert again["seconds"]["encoding"] == again["seconds"]["packing"] == 0
    different = {"seconds", "found_again"}
    assert {key: again[key] for key in again.keys() - different} == {
        key: first[key] for key in first.keys() - different
    }


def test_pack_data_finds_what_fine_tune_made(recipe: str, capsys: Said) -> None:
    assert run(["fine-tune", recipe, "--set", "training.steps=1"]) == 0
    assert packed(recipe, capsys=capsys)["found_again"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_force_makes_the_rows_anew_and_leaves_those_of_others(recipe: str, cache: Path, capsys: Said) -> None:
    first = packed(recipe, capsys=capsys)
    other = packed(recipe, "--set", "packing.sequence_length=64", capsys=capsys)
    (cache / "notes.txt").write_text("not trainkit's")
    rows = Path(first["output"])
    before, inode = files(rows), rows.stat().st_ino
    forced = packed(recipe, "--force", capsys=capsys)
    assert not forced["found_again"]
    assert forced["seconds"]["encoding"] > 0
    assert forced["output"] == first["output"]
    assert files(rows) == before
    assert rows.stat().st_ino != inode
    assert packed(recipe, capsys=capsys)["found_again"]
    assert packed(recipe, "--set", "packing.sequence_length=64", capsys=capsys)["found_again"]
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
        wrong = packed(recipe, capsys=capsys)
    tokens = Path(wrong["output"]).parent.parent / "tokens.bin"
    before = tokens.read_bytes()
    assert packed(recipe, capsys=capsys)["found_again"]  # the sums are right: only --force looks at the examples again
    assert packed(recipe, "--force", capsys=capsys)["output"] == wrong["output"]
    assert tokens.read_bytes() != before
    verify(Path(wrong["output"]), "rows", Path(wrong["output"]).name)
    assert packed(recipe, capsys=capsys)["found_again"]


OPTIONS = ["--data", "texts.jsonl", "--tokenizer", "tokenizer", "--sequence-length", "8"]


def test_options_make_the_rows_of_the_recipe_that_says_the_same(letters: str, cache: Path, capsys: Said) -> None:
    """Found by `fine-tune`'s recipe, in the cache as in a place of its own."""
    by_options = packed(*OPTIONS, capsys=capsys)
    recipe = Path(letters).read_text().replace("overlap: 1", "overlap: 4")  # half of such a short row
    Path(letters).write_text(recipe)
    by_recipe = packed(letters, capsys=capsys)
    assert (by_options["found_again"], by_recipe["found_again"]) == (False, True)
    assert by_recipe["output"] == by_options["output"]
    assert not packed(letters, "--output", "here", capsys=capsys)["found_again"]
    assert Path("here").joinpath(*Path(by_recipe["output"]).relative_to(cache).parts).is_dir()
    assert packed(letters, "--output", "here", capsys=capsys)["found_again"]


def test_an_output_of_its_own_holds_several_packings_and_force_replaces_only_the_one(
    letters: str, cache: Path, capsys: Said
) -> None:
    first = packed(letters, "--output", "new/here", capsys=capsys)
    assert packed(letters, "--output", "new/here", "--set", "packing.sequence_length=16", capsys=capsys)["rows"] == 1
    assert not cache.exists()
    inode = Path(first["output"]).stat().st_ino
    (Path("new/here") / ".building-left").mkdir()  # of a process that was killed
    assert not packed(letters, "--output", "new/here", "--force", capsys=capsys)["found_again"]
    assert Path(first["output"]).stat().st_ino != inode
    assert len(list(Path(first["output"]).parent.iterdir())) == 2


def test_the_cache_that_output_made_is_one_for_fine_tune(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    made = packed(recipe, "--output", "here", capsys=capsys)
    monkeypatch.setenv("TRAINKIT_CACHE", "here")
    capsys.readouterr()
    assert run(["fine-tune", recipe, "--set", "training.steps=1"]) == 0
    assert f"found again in {made['output']}" in capsys.readouterr().out


def test_parquet_holds_training_and_held_out_rows(recipe: str, capsys: Said) -> None:
    result = packed(recipe, "--format", "parquet", "--output", "out", capsys=capsys)
    assert result["parquet"] == {"train": "out/train.parquet", "evaluation": "out/evaluation.parquet"}
    for part in ("train", "evaluation"):
        rows = PackedRows.open(Path(result["output"]), part)
        read = pq.read_table(result["parquet"][part]).to_pylist()
        assert [one["input_ids"] for one in read] == [rows.row(index).ids_T.tolist() for index in range(len(rows))]
    assert result["rows"] == len(pq.read_table("out/train.parquet"))
    assert result["seconds"]["writing"] > 0


def test_parquet_in_one_file_is_found_again_and_replaced_on_demand(letters: str, capsys: Said) -> None:
    asked = ["pack-data", letters, "--format", "parquet", "--output", "new/rows.parquet"]
    assert run(asked) == 0
    assert "parquet: train rows written in new/rows.parquet\n" in capsys.readouterr().out
    assert run(asked) == 0
    assert "parquet: train rows found again in new/rows.parquet\n" in capsys.readouterr().out
    assert [path.name for path in Path("new").iterdir()] == ["rows.parquet"]
    other = [*asked, "--set", "packing.sequence_length=16"]
    before = Path("new/rows.parquet").read_bytes()
    assert run(other) == 2
    assert "error: new/rows.parquet: holds other rows" in capsys.readouterr().err
    assert Path("new/rows.parquet").read_bytes() == before
    assert run([*other, "--force"]) == 0
    assert pq.read_table("new/rows.parquet")["seq_lengths"].to_pylist()[0] != []
    assert len(pq.read_table("new/rows.parquet")) == 1


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.html"])
def test_the_picture_is_drawn_and_named(letters: str, name: str, capsys: Said) -> None:
    pytest.importorskip("matplotlib")
    result = packed(letters, "--plot", name, capsys=capsys)
    assert result["plot"] == name
    assert Path(name).stat().st_size > 5000
    assert run(["pack-data", letters, "--plot", name]) == 0
    assert f"plot: {name}\n" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["encoding", "packing", "writing"])
def test_ctrl_c_leaves_nothing_half_and_says_so(
    stage: str, letters: str, cache: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = StageClock.progress

    def interrupted(clock: StageClock, name: str, done: int, total: int | None) -> None:
        progress(clock, name, done, total)
        if name.startswith(stage):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StageClock, "progress", interrupted)
        assert run(["pack-data", letters, "--format", "parquet", "--output", "out"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: interrupted during {stage}; nothing half is left, and the same command goes on from what was complete"
    )
    assert not Path("out").exists()
    left = [path for path in cache.rglob("*") if path.name.startswith(".building-")]
    assert left == []
    assert all((folder / "manifest.json").is_file() for folder in cache.iterdir() if any(folder.iterdir()))
    result = packed(letters, "--format", "parquet", "--output", "out", capsys=capsys)
    assert (result["rows"], result["found_again"]) == (2, stage == "writing")


def test_the_document_names_every_option_key_stage_and_column(letters: str, capsys: Said) -> None:
    text = DOCUMENT.read_text()
    group: Any = typer.main.get_command(app)
    options = [option for parameter in group.commands["pack-data"].params for option in parameter.opts]
    result = packed(letters, capsys=capsys)
    spoken_of = [*result, *result["padding_waste_before"], *result["attention_pairs"], *result["document_lengths"]]
    spoken_of += [*result["long_documents"], *STAGES, *SCHEMA.names]
    assert [name for name in spoken_of if f"`{name}`" not in text] == []
    assert [option for option in options if option.startswith("--") and option not in text] == []


def test_the_commands_of_the_document_run(tmp_path: Path, tiny_model_folder: Path, capsys: Said) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "models" / "my-model")
    for name in ("train.jsonl", "more.jsonl"):
        texts = [f"{name} {number}" for number in range(200)]
        Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    blocks = re.findall(r"^```bash\n(.*?)^```$", DOCUMENT.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("trainkit pack-data ")]
    assert len(commands) == len(lines) > 2
    for command in commands:
        assert run(command[1:]) == 0, capsys.readouterr().err
    assert Path("packed/train.parquet").is_file()


@pytest.mark.filterwarnings("ignore")  # of libraries that are not ours
def test_trl_trains_on_the_rows_as_the_document_says(
    letters: str, tmp_path: Path, tiny_model_folder: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    shutil.copytree(tiny_model_folder, tmp_path / "models" / "my-model")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    packed(*OPTIONS, "--format", "parquet", "--output", "packed", capsys=capsys)
    [block] = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), flags=re.DOTALL | re.MULTILINE)
    here = block.replace("padding_free=True,", "padding_free=True, use_cpu=True, bf16=False,")  # not on a GPU
    assert here != block
    exec(compile(here, "packing.md", "exec"), {})
    assert "train_loss" in capsys.readouterr().out


def test_no_weights_are_read(letters: str, capsys: Said) -> None:
    assert sorted(path.name for path in Path("tokenizer").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert packed(letters, capsys=capsys)["rows"] == 2


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
    result = packed("real.yaml", capsys=capsys)
    assert result["documents"] > 950
    assert result["lower_bound_rows"] <= result["rows"] <= result["lower_bound_rows"] + 2
    padding = result["padding_waste_before"]
    assert (
        1 - result["fill"] < 0.02 < padding["batches_of_8"] < padding["batches_of_32"] < padding["to_sequence_length"]
    )
    assert result["attention_pairs"]["isolated"] < 0.3 * result["attention_pairs"]["whole_rows"]
    assert sum(band["documents"] for band in result["document_lengths"]["histogram"]) == result["documents"]


def test_time_belongs_to_the_stage_that_worked(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.5, 1.5, 3.5, 7.5, 8.0, 16.0, 16.25, 16.5, 18.5, 18.75])
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
        clock.progress("writing rows.parquet", 0, 2)
        assert clock.stage == "writing"
        clock.progress("writing rows.parquet", 2, 2)
        clock.end("writing")
    seconds = {"tokenizer": 1.5, "checking": 2.0, "encoding": 4.5, "packing": 8.0, "opening": 0.5, "writing": 2.25}
    assert clock.seconds() == {**seconds, "total": 18.75}
    assert told[2] == ("encoding a.jsonl", 9, None)


def test_rows_that_fine_tune_would_refuse_are_packed_with_a_warning(
    small_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe))
    changes = ["--set", "packing.sequence_length=512", "--set", "training.micro_batch_size=1"]
    assert run(["pack-data", str(path), *changes]) == 0
    said = capfd.readouterr().err
    assert "packing.sequence_length: 512 is beyond the 256 positions of" in said
    assert "fine-tune will refuse these rows" in said
