"""`trainkit estimate-memory` through the command line; a stand-in for the engines where the figures do not matter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainkit.cli import run
from trainkit.memory.estimate import PARTS, Estimate, Point
from trainkit.memory.models import known_models
from trainkit.memory.scenario import Scenario

GIB = 2**30
RECIPE = """\
model: {name: llama-3.1-8b}
precision: bf16
adapter: {type: lora, r: 8, alpha: 16}
data: {train: train.jsonl}
packing: {sequence_length: 1024}
training: {epochs: 1, tokens_per_step: 8192, micro_batch_size: 4}
output_dir: runs/a
"""

Said = pytest.CaptureFixture[str]


@dataclass
class StandIn:
    """Answers by the token and by the method, and keeps what it was asked."""

    asked: list[Scenario] = field(default_factory=list)
    exact: bool | None = None

    def __call__(self, scenario: Scenario, *, exact: bool = False) -> Estimate:
        self.asked.append(scenario)
        self.exact = exact
        states = {"full": 120, "lora": 16, "qlora": 6}[scenario.method] * GIB
        share = scenario.gpus if scenario.shard == "fsdp2" else 1
        a_token = GIB // (8192 if scenario.activation_checkpointing else 1024)
        parts = dict.fromkeys(PARTS, 0) | {"weights": states // share, "activations": scenario.tokens * a_token}
        peak = sum(parts.values())
        timeline = (Point("forward", "layer 1", {"weights": states}), Point("backward", "layer 3", parts))
        trained = 8_030_261_248 if scenario.adapter is None else 41_943_040
        return Estimate(
            8_030_261_248,
            trained,
            peak,
            peak + GIB,
            "backward",
            "layer 3",
            parts,
            timeline,
            "quick",
            0.25,
            ("A remark.",),
        )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    stand_in = StandIn()
    monkeypatch.setattr("trainkit.commands.estimate_memory.estimate", stand_in)
    monkeypatch.setattr("trainkit.commands.estimate_memory.quick_peak_bytes", lambda _scenario: None)
    return stand_in


@pytest.fixture
def estimated(engine: StandIn, capsys: Said) -> Callable[..., dict[str, Any]]:
    """`estimated(arguments...)` is the JSON object of a call, whose exit code is `code`."""

    def call(*arguments: str, code: int = 0) -> dict[str, Any]:
        assert run(["estimate-memory", *arguments, "--json"]) == code
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return call


Estimated = Callable[..., dict[str, Any]]


def test_the_keys_that_scripts_rely_on(estimated: Estimated) -> None:
    found = estimated("--model", "llama-3.1-8b", "--adapter", "lora", "--memory", "24GiB")
    assert found["model"] == "llama-3.1-8b"
    assert (found["parameters"], found["trainable_parameters"]) == (8_030_261_248, 41_943_040)
    assert found["peak_allocated_bytes"] == sum(found["parts"].values()) == 18 * GIB
    assert found["peak_reserved_bytes"] == 19 * GIB
    assert found["process_bytes"] == found["peak_reserved_bytes"] + found["context_bytes"]
    assert (found["peak_phase"], found["engine"], found["seconds"]) == ("backward", "formula", 0.25)
    assert (found["fits"], found["verdict"], found["advice"]) == (True, "fits", [])
    assert found["max_micro_batch_size"] == 2
    assert found["max_sequence_length"] == (24 * 0.97 - 17.5) * 1024 // 64 * 64


def test_without_a_capacity_nothing_is_judged(estimated: Estimated) -> None:
    assert not {"fits", "verdict", "advice", "max_micro_batch_size"} & estimated("recipe.yaml").keys()


def test_options_and_a_recipe_are_one_path(engine: StandIn, estimated: Estimated) -> None:
    from_file = estimated("recipe.yaml")
    options = ["--adapter", "lora", "--precision", "bf16", "--sequence-length", "1024", "--micro-batch-size", "4"]
    overrides = ["--set", "adapter.r=8", "--set", "adapter.alpha=16", "--set", "training.tokens_per_step=8192"]
    from_options = estimated("--model", "llama-3.1-8b", *options, *overrides)
    assert engine.asked[0] == engine.asked[1]
    assert from_file == from_options


def test_every_option_reaches_the_scenario(engine: StandIn, estimated: Estimated) -> None:
    estimated("--model", "llama-70b")
    plain = engine.asked[-1]
    assert (plain.method, plain.precision, plain.sequence_length, plain.micro_batch_size) == ("full", "bf16", 2048, 1)
    assert (plain.activation_checkpointing, plain.optimizer, plain.gpus, plain.shard) == (False, "adamw", 1, "none")
    for options, name, value in (
        (["--adapter", "qlora"], "method", "qlora"),
        (["--precision", "fp16"], "precision", "fp16"),
        (["--sequence-length", "3000"], "sequence_length", 3000),
        (["--micro-batch-size", "3"], "micro_batch_size", 3),
        (["--activation-checkpointing"], "activation_checkpointing", True),
        (["--optimizer", "adafactor"], "optimizer", "adafactor"),
        (["--gpus", "8"], "shard", "ddp"),
        (["--gpus", "8", "--shard", "fsdp2"], "shard", "fsdp2"),
        (["--set", "model.attention=eager"], "attention", "eager"),
    ):
        estimated("--model", "llama-70b", *options)
        assert getattr(engine.asked[-1], name) == value, options
    estimated("--model", "llama-70b", "--gpu", "t4", code=5)
    assert (engine.asked[0].device.capability, engine.asked[-1].device.capability) == ((9, 0), (7, 5))
    assert engine.exact is False
    estimated("--model", "llama-70b", "--exact")
    assert engine.exact is True


def test_options_change_a_recipe_file(engine: StandIn, estimated: Estimated) -> None:
    estimated("recipe.yaml", "--adapter", "none", "--sequence-length", "3000", "--model", "qwen3-8b")
    asked = engine.asked[-1]
    assert (asked.method, asked.sequence_length, asked.micro_batch_size) == ("full", 3000, 4)
    assert asked.config["model_type"] == "qwen3"


def test_a_recipe_without_a_model_takes_that_of_the_option(
    engine: StandIn, estimated: Estimated, tmp_path: Path
) -> None:
    (tmp_path / "nameless.yaml").write_text(RECIPE.replace("model: {name: llama-3.1-8b}\n", ""))
    estimated("nameless.yaml", "--model", "qwen3-8b", "--memory", "80GiB")
    assert engine.asked[0].config["model_type"] == "qwen3"


@pytest.mark.parametrize("model", ["gpt2", "llama-3.1-8b"])
def test_what_set_says_of_the_rows_decides_the_tokens_of_a_step(
    engine: StandIn, estimated: Estimated, model: str
) -> None:
    rows = ["--set", "packing.sequence_length=511", "--set", "training.micro_batch_size=3"]
    for options in ([], ["--sequence-length", "512", "--micro-batch-size", "2"]):
        estimated("--model", model, *options, *rows)
        asked = engine.asked[-1]
        assert (asked.sequence_length, asked.micro_batch_size, asked.micro_batches) == (511, 3, 43)  # 128 rows


def test_auto_takes_the_largest_micro_batch_that_fits_and_divides_the_step(
    engine: StandIn, estimated: Estimated
) -> None:
    auto = ["recipe.yaml", "--set", "training.micro_batch_size=auto"]
    assert estimated(*auto)["micro_batch_size"] == 1
    assert estimated("recipe.yaml", "--micro-batch-size", "auto", "--memory", "24GiB")["micro_batch_size"] == 4
    known = ["--model", "llama-3.1-8b", "--adapter", "lora", "--memory", "24GiB"]
    assert estimated(*known, "--micro-batch-size", "auto")["micro_batch_size"] == 2
    assert estimated(*auto, "--memory", "24GiB")["micro_batch_size"] == 4  # of the 5 that fit, 8 rows a step
    assert estimated(*auto, "--memory", "12GiB", code=5)["max_micro_batch_size"] == 0


def test_a_short_model_is_asked_about_rows_that_it_can_take(engine: StandIn, estimated: Estimated) -> None:
    estimated("--model", "gpt2")
    assert engine.asked[-1].sequence_length == 1024


@pytest.mark.usefixtures("engine")
def test_the_report_for_people(capsys: Said) -> None:
    assert run(["estimate-memory", "--model", "llama-3.1-8b", "--adapter", "lora", "--memory", "24GiB"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[:4] == [
        "llama-3.1-8b (from the table of known models)",
        "8,030,261,248 parameters; 41,943,040 train (0.522 %)",
        "LoRA r 16, bf16, adamw",
        "a step: 32 micro-batches of 1 row of 2,048 tokens",
    ]
    table = [line.split() for line in said.splitlines() if line.count("  ") > 1]
    assert ["weights", "16.00", "17.18"] in table
    assert ["peak", "allocated", "18.00", "19.33"] in table
    assert ["process", "19.50", "20.94"] in table
    assert "The peak is in the backward phase, at: layer 3" in said
    assert "A remark." in said
    assert "fits: 19.50 GiB of 24.00 GiB (as given)\nup to 23.28 GiB, 97 % of that, counts as fitting\n" in said
    assert "largest micro-batch that fits: 2 of these rows\nlongest rows that fit: 5,888 tokens\n" in said
    assert "engine: formula" in said


@pytest.mark.usefixtures("engine")
def test_several_gpus_are_said(capsys: Said) -> None:
    assert run(["estimate-memory", "--model", "llama-3.1-8b", "--activation-checkpointing", "--gpus", "8"]) == 0
    assert capsys.readouterr().out.splitlines()[2:5] == [
        "full fine-tuning, bf16, adamw, activation checkpointing",
        "a step: 4 micro-batches of 1 row of 2,048 tokens",
        "on each of 8 GPUs, ddp; figures are for one of them",
    ]


@pytest.mark.usefixtures("engine")
def test_tight_is_a_verdict_of_its_own(capsys: Said) -> None:
    """18 GiB are allocated, 19 reserved, and the context takes a half."""
    lora = ["--model", "llama-3.1-8b", "--adapter", "lora"]
    for memory, word, code in (("20.2GiB", "fits", 0), ("18.6GiB", "tight", 0), ("18.4GiB", "does not fit", 5)):
        assert run(["estimate-memory", *lora, "--memory", memory]) == code, word
        said = capsys.readouterr().out
        assert f"\n{word}: 19.50 GiB of {memory[:4]}0 GiB (as given)\n" in said
        assert ("what is allocated has room" in said) == (word == "tight")
        assert ("largest micro-batch that fits: not even one row\n" in said) == (word != "fits")
        assert ("What makes it fit" in said) == (word != "fits")


@pytest.mark.usefixtures("engine")
def test_what_does_not_fit_gets_advice_to_paste(capsys: Said) -> None:
    arguments = ["--model", "llama-3.1-8b", "--adapter", "lora", "--micro-batch-size", "4", "--gpu", "rtx-4090"]
    assert run(["estimate-memory", *arguments]) == 0
    said = capsys.readouterr().out
    assert "does not fit: 25.50 GiB of 23.52 GiB (rtx-4090-24gb)" in said
    advice = said.partition("What makes it fit, the cheapest first:\n")[2].splitlines()
    assert advice[:3] == [
        "  1. 21.50 GiB: the step takes more passes",
        "       training:",
        "         micro_batch_size: 2",
    ]
    assert advice[3:6] == [
        "  2. 18.50 GiB: about a third more time",
        "       model:",
        "         activation_checkpointing: true",
    ]
    assert yaml.safe_load("\n".join(advice[1:3])) == {"training": {"micro_batch_size": 2}}


@pytest.mark.parametrize(
    "keys",
    [
        {"training": {"micro_batch_size": 4}},
        {"adapter": {"type": "lora", "r": 8, "target_modules": ["q_proj", "no"]}, "training": {"micro_batch_size": 4}},
        {"adapter": {"dropout": 0.1, "use_dora": True, "rank_pattern": {"q_proj": 4}, "alpha": 2.5}},
        {"training": {"micro_batch_size": "auto"}},
        {"training": {"micro_batch_size": 8, "tokens_per_step": 8192}},
    ],
    ids=lambda keys: json.dumps(keys)[:60],
)
@pytest.mark.parametrize("memory", ["14GiB", "70GiB"])
def test_pasted_advice_comes_to_what_it_promised(
    engine: StandIn, tmp_path: Path, capsys: Said, keys: dict[str, dict[str, Any]], memory: str
) -> None:
    """Section by section, key by key, with the options that the advice names."""
    recipe: dict[str, Any] = yaml.safe_load(RECIPE)
    del recipe["adapter"]
    recipe |= {**keys, "training": recipe["training"] | keys.get("training", {})}
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(recipe))
    run(["estimate-memory", "asked.yaml", "--memory", memory, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["advice"] == []) == found["fits"]
    for change in found["advice"]:
        changed = dict(recipe)
        for section, lines in yaml.safe_load(change["recipe"] or "{}").items():
            changed[section] = {**changed.get(section, {}), **lines} if section != "adapter" else lines
        (tmp_path / "pasted.yaml").write_text(yaml.safe_dump(changed))
        gpus = [] if change["gpus"] == 1 else ["--gpus", str(change["gpus"]), "--shard", change["shard"]]
        assert run(["estimate-memory", "pasted.yaml", "--memory", memory, *gpus, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["fits"], found["process_bytes"]) == (True, change["process_bytes"]), change


def test_a_micro_batch_leaves_the_tokens_of_a_step_as_they_are(engine: StandIn, estimated: Estimated) -> None:
    """A step has 8 rows; it grows where a micro-batch is larger."""
    for rows, passes in ((3, 3), (8, 1), (20, 1)):
        found = estimated("recipe.yaml", "--micro-batch-size", str(rows))
        assert (found["micro_batch_size"], found["micro_batches_per_step"]) == (rows, passes)


def test_the_largest_micro_batch_does_not_depend_on_the_one_that_is_asked_about(capsys: Said) -> None:
    """By the formula itself: gradients of earlier micro-batches are there up to 31 rows, and not from 32 on."""
    model = ["estimate-memory", "--model", "llama-3.2-1b", "--activation-checkpointing", "--memory", "36GiB", "--json"]
    found = {}
    for rows in (1, 22, 23, 32, 40):
        run([*model, "--micro-batch-size", str(rows)])
        found[rows] = json.loads(capsys.readouterr().out)
    assert {one["max_micro_batch_size"] for one in found.values()} == {22}
    assert [one["fits"] for one in found.values()] == [True, True, False, False, False]


def test_advice_as_json(estimated: Estimated) -> None:
    found = estimated("--model", "llama-3.1-8b", "--memory", "24GiB", code=5)
    assert (found["fits"], found["verdict"], found["max_micro_batch_size"]) == (False, "does not fit", 0)
    lora, *_ = found["advice"]
    assert lora["change"] == "adapters train, the model's own weights do not"
    assert yaml.safe_load(lora["recipe"]) == {"adapter": {"type": "lora", "r": 16, "alpha": 32}}
    assert lora["peak_allocated_bytes"] == 18 * GIB
    assert {(change["gpus"], change["shard"]) for change in found["advice"]} >= {(1, "none"), (8, "fsdp2")}


@pytest.mark.usefixtures("engine")
def test_where_not_one_row_fits_the_exit_code_is_5(capsys: Said) -> None:
    assert run(["estimate-memory", "--model", "llama-70b", "--gpu", "h100-80gb"]) == 5
    said = capsys.readouterr()
    assert said.err == "error: llama-3.3-70b: not even one row of 2,048 tokens fits in 79.10 GiB (h100-80gb)\n"
    assert "What makes it fit" in said.out


@pytest.mark.usefixtures("engine")
def test_a_plot_is_written(tmp_path: Path, capsys: Said) -> None:
    assert run(["estimate-memory", "recipe.yaml", "--plot", "step.svg"]) == 0
    assert "plot: step.svg" in capsys.readouterr().out
    assert "LoRA r 8, 4 rows of 1,024 tokens" in (tmp_path / "step.svg").read_text()


@pytest.mark.usefixtures("engine")
def test_the_textbooks_figures_to_the_digit(capsys: Said) -> None:
    assert run(["estimate-memory", "--model", "llama-70b", "--view", "textbook"]) == 0
    said = capsys.readouterr().out
    table = {line[:50].strip(): line[50:].split() for line in said.splitlines()}
    columns = next(line.split() for line in said.splitlines() if "llama-2-70b" in line)
    assert columns[0] == "70b"
    assert "llama-2-70b" in columns
    rows = [line for line in said.splitlines() if "GiB  " in line]
    assert rows[0].startswith("weights in fp32")
    assert "260.77 GiB" in rows[0]
    assert "256.96 GiB" in rows[0]
    assert "1043.08 GiB" in rows[1]
    assert "1043.08 GiB" in rows[2]
    assert "= 1120 GB" in said
    assert "1043.08 GiB and 1120 GB are one amount." in said
    assert table


@pytest.mark.usefixtures("engine")
def test_the_units_are_explained_by_the_tables_own_figures(capsys: Said) -> None:
    assert run(["estimate-memory", "--model", "gpt2", "--view", "textbook"]) == 0
    said = capsys.readouterr().out
    found = re.search(r"GB is 10\^9: ([0-9.]+ GiB) and ([0-9.]+ GB) are one amount\.", said)
    assert found is not None
    table = said.partition("GiB is 2^30")[0]
    assert found[1] in table
    assert f"= {found[2]}" in table


def test_the_textbook_as_json(estimated: Estimated) -> None:
    found = estimated("--model", "llama-70b", "--view", "textbook")
    assert found["parameters"]["70b"] == 70 * 10**9
    assert found["parameters"]["llama-2-70b"] == 68_976_648_192
    by_name = {line["what"]: line["bytes"] for line in found["lines"]}
    assert by_name["training in mixed precision"]["70b"] == 1120 * 10**9


def test_every_known_model_by_the_cheapest_method_that_fits(estimated: Estimated) -> None:
    found = estimated("--fits", "24GiB")
    by_name = {model["model"]: model for model in found["models"]}
    assert by_name.keys() == known_models().keys()
    assert by_name["llama-3.1-8b"]["method"] == "LoRA"
    assert by_name["llama-3.1-8b"]["trainable_parameters"] == 41_943_040
    assert by_name["llama-3.3-70b"]["method"] is None  # for its weights alone


def test_options_that_the_list_takes_reach_every_model(engine: StandIn, estimated: Estimated) -> None:
    options = ["--micro-batch-size", "2", "--sequence-length", "512", "--optimizer", "sgd", "--precision", "fp16"]
    estimated("--fits", "24GiB", *options, "--gpus", "2", "--shard", "fsdp2", "--exact")
    found = {(asked.micro_batch_size, asked.sequence_length) for asked in engine.asked}
    assert found == {(2, 512)}
    others = {(asked.optimizer, asked.precision, asked.gpus, asked.shard) for asked in engine.asked}
    assert others == {("sgd", "fp16", 2, "fsdp2")}
    assert engine.exact is True


@pytest.mark.usefixtures("engine")
def test_the_list_for_people(capsys: Said) -> None:
    assert run(["estimate-memory", "--fits", "24GiB", "--sequence-length", "1024"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Micro-batches of 1 row of 1,024 tokens in 24.00 GiB\n")
    assert "fit by no method: " in said
    assert "llama-3.3-70b" in said.partition("fit by no method: ")[2]


# With the engines themselves


def test_the_weights_of_a_real_estimate_are_the_models_own(capsys: Said) -> None:
    assert run(["estimate-memory", "--model", "llama-3.1-8b", "--adapter", "lora", "--json", "--exact"]) == 0
    found = json.loads(capsys.readouterr().out)
    parameters = known_models()["llama-3.1-8b"].parameters
    assert found["engine"] == "trace"
    assert found["parts"]["weights"] == pytest.approx(2 * parameters, rel=1e-4)
    assert found["parts"]["adapters"] == 4 * found["trainable_parameters"]
    assert found["parts"]["optimizer state"] == pytest.approx(8 * found["trainable_parameters"], rel=1e-4)
    assert sum(found["parts"].values()) == found["peak_allocated_bytes"] <= found["peak_reserved_bytes"]


def test_qlora_is_estimated_where_bitsandbytes_is_not_installed() -> None:
    program = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from trainkit.cli import run\n"
        "sys.exit(run(['estimate-memory', '--model', 'smollm2-135m', '--adapter', 'qlora', '--exact', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["method"] == "qlora"
    # 106 million numbers of linear layers in half a byte each, 28 million of the embedding in two bytes
    assert found["parts"]["weights"] == pytest.approx(0.515 * 106.2e6 + 2 * 28.3e6, rel=0.02)


# Refusals


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"head_dim": 7}, "RoPE requires an even rotary dimension, but got `head_dim`=7"),
        ({"layer_types": ["full_attention"]}, "`num_hidden_layers` (4) must be equal to the number of `layer_types`"),
        ({"intermediate_size": None}, "Field 'intermediate_size' expected int, got NoneType"),
        ({"tie_word_embeddings": None}, "Field 'tie_word_embeddings' expected bool, got NoneType"),
        ({"hidden_act": "nonsense"}, "no model can be built: `hidden_act` is 'nonsense', which transformers does not "),
        (
            {"rope_scaling": {"type": "nonsense"}},
            "no model can be built: `type` is 'nonsense', which transformers",
        ),
        ({"architectures": "LlamaForCausalLM"}, "`architectures` must be a list of class names, as ["),
        ({"auto_map": 5}, "`auto_map` must be an object that names classes of the model's own code"),
        ({"architectures": [1]}, "`architectures` must be a list of class names, as ["),
    ],
)
def test_what_transformers_says_of_a_config_is_told_whole_with_its_file(
    tmp_path: Path, changes: dict[str, Any], line: str, capsys: Said
) -> None:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    assert run(["estimate-memory", "--model", str(tmp_path)]) == 4
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {tmp_path}/config.json: {line}")
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert len(said.err.replace(str(tmp_path), "")) <= 200


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ([], 2, "give a RECIPE or --model NAME; see `trainkit estimate-memory --help`"),
        (["--model", "lama-70b"], 4, "model.name: no model `lama-70b` is known; near: llama-70b, "),
        (["--model", "./nowhere"], 4, "model.name: no model `./nowhere` is known; "),
        (["--model", "gpt2", "--sequence-length", "2048"], 4, "packing.sequence_length: 2,048 is beyond the 1,024 "),
        (["--model", ""], 2, "model.name: is empty; give a known model"),
        (["--model", "gpt2", "--set", "packing.sequence_length=0"], 2, "--set packing.sequence_length: "),
        (["--model", "gpt2", "--memory", "24"], 2, "--memory: 24 has no unit; write 24GiB"),
        (["--model", "gpt2", "--memory", "much"], 2, "--memory: `much` is no amount of memory"),
        (["--model", "gpt2", "--gpu", "h10"], 2, "--gpu: `h10` is not known; near: h100"),
        (["--model", "gpt2", "--gpu", "h100", "--memory", "1GiB"], 2, "--memory: --gpu says how much memory there is"),
        (["--model", "gpt2", "--gpus", "4", "--shard", "none"], 2, "--gpus: 4 GPUs that share nothing each need the"),
        (["--model", "gpt2", "--shard", "fsdp2"], 2, "--shard: fsdp2 needs --gpus 2 or more"),
        (["--model", "gpt2", "--gpu", "t4", "--precision", "bf16"], 5, "precision: t4 has no bf16 arithmetic; set"),
        (
            ["--model", "gpt2", "--precision", "int8"],
            2,
            "--precision: expected `fp32`, `fp16`, `bf16` or `auto`; got the text `int8`",
        ),
        (
            ["--model", "gpt2", "--optimizer", "adam"],
            2,
            "--optimizer: expected `adamw`, `adamw_8bit`, `adafactor` or `sgd`; got the",
        ),
        (["--model", "gpt2", "--set", "adapter.ranks=3"], 2, "--set adapter.ranks: unknown key"),
        (["--model", "gpt2", "--plot", "a.pdf"], 2, "--plot: a.pdf must end in .png, .svg or .html"),
        (["recipe.yaml", "--gpus", "4"], 2, "training.tokens_per_step: 8,192 tokens are no micro-batch for each of 4"),
        (["--fits", "24"], 2, "--fits: 24 has no unit; write 24GiB"),
        *(
            (["--fits", "24GiB", *more], 2, f"--fits: lists every known model by the cheapest method, so {more[0]} has")
            for more in (
                *(["--model", "gpt2"], ["--adapter", "lora"], ["--activation-checkpointing"], ["--gpu", "t4"]),
                *(["--memory", "8GiB"], ["--plot", "a.svg"]),
            )
        ),
        *(
            (
                ["--fits", "24GiB", "--set", f"{key}=x"],
                2,
                f"--fits: lists every known model by the cheapest method, so --set {key}",
            )
            for key in ("model.name", "model.activation_checkpointing", "adapter", "adapter.type")
        ),
        (
            ["--model", "gpt2", "--micro-batch-size", "2000"],
            2,
            "training.micro_batch_size: 2,000 rows of 1,024 tokens are 2,048,000 tokens; more than 1,048,576 in a",
        ),
        (["recipe.yaml", "--fits", "24GiB"], 2, "--fits: lists every known model by the cheapest method, so RECIPE"),
        *(
            (["recipe.yaml", "--view", "textbook", *more], 2, f"--view: textbook counts parameters alone, so {more[0]}")
            for more in (
                *(["--adapter", "lora"], ["--precision", "fp32"], ["--sequence-length", "512"], ["--optimizer", "sgd"]),
                *(["--micro-batch-size", "2"], ["--activation-checkpointing"], ["--gpus", "2"], ["--shard", "none"]),
                *(["--gpu", "t4"], ["--memory", "8GiB"], ["--exact"], ["--plot", "a.svg"]),
            )
        ),
        (["--fits", "24GiB", "--view", "textbook"], 2, "--view: textbook counts parameters alone, so --fits has no pl"),
        (["--model", "gpt2", "--view", "novel"], 2, "Invalid value for '--view'"),
        (["--model", "gpt2", "--adapter", "dora"], 2, "Invalid value for '--adapter'"),
        *(
            (
                ["--model", "gpt2", "--micro-batch-size", rows],
                2,
                "--micro-batch-size: expected a whole number above 0, ",
            )
            for rows in ("0", "-1", "two", "1.5", "", "9" * 5000)
        ),
        (["--model", "gpt2", "--plot", "/proc/a.png"], 2, "--plot: /proc takes no file ("),
        (["--model", "gpt2", "--plot", "nodir/a.png"], 2, "--plot: nodir is no folder; create it first"),
        (["--model", "gpt2", "--memory", "24G"], 2, "--memory: 24G may be one of two units; write 24GiB"),
    ],
)
@pytest.mark.usefixtures("engine")
def test_bad_input_is_one_line(arguments: list[str], code: int, line: str, capsys: Said) -> None:
    assert run(["estimate-memory", *arguments]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {line}")
    assert said.err.count("\n") == 1
