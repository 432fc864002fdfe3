"""What other tools call things, and what that is here. Used for messages only: no foreign name is ever accepted.

Tools: axolotl, LLaMA-Factory, torchtune, TRL (with transformers), Unsloth, Soup, mlx-lm, oumi.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainkit.recipe.yaml_nodes import Mapping, Node, Scalar, shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Mapping as Words

LEAVE_OUT = ""

# Other words for the values of our keys; LEAVE_OUT where the key is then not needed.
VALUES: dict[str, dict[str, str]] = {
    "precision": {
        "no": "fp32", "none": "fp32", "32": "fp32", "float32": "fp32", "float": "fp32", "full": "fp32",
        "16": "fp16", "float16": "fp16", "half": "fp16", "16-mixed": "fp16",
        "bfloat16": "bf16", "bf16-mixed": "bf16", "true": "auto",
    },
    "model.attention": {
        "true": "flash_attention_2", "fa2": "flash_attention_2", "flash_attn": "flash_attention_2",
        "flash_attention": "flash_attention_2", "flash": "flash_attention_2", "flex_attention": "flex",
        "xformers": "sdpa", "disabled": "eager", "false": "eager",
    },
    "training.optimizer": {
        "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adam": "adamw",
        "torch.optim.adamw": "adamw", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "adamw_8bit",
        "adamw8bit": "adamw_8bit",
    },
    "training.lr_scheduler": {
        "constant_with_warmup": "constant", "warmup_stable_decay": "wsd", "cosine_with_warmup": "cosine",
    },
    "packing.strategy": {"true": "best-fit", "bfd": "best-fit", "ffd": "best-fit", "false": "none"},
    "adapter.type": {
        "true": "lora", "dora": "lora",
        "freeze": LEAVE_OUT, "full": LEAVE_OUT, "false": LEAVE_OUT, "none": LEAVE_OUT,
    },
    "adapter.target_modules": {"all": "all-linear", "true": "all-linear"},
    "data.train_on": {"true": "all", "false": "completions"},
    "data.train.format": {
        "chat_template": "messages", "chatml": "messages", "openai": "messages", "conversational": "messages",
        "completion": "text", "raw": "text", "prompt_completion": "prompt-completion", "instruct": "alpaca",
    },
}  # fmt: skip

# The key that a section is about: `model: tiny` means `model: {name: tiny}`.
MAIN_KEYS = {
    "model": "name", "adapter": "type", "data": "train", "packing": "strategy",
    "evaluation": "every_steps", "checkpoints": "every_steps",
}  # fmt: skip

_TRACKERS = {"none": "[]", "all": "[tensorboard, wandb, mlflow]", "wandb": "[wandb]", "mlflow": "[mlflow]",
             "tensorboard": "[tensorboard]"}  # fmt: skip

NEGATED = {"true": "false", "false": "true"}


@dataclass(frozen=True)
class Foreign:
    """Another tool's key: who says it, our key for it, and its values in our words where those differ."""

    tools: str
    ours: str
    values: Words[str, str] = field(default_factory=dict)


_LENGTH = "packing.sequence_length"
_MASKS_PROMPT = {"true": "completions", "false": "all"}

