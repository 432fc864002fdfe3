from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from trainkit.commands.inspect_data import inspect_data
from trainkit.errors import DataError, ModelError
from trainkit.recipe.reader import ReadRecipe, read_recipe

if TYPE_CHECKING:
    from pathlib import Path

CHATS = [
    {"messages": [{"role": "user", "content": "is it 👩?"}, {"role": "assistant", "content": "the end"}]},
    {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "the fox\nand the dog"}]},
]


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """A recipe over two files: conversations, and a text."""
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(one) + "\n" for one in CHATS), encoding="utf-8")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "the lazy dog"}) + "\n", encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{name: {tiny_model_folder}}}\n"
        f"data: {{train: [{tmp_path}/chat.jsonl, {tmp_path}/text.jsonl]}}\n"
        f"training: {{epochs: 1}}\noutput_dir: {tmp_path}/run\n"
    )
    return path


def read(path: Path, *overrides: str) -> ReadRecipe:
    return read_recipe(str(path), overrides)


def test_examples_show_what_is_trained(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_data(read(recipe), examples=1, json_output=False)
    shown = capsys.readouterr().out
    assert "chat.jsonl: messages" in shown
    assert "<|user|>is it 👩?<|end|>↵\n<|assistant|>⟦the end<|end|>⟧↵" in shown
    assert "the fox" not in shown  # one example of each source
    assert "⟦" in shown.split("text.jsonl:1: ")[1]


def test_counts_cover_every_example(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_data(read(recipe), examples=1, json_output=True)
    result = json.loads(capsys.readouterr().out)
    chat, text = result["sources"]
    assert (chat["examples"], chat["documents"], text["documents"]) == (2, 2, 1)
    assert chat["longest_place"].endswith("chat.jsonl:1")  # four tokens for an emoji
    assert chat["longest_tokens"] == result["examples"][0]["tokens"]
    assert text["trained_tokens"] == text["tokens"] - 1
    assert 0 < chat["trained_share"] < 1
    first, second = result["examples"]
    assert {"text": "the end<|end|>", "trained": True} in first["spans"]
    assert "".join(span["text"] for span in second["spans"]) == "the lazy dog<|end|>"


def test_a_bad_example_behind_those_shown_is_found(recipe: Path) -> None:
    with (recipe.parent / "chat.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": [{"role": "boss", "content": "x"}]}) + "\n")
    with pytest.raises(DataError, match=r"chat\.jsonl:3.*boss"):
        inspect_data(read(recipe), examples=1, json_output=False)


def test_all_masked_data_is_refused_after_it_was_shown(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masked = [{"messages": [*one["messages"][:1], {**one["messages"][1], "loss_weight": 0.0}]} for one in CHATS]
    (recipe.parent / "chat.jsonl").write_text("".join(json.dumps(one) + "\n" for one in masked), encoding="utf-8")
    with pytest.raises(DataError, match=r"0 of \d+ tokens in 2 examples are trained"):
        inspect_data(read(recipe, f"data.train={recipe.parent}/chat.jsonl"), examples=2, json_output=False)
    shown = capsys.readouterr().out
    assert "⟦" not in shown
    assert "no trained token: 2" in shown


def test_a_template_that_reaches_out_of_the_sandbox_is_refused(recipe: Path, tmp_path: Path) -> None:
    template = tmp_path / "evil.jinja"
    template.write_text("{{ raise_exception.__globals__ }}")
    with pytest.raises(ModelError, match=r"chat\.jsonl:1: .*evil\.jinja: it reaches for `__globals__`"):
        inspect_data(read(recipe, f"data.chat_template={template}"), examples=1, json_output=False)
