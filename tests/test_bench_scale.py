"""`scripts/bench scale`: its arithmetic against torch's and trainkit's own counts, docs/scale.md against its output.

No time is judged.
"""

from __future__ import annotations

import doctest
import json
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import ParallelismConfig
from benchmarks import packing_data, packing_shards, scale, step_time
from benchmarks.command import main
from benchmarks.packing_shards import Costs, histogram, machine_costs, merged_histograms, rows_of, shards_of
from benchmarks.scale import Case, Line, line_of, time_of
from benchmarks.step_time import GPUS_PER_MACHINE, H100, exchange, llama_shapes, ring_seconds, row_flops
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from trainkit.cli import run
from trainkit.data.packing import best_fit
from trainkit.memory import trace
from trainkit.memory.estimate import estimate
from trainkit.memory.fake_model import parse_config
from trainkit.memory.models import known_models
from trainkit.memory.scenario import Device, Scenario
from trainkit.model.adapters import attach_adapter
from trainkit.model.loading import enable_activation_checkpointing
from trainkit.recipe.schema import Adapter

if TYPE_CHECKING:
    from types import ModuleType

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("module", [step_time, packing_shards], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings_are_right(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


# --- what a step computes and exchanges ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", scale.MODELS)
def test_the_shapes_have_as_many_numbers_as_the_model(name: str) -> None:
    known = known_models()[name]
    assert llama_shapes(known.config).parameters(trained=True) == known.parameters
    lora = estimate(Scenario(config=known.config, sequence_length=64, adapter=Adapter()))
    shapes = llama_shapes(known.config, Adapter().r)
    assert shapes.parameters(trained=True) == lora.trainable_parameters
    assert shapes.parameters(trained=False) == known.parameters + lora.trainable_parameters


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [None, Adapter(r=4)], ids=["full", "lora"])
def test_the_matrix_products_are_those_that_torch_counts(adapter: Adapter | None, *, checkpointing: bool) -> None:
    """torch's own counter on a real step; the head runs once there, and attention is counted apart."""
    tokens = 48
    model = AutoModelForCausalLM.from_config(parse_config(SMALL), attn_implementation="sdpa")
    if checkpointing:
        enable_activation_checkpointing(model)
    adapted, _ = attach_adapter(model, adapter, seed=0)
    model.enable_input_require_grads()  # as if the embedding trained: the first layer is then like the others
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counted.items() if "attention" not in str(operation))

    shapes = replace(llama_shapes(SMALL, adapter.r if adapter else None), attention_width=0)
    head_once_more = 2 * shapes.head.numbers * tokens
    assert products == row_flops(shapes, tokens, checkpointing=checkpointing) - head_once_more


