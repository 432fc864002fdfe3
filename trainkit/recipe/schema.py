"""Every key of a recipe: its type, default, unit, range and meaning. Written once, here.

The reader (``reader.py``) validates against these classes, ``trainkit schema`` prints them as JSON Schema, and
``trainkit show`` explains them. A section is a frozen dataclass; a key is a field made by :func:`key`.
Nothing in this module loads torch.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

LARGEST = 3.4e38  # of what an optimizer takes as a number in fp32

Precision = Literal["fp32", "fp16", "bf16", "auto"]


def key(
    default: Any = MISSING,
    doc: str = "",
    *,
    factory: Any = MISSING,
    unit: str | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A recipe key: its default, what it means, the unit it is counted in and the range it must lie in.

    A key without ``default`` and ``factory`` is required. Bounds are inclusive (``at_least``, ``at_most``) or
    exclusive (``above``, ``below``) and hold for every number in the value.
    """
    metadata = {"doc": doc, "unit": unit, "at_least": at_least, "above": above, "at_most": at_most, "below": below}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which model is trained, and how its layers run."""

    name: str = key(
        doc="`tiny` (the model that ships with trainkit), a folder relative to where the command runs, or a hub id"
    )
    revision: str | None = key(None, "branch, tag or commit of a hub id")
    attention: Literal["auto", "sdpa", "varlen", "flash_attention_2", "flex", "eager"] = key(
        "auto", "attention kernel; `auto` takes the fastest that isolates documents here, and says which and why"
    )
    activation_checkpointing: bool = key(
        False, "recompute activations in the backward pass: less memory, about a third more time"
    )


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A parameter-efficient adapter. Leave the section out to train every weight. Names are peft's own."""

    type: Literal["lora", "qlora"] = key("lora", "`qlora` loads the base in 4 bit and needs the optional extra [qlora]")
    r: int = key(16, "rank of the two factors", at_least=1)
    alpha: float = key(32, "the update is scaled by alpha / r", above=0)
    dropout: float = key(0.0, "dropout on the input of the first factor", at_least=0, below=1)
    target_modules: Literal["all-linear"] | tuple[str, ...] = key(
        "all-linear", "module name endings that get an adapter; each must match at least one module"
    )
    exclude_modules: tuple[str, ...] = key((), "module name endings that get none")
    modules_to_save: tuple[str, ...] = key((), "modules trained in full and saved beside the adapter")
    use_rslora: bool = key(False, "scale by alpha / sqrt(r) instead of alpha / r")
    use_dora: bool = key(False, "train magnitude and direction apart (DoRA)")
    init_lora_weights: bool | Literal["gaussian", "pissa", "olora", "orthogonal"] = key(
        True, "how the factors start; true: the second is zero, so that training starts from the base model"
    )
    layers_to_transform: tuple[int, ...] | None = key(None, "indices of the layers that get an adapter", at_least=0)
    rank_pattern: dict[str, int] = key(factory=dict, doc="rank of single modules, by name or regex", at_least=1)
    alpha_pattern: dict[str, float] = key(factory=dict, doc="alpha of single modules, by name or regex", above=0)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One place that examples come from."""

    path: str = key(
        doc="jsonl, json, parquet, csv or txt file; a folder of them; or a hub id. Relative to where the command runs"
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"] = key(
        "auto", "shape of an example; `auto` recognises it and says what it saw"
    )
    weight: float | None = key(
        None,
        "share of the trained tokens in the mix, relative to the other sources; give it to all sources or to none "
        "(none: every source whole, once)",
        above=0,
    )
    columns: dict[str, str] = key(
        factory=dict, doc="names of this source's columns for ours, as {prompt: question, completion: answer}"
    )
    name: str | None = key(None, "configuration of a hub data set")
    split: str | None = key(None, "split of a hub data set (default: train)")


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read, and which of its tokens are trained."""

    train: tuple[Source, ...] = key(doc="a path, a source, or a list of them")
    eval: float | tuple[Source, ...] | None = key(
        None,
        "held out for evaluation: a fraction of the training examples (by a stable hash of the example, so that "
        "equal examples never stand on both sides), or sources of its own",
        above=0,
        below=1,
    )
    chat_template: str | None = key(
        None, "null: the tokenizer's own; a .jinja file; or the name of a shipped one (chatml, plain)"
    )
    train_on: Literal["completions", "all"] = key(
        "completions", "`completions`: only what the assistant says, its end-of-turn token included; `all`: every token"
    )
    max_dropped: float = key(
        0.01,
        "share of the examples that may be dropped because they are empty or leave nothing to train before that "
        "is an error; every drop is counted in the ledger",
        at_least=0,
        at_most=1,
    )


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How documents become rows of equal length."""

    strategy: Literal["best-fit", "none"] = key(
        "best-fit", "`best-fit` packs documents together; `none` gives each its own row and pads"
    )
    sequence_length: int = key(2048, "length of a row", unit="tokens", at_least=8)
    long_documents: Literal["split", "truncate", "drop", "error"] = key(
        "split", "what becomes of a document longer than a row; `split` loses nothing"
    )
    overlap: int = key(
        64, "tokens that a piece of a split document repeats from the one before", unit="tokens", at_least=0
    )
    train_on_overlap: bool = key(False, "train the repeated tokens a second time; otherwise they are context only")
    separator: str = key(
        "eos", "`eos`, `none`, or a token of the vocabulary; ends a document where its format puts none"
    )
    isolate_documents: bool = key(True, "no token sees another document of its row (block-diagonal causal attention)")
    reset_positions: bool = key(True, "positions start from 0 in each document of a row")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long, how fast, and with which optimizer. Exactly one of `epochs` and `steps`."""

    epochs: float | None = key(None, "passes over the rows", above=0)
    steps: int | None = key(None, "optimizer updates", at_least=1)
    tokens_per_step: int = key(
        65536,
        "tokens (row slots) in one optimizer update over all devices; a multiple of packing.sequence_length",
        unit="tokens",
        at_least=1,
    )
    micro_batch_size: int | Literal["auto"] = key(
        "auto", "rows per device and forward pass; `auto`: what the memory estimate says fits", unit="rows", at_least=1
    )
    learning_rate: float = key(2e-4, "peak learning rate", above=0, at_most=LARGEST)
    lr_scheduler: Literal["constant", "linear", "cosine", "wsd"] = key(
        "cosine", "shape after the warm-up; `wsd` stays constant and falls linearly over the last fifth"
    )
    warmup_ratio: float | None = key(None, "share of the steps that warm up (default 0.03)", at_least=0, below=1)
    warmup_steps: int | None = key(None, "steps that warm up, instead of warmup_ratio", unit="steps", at_least=0)
    weight_decay: float = key(
        0.0, "decoupled weight decay; not applied to biases and norms", at_least=0, at_most=LARGEST
    )
    max_grad_norm: float | None = key(1.0, "gradients are scaled down to this global norm; null: never", above=0)
    not_finite: Literal["stop", "skip"] = key(
        "stop",
        "a step whose loss or gradient is NaN or infinite: `stop` before its update and name its rows; `skip` leaves "
        "its update out, but not for ten steps one after another, nor in more than 5 % of the steps",
    )
    loss_spike: Literal["report", "skip"] = key(
        "report",
        "a step whose loss stands more than 6 standard deviations above the last 200: `report` names its rows; `skip` "
        "leaves its update out too, within the limits of not_finite",
    )
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "sgd"] = key(
        "adamw", "`adamw_8bit` needs the optional extra [qlora]"
    )
    adam_beta1: float = key(0.9, "decay of AdamW's first moment", at_least=0, below=1)
    adam_beta2: float = key(0.999, "decay of AdamW's second moment", at_least=0, below=1)
    adam_epsilon: float = key(1e-8, "added to AdamW's denominator", above=0)
    seed: int = key(42, "of the data order, the held-out share, new weights and dropout", at_least=0, below=2**32)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured on the held-out examples: before the first step, at intervals, after the last."""

    every_steps: int | None = key(
        100, "interval; null: only before the first step and after the last", unit="steps", at_least=1
    )
    samples: int = key(4, "held-out prompts that are answered and shown", at_least=0)
    exact_match: int = key(
        0,
        "held-out prompts that are answered greedily, before the first step and after the last, and compared with the "
        "reference letter by letter",
        at_least=0,
    )
    max_new_tokens: int = key(64, "length of a generated answer", unit="tokens", at_least=1)


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When the full training state is saved, and how many stay."""

    every_steps: int | None = key(
        200,
        "interval; null: only after the last step, when a signal stops the run, and for keep_best",
        unit="steps",
        at_least=1,
    )
    keep_last: int = key(2, "newest checkpoints that stay", at_least=1)
    keep_best: bool = key(True, "the checkpoint with the lowest evaluation loss is saved and stays too")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train. It never names a machine."""

    model: Model = key(doc="the model")
    precision: Precision = key("auto", "compute type of the forward and backward pass; trained weights stay in fp32")
    adapter: Adapter | None = key(None, "leave the section out for full fine-tuning")
    data: Data = key(doc="the data")
    packing: Packing = key(factory=Packing, doc="packing")
    training: Training = key(doc="training")
    evaluation: Evaluation = key(factory=Evaluation, doc="evaluation")
    checkpoints: Checkpoints = key(factory=Checkpoints, doc="checkpoints")
    tracking: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = key(
        (), "trackers beside the run folder's own files; each needs the optional extra of its name"
    )
    output_dir: str = key(doc="the run folder; relative to where the command runs")
