"""From a recipe's sources to rows: the key, the cache, the held-out share, and every refusal."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from trainkit.data import preparation
from trainkit.data.conversations import Conversation, Message, ParsedExample, PlainText, PromptCompletion
from trainkit.data.packed_store import PackedRows
from trainkit.data.preparation import PreparedData, default_cache, prepare
from trainkit.data.row_plan import NO_TARGET
from trainkit.data.sealed_folder import StoreUnusable
from trainkit.data.token_bytes import NOTHING_FAST, FastTokens
from trainkit.errors import DataError, MachineError
from trainkit.recipe.schema import Data, Evaluation, Model, Packing, Recipe, Source, Training

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trainkit.data.encoding import Encoder

PACKING = Packing(sequence_length=64, overlap=4)
END = 1


@dataclass(frozen=True)
class Letters:
    """What the encoder of a letter-by-letter tokenizer gives."""

    ids: "NDArray[np.int32]"
    trained: "NDArray[np.bool_]"
    separator_tokens: int
    turns: int = 0
    ended_turns: int = 0
    spoken_specials: int = 0


@dataclass
class LetterEncoder:
    """A token a letter, trained where an answer is; counts its calls, to tell who was tokenised again."""

    fingerprint: str = "letters"
    calls: int = 0

    @property
    def tokenizer(self) -> "LetterEncoder":
        return self

    @property
    def fast(self) -> FastTokens:
        """Nothing, so that every example comes here."""
        return NOTHING_FAST

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(map(chr, ids))

    def encode_many(self, examples: Sequence[tuple[ParsedExample, str]]) -> list[Letters]:
        return [self.encode(parsed, place) for parsed, place in examples]

    def encode(self, parsed: ParsedExample, place: str) -> Letters:
        self.calls += 1
        if isinstance(parsed, PlainText):
            parts = [(parsed.text, True)]
        elif isinstance(parsed, PromptCompletion):
            parts = [(parsed.prompt, False), (parsed.completion, True)]
        else:
            parts = [(message.content, message.role == "assistant") for message in parsed.messages]
        letters = "".join(text for text, _ in parts)
        flags = [trained for text, trained in parts for _ in text]
        return Letters(
            np.array([*map(ord, letters), END], np.int32), np.array([False, *flags[1:], flags[-1]]), separator_tokens=1
        )


def pairs(path: Path, prompts: Sequence[str], completion: str = "the answer") -> Source:
    path.write_text("".join(json.dumps({"prompt": p, "completion": completion}) + "\n" for p in prompts), "utf-8")
    return Source(path=str(path))


def recipe(*train: Source, packing: Packing = PACKING, seed: int = 1, **data: Any) -> Recipe:
    return Recipe(
        model=Model(name="tiny"),
        data=Data(train=train, **data),
        packing=packing,
        training=Training(epochs=1, seed=seed),
        output_dir="run",
    )


def run(made: Recipe, cache: Path, encoder: LetterEncoder | None = None) -> PreparedData:
    return prepare(made, cast("Encoder", encoder or LetterEncoder()), cache, lambda _stage, _done, _total: None)


def texts(rows: PackedRows) -> list[str]:
    """The documents of all rows, sorted; a letter for a token."""
    found = []
    for index in range(len(rows)):
        row = rows.row(index)
        for part in np.split(row.ids_T, np.cumsum(row.segment_lengths)[:-1]):
            found += ["".join(map(chr, part[part != END].tolist()))]
    return sorted(found)


def test_every_example_is_in_the_rows(tmp_path: Path) -> None:
    source = pairs(tmp_path / "a.jsonl", [f"question {n} " for n in range(20)])
    prepared = run(recipe(source), tmp_path / "cache")
    assert texts(prepared.train) == sorted(f"question {n} the answer" for n in range(20))
    assert prepared.evaluation is None
    assert prepared.prompts == ()
    ledger = prepared.train.ledger
    assert (ledger.examples_read, ledger.documents, ledger.separators_trained) == (20, 20, 20)
    assert ledger.trained == 20 * len("the answer")
    assert any("prompt-completion" in sentence for sentence in prepared.sentences)
    assert prepared.train.documents_of(0)[0].startswith(source.path)


def test_a_fraction_is_held_out_and_equal_examples_stay_together(tmp_path: Path) -> None:
    source = pairs(tmp_path / "a.jsonl", [f"question {n % 50} " for n in range(200)])
    prepared = run(recipe(source, eval=0.3), tmp_path / "cache")
    assert prepared.evaluation is not None
    held, trained = texts(prepared.evaluation), texts(prepared.train)
    assert len(held) + len(trained) == 200
    assert not set(held) & set(trained)
    assert 5 < len(set(held)) < 25
    other = run(recipe(source, eval=0.3, seed=2), tmp_path / "cache")
    assert other.evaluation is not None
    assert set(texts(other.evaluation)) != set(held)


def test_prompts_are_held_out_examples_as_they_were_parsed(tmp_path: Path) -> None:
    source = pairs(tmp_path / "a.jsonl", [f"question {n} " for n in range(60)])
    made = replace(recipe(source, eval=0.3), evaluation=Evaluation(samples=2, exact_match=5))
    prepared = run(made, tmp_path / "cache")
    assert prepared.evaluation is not None
    assert len(prepared.prompts) == 5
    held = texts(prepared.evaluation)
    for place, example in prepared.prompts:
        assert isinstance(example, PromptCompletion)
        assert example.prompt + example.completion in held
        line = int(place.rpartition(":")[2])
        assert example.prompt == f"question {line - 1} "
    fewer = run(replace(made, evaluation=Evaluation(samples=2)), tmp_path / "cache")
    assert fewer.prompts == prepared.prompts[:2]
    assert fewer.key == prepared.key


def test_a_conversation_comes_back_whole_as_a_prompt(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    lines = [
        {
            "tools": tools,
            "messages": [
                {"role": "user", "content": f"add {n}"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "3"},
                {"role": "assistant", "content": "three"},
            ],
        }
        for n in range(20)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (_, example), *_ = run(recipe(Source(path=str(tmp_path / "a.jsonl")), eval=0.5), tmp_path / "cache").prompts
    assert isinstance(example, Conversation)
    assert example.tools == tuple(tools)
    assert example.messages[3] == Message("assistant", "three")
    assert list(example.messages[1].extras["tool_calls"]) == [call]


def test_separate_evaluation_sources_are_used_and_shared_examples_are_told(tmp_path: Path) -> None:
    train = pairs(tmp_path / "a.jsonl", [f"question {n} " for n in range(20)])
    evaluation = pairs(tmp_path / "b.jsonl", ["question 3 ", "other ", "question 4 "])
    prepared = run(recipe(train, eval=(evaluation,)), tmp_path / "cache")
    assert prepared.evaluation is not None
    assert texts(prepared.evaluation) == ["other the answer", "question 3 the answer", "question 4 the answer"]
    assert prepared.evaluation.ledger.examples_read == 3
    assert "warning: 2 of the 3 evaluation examples are in the training data too" in prepared.sentences


def test_a_second_run_finds_everything_again(tmp_path: Path) -> None:
    source = pairs(tmp_path / "a.jsonl", [f"question {n} " for n in range(40)])
    encoder = LetterEncoder()
    first = run(recipe(source, eval=0.3), tmp_path / "cache", encoder)
    again = run(recipe(source, eval=0.3), tmp_path / "cache", encoder)
    assert encoder.calls == 40
    assert again.key == first.key
    assert again.prompts == first.prompts
    assert again.train.ledger == first.train.ledger
    assert [again.train.row(i).ids_T.tolist() for i in range(len(again.train))] == [
        first.train.row(i).ids_T.tolist() for i in range(len(first.train))
    ]
    assert "found again" in again.sentences[-1]
    how = "tokenised by tokenizers: its tokens are no strings of bytes, so each example is encoded by itself"
    assert first.sentences[:-1] == (how, *again.sentences[:-1])


@pytest.mark.parametrize(
    ("change", "tokenises"),
    [
        ({"packing": replace(PACKING, sequence_length=32)}, False),
        ({"packing": replace(PACKING, overlap=2)}, False),
        ({"seed": 2}, False),
        ({"eval": 0.4}, False),
        ({"packing": replace(PACKING, separator="none")}, True),
        ({"train_on": "all"}, True),
    ],
)
def test_a_changed_recipe_has_another_key_and_tokenises_only_where_it_must(
    tmp_path: Path, change: dict[str, Any], tokenises: bool
) -> None:
    source = pairs(tmp_path / "a.jsonl", [f"question {n} " for n in range(40)])
    encoder = LetterEncoder()
    first = run(recipe(source, eval=0.3), tmp_path / "cache", encoder)
    second = run(recipe(source, **{"eval": 0.3} | change), tmp_path / "cache", encoder)
    assert first.key != second.key
    assert encoder.calls == (80 if tokenises else 40)


@pytest.mark.parametrize(
    ("kind", "stage", "end"), [("jsonl", "encoding {path}, MiB", (1, 1)), ("csv", "encoding {path}", (600, 600))]
)
def test_every_stage_of_progress_comes_to_its_end(tmp_path: Path, kind: str, stage: str, end: tuple[int, int]) -> None:
    source = pairs(tmp_path / "a.jsonl", [f"question {n} " for n in range(600)])
    if kind == "csv":
        rows = [json.loads(line) for line in Path(source.path).read_text().splitlines()]
        source = Source(path=str(tmp_path / "a.csv"))
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        Path(source.path).write_text("\n".join(lines))
    last: dict[str, tuple[int, int | None]] = {}
    prepare(
        recipe(source),
        cast("Encoder", LetterEncoder()),
        tmp_path / "cache",
        lambda *now: last.update({now[0]: now[1:]}),
    )
    assert last == {"checking files": (1, 1), stage.format(path=source.path): end, "packing": (1, 1)}


def test_changed_bytes_or_another_encoder_have_another_key(tmp_path: Path) -> None:
    source = pairs(tmp_path / "a.jsonl", ["one ", "two "])
    keys = [run(recipe(source), tmp_path / "cache").key]
    keys.append(run(recipe(source), tmp_path / "cache", LetterEncoder("other letters")).key)
    pairs(tmp_path / "a.jsonl", ["one ", "2wo "])
    prepared = run(recipe(source), tmp_path / "cache")
    assert len({*keys, prepared.key}) == 3
    assert texts(prepared.train) == ["2wo the answer", "one the answer"]


@pytest.mark.parametrize("file", ["tokens.bin", "manifest.json", "rows/*/train-begins.bin", "rows/*/manifest.json"])
def test_what_is_damaged_in_the_cache_is_made_anew_and_told(tmp_path: Path, file: str) -> None:
    source = pairs(tmp_path / "a.jsonl", [f"question {n} " for n in range(20)])
    first = run(recipe(source), tmp_path / "cache")
    expected = texts(first.train)
    (damaged,) = (tmp_path / "cache").glob(f"*/{file}")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    again = run(recipe(source), tmp_path / "cache")
    assert texts(again.train) == expected
    assert again.sentences[0].startswith("warning: ")
    assert again.sentences[0].endswith("; made anew")
    assert not run(recipe(source), tmp_path / "cache").sentences[0].startswith("warning")


def test_weights_repeat_a_source_and_say_so(tmp_path: Path) -> None:
    large = pairs(tmp_path / "a.jsonl", [f"question {n} " for n in range(100)])
    small = pairs(tmp_path / "b.jsonl", [f"small {n} " for n in range(10)])
    made = recipe(replace(large, weight=0.5), replace(small, weight=0.5))
    prepared = run(made, tmp_path / "cache")
    assert [round(source.share, 2) for source in prepared.train.ledger.sources] == [0.5, 0.5]
    assert prepared.train.ledger.repeated > 0
    assert f"warning: {small.path} is repeated 10.0 times to meet its weight" in prepared.sentences
    assert len(texts(prepared.train)) == 200


def test_dropped_examples_are_counted_and_too_many_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"prompt": f"question {n} ", "completion": "" if n in (3, 5) else "yes"} for n in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = Source(path=str(path))
    with pytest.raises(DataError, match=rf"2 of 20 examples .*first: {path}:4.*more than data\.max_dropped: 0\.01"):
        run(recipe(source), tmp_path / "cache")
    prepared = run(recipe(source, max_dropped=0.1), tmp_path / "cache")
    assert sum(prepared.train.ledger.examples_dropped.values()) == 2
    assert any("dropped of 20 examples" in sentence for sentence in prepared.sentences)
    with pytest.raises(DataError, match="more than data"):
        run(recipe(source), tmp_path / "cache")


def test_documents_without_a_target_count_as_dropped_and_are_named(tmp_path: Path) -> None:
    class Untrained(LetterEncoder):
        def encode(self, parsed: ParsedExample, place: str) -> Letters:
            encoded = super().encode(parsed, place)
            return replace(encoded, trained=encoded.trained & (not place.endswith(":2")))

    source = pairs(tmp_path / "a.jsonl", ["one ", "two ", "three "])
    with pytest.raises(DataError, match=rf"1 of 3 examples .*{NO_TARGET}: 1; first: {source.path}:2"):
        run(recipe(source), tmp_path / "cache", Untrained())
    prepared = run(recipe(source, max_dropped=0.5), tmp_path / "cache", Untrained())
    assert prepared.train.ledger.dropped == {NO_TARGET: len("two the answer")}


def test_an_example_without_a_token_is_dropped_and_counted(tmp_path: Path) -> None:
    class Deaf(LetterEncoder):
        def encode(self, parsed: ParsedExample, place: str) -> Letters:
            encoded = super().encode(parsed, place)
            return Letters(encoded.ids[:0], encoded.trained[:0], 0) if place.endswith(":1") else encoded

    source = pairs(tmp_path / "a.jsonl", ["one ", "two "])
    ledger = run(recipe(source, max_dropped=0.5), tmp_path / "cache", Deaf()).train.ledger
    assert ledger.examples_dropped == {"no tokens": 1}


def test_a_source_that_trains_nothing_is_refused_with_an_example_and_not_kept(tmp_path: Path) -> None:
    class Untrained(LetterEncoder):
        def encode(self, parsed: ParsedExample, place: str) -> Letters:
            encoded = super().encode(parsed, place)
            return replace(encoded, trained=encoded.trained & (source.path not in place))

    source, other = pairs(tmp_path / "a.jsonl", ["one "]), pairs(tmp_path / "b.jsonl", ["two "])
    with pytest.raises(DataError, match=r"a\.jsonl:1: 0 of \d+ tokens in 1 examples are trained"):
        run(recipe(other, source), tmp_path / "cache", Untrained())
    assert list((tmp_path / "cache").iterdir()) == []


def test_examples_that_are_all_empty_are_refused(tmp_path: Path) -> None:
    source = pairs(tmp_path / "a.jsonl", ["one ", "two "], completion="")
    with pytest.raises(DataError, match="none of 2 examples is left to train on"):
        run(recipe(source, max_dropped=1.0), tmp_path / "cache")


@pytest.mark.parametrize(("fraction", "which"), [(0.001, "none"), (0.999, "all")])
def test_a_fraction_that_leaves_one_side_empty_is_refused(tmp_path: Path, fraction: float, which: str) -> None:
    source = pairs(tmp_path / "a.jsonl", ["one ", "two "])
    with pytest.raises(DataError, match=f"holds out {which} of the 2 examples"):
        run(recipe(source, eval=fraction), tmp_path / "cache")


def test_a_book_is_split_and_a_fraction_of_it_is_refused(tmp_path: Path) -> None:
    text = "".join(chr(97 + n % 26) for n in range(1000))
    (tmp_path / "book.txt").write_text(text)
    source = Source(path=str(tmp_path / "book.txt"))
    rows = run(recipe(source), tmp_path / "cache").train
    ledger = rows.ledger
    assert (ledger.read, ledger.truncated, dict(ledger.dropped)) == (1000, 0, {})
    assert ledger.overlap == 4 * (ledger.pieces - 1)
    assert ledger.trained_targets == 1000  # all but the first, and the separator
    with pytest.raises(DataError, match=r"is one document, so data\.eval: 0\.1 cannot hold out a part of it"):
        run(recipe(source, eval=0.1), tmp_path / "cache")


def test_a_file_that_changes_while_it_is_read_is_refused_and_not_kept(tmp_path: Path) -> None:
    source = pairs(tmp_path / "a.jsonl", ["one ", "two "])

    class Appending(LetterEncoder):
        def encode(self, parsed: ParsedExample, place: str) -> Letters:
            with Path(source.path).open("a") as file:
                file.write("\n")
            return super().encode(parsed, place)

    with pytest.raises(DataError, match=r"a\.jsonl changed while it was read"):
        run(recipe(source), tmp_path / "cache", Appending())
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path) -> None:
    source = pairs(tmp_path / "a.jsonl", ["one ", "two "])
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(MachineError, match="TRAINKIT_CACHE"):
        run(recipe(source), tmp_path / "cache")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for name in ("TRAINKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert default_cache() == Path("/home/someone/.cache/trainkit")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert default_cache() == Path("/var/cache/trainkit")
    monkeypatch.setenv("TRAINKIT_CACHE", "~/mine")
    assert default_cache() == Path("/home/someone/mine")
    monkeypatch.setenv("TRAINKIT_CACHE", "~nobody-here/mine")
    with pytest.raises(MachineError, match=r"there is no home folder; set .*TRAINKIT_CACHE"):
        default_cache()


def test_the_real_encoder_and_its_rows(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from trainkit.data.encoding import Encoder

    lines = [
        {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]}
        for n in range(30)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = recipe(Source(path=str(tmp_path / "a.jsonl")), eval=0.2)
    prepared = prepare(made, Encoder(tiny_tokenizer, made.data, made.packing), tmp_path / "cache", lambda *_: None)
    row = prepared.train.row(0)
    trained = tiny_tokenizer.decode(row.ids_T[row.trained_T])
    assert trained.count("answer") == row.segment_lengths.size
    assert "question" not in trained


TWO_AT_ONCE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_preparation as t
from trainkit.recipe.schema import Source
folder = Path(sys.argv[2])
prepared = t.run(t.recipe(Source(path=str(folder / "a.jsonl")), eval=0.3), folder / "cache")
print(prepared.key, prepared.train.ledger.rows, t.texts(prepared.train))
"""