KEYS: dict[str, Foreign] = {
    "base_model": Foreign("axolotl", "model.name"),
    "model_name_or_path": Foreign("LLaMA-Factory, TRL", "model.name"),
    "model_name": Foreign("oumi", "model.name"),
    "base": Foreign("Soup", "model.name"),
    "checkpoint_dir": Foreign("torchtune", "model.name"),
    "model_revision": Foreign("TRL", "model.revision"),
    "revision_of_model": Foreign("axolotl", "model.revision"),
    "attn_implementation": Foreign("axolotl, TRL", "model.attention"),
    "flash_attention": Foreign("axolotl", "model.attention"),
    "flash_attn": Foreign("LLaMA-Factory", "model.attention"),
    "gradient_checkpointing": Foreign("axolotl, TRL", "model.activation_checkpointing"),
    "enable_activation_checkpointing": Foreign("torchtune", "model.activation_checkpointing"),
    "grad_checkpoint": Foreign("mlx-lm", "model.activation_checkpointing"),
    "disable_gradient_checkpointing": Foreign("LLaMA-Factory", "model.activation_checkpointing", NEGATED),
    "bf16": Foreign("axolotl, LLaMA-Factory, TRL", "precision", {"true": "bf16", "auto": "auto", "false": LEAVE_OUT}),
    "fp16": Foreign("axolotl, LLaMA-Factory, TRL", "precision", {"true": "fp16", "auto": "auto", "false": LEAVE_OUT}),
    "pure_bf16": Foreign("LLaMA-Factory", "precision", {"true": "bf16", "false": LEAVE_OUT}),
    "dtype": Foreign("torchtune, TRL", "precision"),
    "torch_dtype": Foreign("TRL", "precision"),
    "mixed_precision": Foreign("Accelerate", "precision"),
    "lora": Foreign("Unsloth, Soup", "adapter"),
    "peft": Foreign("oumi", "adapter"),
    "peft_config": Foreign("LLaMA-Factory", "adapter"),
    "lora_parameters": Foreign("mlx-lm", "adapter"),
    "use_peft": Foreign("TRL", "adapter.type"),
    "finetuning_type": Foreign("LLaMA-Factory", "adapter.type"),
    "training_type": Foreign("Unsloth", "adapter.type"),
    "fine_tune_type": Foreign("mlx-lm", "adapter.type"),
    "load_in_4bit": Foreign("axolotl, TRL, Unsloth", "adapter.type", {"true": "qlora", "false": LEAVE_OUT}),
    "quantization_bit": Foreign("LLaMA-Factory", "adapter.type", {"4": "qlora"}),
    "lora_r": Foreign("axolotl, TRL, Unsloth", "adapter.r"),
    "lora_rank": Foreign("LLaMA-Factory, torchtune", "adapter.r"),
    "rank": Foreign("mlx-lm", "adapter.r"),
    "lora_alpha": Foreign("peft, axolotl, TRL", "adapter.alpha"),
    "lora_dropout": Foreign("peft, axolotl, TRL", "adapter.dropout"),
    "lora_target_modules": Foreign("axolotl, TRL", "adapter.target_modules"),
    "lora_target": Foreign("LLaMA-Factory", "adapter.target_modules"),
    "lora_target_linear": Foreign("axolotl", "adapter.target_modules"),
    "lora_attn_modules": Foreign("torchtune", "adapter.target_modules"),
    "lora_modules_to_save": Foreign("axolotl, TRL", "adapter.modules_to_save"),
    "peft_use_dora": Foreign("axolotl", "adapter.use_dora"),
    "peft_use_rslora": Foreign("axolotl", "adapter.use_rslora"),
    "datasets": Foreign("axolotl, TRL, oumi", "data.train"),
    "dataset": Foreign("LLaMA-Factory, torchtune", "data.train"),
    "dataset_name": Foreign("TRL, oumi", "data.train"),
    "train_dataset": Foreign("LLaMA-Factory", "data.train"),
    "train_file": Foreign("transformers", "data.train"),
    "local_dataset": Foreign("Unsloth", "data.train"),
    "val_set_size": Foreign("axolotl", "data.eval"),
    "val_size": Foreign("LLaMA-Factory", "data.eval"),
    "test_split_size": Foreign("TRL", "data.eval"),
    "test_datasets": Foreign("axolotl", "data.eval"),
    "eval_dataset": Foreign("LLaMA-Factory", "data.eval"),
    "validation": Foreign("oumi", "data.eval"),
    "chat_template_path": Foreign("TRL", "data.chat_template"),
    "template": Foreign("LLaMA-Factory", "data.chat_template"),
    "train_on_inputs": Foreign("axolotl", "data.train_on"),
    "train_on_input": Foreign("torchtune", "data.train_on"),
    "train_on_prompt": Foreign("LLaMA-Factory", "data.train_on"),
    "mask_prompt": Foreign("mlx-lm", "data.train_on", _MASKS_PROMPT),
    "assistant_only_loss": Foreign("TRL", "data.train_on", _MASKS_PROMPT),
    "completion_only_loss": Foreign("TRL", "data.train_on", _MASKS_PROMPT),
    "train_on_completions": Foreign("Unsloth", "data.train_on", _MASKS_PROMPT),
    "format_type": Foreign("Unsloth", "data.train.format"),
    "formatting": Foreign("LLaMA-Factory", "data.train.format"),
    "sequence_len": Foreign("axolotl", _LENGTH),
    "cutoff_len": Foreign("LLaMA-Factory", _LENGTH),
    "max_length": Foreign("TRL", _LENGTH),
    "max_seq_length": Foreign("Unsloth, mlx-lm", _LENGTH),
    "max_seq_len": Foreign("torchtune", _LENGTH),
    "model_max_length": Foreign("oumi", _LENGTH),
    "sample_packing": Foreign("axolotl", "packing.strategy"),
    "packed": Foreign("torchtune", "packing.strategy"),
    "packing_strategy": Foreign("TRL", "packing.strategy"),
    "batching_strategy": Foreign("LLaMA-Factory", "packing.strategy"),
    "neat_packing": Foreign("LLaMA-Factory", "packing.isolate_documents"),
    "num_train_epochs": Foreign("LLaMA-Factory, TRL", "training.epochs"),
    "num_epochs": Foreign("axolotl", "training.epochs"),
    "max_steps": Foreign("axolotl, LLaMA-Factory, TRL", "training.steps", {"-1": LEAVE_OUT}),
    "iters": Foreign("mlx-lm", "training.steps"),
    "per_device_train_batch_size": Foreign("LLaMA-Factory, TRL", "training.micro_batch_size"),
    "batch_size": Foreign("torchtune, mlx-lm", "training.micro_batch_size"),
    "gradient_accumulation_steps": Foreign("axolotl, LLaMA-Factory, TRL", "training.tokens_per_step"),
    "gradient_accumulation": Foreign("Soup", "training.tokens_per_step"),
    "grad_accumulation_steps": Foreign("mlx-lm", "training.tokens_per_step"),
    "lr": Foreign("torchtune", "training.learning_rate"),
    "lr_scheduler_type": Foreign("LLaMA-Factory, TRL", "training.lr_scheduler"),
    "num_warmup_steps": Foreign("torchtune", "training.warmup_steps"),
    "optim": Foreign("LLaMA-Factory, TRL", "training.optimizer"),
    "clip_grad_norm": Foreign("torchtune", "training.max_grad_norm"),
    "gradient_clipping": Foreign("DeepSpeed", "training.max_grad_norm"),
    "eval_steps": Foreign("axolotl, LLaMA-Factory, TRL", "evaluation.every_steps"),
    "steps_per_eval": Foreign("mlx-lm", "evaluation.every_steps"),
    "save_steps": Foreign("axolotl, LLaMA-Factory, TRL", "checkpoints.every_steps"),
    "save_every": Foreign("mlx-lm", "checkpoints.every_steps"),
    "save_total_limit": Foreign("TRL", "checkpoints.keep_last"),
    "load_best_model_at_end": Foreign("TRL", "checkpoints.keep_best"),
    "report_to": Foreign("LLaMA-Factory, TRL", "tracking", _TRACKERS),
    "use_wandb": Foreign("axolotl", "tracking", {"true": "[wandb]", "false": LEAVE_OUT}),
    "metric_logger": Foreign("torchtune", "tracking"),
    "output": Foreign("Soup", "output_dir"),
    "adapter_path": Foreign("mlx-lm", "output_dir"),
}

