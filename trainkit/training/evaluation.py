"""What the model does on the held-out examples: the exact mean loss over their trained tokens, and its answers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from trainkit.data.batches import empty_batch, make_batch
from trainkit.errors import DivergedError
from trainkit.model.loading import quiet_libraries
from trainkit.model.precision import autocast
from trainkit.training.processes import sums
from trainkit.training.step import StopRequested, batch_on

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    from trainkit.data.encoding import Encoded, Prompt
    from trainkit.data.packed_store import PackedRows
    from trainkit.training.loop import Trainer

    Progress = Callable[[str, int, int | None], None]  # a stage, what is done of it, and of how much

ANSWERS_AT_ONCE = 32


@dataclass(frozen=True)
class EvaluationLoss:
    """``loss`` is the mean over ``trained_tokens``, all of the held-out ones, whatever the batches."""

    loss: float
    trained_tokens: int


@dataclass(frozen=True)
class Answer:
    """A held-out prompt, what the data answers, and what the model answers greedily.

    ``match`` is letter by letter, after white space at both ends is taken off.
    """

    place: str
    prompt: str
    reference: str
    answer: str
    match: bool

    def json_line(self, step: int) -> dict[str, Any]:
        """The line of samples.jsonl."""
        return {"step": step, **asdict(self)}


@torch.no_grad()
def evaluate_loss(
    trainer: Trainer, rows: PackedRows, should_stop: Callable[[], bool], on_progress: Progress
) -> EvaluationLoss:
    """Mean loss over every trained token of ``rows``. Draws no random number; leaves the model in eval mode.

    Raises StopRequested when ``should_stop`` says so between micro-batches, DivergedError when the loss is not finite.
    """
    accelerator, size = trainer.accelerator, trainer.plan.micro_batch_size
    trainer.loss_model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    own = range(accelerator.process_index, len(rows), accelerator.num_processes)
    most = -(-len(rows) // accelerator.num_processes)
    for start in range(0, most, size):
        if should_stop():
            raise StopRequested
        chosen = [rows.row(row) for row in own[start : start + size]]
        batch = make_batch(chosen, trainer.packing, trainer.pad_id) if chosen else empty_batch(trainer.pad_id)
        loss_sum, count = trainer.loss_model(*batch_on(accelerator.device, batch))
        total += torch.stack([loss_sum.double(), count.double()]).cpu()
        on_progress("evaluating rows", min(start + size, most), most)
    total = torch.tensor(sums(accelerator, total.tolist()), dtype=torch.float64)
    loss = float(total[0] / total[1])
    if not math.isfinite(loss):
        raise DivergedError(
            f"after step {trainer.counters.step}: the evaluation loss is {loss}; lower training.learning_rate, or set "
            "precision: fp32"
        )
    return EvaluationLoss(loss=loss, trained_tokens=int(total[1]))


@torch.no_grad()
def check_last_update(trainer: Trainer) -> None:
    """Raise DivergedError when the loss of the row with most to train is not finite.

    A step looks at what the one before it did; nothing looks at what the last one did when there is no evaluation.
    """
    trainer.loss_model.eval()
    row = trainer.rows.row(max(range(len(trainer.rows)), key=trainer.rows.trained_tokens))
    batch = make_batch([row], trainer.packing, trainer.pad_id)
    loss_sum, _ = trainer.loss_model(*batch_on(trainer.accelerator.device, batch))
    if not math.isfinite(float(loss_sum)):
        raise DivergedError(
            f"after step {trainer.counters.step}: the loss is {float(loss_sum)}; lower training.learning_rate"
        )


def stop_ids(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Encoded]) -> frozenset[int]:
    """Tokens that end an answer: end of sequence, and the special tokens that end the trained part of ``documents``."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    ends = {int(document.ids[document.trained][-1]) for document in documents if document.trained.any()}
    return frozenset((ends & special) | ({tokenizer.eos_token_id} - {None}))


def answer_prompts(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[str, Prompt]],
    *,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    should_stop: Callable[[], bool],
    on_progress: Progress,
) -> list[Answer]:
    """Answer ``prompts``, pairs of (place, prompt), greedily; the answers stand in the order of the prompts.

    Prompts of like length are answered together, padded on the left and masked. No random number is drawn.
    Raises StopRequested when ``should_stop`` says so between them.
    """
    answers: dict[int, Answer] = {}
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index][1].ids))
    trainer.loss_model.eval()
    for start in range(0, len(by_length), ANSWERS_AT_ONCE):
        if should_stop():
            raise StopRequested
        indices = by_length[start : start + ANSWERS_AT_ONCE]
        generated = _generate(trainer, [prompts[index][1] for index in indices], stop_ids, max_new_tokens)
        for index, ids in zip(indices, generated, strict=True):
            place, prompt = prompts[index]
            text = _text(tokenizer, ids, stop_ids)
            match = text.strip() == prompt.reference.strip()
            answers[index] = Answer(place, prompt.text, prompt.reference, text, match)
        on_progress("answering prompts", len(answers), len(prompts))
    return [answers[index] for index in range(len(prompts))]


@torch.no_grad()
def _generate(
    trainer: Trainer, prompts: Sequence[Prompt], stop_ids: frozenset[int], max_new_tokens: int
) -> list[list[int]]:
    """The new tokens for each prompt."""
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), longest), trainer.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.ids) :] = torch.as_tensor(prompt.ids, dtype=torch.int64)
        mask[row, longest - len(prompt.ids) :] = 1
    device = trainer.accelerator.device
    with autocast(trainer.precision, device), quiet_libraries():
        generated = trainer.accelerator.unwrap_model(trainer.loss_model).generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=trainer.pad_id,
            eos_token_id=sorted(stop_ids),
        )
    return [row[longest:].tolist() for row in generated]


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop_ids: frozenset[int]) -> str:
    """The answer up to its end-of-turn token, special tokens left out."""
    stops = [position for position, token in enumerate(ids) if token in stop_ids]
    return str(tokenizer.decode(ids[: stops[0]] if stops else ids, skip_special_tokens=True))
