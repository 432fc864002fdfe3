"""Packing changes nothing: the loss and gradients of documents in a row are those of each document alone.

"Alone" is plain transformers code, without anything of trainkit's. Legend: R rows, T tokens in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trainkit.model.attention import choose_attention
from trainkit.model.loss import LossModel
from trainkit.model.precision import make_scaler, plan_precision

CPU = torch.device("cpu")
UNTRAINED = -100

# Token ids of a document, and its labels as transformers wants them (not shifted; -100 is not trained).
Document = tuple[torch.Tensor, torch.Tensor]
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["tiny", "stories260K"])
def folder(request: pytest.FixtureRequest) -> Path:
    if request.param == "tiny":
        return Path(request.getfixturevalue("tiny_model_folder"))
    return Path(request.getfixturevalue("material")) / "models" / "stories260K"


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make_documents(lengths: Sequence[int], vocabulary: int = 290) -> list[Document]:
    """Documents of these lengths; about a third of each, at its start, is not trained, and so unequal counts are."""
    generator = torch.Generator().manual_seed(5)
    documents = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, vocabulary, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length // (2 + number % 3))] = UNTRAINED
        documents.append((ids, labels))
    return documents


def make_row(documents: Sequence[Document], slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """One row: ids, labels (shifted), positions, and segment lengths with the padding tail as the last."""
    lengths = [len(ids) for ids, _ in documents]
    if tail := slots - sum(lengths):
        lengths.append(tail)
    ids = torch.cat([*(ids for ids, _ in documents), torch.zeros(tail, dtype=torch.int64)])
    shifted = [torch.cat([labels[1:], torch.tensor([UNTRAINED])]) for _, labels in documents]
    labels = torch.cat([*shifted, torch.full((tail,), UNTRAINED)])
    return ids, labels, torch.cat([torch.arange(length) for length in lengths]), lengths


def packed_sums(
    loss_model: LossModel, rows: Sequence[Sequence[Document]], slots: int, micro_batch: int
) -> tuple[float, int, Gradients]:
    """Loss sum, trained tokens and gradients of the mean over all rows, accumulated over micro-batches."""
    loss_model.zero_grad()
    total, trained = 0.0, 0
    for start in range(0, len(rows), micro_batch):
        made = [make_row(row, slots) for row in rows[start : start + micro_batch]]
        ids, labels, positions, lengths = zip(*made, strict=True)
        loss_sum, count = loss_model(torch.stack(ids), torch.stack(labels), torch.stack(positions), lengths)
        torch.autograd.backward(loss_sum)
        total += loss_sum.item()
        trained += int(count)
    return total, trained, gradients_over(loss_model.model, trained)


def alone_sums(model: Any, documents: Sequence[Document]) -> tuple[float, int, Gradients]:
    """The same, each document by itself through transformers' own forward pass and loss (a mean, times its count)."""
    model.zero_grad()
    total, trained = 0.0, 0
    for ids, labels in documents:
        count = int((labels[1:] != UNTRAINED).sum())
        loss = model(ids[None], labels=labels[None], use_cache=False).loss * count
        loss.backward()
        total += loss.item()
        trained += count
    return total, trained, gradients_over(model, trained)


def gradients_over(model: torch.nn.Module, trained: int) -> Gradients:
    return {name: p.grad / trained for name, p in model.named_parameters() if p.grad is not None}


def relative(one: Gradients, other: Gradients) -> float:
    """Norm of the difference over the norm, over all parameters together."""
    assert one.keys() == other.keys()
    difference = sum((one[name] - other[name]).double().square().sum() for name in one)
    return float((difference / sum(value.double().square().sum() for value in other.values())) ** 0.5)


def make_loss_model(model: Any, attention: Any = "auto", precision: Any = "fp32") -> LossModel:
    return LossModel(model, choose_attention(attention, CPU, model.config), plan_precision(precision, CPU))


