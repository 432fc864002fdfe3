"""``scripts/bench memory``: estimates beside those of other tools, and beside what a GPU measures where there is one.

The other tools are asked only where they are installed, through their own functions and with the same shapes: what they
would look up on the hub is given to them.
"""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any

from trainkit.memory.estimate import estimate
from trainkit.memory.models import known_models
from trainkit.memory.scenario import Device, Scenario
from trainkit.memory.sizes import GIB, MIB
from trainkit.recipe.schema import Adapter

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping

    import torch

LENGTH = 2048
SIDE_BY_SIDE = ("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-7b", "llama-3.3-70b")
GRID_MODELS = ("smollm2-135m", "llama-3.2-1b", "qwen2.5-7b")
GRID_LENGTHS = (1024, 4096, 16384)
LARGEST_SHARE = 0.95  # of the GPU: what is predicted to take more is not tried


@dataclass(frozen=True)
class Case:
    """A known model and how it is trained: rows of ``length`` tokens, bf16, AdamW."""

    model: str
    method: str
    rows: int
    length: int
    checkpointing: bool

    def scenario(self, device: Device | None = None) -> Scenario:
        """The case as the estimator is asked about it; two micro-batches, so that gradients are there in the second."""
        adapter = None if self.method == "full" else Adapter(type="qlora" if self.method == "QLoRA" else "lora")
        return Scenario(
            config=known_models()[self.model].config,
            sequence_length=self.length,
            micro_batch_size=self.rows,
            micro_batches=2,
            adapter=adapter,
            activation_checkpointing=self.checkpointing,
            device=device or Device(),
        )


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """The tables; that of the GPU is empty without one, that of published measurements without their file."""
    import torch

    found: dict[str, Any] = {"peers": _versions(), "side_by_side": [], "grid": [], "published": []}
    if options.published is not None:
        lines = options.published.read_text(encoding="utf-8").splitlines()
        return found | {"published": [_published(json.loads(line)) for line in lines]}
    if not options.grid:
        found["side_by_side"] = [_side_by_side(case) for case in _cases()]
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(0), "grid": _grid()}
    return found


def table(found: dict[str, Any]) -> str:
    """What :func:`measure_memory` found, for people; GiB."""
    if found["published"]:
        return "\n".join(_published_lines(found["published"]))
    lines = [", ".join(f"{name} {version}" for name, version in found["peers"].items())]
    columns = ("trainkit", "accelerate", "fitcheck", "zero2", "zero3")
    lines.append(f"{'model':<14}{'method':<8}{'rows':>5}{'ckpt':>6}" + "".join(f"{name:>12}" for name in columns))
    for one in found["side_by_side"]:
        case = one["case"]
        sizes = "".join(f"{_in_gib(one[name]):>12}" for name in columns)
        lines.append(f"{case['model']:<14}{case['method']:<8}{case['rows']:>5}{_yes(case['checkpointing']):>6}{sizes}")
    if not found["grid"]:
        lines.append("no CUDA device: nothing was measured")
        return "\n".join(lines)
    lines.append(f"\n{found['device']}: peak of the second step")
    lines.append(
        f"{'model':<14}{'method':<8}{'length':>7}{'ckpt':>6}{'allocated':>11}{'predicted':>11}{'error':>8}"
        f"{'reserved':>11}{'predicted':>11}{'error':>8}"
    )
    for one in found["grid"]:
        case = one["case"]
        start = f"{case['model']:<14}{case['method']:<8}{case['length']:>7}{_yes(case['checkpointing']):>6}"
        lines.append(start + _compared(one, "allocated") + _compared(one, "reserved"))
    errors = [abs(_error(one, "allocated")) for one in found["grid"]]
    lines.append(f"allocated: mean error {sum(errors) / len(errors):.2%}, worst {max(errors):.2%}")
    return "\n".join(lines)


def _cases() -> list[Case]:
    ways = [("full", 1, True), ("LoRA", 1, False), ("LoRA", 4, True), ("QLoRA", 1, True)]
    return [Case(model, method, rows, LENGTH, ckpt) for model in SIDE_BY_SIDE for method, rows, ckpt in ways]


def _side_by_side(case: Case) -> dict[str, Any]:
    """Bytes that each tool says the case takes: its own word for the total; None where it has none."""
    peers: dict[str, tuple[str, Callable[[Case], float | None]]] = {
        "accelerate": ("accelerate", _accelerate_bytes),
        "fitcheck": ("fitcheck", _fitcheck_bytes),
        "zero2": ("deepspeed", _zero2_bytes),
        "zero3": ("deepspeed", _zero3_bytes),
    }
    said = {name: ask(case) if find_spec(module) else None for name, (module, ask) in peers.items()}
    return {"case": asdict(case), "trainkit": estimate(case.scenario()).peak_allocated_bytes, **said}