def test_attention_grows_with_the_square_of_the_row() -> None:
    shapes = llama_shapes(SMALL)

    def attention(tokens: int, *, checkpointing: bool) -> float:
        nothing = replace(shapes, attention_width=0)
        return row_flops(shapes, tokens, checkpointing=checkpointing) - row_flops(
            nothing, tokens, checkpointing=checkpointing
        )

    assert attention(10, checkpointing=False) == 3 * 2 * 10**2 * 64 * 3.5
    assert attention(20, checkpointing=True) == pytest.approx(4 * attention(10, checkpointing=False) * 4.5 / 3.5)


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each all-gather and reduce-scatter (all parts together) that torch is asked for."""
    found: list[int] = []
    monkeypatch.setattr(trace, "period_of", lambda *_: None)  # all layers, so that all is seen

    def watch(name: str) -> None:
        asked = getattr(torch.distributed, name)

        def note(*arguments: Any, **options: Any) -> Any:
            tensors = [one for one in (*arguments, *options.values()) if isinstance(one, torch.Tensor)]
            found.append(max(one.numel() * one.element_size() for one in tensors))
            return asked(*arguments, **options)

        monkeypatch.setattr(torch.distributed, name, note)

    names = ("all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor")
    for name in names:  # the latter two before torch 2.13
        if hasattr(torch.distributed, name):
            watch(name)
    return found


@pytest.mark.parametrize("gpus", [4, 24])
@pytest.mark.parametrize("adapter", [None, Adapter(r=4)], ids=["full", "lora"])
def test_what_is_exchanged_is_what_the_run_s_own_step_asks_for(
    adapter: Adapter | None, gpus: int, collectives: list[int]
) -> None:
    """The first dimension of some weights is no multiple of 24: what travels is filled up."""
    trace.trace(
        Scenario(
            config=SMALL,
            sequence_length=64,
            adapter=adapter,
            activation_checkpointing=True,
            gpus=gpus,
            shard="fsdp2",
            device=Device("cuda"),
        )
    )
    shapes = llama_shapes(SMALL, adapter.r if adapter else None)
    expected = [size for size, count in exchange(shapes, gpus) for _ in range(count)]
    assert sorted(collectives) == sorted(expected)


# --- seconds ---------------------------------------------------------------------------------------------------------


def test_a_ring_is_as_fast_as_its_narrowest_link_and_pays_for_every_hop() -> None:
    plain = replace(H100, first_hop_seconds=0.0, nvlink_hop_seconds=0.0, network_hop_seconds=0.0, link_utilisation=1.0)
    assert ring_seconds(8e9, 1) == 0
    assert ring_seconds(450e9, 8, plain) == pytest.approx(7 / 8)
    assert ring_seconds(400e9, 16, plain) == pytest.approx(15 / 16)
    narrow = replace(plain, network_bytes=100e9)
    assert ring_seconds(400e9, 16, narrow) == pytest.approx(4 * 15 / 16)
    assert ring_seconds(400e9, 8, narrow) == ring_seconds(400e9, 8, plain)
    machines = 1024 // GPUS_PER_MACHINE
    hops = 8.4e-6 + (1024 - machines) * 3.4e-6 + (machines - 1) * 9.6e-6
    assert ring_seconds(0, 1024) == pytest.approx(hops)


def test_a_step_lies_between_its_bounds() -> None:
    shapes = llama_shapes(known_models()["llama-3.1-8b"].config)
    one = step_time.step_time(shapes, 64, row_tokens=4096, rows_per_gpu=4)
    assert max(one.computing, one.exchanging) < one.overlapped < one.in_turn
    assert one.in_turn == one.computing + one.exchanging + one.updating
    fewer_passes = step_time.step_time(shapes, 64, row_tokens=4096, rows_per_gpu=4, micro_batch_size=4)
    assert fewer_passes.exchanging == pytest.approx(one.exchanging / 4)
    assert fewer_passes.computing == one.computing
    half_as_fast = step_time.step_time(
        shapes, 64, row_tokens=4096, rows_per_gpu=4, speeds=replace(H100, utilisation=H100.utilisation / 2)
    )
    assert half_as_fast.computing == pytest.approx(2 * one.computing)
    assert half_as_fast.exchanging == one.exchanging


def test_published_runs_are_within_a_quarter_of_the_upper_bound() -> None:
    for run_ in scale.PUBLISHED:
        line = scale.published_line(run_)
        assert 0.75 < line["measured"] / line["overlapped"] < 1.25, run_


def test_more_gpus_than_rows_are_refused_as_a_run_refuses_them() -> None:
    line = line_of(Case("llama-3.1-8b", "full", 64, row_tokens=2048, tokens_per_step=65536))
    assert line == Line(line.case, refused=line.refused)
    assert "32 rows of 2048, fewer than the 64 processes" in line.refused
    assert scale.steps_cells(asdict(line))[3] == "less than one: refused"


# --- the document ----------------------------------------------------------------------------------------------------


def rows_between(marker: str) -> list[list[str]]:
    """The cells of the table between two marks of the document, without its head."""
    block = re.search(rf"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", DOCUMENT.read_text(), re.DOTALL)
    assert block is not None
    lines = [line for line in block[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def cases() -> list[Case]:
    return [Case(model, trains, gpus) for model in scale.MODELS for trains in scale.TRAINS for gpus in scale.GPUS]


def test_the_document_s_times_are_those_of_the_formulas() -> None:
    rows = rows_between("bench scale steps")
    expected = [scale.steps_cells(asdict(Line(case, case.rows_per_gpu(), time=time_of(case)))) for case in cases()]
    assert [row[:4] + row[7:] for row in rows] == [row[:4] + row[7:] for row in expected]


@pytest.mark.parametrize(
    "case",
    [
        Case("llama-3.1-8b", "lora", 1024),
        *(pytest.param(case, marks=pytest.mark.long) for case in cases()),
    ],
    ids=lambda case: f"{case.model} {case.trains} {case.gpus}",
)
def test_the_document_s_memory_is_the_estimator_s(case: Case) -> None:
    row = next(
        row for row in rows_between("bench scale steps") if row[:3] == [case.model, case.trains, f"{case.gpus:,}"]
    )
    assert row == scale.steps_cells(asdict(line_of(case)))


def test_the_document_s_published_runs_are_the_command_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "--part", "published"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows_between("bench scale published") == [
        [cell.strip() for cell in line.strip("|").split("|")] for line in said[2:]
    ]


def test_the_verb_prints_lines_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["scale", "--part", "steps", "--model", "llama-3.1-8b", "--trains", "lora", "--gpus", "2048"]
    assert main(asked) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| llama-3.1-8b | lora | 2,048 | less than one: refused")
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"][0]["refused"]


def test_the_document_s_limits_are_the_command_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "--part", "limits"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows_between("bench scale limits") == [
        [cell.strip() for cell in line.strip("|").split("|")] for line in said[2:]
    ]


def test_a_row_of_balancing_tokens_takes_as_long_to_compute_as_to_exchange() -> None:
    shapes = llama_shapes(known_models()["llama-3.1-8b"].config)
    tokens = step_time.balancing_tokens(shapes, 64)
    longer, shorter = (
        step_time.step_time(shapes, 64, row_tokens=length, rows_per_gpu=1) for length in (tokens, tokens - 1)
    )
    assert shorter.computing < shorter.exchanging <= longer.computing


def test_accelerate_has_the_engines_that_the_document_names() -> None:
    """The sizes, their product, and what goes together, as the document says."""
    text = DOCUMENT.read_text()
    names = {field.name for field in fields(ParallelismConfig)}
    for name in ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size"):
        assert name in names
        assert f"`{name}`" in text
    asked = re.findall(r"ParallelismConfig\(([^)]+=[^)]+)\)", text)
    assert asked
    for arguments in asked:
        sizes = {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", arguments)}
        assert ParallelismConfig(**sizes).total_size == 1024
    with pytest.raises(ValueError, match="mutually exclusive"):
        ParallelismConfig(cp_size=2, sp_size=2)
    with pytest.raises(ValueError, match="pure data parallelism"):
        ParallelismConfig(dp_replicate_size=2, tp_size=2)


# --- packing in shards -----------------------------------------------------------------------------------------------


def test_merged_histograms_lay_out_what_packing_all_pieces_does() -> None:
    lengths = np.random.default_rng(3).integers(1, 60, 4000)
    parts = np.array_split(lengths, 7)
    merged = sum((histogram(part, 32, 4) for part in parts), np.zeros(33, np.int64))
    assert merged.tolist() == histogram(lengths, 32, 4).tolist()
    rows, least = rows_of(merged)
    pieces = np.repeat(np.arange(33), merged)
    assert least <= len(best_fit(pieces, 32, seed=0)) <= rows <= 1.01 * least


def test_packing_apart_costs_rows_and_never_saves_any_but_by_chance() -> None:
    lengths = np.random.default_rng(0).lognormal(5.8, 1.1, 3000).astype(np.int64) + 1
    together, apart = (shards_of(lengths, number, "") for number in (1, 30))
    assert together.lower_bound_rows == apart.lower_bound_rows
    assert together.rows - together.lower_bound_rows <= 1
    assert together.rows < apart.rows <= together.rows + 60
    found = merged_histograms(2, 1000)
    assert found.documents == 2000
    assert found.lower_bound_rows <= found.rows <= found.rows_apart
    assert found.histogram_bytes == 2049 * 8


def test_costs_are_shared_out_over_the_machines() -> None:
    costs = Costs(
        encoding_documents_per_second=10,
        encoding_tokens_per_second=100,
        packing_seconds=0.36,
        memory_base_bytes=5,
        memory_bytes=2,
        store_bytes=3,
        index_bytes=4,
        token_bytes=5,
        tokens=36,
    )
    assert machine_costs(costs, 10_000, 10) == pytest.approx(
        {
            "documents": 1000,
            "encoding_hours": 0.1,
            "packing_hours": 0.1,
            "memory_bytes": 2005,
            "disk_bytes": 1000 * (180 + 7),
        }
    )


@pytest.mark.long
@pytest.mark.parametrize("shards", [1, 10])
def test_the_document_s_rows_of_shards_are_those_of_the_packer(shards: int) -> None:
    found = shards_of(packing_data.long_tailed_lengths(10_000_000).lengths_N, shards, "as they come")
    above = found.rows - found.lower_bound_rows
    assert f"| {shards} | as they come | {found.rows:,} | {above} (" in DOCUMENT.read_text()


@pytest.mark.long
def test_packing_is_measured_and_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINKIT_MATERIAL", "nothing")
    assert main(["scale", "--part", "packing", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "| 2 | as they come | 5,974 | 1 (0.0167%) | 99.983% |" in said
    assert "| 1,000 | 1,000,000 |" in said


def packed(capsys: pytest.CaptureFixture[str], recipe: dict[str, Any], train: list[str]) -> dict[str, Any]:
    """What `pack-data --json` says of a recipe with these files."""
    Path("recipe.yaml").write_text(yaml.safe_dump({**recipe, "data": {**recipe["data"], "train": train}}))
    capsys.readouterr()
    code = run(["pack-data", "recipe.yaml", "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


def test_files_packed_apart_hold_out_and_train_what_they_do_together(
    small_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the document promises of shards: every token goes where it goes when all files are packed at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    lines = Path(small_recipe["data"]["train"]).read_text().splitlines(keepends=True)
    shards = ["one.jsonl", "two.jsonl"]
    for shard, part in zip(shards, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
        Path(shard).write_text("".join(part))
    recipe = {**small_recipe, "data": {**small_recipe["data"], "eval": 0.25}}
    together = packed(capsys, recipe, shards)
    apart = [packed(capsys, recipe, [shard]) for shard in shards]
    for ledger in ("ledger", "evaluation_ledger"):
        for count in ("read", "trained", "masked", "documents", "truncated"):
            assert sum(one[ledger][count] for one in apart) == together[ledger][count] >= 0, (ledger, count)
        assert together[ledger]["documents"] > 1
    assert together["rows"] <= sum(one["rows"] for one in apart) <= together["rows"] + 4
