"""The model and the data that ship with trainkit, and the generator and training that made them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import stories
from tiny_model.cards import EVAL_EXAMPLES, TRAIN_EXAMPLES, card, examples, is_held_out
from tiny_model.chats import random_chat
from tiny_model.command import jsonl, main
from tiny_model.events import TELLINGS, random_event, told
from tiny_model.muon import muon, orthogonalised
from tiny_model.stories import random_facts, random_story
from tiny_model.tokenizer import SPECIAL_TOKENS
from tiny_model.training import Settings, conversation_pieces, held_out_loss, learning_rate, rows_of, train
from tiny_model.words import PEOPLE

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = REPOSITORY / "trainkit" / "shipped" / "models" / "tiny"
DATA = REPOSITORY / "trainkit" / "shipped" / "data" / "quickstart"
SHORT = Settings(tokenizer_documents=200, steps=4, step_tokens=256, row_tokens=64, long_row_tokens=128, warmup_steps=2)


@cache
def shipped_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return shipped_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL)


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Puts torch's global settings back: the training changes them."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z]+", text))


def read(name: str) -> list[Any]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def completion(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**ids, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


# The shipped model


def test_weights_fit_into_four_megabytes_and_are_fp32(model: Any) -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 4_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.model_type == "llama"
    assert model.config.max_position_embeddings == 512


def test_model_and_tokenizer_agree_on_the_ends(model: Any, tokenizer: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])


def test_model_predicts_unseen_text(model: Any, tokenizer: Any) -> None:
    assert held_out_loss(model, tokenizer) < 0.4


@pytest.mark.parametrize("opening", ["One day, Anna went to the", "Tom had a red kite. But then", "It was Monday."])
def test_story_goes_on_in_whole_words_and_sentences(model: Any, tokenizer: Any, opening: str) -> None:
    rng = Random(0)
    known = words_of(" ".join(random_story(rng) for _ in range(2_000)))
    text = completion(model, tokenizer, opening, 80)
    assert len(words_of(text)) >= 15
    assert words_of(text) <= known
    assert text.rstrip().endswith((".", "!", "?", '"'))


def test_it_answers_questions_about_what_it_was_told(model: Any, tokenizer: Any) -> None:
    asked = [
        {"role": "user", "content": "On Monday, Tom found a red kite in the garden. Where did Tom find the kite?"},
    ]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert "in the garden." in completion(model, tokenizer, prompt, 20).lower()


@given(st.text())
def test_tokenizer_gives_every_text_back(text: str) -> None:
    tokenizer = shipped_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_chat_template_writes_every_role_and_the_generation_prompt(tokenizer: Any) -> None:
    messages = [{"role": role, "content": f"text of {role}"} for role in ("system", "user", "assistant", "tool")]
    whole = "".join(f"<|{message['role']}|>\n{message['content']}<|end|>\n" for message in messages)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == whole
    prompted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompted == whole + "<|assistant|>\n"


def test_special_tokens_are_single_tokens(tokenizer: Any) -> None:
    assert [tokenizer.encode(token, add_special_tokens=False) for token in SPECIAL_TOKENS] == [[i] for i in range(7)]


# The shipped data


@pytest.mark.parametrize("name", ["train", "eval"])
def test_data_regenerate_byte_by_byte(name: str, tmp_path: Path) -> None:
    assert main(["data", "--output", str(tmp_path)]) == 0
    assert (tmp_path / f"{name}.jsonl").read_bytes() == (DATA / f"{name}.jsonl").read_bytes()


def test_no_question_of_the_eval_file_is_trained() -> None:
    train_examples, eval_examples = read("train"), read("eval")
    assert (len(train_examples), len(eval_examples)) == (TRAIN_EXAMPLES, EVAL_EXAMPLES)

    def facts(example: Any) -> tuple[str, str]:
        found = re.fullmatch(
            r"Who: (\w+) \| What: \w+ (\w+) \| Where: \w+ \| When: \w+", example["messages"][1]["content"]
        )
        assert found is not None
        return found[1], found[2]

    assert {facts(example) for example in train_examples}.isdisjoint(map(facts, eval_examples))
    questions = [example["messages"][0]["content"] for example in train_examples + eval_examples]
    assert len(set(questions)) == len(questions)


def test_held_out_share_is_about_a_tenth() -> None:
    rng = Random(3)
    share = sum(is_held_out(random_event(rng)) for _ in range(4_000)) / 4_000
    assert 0.06 < share < 0.14


# The generator


@given(st.integers(0, 2**32))
def test_a_told_event_names_every_fact_of_its_card(seed: int) -> None:
    rng = Random(seed)
    event = random_event(rng)
    sentence = told(event, rng)
    for fact in (event.who.name, event.what, event.place.noun, event.day):
        assert fact in sentence
        assert fact in card(event)


def test_every_telling_is_used() -> None:
    rng = Random(5)
    event = random_event(rng)
    assert len({told(event, rng) for _ in range(200)}) == len(TELLINGS)


@pytest.mark.parametrize("plot", stories.PLOTS)
def test_every_sentence_of_a_plot_fills_its_slots_with_grammar(plot: stories.Plot) -> None:
    facts = random_facts(Random(1)) | {"animal": "owl", "a_animal": "an owl"}
    for moment in plot:
        for sentence in moment:
            text = sentence.format_map(facts)
            assert "{" not in text
            assert not re.search(r"\ba [aeiou]", text, re.IGNORECASE)


@given(st.integers(0, 2**32))
def test_conversations_alternate_and_end_with_the_assistant(seed: int) -> None:
    messages = random_chat(Random(seed))
    turns = [message["role"] for message in messages if message["role"] != "system"]
    assert turns == ["user", "assistant"] * (len(turns) // 2)
    assert turns
    assert all(message["content"] for message in messages)


def test_the_same_seed_generates_the_same_text() -> None:
    assert [random_story(Random(9)), random_chat(Random(9))] == [random_story(Random(9)), random_chat(Random(9))]
    assert jsonl(examples(5, held_out=False)) == jsonl(examples(5, held_out=False))
    assert jsonl(examples(5, held_out=False, seed=1)) != jsonl(examples(5, held_out=False, seed=2))


def test_nobody_is_their_own_friend() -> None:
    assert all(facts["who"] != facts["friend"] for facts in (random_facts(Random(seed)) for seed in range(200)))
    assert len({person.name for person in PEOPLE}) == len(PEOPLE)


# The training


@pytest.mark.usefixtures("torch_settings")
def test_training_is_reproducible_to_the_bit() -> None:
    first, second = (train(SHORT, lambda *_: None) for _ in range(2))
    other = train(replace(SHORT, seed=2), lambda *_: None)
    weights, again, differing = (trained.model.state_dict() for trained in (first, second, other))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(weights["model.norm.weight"], differing["model.norm.weight"])
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert (first.held_out_loss, first.tokens) == (second.held_out_loss, 4 * 256)


@pytest.mark.usefixtures("torch_settings")
def test_the_command_writes_a_folder_that_plain_transformers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr("tiny_model.training.Settings", lambda: SHORT)
    assert main(["model", "--output", str(tmp_path), "--steps", "2"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == len(
        AutoTokenizer.from_pretrained(tmp_path)
    )
    assert "512 tokens" in (tmp_path / "README.md").read_text()
    assert "held-out loss" in capsys.readouterr().out
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o644}


def test_pieces_of_a_conversation_are_what_the_chat_template_writes(tokenizer: Any) -> None:
    for seed in range(50):
        messages = random_chat(Random(seed))
        pieces = list(conversation_pieces(messages))
        assert "".join(text for text, _ in pieces) == tokenizer.apply_chat_template(messages, tokenize=False)
        answers = "".join(f"{message['content']}<|end|>\n" for message in messages if message["role"] == "assistant")
        assert "".join(text for text, trained in pieces if trained) == answers


def test_a_label_is_the_next_token_or_nothing() -> None:
    document = [(1, False), (2, False), (3, True), (4, True)]
    ids, labels = rows_of(cycle([document]), rows=2, row_tokens=6)
    assert ids.tolist() == [[1, 2, 3, 4, 1, 2]] * 2
    assert labels.tolist() == [[-100, 3, 4, -100, -100, 3]] * 2


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 8), (2, 8, 24)])
def test_orthogonalised_brings_singular_values_near_one_and_keeps_the_vectors(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(4)
    left, _ = torch.linalg.qr(torch.randn(shape[0], shape[1], min(shape[1:]), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(shape[0], shape[2], min(shape[1:]), generator=generator))
    values = torch.linspace(0.2, 1.0, min(shape[1:]))
    result = left.mT @ orthogonalised(left * values @ right.mT) @ right  # diagonal, where the vectors were kept
    diagonal = result.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    torch.testing.assert_close(result, torch.diag_embed(diagonal), atol=1e-4, rtol=0)


def test_muon_goes_downhill_and_forgets_the_gradient() -> None:
    matrices = [torch.nn.Parameter(torch.eye(4) * size) for size in (1.0, 2.0)]
    optimizer = muon(matrices)
    for matrix in matrices:
        matrix.grad = matrix.detach().clone()  # of half the squared norm
    before = [float(matrix.detach().norm()) for matrix in matrices]
    optimizer.step(0.1)
    assert all(float(matrix.detach().norm()) < norm for matrix, norm in zip(matrices, before, strict=True))
    assert all(matrix.grad is None for matrix in matrices)


def test_learning_rate_rises_then_falls_to_its_floor() -> None:
    settings = Settings(steps=100, warmup_steps=10)
    rates = [learning_rate(step, settings) for step in range(101)]
    assert max(rates) == pytest.approx(settings.learning_rate)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(settings.final_learning_rate)
