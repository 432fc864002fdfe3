"""Puts the parts of a run together: base model, adapter, attention, precision, loss, optimizer, plan."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from trainkit.data.preparation import default_cache
from trainkit.errors import UsageError
from trainkit.launched import launched
from trainkit.model.adapters import attach_adapter, check_adapter
from trainkit.model.attention import choose_attention
from trainkit.model.checking import check_model, check_vocabulary, code_of_model, empty_model, weight_files
from trainkit.model.isolation import prove_isolation
from trainkit.model.loading import load_model, load_tokenizer, quiet_libraries, tokenizer_sentences
from trainkit.model.locating import ModelLocation, locate_model
from trainkit.model.loss import HeadPath, LossModel
from trainkit.model.precision import PrecisionPlan, make_scaler
from trainkit.model.sharding import give_back, shard_fully, whole
from trainkit.model.trusted_code import Trust, is_of_trusted_code, needless
from trainkit.training.loop import Counters, Trainer
from trainkit.training.optimizer import make_optimizer
from trainkit.training.plan import make_plan
from trainkit.training.processes import prepares_alone
from trainkit.training.random_state import seed_everything

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from trainkit.data.packed_store import PackedRows
    from trainkit.recipe.schema import Recipe

Fact = tuple[str, str]
"""A topic of one word and a sentence, for the command to show."""

PIECES, PIECE_BYTES = 256, 2**12  # of a weight file, for its fingerprint


@dataclass(frozen=True)
class Base:
    """The model that training starts from, as it lies on disk; ``facts`` say what was found."""

    location: ModelLocation
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    facts: tuple[Fact, ...]


def read_base(recipe: Recipe, trust: Trust | None = None) -> Base:
    """Find the model, check its files and load its tokenizer; no weight is read.

    Raises ModelError, and UsageError for an adapter that does not fit the model and for a trust without use.
    """
    location = locate_model(recipe.model, trust)
    config = check_model(location, recipe.packing)
    tokenizer = load_tokenizer(location)
    check_vocabulary(tokenizer, config)
    facts = [("code", sentence) for sentence in _code_sentences(location, tokenizer)]
    with quiet_libraries():
        check_adapter(empty_model(location, config), recipe.adapter)
    facts += [("tokenizer", sentence) for sentence in tokenizer_sentences(location, tokenizer)]
    return Base(location, config, tokenizer, tuple(facts))


def _code_sentences(location: ModelLocation, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Whose code runs, and where a copy of it lies. Raises UsageError where some is trusted and none is needed."""
    from transformers.utils import HF_MODULES_CACHE

    if location.code is None:
        return []
    needed = (("the model", code_of_model(location) is not None), ("the tokenizer", is_of_trusted_code(tokenizer)))
    parts = " and ".join(what for what, is_needed in needed if is_needed)
    if not parts:
        raise needless(location.code)
    return [
        f"Python code of {location.code.repository}, commit {location.code.commit}, is run for {parts}",
        f"copied to {HF_MODULES_CACHE}; it can do whatever you can",
    ]


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
    shards = launched().shards
    attention = choose_attention(recipe.model.attention, accelerator.device, base.config)
    with prepares_alone(default_cache()) if shards else nullcontext():  # so that host memory holds one copy at a time
        seed_everything(seed)
        loaded = load_model(
            base.location,
            recipe.adapter,
            precision.frozen_storage,
            torch.device("cpu") if shards else accelerator.device,
            attention.implementation,
            recipe.model.activation_checkpointing,
        )
        model, adapter_sentences = attach_adapter(loaded.model, recipe.adapter, seed)
        loss_model = LossModel(model, attention, precision, HeadPath(apart=False, sentence="") if shards else None)
        if shards:
            mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
            shard_fully(loss_model, precision, mesh)
    if shards:
        loss_model.find_head()
    isolation = _isolation(recipe, base, loss_model)
    give_back(loss_model)
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
        loss_model=loss_model if shards else accelerator.prepare_model(loss_model),
        scaler=make_scaler(precision, accelerator.device),
        accelerator=accelerator,
        precision=precision,
        rows=rows,
        packing=recipe.packing,
        pad_id=base.tokenizer.pad_token_id,
        seed=seed,
        max_grad_norm=recipe.training.max_grad_norm,
        not_finite=recipe.training.not_finite,
        loss_spike=recipe.training.loss_spike,
        counters=Counters(),
    )
    seed_everything(seed, accelerator.process_index)  # how the parts were made must not show in the run
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()  # blocks that loading left behind fit no tensor of a step
    facts = [("model", sentence) for sentence in (*loaded.sentences, *adapter_sentences)]
    facts += [("attention", attention.reason), ("precision", precision.sentence())]
    facts += [("loss", sentence) for sentence in loss_model.sentences]
    return trainer, [*facts, ("isolation", isolation), ("plan", plan.sentence())]


def check_sharding(recipe: Recipe) -> None:
    """Raise UsageError for what cannot be shared out over processes (FSDP2)."""
    if recipe.adapter is not None and recipe.adapter.type == "qlora":
        raise UsageError("adapter.type: qlora: a base in 4 bit cannot be shared out by FSDP2; use lora, or DDP")
    if recipe.training.optimizer not in {"adamw", "sgd"}:
        raise UsageError(
            f"training.optimizer: {recipe.training.optimizer} cannot be shared out by FSDP2; use adamw or sgd, or DDP"
        )


def whole_model(recipe: Recipe, base: Base, precision: PrecisionPlan, trainer: Trainer) -> Any:
    """The trained model in one piece, as it is saved; None in a process that does not save it.

    Where the weights are shared out, all processes give theirs, one weight after another, and the first one loads the
    base anew into host memory and puts the trained weights into it.
    """
    first = trainer.accelerator.is_main_process
    if not trainer.is_sharded:
        return trainer.model if first else None
    trained = {}
    for name, weight in trainer.trained_weights().items():
        complete = whole(weight.detach())
        if first:
            trained[name.removeprefix("model.")] = complete.cpu()
    if not first:
        return None
    loaded = load_model(base.location, recipe.adapter, precision.frozen_storage, torch.device("cpu"))
    model, _ = attach_adapter(loaded.model, recipe.adapter, recipe.training.seed)
    parameters = dict(model.named_parameters())
    for name, value in trained.items():
        parameters[name].data.copy_(value)
    return model


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
    """A hash of what tells one base model from another without reading all its weights.

    config.json, and of every weight file its size, its header (names, types, shapes and offsets of the tensors) and
    pieces of its content: a model trained further differs nearly everywhere.
    """
    digest = hashlib.sha256((location.folder / "config.json").read_bytes())
    for path in weight_files(location.folder):
        with path.open("rb") as file:
            length = file.read(8)
            digest.update(length + file.read(int.from_bytes(length, "little")))
            size = path.stat().st_size
            digest.update(str(size).encode())
            for start in range(0, size, max(size // PIECES, PIECE_BYTES)):
                file.seek(start)
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()
