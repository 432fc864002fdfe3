"""TRL's side of a measurement: an SFTTrainer for trainkit's rows, in trainkit's order, with the recipe's numbers."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from typing import TYPE_CHECKING, Any

from trainkit.data.batches import NOT_A_TARGET

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.setting import Material
    from trainkit.data.packed_store import Row
    from trainkit.recipe.schema import Recipe

MISSING = "TRL is not installed; it is needed for this comparison only: .venv/bin/pip install --no-deps trl==1.16"


def trl_is_installed() -> bool:
    """Whether TRL can be imported; nothing else of the project needs it."""
    return importlib.util.find_spec("trl") is not None


def quiet_libraries() -> None:
    """For the rest of this process, only errors of other libraries are shown: their advice is for their own users."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def make_sft_trainer(
    material: Material, rows: Sequence[Row], folder: Path, *, batch_rows: int, accumulation: int, padding_free: bool
) -> Any:
    """An SFTTrainer that trains on ``rows`` as they stand: ``batch_rows`` at a time, ``accumulation`` times a step.

    With ``padding_free``, TRL's own collator for packed rows puts the rows of a micro-batch one after the other, with
    positions that start from 0 in each document; from these transformers sees where a document ends. Otherwise its
    default collator pads.
    """
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    training = material.recipe.training
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch_rows,
        gradient_accumulation_steps=accumulation,
        max_steps=len(rows) // (batch_rows * accumulation),
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=0,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch_fused",
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        seed=training.seed,
        bf16=material.recipe.precision == "bf16",
        padding_free=padding_free,
        packing=False,  # the rows are packed already
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        shuffle_dataset=False,
        activation_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=_model(material),
        args=arguments,
        train_dataset=_dataset(rows),
        processing_class=material.base.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses(trainer: Any) -> list[float]:
    """The curve of a trainer that has trained, unrounded."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _dataset(rows: Sequence[Row]) -> Any:
    from datasets import Dataset

    labels = []
    for row in rows:
        row_labels = row.ids_T.copy()
        row_labels[~row.trained_T] = NOT_A_TARGET
        labels.append(row_labels)
    return Dataset.from_dict(
        {
            "input_ids": [row.ids_T for row in rows],
            "labels": labels,
            "seq_lengths": [row.segment_lengths for row in rows],
        }
    )


def _model(material: Material) -> Any:
    """The model as transformers and peft make it; new adapter weights start with trainkit's numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    recipe = material.recipe
    # fp32 under bf16 autocast too: so does TRL load a model that is given by its name
    model = AutoModelForCausalLM.from_pretrained(material.base.location.folder, dtype=torch.float32)
    if recipe.adapter is None:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.adapter.r,
        lora_alpha=recipe.adapter.alpha,
        target_modules="all-linear",
    )
    adapted = get_peft_model(model, config)
    start = _adapter_weights(material, recipe)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            weight.data.copy_(start.pop(name))
    assert not start, f"trainkit trains more than peft alone: {sorted(start)}"
    return adapted


def _adapter_weights(material: Material, recipe: Recipe) -> dict[str, Any]:
    """The adapter weights that a run of trainkit starts with."""
    import torch

    from trainkit.model.adapters import attach_adapter
    from trainkit.model.loading import load_model

    base = load_model(
        material.base.location, recipe.adapter, torch.float32, torch.device("cpu"), None, activation_checkpointing=False
    )
    model, _ = attach_adapter(base.model, recipe.adapter, recipe.training.seed)
    return {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
