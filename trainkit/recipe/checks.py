"""What must hold between keys, and what a recipe asks for that has no effect.

A recipe that asks for something that cannot happen is refused. A key that only tunes something that does not happen
is inert: it is accepted with a warning, never silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainkit.recipe.schema import Recipe, Source
    from trainkit.recipe.values import Notes
    from trainkit.recipe.yaml_nodes import Place

FILE_ENDINGS = frozenset({".jsonl", ".json", ".parquet", ".csv", ".txt"})


@dataclass(frozen=True)
class Conflict:
    """Keys that do not go together, the first being the one to name; ``message`` says why and what to do."""

    keys: tuple[str, ...]
    message: str


def check(recipe: Recipe, notes: Notes) -> None:
    """Write down every conflict and every inert key of a recipe; skips what depends on a key with a mistake."""
    for conflict in conflicts(recipe):
        if any(notes.is_bad(key) for key in conflict.keys):
            continue
        notes.wrong(_where_to_mend(conflict.keys, notes), conflict.keys[0], conflict.message)
    for conflict in doubts(recipe):
        if conflict.keys[0] in notes.places and not any(notes.is_bad(key) for key in conflict.keys):
            notes.warn(conflict.keys[0], conflict.message)
    for key, reason in inert_keys(recipe).items():
        if key in notes.places and not notes.is_bad(key):
            notes.warn(key, f"has no effect: {reason}")


def _where_to_mend(keys: tuple[str, ...], notes: Notes) -> Place:
    """The first of the keys that the recipe gives, else the section that the first belongs to."""
    places = (notes.places.get(key) for key in (*keys, keys[0].rpartition(".")[0]))
    return next((place for place in places if place), notes.root.place)


def conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """What makes a recipe impossible."""
    yield from _length_of_run(recipe)
    yield from _rows_and_steps(recipe)
    yield from _overlap(recipe)
    yield from _weights(recipe)
    yield from _adapter(recipe)
    if recipe.data.eval is None and recipe.evaluation.exact_match:
        message = "asks for held-out prompts, but `data.eval` is not given; give it, or leave this out"
        yield Conflict(("evaluation.exact_match", "data.eval"), message)


def _length_of_run(recipe: Recipe) -> Iterator[Conflict]:
    training = recipe.training
    if training.epochs is None and training.steps is None:
        yield Conflict(("training.epochs", "training.steps"), "is missing; give either `epochs` or `steps`")
    if training.epochs is not None and training.steps is not None:
        message = "give either `steps` or `epochs`, not both; to undo an inherited one, set it to null"
        yield Conflict(("training.steps", "training.epochs"), message)
    if training.warmup_ratio is not None and training.warmup_steps is not None:
        message = "give either `warmup_steps` or `warmup_ratio`, not both; to undo an inherited one, set it to null"
        yield Conflict(("training.warmup_steps", "training.warmup_ratio"), message)


def _rows_and_steps(recipe: Recipe) -> Iterator[Conflict]:
    keys = ("training.tokens_per_step", "packing.sequence_length")
    tokens, length = recipe.training.tokens_per_step, recipe.packing.sequence_length
    if tokens % length:
        below, above = tokens // length * length, (tokens // length + 1) * length
        nearest = f"{below} and {above} are" if below else f"the smallest is {above}"
        yield Conflict(keys, f"{tokens} is no multiple of `packing.sequence_length` {length}; {nearest}")
        return
    rows = recipe.training.micro_batch_size
    if rows != "auto" and rows * length > tokens:
        message = (
            f"{rows} rows of {length} tokens are {rows * length}, more than `tokens_per_step` {tokens}; "
            f"at most {tokens // length} rows fit"
        )
        yield Conflict(("training.micro_batch_size", *keys), message)


def _overlap(recipe: Recipe) -> Iterator[Conflict]:
    packing = recipe.packing
    if packing.long_documents == "split":
        if packing.overlap > packing.sequence_length // 2:
            message = (
                f"{packing.overlap} tokens are more than half of `sequence_length` {packing.sequence_length}; "
                f"give at most {packing.sequence_length // 2}"
            )
            yield Conflict(("packing.overlap", "packing.sequence_length", "packing.long_documents"), message)
        if packing.train_on_overlap and packing.overlap == 0:
            yield Conflict(("packing.train_on_overlap", "packing.overlap"), "there is none to train: `overlap` is 0")
    elif packing.train_on_overlap:
        message = f"only `long_documents: split` makes overlap, and it is `{packing.long_documents}`"
        yield Conflict(("packing.train_on_overlap", "packing.long_documents"), message)


def _weights(recipe: Recipe) -> Iterator[Conflict]:
    sources = recipe.data.train
    without = [index for index, source in enumerate(sources) if source.weight is None]
    if without and len(without) < len(sources):
        some = f"data.train[{without[0]}]"
        yield Conflict((some, "data.train"), "has no `weight`, other sources have one; give it to all or to none")


def _adapter(recipe: Recipe) -> Iterator[Conflict]:
    adapter = recipe.adapter
    if adapter is None:
        return
    if adapter.type == "qlora" and adapter.init_lora_weights == "pissa":
        message = "`pissa` factors the full weights, and qlora holds them in 4 bit; use `type: lora`"
        yield Conflict(("adapter.init_lora_weights", "adapter.type"), message)
    if adapter.target_modules == ():
        yield Conflict(("adapter.target_modules",), "an empty list adapts nothing; list modules or write all-linear")
    if adapter.layers_to_transform == ():
        yield Conflict(("adapter.layers_to_transform",), "an empty list adapts nothing; list layers or leave it out")


def doubts(recipe: Recipe) -> Iterator[Conflict]:
    """What is possible, but hardly meant."""
    training = recipe.training
    if training.steps is not None and training.warmup_steps is not None and training.warmup_steps >= training.steps:
        message = (
            f"{training.warmup_steps} steps of warm-up in a run of {training.steps} steps: "
            "the learning rate never falls from its peak, or never reaches it"
        )
        yield Conflict(("training.warmup_steps", "training.steps"), message)
    held_out = recipe.data.eval if isinstance(recipe.data.eval, tuple) else ()
    trained = {(source.path, source.name, source.split) for source in recipe.data.train}
    for index, source in enumerate(held_out):
        if (source.path, source.name, source.split) in trained:
            message = f"`{source.path}` is also trained on, so the evaluation measures memory; give other examples"
            yield Conflict((f"data.eval[{index}]", "data.train"), message)


def inert_keys(recipe: Recipe) -> dict[str, str]:
    """Keys that change nothing beside the other values of this recipe, with the reason."""
    inert: dict[str, str] = {}
    packing, evaluation, training = recipe.packing, recipe.evaluation, recipe.training
    if packing.long_documents != "split":
        inert["packing.overlap"] = f"only `long_documents: split` makes overlap, and it is `{packing.long_documents}`"
    if packing.strategy == "none" and not packing.isolate_documents:
        inert["packing.isolate_documents"] = "with `strategy: none` a row holds a single document"
    if packing.strategy == "none" and not packing.reset_positions:
        inert["packing.reset_positions"] = "with `strategy: none` a row holds a single document"
    if not training.optimizer.startswith("adamw"):
        reason = f"the optimizer is `{training.optimizer}`"
        inert |= dict.fromkeys(("training.adam_beta1", "training.adam_beta2", "training.adam_epsilon"), reason)
    if recipe.data.eval is None:
        names = ("evaluation.every_steps", "evaluation.samples", "evaluation.max_new_tokens", "checkpoints.keep_best")
        inert |= dict.fromkeys(names, "`data.eval` is not given")
    elif not evaluation.samples and not evaluation.exact_match:
        inert["evaluation.max_new_tokens"] = "`samples` and `exact_match` are 0"
    if recipe.model.revision is not None and recipe.model.name == "tiny":
        inert["model.revision"] = "`tiny` ships with trainkit and has one version"
    return inert | _inert_in_sources(recipe)


def _inert_in_sources(recipe: Recipe) -> dict[str, str]:
    inert = {}
    held_out = recipe.data.eval if isinstance(recipe.data.eval, tuple) else ()
    for section, sources in (("data.train", recipe.data.train), ("data.eval", held_out)):
        for index, source in enumerate(sources):
            start = f"{section}[{index}]"
            if PurePath(source.path).suffix in FILE_ENDINGS:
                if source.name is not None:
                    inert[f"{start}.name"] = "only hub data sets have configurations, and this is a file"
                if source.split is not None:
                    inert[f"{start}.split"] = "only hub data sets have splits, and this is a file"
            if section == "data.eval" and source.weight is not None:
                inert[f"{start}.weight"] = "evaluation reads every source whole"
    if recipe.data.chat_template is not None and not any(map(_may_be_chat, (*recipe.data.train, *held_out))):
        inert["data.chat_template"] = "no source holds conversations"
    return inert


def _may_be_chat(source: Source) -> bool:
    return source.format not in ("text", "prompt-completion")
