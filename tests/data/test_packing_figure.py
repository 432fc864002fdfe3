"""The picture of a packing: its numbers are the store's, and no shape of data breaks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.encoding import Encoder
from trainkit.data.packing_figure import FIGURE_INCHES, draw_packing, length_edges
from trainkit.data.packing_quality import packing_quality
from trainkit.data.preparation import prepare
from trainkit.plotting import new_figure, save
from trainkit.recipe.reader import read_recipe

pytest.importorskip("matplotlib")


@given(st.integers(1, 10**6), st.integers(0, 10**7))
def test_bars_hold_every_length_once_and_none_is_narrower_than_one_token(shortest: int, more: int) -> None:
    edges = length_edges(shortest, shortest + more)
    assert edges[0] <= shortest - 0.5
    assert edges[-1] >= shortest + more + 0.5
    assert 2 <= edges.size <= 42
    assert np.all(np.diff(edges) >= 1)
    assert np.all(edges % 1 == 0.5)


def drawn(tmp_path: Path, tokenizer: Any, texts: list[str]) -> tuple[Any, Any]:
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name: tiny}}\ndata: {{train: {tmp_path / 'texts.jsonl'}}}\n"
        "packing: {sequence_length: 8, overlap: 0}\ntraining: {epochs: 1}\noutput_dir: run\n"
    )
    recipe = read_recipe(str(tmp_path / "recipe.yaml")).recipe
    encoder = Encoder(tokenizer, recipe.data, recipe.packing)
    rows = prepare(recipe, encoder, tmp_path / "cache", lambda *_: None).train
    figure = new_figure(*FIGURE_INCHES)
    quality = packing_quality(rows)
    draw_packing(figure, rows, [("packed", quality.packed_slots), ("padded to 8", quality.slots_to_context)])
    save(figure, tmp_path / "a.png", "a")
    return figure, rows


def test_its_bars_count_documents_rows_and_slots(tmp_path: Path, tiny_tokenizer: Any) -> None:
    figure, rows = drawn(tmp_path, tiny_tokenizer, ["12", "1234", "12345"])  # 3, 5 and 6 tokens in two rows of 8
    lengths, fill, layouts = figure.axes
    assert [bar.get_height() for bar in lengths.patches] == [1, 0, 1, 1]
    assert [bar.get_height() for bar in fill.patches if bar.get_height()] == [1, 1]
    assert [bar.get_x() for bar in fill.patches if bar.get_height()] == [75, 95]
    assert [bar.get_width() for bar in layouts.patches] == [16, 24, 14, 14]  # slots, then tokens
    assert {text.get_text() for text in layouts.texts} == {"12.5% padding", "41.7% padding"}
    assert [axes.get_xlabel() != "" for axes in figure.axes] == [True] * 3
    assert figure.get_suptitle() == f"documents: 3  ·  tokens: 14  ·  rows of 8: {len(rows)}"


@pytest.mark.parametrize("texts", [["1"], ["12"] * 9, ["1", "1" * 500], ["1" * 300]])
def test_one_document_equal_lengths_and_long_ones_can_be_drawn(
    texts: list[str], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    figure, _ = drawn(tmp_path, tiny_tokenizer, texts)
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == len(texts)