_LAUNCH = "a recipe names no machine; devices and sharding are an Accelerate launch file"
_EVERY_STEP = "every step is logged; leave it out"
_RESUME = "the same command run again resumes by itself; leave it out"
_ONE_TASK = "`trainkit fine-tune` says it; leave it out"
_TOKENIZER = "the tokenizer is the one in the model's folder"
_TURNS = "`data.train_on: completions` trains every assistant turn with its end"
_PADDED = "rows are always filled up to `packing.sequence_length`; leave it out"
_TRACKER = "write `tracking: [wandb]`; the run's name is its output_dir"

_CODE = (
    "no recipe can allow that a model's own code is run; the flag `--trust-remote-code OWNER/NAME@COMMIT` of "
    "`trainkit fine-tune` can, for one commit of the model"
)

# Foreign keys without a key of ours, and what to do instead.
NOTES: dict[str, str] = {
    "trust_remote_code": _CODE, "code_revision": _CODE,
    "tf32": "say `precision: bf16`, `fp16` or `fp32`",
    "load_in_8bit": "8-bit bases are not offered; `adapter: {type: qlora}` loads the base in 4 bit",
    "quantization_method": "`adapter: {type: qlora}` loads the base in 4 bit",
    "apply_lora_to_mlp": "list the modules in `adapter.target_modules`",
    "apply_lora_to_output": "list the modules in `adapter.target_modules`",
    "num_layers": "list the layers in `adapter.layers_to_transform`",
    "scale": "`adapter.alpha` is scale × r",
    "tokenizer": _TOKENIZER, "tokenizer_config": _TOKENIZER, "special_tokens": _TOKENIZER,
    "roles_to_train": _TURNS, "train_on_eos": _TURNS, "mask_history": _TURNS,
    "data_files": "give the file as `path`",
    "ds_type": "the file's ending says it; leave it out",
    "fraction": "`weight` sets a source's share of the trained tokens",
    "eval_sample_packing": "evaluation packs as training does; leave it out",
    "eval_packing": "evaluation packs as training does; leave it out",
    "pad_to_sequence_len": _PADDED, "pad_to_max_length": _PADDED,
    "max_steps_per_epoch": "give the length of the run as `training.steps`",
    "logging_steps": _EVERY_STEP, "log_every_n_steps": _EVERY_STEP, "steps_per_report": _EVERY_STEP,
    "plot_loss": "report.html shows the curves; leave it out",
    "saves_per_epoch": "give the interval as `checkpoints.every_steps`",
    "save_strategy": "give the interval as `checkpoints.every_steps`",
    "evals_per_epoch": "give the interval as `evaluation.every_steps`",
    "eval_strategy": "give the interval as `evaluation.every_steps`",
    "evaluation_strategy": "give the interval as `evaluation.every_steps`",
    "per_device_eval_batch_size": "evaluation uses `training.micro_batch_size`; leave it out",
    "wandb_project": _TRACKER, "wandb_entity": _TRACKER, "wandb_name": _TRACKER, "run_name": _TRACKER,
    "resume_from_checkpoint": _RESUME, "auto_resume_from_checkpoints": _RESUME, "resume_adapter_file": _RESUME,
    "overwrite_output_dir": "`trainkit fine-tune --fresh` starts anew",
    "save_adapter_weights_only": "checkpoints hold the full state; leave it out",
    "deepspeed": _LAUNCH, "fsdp": _LAUNCH, "fsdp_config": _LAUNCH, "ddp_timeout": _LAUNCH, "device": _LAUNCH,
    "accelerate_config": _LAUNCH, "num_processes": _LAUNCH, "dist_config": _LAUNCH,
    "stage": _ONE_TASK, "do_train": _ONE_TASK, "task": _ONE_TASK, "trainer_type": _ONE_TASK,
}  # fmt: skip