def _accelerate_bytes(case: Case) -> float | None:
    """`accelerate estimate-memory`: the largest of its stages of "Training using Adam" in bf16, for a batch of 1.

    It builds the model by AutoModel, so without a head. It knows no adapters.
    """
    if case.method != "full":
        return None
    import torch
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes
    from transformers import CONFIG_MAPPING, AutoModel

    values = dict(known_models()[case.model].config)
    with torch.device("meta"):
        model = AutoModel.from_config(CONFIG_MAPPING[values.pop("model_type")](**values))
    total, _ = calculate_maximum_sizes(model)
    return float(max(estimate_training_usage(total, "bfloat16").values()))


def _fitcheck_bytes(case: Case) -> float | None:
    """fitcheck-llm's total with flash attention, all linear layers adapted, on an H100; its overhead taken out."""
    fitcheck: Any = import_module("fitcheck")
    known = known_models()[case.model]
    config: Mapping[str, Any] = known.config
    model = fitcheck.ModelConfig(
        name=case.model,
        num_params=known.parameters,
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        tie_word_embeddings=config["tie_word_embeddings"],
    )
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    training = fitcheck.TrainingConfig(
        precision="bf16",
        quantization="nf4" if case.method == "QLoRA" else "none",
        double_quant=case.method == "QLoRA",
        batch_size=case.rows,
        seq_len=case.length,
        lora_rank=None if case.method == "full" else 16,
        lora_targets=everything,
        grad_checkpoint=case.checkpointing,
        flash_attn=True,
    )
    report = fitcheck.estimate(model, training, fitcheck.get_gpu("h100"))
    return float((report.total_mib - report.overhead_mib) * 2**20)


def _zero2_bytes(case: Case) -> float | None:
    """DeepSpeed's estimate of ZeRO-2's model states on one GPU, nothing offloaded. It knows no adapters."""
    if case.method != "full":
        return None
    zero: Any = import_module("deepspeed.runtime.zero.stage_1_and_2")
    _, gpu = zero.estimate_zero2_model_states_mem_needs(known_models()[case.model].parameters, cpu_offload=False)
    return float(gpu)


def _zero3_bytes(case: Case) -> float | None:
    """The same of ZeRO-3, whose largest layer is taken to be the embedding."""
    if case.method != "full":
        return None
    zero: Any = import_module("deepspeed.runtime.zero.stage3")
    known = known_models()[case.model]
    largest = known.config["vocab_size"] * known.config["hidden_size"]
    _, gpu, _ = zero.estimate_zero3_model_states_mem_needs(
        known.parameters, largest, cpu_offload=False, cpu_offload_params=False, zero_init=True
    )
    return float(gpu)


def _published(row: Mapping[str, Any]) -> dict[str, Any]:
    """A measurement on a Tesla T4 and the estimate for it: transformers' plain loop, fp16, q, k, v and o adapted."""
    four_bit = row["base_quantization"] == "nf4"
    scenario = Scenario(
        config=known_models()[row["model"]].config,
        sequence_length=row["sequence_length"],
        micro_batch_size=row["batch_size"],
        adapter=Adapter(
            type="qlora" if four_bit else "lora",
            r=row["lora_r"],
            target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
        ),
        precision="fp16",
        frozen_storage="fp16",
        activation_checkpointing=True,
        attention="eager" if row["attention"] == "eager" else "sdpa",
        device=Device("cuda", (7, 5)),
        loop="transformers",
    )
    predicted = estimate(scenario, exact=True)
    return {
        "base": "4 bit" if four_bit else "fp16",
        "allocated_bytes": row["peak_allocated_mib"] * MIB,
        "reserved_bytes": row["peak_reserved_mib"] * MIB,
        "predicted_allocated_bytes": predicted.peak_allocated_bytes,
        "predicted_reserved_bytes": predicted.peak_reserved_bytes,
    }