# Lengths of the documents of each row.
ROWS = ((50, 30, 20), (64, 63), (128,), (9, 9, 9, 40, 2, 2, 31), (77, 50), (12, 100), (3, 4, 5), (90, 37))
SLOTS = 128


def make_rows() -> list[list[Document]]:
    documents = iter(make_documents([length for row in ROWS for length in row]))
    return [[next(documents) for _ in row] for row in ROWS]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_each_document_alone(folder: Path, attention: str) -> None:
    rows = make_rows()
    model = load(folder)
    loss, trained, gradients = alone_sums(model, [document for row in rows for document in row])
    packed_loss, packed_trained, packed_gradients = packed_sums(make_loss_model(model, attention), rows, SLOTS, 4)
    assert packed_trained == trained
    assert abs(packed_loss - loss) <= 1e-6 * loss
    assert relative(packed_gradients, gradients) <= 1e-6


def test_micro_batches_of_1_2_4_and_8_rows_are_the_same_step(folder: Path) -> None:
    """Trained tokens differ from row to row, so that a mean of means would not pass."""
    rows = make_rows()
    loss_model = make_loss_model(load(folder))
    loss, trained, gradients = packed_sums(loss_model, rows, SLOTS, 8)
    assert len({sum((labels[1:] != UNTRAINED).sum().item() for _, labels in row) for row in rows}) == len(rows)
    for micro_batch in (1, 2, 4):
        other_loss, other_trained, other = packed_sums(loss_model, rows, SLOTS, micro_batch)
        assert other_trained == trained
        assert abs(other_loss - loss) <= 1e-6 * loss
        assert relative(other, gradients) <= 1e-6


def test_an_adapter_that_starts_at_zero_is_the_base_model(folder: Path) -> None:
    rows = make_rows()[:2]
    loss, _, _ = packed_sums(make_loss_model(load(folder)), rows, SLOTS, 2)
    adapted = get_peft_model(load(folder), LoraConfig(r=4, target_modules="all-linear"))
    adapted_loss, _, gradients = packed_sums(make_loss_model(adapted), rows, SLOTS, 2)
    assert adapted_loss == loss
    assert gradients
    assert all("lora_" in name for name in gradients)
    assert any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_stays_within_a_band_of_fp32(folder: Path, precision: str) -> None:
    """Loss within 0.5 %, gradients within 5 % in norm; the cross entropy itself is summed in fp32."""
    rows = make_rows()
    loss, trained, gradients = packed_sums(make_loss_model(load(folder)), rows, SLOTS, 8)
    half_loss, half_trained, half = packed_sums(make_loss_model(load(folder), precision=precision), rows, SLOTS, 8)
    assert half_trained == trained
    assert half_loss != loss
    assert abs(half_loss - loss) <= 5e-3 * loss
    assert relative(half, gradients) <= 0.05


def test_the_fp16_loss_scale_cancels_out(folder: Path) -> None:
    """Scaled, differentiated and unscaled again, the gradients are those of fp32 within the band.

    The scaler starts high on purpose and backs off, by skipping steps, until no gradient overflows.
    """
    rows = make_rows()[:1]
    _, trained, expected = packed_sums(make_loss_model(load(folder)), rows, SLOTS, 1)
    loss_model = make_loss_model(load(folder), precision="fp16")
    scaler = make_scaler(loss_model.precision, CPU)
    assert scaler is not None
    optimizer = torch.optim.SGD(loss_model.parameters(), lr=0.0)
    ids, labels, positions, lengths = make_row(rows[0], SLOTS)
    for _ in range(6):
        optimizer.zero_grad()
        loss_sum, _ = loss_model(ids[None], labels[None], positions[None], [lengths])
        torch.autograd.backward(scaler.scale(loss_sum / trained))
        scaler.unscale_(optimizer)
        gradients = gradients_over(loss_model.model, 1)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() == scale:
            break
    assert relative(gradients, expected) <= 0.05