_MICRO_BATCH_NAMES = ("micro_batch_size", "per_device_train_batch_size", "batch_size")
_LENGTH_NAMES = ("sequence_length", *(name for name, foreign in KEYS.items() if foreign.ours == _LENGTH))


def meaning_here(name: str, value: Node, root: Mapping) -> str | None:
    """The sentence for a key that another tool knows, or None. ``root`` is the whole recipe, for numbers beside it."""
    if name in NOTES:
        return f"no such key here: {NOTES[name]}"
    foreign = KEYS.get(name)
    if foreign is None:
        return None
    if foreign.ours == "training.tokens_per_step":
        return _tokens_per_step(value, root)
    text = _value_here(foreign, value)
    said = f"the name in {foreign.tools}"
    if text == LEAVE_OUT:
        return f"{said}; here it is `{foreign.ours}`, and this value needs no key: leave it out"
    section, _, key = foreign.ours.rpartition(".")
    if text is None or section == "data.train":
        return f"{said}; here it is `{foreign.ours}`"
    return f"{said}; here write `{key}: {text}`" + (f" under `{section}`" if section else "")


def our_word(key: str, text: str) -> str | None:
    """Our value for another tool's word; LEAVE_OUT where ours is to leave the key out."""
    return VALUES.get(key, {}).get(text.lower())


def _value_here(foreign: Foreign, value: Node) -> str | None:
    """The value in our words, or None where it is no single word or has no equal here."""
    if not isinstance(value, Scalar) or not value.text or foreign.ours == "adapter":
        return None
    text = value.text.lower()
    if foreign.values:
        return foreign.values.get(text, None if set(foreign.values) & set(NEGATED) else shown(value.text))
    return VALUES.get(foreign.ours, {}).get(text, shown(value.text))


def _tokens_per_step(value: Node, root: Mapping) -> str:
    start = "here it follows from `training.tokens_per_step`"
    accumulation = value.value if isinstance(value, Scalar) else None
    micro_batch = next(_whole_numbers(root, _MICRO_BATCH_NAMES), None)
    length = next(_whole_numbers(root, _LENGTH_NAMES), None)
    if type(accumulation) is not int or accumulation < 1 or micro_batch is None or length is None:
        return f"{start}: rows per device × accumulation × sequence_length × devices"
    tokens = micro_batch * accumulation * length
    return f"{start}: {micro_batch} rows × {accumulation} × {length} tokens × 1 device is `tokens_per_step: {tokens}`"


def _whole_numbers(root: Mapping, names: tuple[str, ...]) -> Iterator[int]:
    """Positive whole numbers that stand under one of these names, at the top or one section down."""
    sections = [root, *(entry.node for entry in root.entries.values() if isinstance(entry.node, Mapping))]
    for section in sections:
        for name in names:
            entry = section.entries.get(name)
            if entry and isinstance(entry.node, Scalar) and type(entry.node.value) is int and entry.node.value > 0:
                yield entry.node.value
