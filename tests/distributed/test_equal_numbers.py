"""One process, two, four; whole models or shares of them: the same numbers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.distributed.workbench import Ended, Workbench, largest_difference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ALMOST = 1e-6  # relative: what fp32 leaves of a different order of sums
CHANGES: dict[str, dict[str, Any]] = {"lora": {}, "full": {"adapter": None}}


@pytest.fixture(scope="session")
def reference(bench: Workbench) -> Callable[[str], Ended]:
    """The run in one process, made when it is first asked for."""
    ended: dict[str, Ended] = {}

    def run(method: str) -> Ended:
        if method not in ended:
            ended[method] = bench.run(bench.recipe(f"{method}-one", CHANGES[method]))
            assert ended[method].code == 0, ended[method].said
        return ended[method]

    return run


def result_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a result, as its file holds them."""
    [file] = (folder / "final").glob("*.safetensors")
    return load_file(file)


def assert_equal_runs(run: Ended, reference: Ended, processes: int) -> None:
    """Every number of metrics.jsonl, the samples, the counts of the summary, and the weights of the result."""
    assert run.code == 0, run.said
    difference = largest_difference(run, reference)
    print(f"{run.folder.name}: largest relative difference in metrics.jsonl {difference:.1e}")
    assert difference <= ALMOST
    assert (run.folder / "samples.jsonl").read_text() == (reference.folder / "samples.jsonl").read_text()
    ours, theirs = result_of(run.folder), result_of(reference.folder)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], rtol=1e-4, atol=1e-6), name
    summary, expected = (json.loads((one.folder / "summary.json").read_text()) for one in (run, reference))
    assert {key: summary[key] for key in ("steps", "updates", "trained_tokens", "ledger")} == {
        key: expected[key] for key in ("steps", "updates", "trained_tokens", "ledger")
    }
    assert f"x {processes} process" in run.output


def assert_only_the_first_speaks(run: Ended, processes: int) -> None:
    """What a run prints is what it would print alone; the others have a log each."""
    assert run.output.count("examples read") == run.output.count("plan  ") == run.output.count("done  ") == 1
    assert run.errors.count("step 20/20  eval loss") == 1
    odd = [
        line for line in run.errors.splitlines() if not line.startswith(("checking", "encoding", "packing", "step "))
    ]
    assert [line for line in odd if line and "answering" not in line and "evaluating" not in line] == []
    logs = {path.name: path.read_text() for path in (run.folder / "logs").iterdir()}
    assert logs == {f"rank-{rank}.log": "" for rank in range(1, processes)}


def test_the_run_has_what_makes_it_hard(reference: Callable[[str], Ended]) -> None:
    """Accumulation, steps with fewer rows than processes, rows of unequal token counts, clipped gradients."""
    run = reference("lora")
    assert "micro-batch 1 x accumulation 5 x 1 process;" in run.output
    steps = [line for line in run.lines() if "loss" in line]
    assert len(steps) == 20
    assert min(line["tokens"] for line in steps) <= 128
    assert len({line["trained_tokens"] for line in steps}) > 10
    norms = [line["grad_norm"] for line in steps]
    assert min(norms) < 0.15 < max(norms)
    evaluations = [line for line in run.lines() if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 7, 14, 20]
    assert ["exact_match" in line for line in evaluations] == [True, False, False, True]
    losses = [line["loss"] for line in steps]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", ["two-ddp", "two-fsdp2"])
def test_two_processes_are_one(bench: Workbench, reference: Callable[[str], Ended], method: str, kind: str) -> None:
    run = bench.run(bench.recipe(f"{method}-{kind}", CHANGES[method]), kind)
    assert_equal_runs(run, reference(method), 2)
    assert_only_the_first_speaks(run, 2)
    assert_draw_apart(run.folder)
    assert_plain_libraries_read(run.folder / "final", method)


def assert_draw_apart(folder: Path) -> None:
    """Each process has random numbers of its own: no two have the same dropout."""
    newest = max((folder / "checkpoints").glob("step-*"))
    states = load_file(newest / "random.safetensors")
    assert not torch.equal(states["0.torch"], states["1.torch"])