def test_two_processes_at_once_agree_and_leave_one_store(tmp_path: Path) -> None:
    pairs(tmp_path / "a.jsonl", [f"question {n} " for n in range(300)])
    here = Path(__file__).parent
    command = [sys.executable, "-c", TWO_AT_ONCE, str(here), str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ}) for _ in range(2)]
    first, second = (process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert first == second
    (store,) = (tmp_path / "cache").iterdir()
    assert len(list((store / "rows").iterdir())) == 1


def test_damage_in_what_is_too_large_to_be_compared_at_once_stops_the_row_and_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "COMPARED_AT_ONCE", 0)
    source = pairs(tmp_path / "a.jsonl", [f"question {n} " for n in range(20)])
    expected = texts(run(recipe(source), tmp_path / "cache").train)
    (tokens,) = (tmp_path / "cache").glob("*/tokens.bin")
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2] ^= 1
    tokens.write_bytes(content)
    found = run(recipe(source), tmp_path / "cache")
    assert found.found_again
    with pytest.raises(
        StoreUnusable, match=r"tokens\.bin has changed since it was written .*; run again, and it is made"
    ):
        texts(found.train)
    again = run(recipe(source), tmp_path / "cache")
    assert again.sentences[0].endswith("it was found to be damaged; made anew")
    assert texts(again.train) == expected
