"""Puts the parts of a run together: base model, adapter, attention, precision, loss, optimizer, plan."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trainkit.model.adapters import attach_adapter, check_adapter
from trainkit.model.attention import choose_attention
from trainkit.model.checking import check_model, check_vocabulary, weight_files
from trainkit.model.isolation import prove_isolation
from trainkit.model.loading import load_model, load_tokenizer, tokenizer_sentences
from trainkit.model.locating import ModelLocation, locate_model
from trainkit.model.loss import LossModel
from trainkit.model.precision import PrecisionPlan, make_scaler
from trainkit.training.loop import Counters, Trainer
from trainkit.training.optimizer import make_optimizer
from trainkit.training.plan import make_plan
from trainkit.training.random_state import seed_everything

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from trainkit.data.packed_store import PackedRows
    from trainkit.recipe.schema import Recipe

Fact = tuple[str, str]
"""A topic of one word and a sentence, for the command to show."""


@dataclass(frozen=True)
class Base:
    """The model that training starts from, as it lies on disk; ``facts`` say what was found."""

    location: ModelLocation
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    facts: tuple[Fact, ...]


def read_base(recipe: Recipe) -> Base:
    """Find the model, check its files and load its tokenizer; no weight is read.

    Raises ModelError, and UsageError for an adapter that does not fit the model.
    """
    location = locate_model(recipe.model)
    config = check_model(location, recipe.packing)
    tokenizer = load_tokenizer(location)
    check_vocabulary(tokenizer, config)
    check_adapter(config, recipe.adapter)
    facts = tuple(("tokenizer", sentence) for sentence in tokenizer_sentences(location, tokenizer))
    return Base(location, config, tokenizer, facts)


def assemble(
    recipe: Recipe,
    base: Base,
    rows: PackedRows,
    precision: PrecisionPlan,
    micro_batch_size: int,
    accelerator: Accelerator,
) -> tuple[Trainer, list[Fact]]:
    """Load the model, attach the adapter, prove what is to be proved, and make the trainer.

    Raises ModelError, UsageError or MachineError when a part cannot be had, or when documents turn out not to be
    isolated on this model and device.
    """
    seed = recipe.training.seed
    seed_everything(seed)
    attention = choose_attention(recipe.model.attention, accelerator.device, base.config)
    loaded = load_model(
        base.location,
        recipe.adapter,
        precision.frozen_storage,
        accelerator.device,
        attention.implementation,
        recipe.model.activation_checkpointing,
    )
    model, adapter_sentences = attach_adapter(loaded.model, recipe.adapter, seed)
    loss_model = LossModel(model, attention, precision)
    isolation = _isolation(recipe, base, loss_model)
    plan = make_plan(
        recipe.training,
        rows=len(rows),
        sequence_length=recipe.packing.sequence_length,
        micro_batch_size=micro_batch_size,
        processes=accelerator.num_processes,
    )
    trainer = Trainer(
        plan=plan,
        optimizer=make_optimizer(loss_model, recipe.training),
        loss_model=accelerator.prepare_model(loss_model),
        scaler=make_scaler(precision, accelerator.device),
        accelerator=accelerator,
        precision=precision,
        rows=rows,
        packing=recipe.packing,
        pad_id=base.tokenizer.pad_token_id,
        seed=seed,
        max_grad_norm=recipe.training.max_grad_norm,
        not_finite=recipe.training.not_finite,
        counters=Counters(),
    )
    seed_everything(seed)  # how the parts were made must not show in the run
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()  # blocks that loading left behind fit no tensor of a step
    facts = [("model", sentence) for sentence in (*loaded.sentences, *adapter_sentences)]
    facts += [("attention", attention.reason), ("precision", precision.sentence())]
    facts += [("loss", sentence) for sentence in loss_model.sentences]
    return trainer, [*facts, ("isolation", isolation), ("plan", plan.sentence())]


def _isolation(recipe: Recipe, base: Base, loss_model: LossModel) -> str:
    """Prove that documents do not see each other, or say why nothing is to be proved."""
    if recipe.packing.strategy == "none":
        return "each document has a row of its own (packing.strategy: none)"
    proof = prove_isolation(
        loss_model,
        isolate_documents=recipe.packing.isolate_documents,
        vocabulary_size=base.config.get_text_config().vocab_size,
        sequence_length=recipe.packing.sequence_length,
    )
    return proof.sentence


def base_fingerprint(location: ModelLocation) -> str:
    """A hash of what tells one base model from another without reading its weights.

    config.json, and of every weight file its size and its header (names, types, shapes and offsets of the tensors).
    """
    digest = hashlib.sha256((location.folder / "config.json").read_bytes())
    for path in weight_files(location.folder):
        with path.open("rb") as file:
            length = file.read(8)
            digest.update(length + file.read(int.from_bytes(length, "little")))
        digest.update(str(path.stat().st_size).encode())
    return digest.hexdigest()