def _published_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Errors of the estimates, by the type of the base model and all together."""
    for base in ("fp16", "4 bit", "all"):
        for kind in ("allocated", "reserved"):
            errors = [_error(row, kind) for row in rows if base in (row["base"], "all")]
            mean = sum(map(abs, errors)) / len(errors)
            extent = f"from {min(errors):+.2%} to {max(errors):+.2%}"
            yield f"{base:<6}{len(errors):>4} rows  {kind:<10} mean {mean:.2%}, {extent}"


def _versions() -> dict[str, str]:
    found = {}
    for name in ("accelerate", "fitcheck-llm", "deepspeed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _grid() -> list[dict[str, Any]]:
    """Real steps of random models on the GPU, each in a process of its own, beside what is predicted for them."""
    import torch

    device = Device("cuda", torch.cuda.get_device_capability(0))
    capacity = torch.cuda.mem_get_info(0)[1]
    found = []
    for model, method, length, ckpt in product(GRID_MODELS, ("full", "LoRA"), GRID_LENGTHS, (False, True)):
        case = Case(model, method, 1, length, ckpt)
        predicted = estimate(case.scenario(device))
        if predicted.peak_reserved_bytes > LARGEST_SHARE * capacity:
            continue
        # a process of its own: no allocation of an earlier case is in its way
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            allocated, reserved = pool.apply(measured_bytes, (case,))
        found.append(
            {
                "case": asdict(case),
                "allocated_bytes": allocated,
                "reserved_bytes": reserved,
                "predicted_allocated_bytes": predicted.peak_allocated_bytes,
                "predicted_reserved_bytes": predicted.peak_reserved_bytes,
            }
        )
    return found


def measured_bytes(case: Case) -> tuple[int, int]:
    """``max_memory_allocated`` and ``max_memory_reserved`` of the second step of a random model on the first GPU.

    The parts are those that a run is made of; only the weights have no file.
    """
    import torch
    from accelerate import Accelerator

    from trainkit.model.loading import quiet_libraries
    from trainkit.training.step import training_step

    with quiet_libraries():
        run = _Stepper.of(case, Accelerator(mixed_precision="no"))
    batch = run.batch(case)
    torch.cuda.empty_cache()
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        training_step(run, [batch, batch], 1e-5, describe_rows=lambda: "", should_stop=lambda: False)
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


@dataclass
class _Stepper:
    """What a step needs of a run."""

    loss_model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    accelerator: Any
    max_grad_norm: float | None
    vocabulary: int

    @classmethod
    def of(cls, case: Case, accelerator: Any) -> _Stepper:
        import torch
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        from trainkit.model.adapters import attach_adapter
        from trainkit.model.attention import choose_attention
        from trainkit.model.loading import enable_activation_checkpointing
        from trainkit.model.loss import LossModel
        from trainkit.model.precision import plan_precision
        from trainkit.recipe.schema import Training
        from trainkit.training.optimizer import make_optimizer

        scenario, device = case.scenario(), accelerator.device
        values = dict(scenario.config)
        config = CONFIG_MAPPING[values.pop("model_type")](**values)
        precision = plan_precision("bf16", device)
        dtype = torch.float32 if scenario.adapter is None else precision.frozen_storage
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.config.use_cache = False
        if case.checkpointing:
            enable_activation_checkpointing(model)
        adapted, _ = attach_adapter(model, scenario.adapter, seed=0)
        loss_model = LossModel(adapted, choose_attention("auto", device, config), precision)
        loss_model.train()
        optimizer = make_optimizer(loss_model, Training(steps=1))
        return cls(loss_model, optimizer, None, accelerator, 1.0, config.vocab_size)

    def batch(self, case: Case) -> Any:
        """Random tokens, all of them trained, one document a row."""
        import torch

        from trainkit.data.batches import Batch

        ids_RT = torch.randint(self.vocabulary, (case.rows, case.length))
        positions_RT = torch.arange(case.length).expand(case.rows, -1)
        return Batch(
            input_ids_RT=ids_RT,
            labels_RT=ids_RT,
            position_ids_RT=positions_RT,
            segment_lengths=((case.length,),) * case.rows,
            trained_tokens=ids_RT.numel(),
            tokens=ids_RT.numel(),
        )


def _compared(one: Mapping[str, Any], kind: str) -> str:
    measured, predicted = _in_gib(one[f"{kind}_bytes"]), _in_gib(one[f"predicted_{kind}_bytes"])
    return f"{measured:>11}{predicted:>11}{_error(one, kind):>+8.2%}"


def _error(one: Mapping[str, Any], kind: str) -> float:
    return float(one[f"predicted_{kind}_bytes"] / one[f"{kind}_bytes"] - 1)


def _in_gib(size: float | None) -> str:
    return "-" if size is None else f"{size / GIB:,.2f}"


def _yes(it_is: object) -> str:
    return "yes" if it_is else "no"
