"""What would fit: found with few estimates, and true by the estimator itself."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.errors import MachineError, ModelError, TrainkitError, UsageError
from trainkit.memory.advice import (
    METHODS,
    Advice,
    Cheapest,
    NotEstimated,
    Question,
    changes,
    cheapest_method,
    fitting,
    largest_micro_batch,
    longest_row,
    rows_for_auto,
)
from trainkit.memory.estimate import PARTS, Estimate
from trainkit.memory.scenario import Scenario
from trainkit.memory.verdict import Capacity
from trainkit.recipe.reader import read_recipe
from trainkit.recipe.schema import Adapter

# A stand-in for the engines: a closed form that moves the right way, so that the search is tested by itself.
PARAMETERS = 10**9
LAYERS, WIDTH = 20, 2048
CONFIG = {"model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": LAYERS}


def scenario(
    *,
    micro_batch_size: int = 4,
    micro_batches: int = 4,
    sequence_length: int = 2048,
    adapter: Adapter | None = None,
    activation_checkpointing: bool = False,
) -> Scenario:
    return Scenario(
        config=CONFIG,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        sequence_length=sequence_length,
        adapter=adapter,
        activation_checkpointing=activation_checkpointing,
    )


def closed_form(asked: Scenario) -> Estimate:
    """Model states by the parameter, activations by the token, a quadratic term as attention without a kernel has."""
    trained = PARAMETERS if asked.adapter is None else PARAMETERS // 100
    base = {"full": 4 * PARAMETERS, "lora": 2 * PARAMETERS, "qlora": PARAMETERS // 2}[asked.method]
    share = asked.gpus if asked.shard == "fsdp2" else 1
    a_token = WIDTH * (2 * LAYERS + 36 if asked.activation_checkpointing else 36 * LAYERS)
    parts = dict.fromkeys(PARTS, 0) | {
        "weights": base // share,
        "adapters": 0 if asked.adapter is None else 4 * trained // share,
        "gradients": 4 * trained // share * (asked.micro_batches > 1),  # beside activations, of earlier micro-batches
        "optimizer state": (8 if asked.optimizer == "adamw" else 2) * trained // share,
        "activations": asked.tokens * a_token,
        "temporary buffers": asked.micro_batch_size * asked.sequence_length**2 // 8,
    }
    peak = sum(parts.values())
    return Estimate(PARAMETERS, trained, peak, peak + 2**20, "backward", "layer 20", parts, (), "quick", 0.001)


ASK = Question(closed_form)
ASK_KNOWING = Question(closed_form, lambda scenario: closed_form(scenario).peak_allocated_bytes)
LORA = scenario(adapter=Adapter())


def capacity(gib: float) -> Capacity:
    return Capacity("test", int(gib * 2**30))


def fits(asked: Scenario, gib: float) -> bool:
    return fitting(asked, capacity(gib), ASK)


@given(st.floats(1, 200), st.booleans(), st.integers(1, 40))
def test_the_largest_micro_batch_fits_and_no_larger_one_does(gib: float, full: bool, asked_rows: int) -> None:
    asked = scenario(micro_batch_size=1, adapter=None if full else Adapter())
    step_tokens = 16 * asked.sequence_length

    def of_rows(rows: int) -> Scenario:
        return asked.with_rows(rows, asked.sequence_length, step_tokens)

    rows = largest_micro_batch(of_rows(asked_rows), capacity(gib), ASK, step_tokens)
    assert largest_micro_batch(of_rows(asked_rows), capacity(gib), ASK_KNOWING, step_tokens) == rows
    assert rows == 0 or fits(of_rows(rows), gib)
    assert not any(fits(of_rows(more), gib) for more in range(rows + 1, 2 * rows + 20))


@given(st.floats(1, 400), st.booleans())
def test_the_longest_row_fits_and_no_longer_one_does(gib: float, full: bool) -> None:
    asked = scenario(adapter=None if full else Adapter())
    step_tokens = 16 * asked.sequence_length

    def of_length(length: int) -> Scenario:
        return asked.with_rows(asked.micro_batch_size, length, step_tokens)

    tokens = longest_row(asked, capacity(gib), ASK, None)
    assert longest_row(asked, capacity(gib), ASK_KNOWING, None, step_tokens) == tokens
    assert tokens % 64 == 0
    assert tokens == 0 or fits(of_length(tokens), gib)
    assert not any(fits(of_length(tokens + 64 * more), gib) for more in range(1, 200))


def test_nothing_is_searched_beyond_a_million_tokens() -> None:
    assert largest_micro_batch(LORA, capacity(10**6), ASK) == 512
    assert longest_row(LORA, capacity(10**9), ASK, None) == 2**20


def test_no_row_is_longer_than_the_positions() -> None:
    assert longest_row(LORA, capacity(400), ASK, 1000) == 1000


def test_a_search_takes_few_estimates() -> None:
    asked: list[Scenario] = []

    def counting(question: Scenario) -> Estimate:
        asked.append(question)
        return closed_form(question)

    rows = largest_micro_batch(LORA, capacity(80), Question(counting))
    assert len(asked) <= 6
    assert max(question.micro_batch_size for question in asked) == rows + 1
    asked.clear()
    longest_row(LORA, capacity(80), Question(counting), None)
    assert len(asked) <= 16  # the quadratic term bends the line


def test_a_search_begins_with_what_was_asked_and_goes_no_lower_where_it_fits() -> None:
    """Shorter rows may need another engine, and say nothing then."""
    asked: list[Scenario] = []

    def counting(question: Scenario) -> Estimate:
        asked.append(question)
        return closed_form(question)

    of_four = replace(LORA, micro_batch_size=4)
    assert largest_micro_batch(of_four, capacity(80), Question(counting)) > 4
    assert longest_row(of_four, capacity(80), Question(counting), None) > LORA.sequence_length
    assert min(question.micro_batch_size for question in asked) == 4
    assert min(question.sequence_length for question in asked) == LORA.sequence_length


def test_where_the_weights_alone_are_too_much_no_shorter_row_is_estimated() -> None:
    asked: list[Scenario] = []

    def counting(question: Scenario) -> Estimate:
        asked.append(question)
        return closed_form(question)

    ask = Question(counting)
    parts = ask(LORA).parts
    too_little = sum(parts[part] for part in ("weights", "adapters", "optimizer state")) / 2**30
    assert largest_micro_batch(LORA, capacity(too_little), ask) == 0
    assert longest_row(LORA, capacity(too_little), ask, None) == 0
    assert len(asked) == 1


def test_what_is_known_in_no_time_saves_most_estimates() -> None:
    asked: list[Scenario] = []

    def counting(question: Scenario) -> Estimate:
        asked.append(question)
        return closed_form(question)

    knowing = Question(counting, lambda scenario: closed_form(scenario).peak_allocated_bytes)
    largest_micro_batch(LORA, capacity(80), knowing)
    longest_row(LORA, capacity(80), knowing, None)
    assert len(asked) <= 4
    assert not fitting(scenario(), capacity(10), knowing)
    assert len(asked) <= 4


def test_what_libraries_log_meanwhile_is_not_said(capfd: pytest.CaptureFixture[str]) -> None:
    def talking(question: Scenario) -> Estimate:
        logging.getLogger("some.library").error("no kernel for this")
        return closed_form(question)

    Question(talking)(scenario())
    assert capfd.readouterr().err == ""
    assert logging.getLogger("some.library").isEnabledFor(logging.ERROR)


def test_auto_takes_a_divisor_of_the_rows_of_a_step() -> None:
    asked = scenario(micro_batch_size=1, micro_batches=12, adapter=Adapter())
    most = largest_micro_batch(asked, capacity(24), ASK)
    assert most == 7
    assert rows_for_auto(asked, capacity(24), ASK) == 6
    assert rows_for_auto(asked, capacity(24), ASK, most_rows=3) == 3
    assert rows_for_auto(asked, capacity(1), ASK) == 0


@pytest.mark.parametrize("gib", [10, 16, 20, 24])
def test_every_advice_fits_and_its_lines_say_what_it_changes(gib: float) -> None:
    asked = scenario()
    assert not fits(asked, gib)
    found = changes(asked, capacity(gib), ASK).changes
    assert found
    for change in found:
        assert fits(change.scenario, gib)
        assert change.estimate == closed_form(change.scenario)
        text = "\n".join(change.lines)
        assert ("activation_checkpointing: true" in text) == change.scenario.activation_checkpointing
        assert ("micro_batch_size" in text) == (change.scenario.micro_batch_size != asked.micro_batch_size)
        assert ("adapter:" in text) == (change.scenario.adapter is not None)
        assert ("--gpus" in change.sentence) == (change.scenario.gpus > 1)


def test_the_lines_can_be_pasted_into_a_recipe(tmp_path: Path) -> None:
    qlora = next(
        change for change in changes(scenario(), capacity(10), ASK).changes if change.scenario.method == "qlora"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(["data: {train: a.jsonl}", "output_dir: runs/a", *qlora.lines]))
    recipe = read_recipe(str(path), ["training.steps=1", "model.name=tiny"]).recipe
    assert recipe.adapter == qlora.scenario.adapter
    assert recipe.model.activation_checkpointing == qlora.scenario.activation_checkpointing


def kind(changed: Scenario) -> str:
    """What a change gives up, in one word."""
    if changed.gpus > 1:
        return "GPUs"
    if changed.adapter is not None:
        return changed.method
    if changed.optimizer != "adamw":
        return "moments"
    return "time" if changed.activation_checkpointing else "rows"


@pytest.mark.parametrize("gib", [10, 16, 20, 24])
def test_advice_goes_from_what_costs_little_to_what_costs_much(gib: float) -> None:
    kinds = [kind(change.scenario) for change in changes(scenario(), capacity(gib), ASK).changes]
    order = ["rows", "time", "moments", "lora", "qlora", "GPUs"]
    assert sorted(kinds, key=order.index) == kinds
    assert kinds[-1] == "GPUs"


def test_adapters_on_several_gpus_stand_beside_all_weights_where_one_gpu_is_never_enough() -> None:
    found = changes(scenario(micro_batch_size=1), capacity(1.1), ASK).changes
    assert [(change.scenario.method, change.scenario.shard) for change in found] == [
        ("full", "fsdp2"),
        ("lora", "fsdp2"),
    ]
    assert found[1].scenario.gpus < found[0].scenario.gpus


def test_several_gpus_are_asked_about_twice_at_most() -> None:
    asked: list[Scenario] = []

    def counting(question: Scenario) -> Estimate:
        asked.append(question)
        return closed_form(question)

    *_, sharded = changes(scenario(), capacity(4), Question(counting)).changes
    several = [question.gpus for question in asked if question.gpus > 1]
    assert len(several) <= 2
    fewer = replace(sharded.scenario, gpus=sharded.scenario.gpus // 2)
    assert not fits(fewer, 4)


def test_nothing_is_advised_where_nothing_helps() -> None:
    assert changes(scenario(), capacity(0.6), ASK) == Advice(())


def test_the_cheapest_method_is_the_first_that_fits() -> None:
    one_row = scenario(micro_batch_size=1)
    for gib in (24, 18, 10, 6, 4, 2):
        best = cheapest_method(one_row, PARAMETERS, capacity(gib), ASK)
        expected = next((method for method in METHODS if fits(method.of(one_row), gib)), None)
        assert best == Cheapest(expected, None if expected is None else closed_form(expected.of(one_row)))
    assert cheapest_method(one_row, PARAMETERS, capacity(0.5), ASK) == Cheapest(None, None)


def test_what_cannot_fit_for_its_weights_alone_is_not_estimated() -> None:
    def never(_asked: Scenario) -> Estimate:
        raise AssertionError

    assert cheapest_method(scenario(), 10**12, capacity(80), Question(never)) == Cheapest(None, None)


def test_changes_that_cannot_fit_for_their_weights_alone_are_not_estimated() -> None:
    asked: list[Scenario] = []

    def counting(question: Scenario) -> Estimate:
        asked.append(question)
        return closed_form(question)

    ask = Question(counting)
    ask(scenario())
    assert changes(scenario(), capacity(9), ask).changes
    assert "adamw_8bit" not in {question.optimizer for question in asked}  # 10 bytes of it a parameter
    assert changes(scenario(), capacity(24), ask).changes
    assert "adamw_8bit" in {question.optimizer for question in asked}


def test_what_has_to_be_held_without_checkpointing_is_not_asked_about_with_it() -> None:
    """Packing leaves these weights as they are, which no count of parameters tells."""
    asked: list[Scenario] = []

    def heavy(question: Scenario) -> Estimate:
        asked.append(question)
        parts = dict.fromkeys(PARTS, 0) | {"weights": 40 * 2**30, "activations": 2**30}
        return replace(
            closed_form(question), parts=parts, peak_allocated_bytes=41 * 2**30, peak_reserved_bytes=41 * 2**30
        )

    assert cheapest_method(scenario(), 20 * PARAMETERS, capacity(24), Question(heavy)).method is None
    assert [(question.method, question.activation_checkpointing) for question in asked] == [("qlora", False)]


@pytest.mark.parametrize("error", [ModelError, UsageError, MachineError])
def test_what_cannot_be_estimated_stops_no_other_change(error: type[TrainkitError]) -> None:
    def without_lora(question: Scenario) -> Estimate:
        if question.method == "lora":
            raise error("its experts are no linear layers")
        return closed_form(question)

    refusing = Question(without_lora)
    whole, rest = changes(scenario(), capacity(20), ASK), changes(scenario(), capacity(20), refusing)
    assert any(change.scenario.method == "lora" for change in whole.changes)
    assert rest.changes == tuple(change for change in whole.changes if change.scenario.method != "lora")
    assert rest.not_estimated == (NotEstimated("LoRA", "its experts are no linear layers"),)


def test_what_cannot_be_estimated_is_listed_before_the_cheapest_method() -> None:
    def without_full(question: Scenario) -> Estimate:
        if question.adapter is None:
            raise ModelError("its kernel takes bf16 alone")
        return closed_form(question)

    best = cheapest_method(scenario(micro_batch_size=1), PARAMETERS, capacity(80), Question(without_full))
    assert best.method is not None
    assert best.method.name == "LoRA"
    reason = "its kernel takes bf16 alone"
    assert best.not_estimated == (NotEstimated("full", reason),)


def test_the_scenario_that_is_asked_about_is_refused_as_it_is() -> None:
    def refused(_question: Scenario) -> Estimate:
        raise ModelError("no such model")

    with pytest.raises(ModelError, match="no such model"):
        largest_micro_batch(scenario(), capacity(80), Question(refused))