def assert_plain_libraries_read(final: Path, method: str) -> None:
    """The result is one like any other, however many made it."""
    loader = AutoModelForCausalLM if method == "full" else AutoPeftModelForCausalLM
    model = loader.from_pretrained(final)
    loaded = dict(model.named_parameters())
    for name, weight in result_of(final.parent).items():
        own = name if method == "full" else name.replace(".weight", ".default.weight")
        assert torch.equal(loaded[own], weight), name


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", ["four-ddp", "four-fsdp2"])
def test_four_processes_are_one(bench: Workbench, reference: Callable[[str], Ended], method: str, kind: str) -> None:
    """A full step has 5 rows, so that three processes have an empty micro-batch in it."""
    run = bench.run(bench.recipe(f"{method}-{kind}", CHANGES[method]), kind)
    assert_equal_runs(run, reference(method), 4)
    assert_only_the_first_speaks(run, 4)


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "full"])
def test_activation_checkpointing_changes_no_number(
    bench: Workbench, reference: Callable[[str], Ended], method: str
) -> None:
    changes = CHANGES[method] | {"model": {"activation_checkpointing": True}}
    for kind in ("two-ddp", "two-fsdp2"):
        run = bench.run(bench.recipe(f"{method}-recomputed-{kind}", changes), kind)
        assert_equal_runs(run, reference(method), 2)


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["adafactor", "sgd", "adamw_8bit"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_optimizers_under_ddp(bench: Workbench, method: str, optimizer: str) -> None:
    """Each process makes the same update of the same gradients; 8 bits round a last bit of them further."""
    changes = CHANGES[method] | {"training": {"optimizer": optimizer, "learning_rate": 1e-3}}
    one = bench.run(bench.recipe(f"{method}-{optimizer}-one", changes))
    run = bench.run(bench.recipe(f"{method}-{optimizer}-two", changes), "two-ddp")
    assert (one.code, run.code) == (0, 0), one.said + run.said
    difference = largest_difference(run, one)
    print(f"{run.folder.name}: largest relative difference in metrics.jsonl {difference:.1e}")
    assert difference <= ALMOST


@pytest.mark.long
def test_qlora_under_ddp(bench: Workbench) -> None:
    """Each process quantises the same base to the same 4 bits."""
    pytest.importorskip("bitsandbytes")
    changes = {"model": {"name": "tiny"}, "adapter": {"type": "qlora", "r": 4, "alpha": 8}}
    one = bench.run(bench.recipe("qlora-one", changes))
    run = bench.run(bench.recipe("qlora-two", changes), "two-ddp")
    assert (one.code, run.code) == (0, 0), one.said + run.said
    difference = largest_difference(run, one)
    print(f"{run.folder.name}: largest relative difference in metrics.jsonl {difference:.1e}")
    assert difference <= ALMOST


@pytest.mark.long
def test_unpacked_rows_with_padding(bench: Workbench) -> None:
    changes = {"packing": {"strategy": "none"}}
    one = bench.run(bench.recipe("padded-one", changes))
    for kind in ("two-ddp", "two-fsdp2"):
        assert_equal_runs(bench.run(bench.recipe(f"padded-{kind}", changes), kind), one, 2)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_half_precision_stays_close(bench: Workbench, method: str, precision: str) -> None:
    """Other sums in 16 bit: the losses within 2 %, and the same updates made."""
    changes = CHANGES[method] | {"precision": precision}
    one = bench.run(bench.recipe(f"{method}-{precision}-one", changes))
    assert one.code == 0, one.said
    for kind in ("two-ddp", "two-fsdp2"):
        run = bench.run(bench.recipe(f"{method}-{precision}-{kind}", changes), kind)
        assert run.code == 0, run.said
        ours, theirs = ([line["loss"] for line in ended.lines() if "loss" in line] for ended in (run, one))
        difference = max(abs(own - other) / other for own, other in zip(ours, theirs, strict=True))
        print(f"{run.folder.name}: largest relative difference of a loss {difference:.1e}")
        assert difference <= 0.02


@pytest.mark.long
def test_dropout_differs_from_process_to_process(bench: Workbench) -> None:
    """With rows that are all the same, two processes would give one process's curve if their dropout were the same."""
    same = bench.root / "same.jsonl"
    line = (bench.root / "train.jsonl").read_text().splitlines()[0]
    same.write_text(f"{line}\n" * 40)
    changes: dict[str, Any] = {
        "adapter": {"dropout": 0.3},
        "data": {"train": str(same), "eval": None},
        "evaluation": None,
        "packing": {"strategy": "none"},
        "training": {"tokens_per_step": 256, "steps": 6},
    }
    runs = [bench.run(bench.recipe(f"dropout-{number}", changes), "two-ddp") for number in range(2)]
    halved = {**changes, "training": {"tokens_per_step": 128, "steps": 6}}
    alone = bench.run(bench.recipe("dropout-alone", halved))
    assert [ended.code for ended in (*runs, alone)] == [0, 0, 0], alone.said
    assert runs[0].lines() == runs[1].lines()  # the same command gives the same run
    ours, one = ([line["loss"] for line in ended.lines()] for ended in (runs[0], alone))
    assert ours[0] == pytest.approx(one[0], rel=ALMOST)  # before the first update the adapter adds nothing
    assert ours[1:] != pytest.approx(one[1:], rel=ALMOST)
