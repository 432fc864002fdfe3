"""The proof, before the first step, that no document of a row sees another: on the run's own model and kernel.

Three documents A, B, C stand in a row. Every token of A but its last is replaced. Then the logits of B and C must
not move at all, while those of A's last token, whose own id stayed, must: they show that the model does look back, so
that a leak would have been seen. It covers what no mask shows (recurrent states, convolutions, a layer that ignores
its mask), since it looks at numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trainkit.errors import ModelError
from trainkit.model.loss import evaluating

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainkit.model.loss import LossModel

# Lengths that no kernel block or window divides. Short, so that the proof takes milliseconds on the quickstart model.
_DOCUMENT_TOKENS = (23, 31, 10)
_SEED = 20_777

# In a mixture of experts the tokens of A share matrix products with those of B: rounding may differ with A's routing,
# by a few units in the last place of the type of the arithmetic, at the size of the largest logit.
_ROUNDING_UNITS = 8
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class IsolationProof:
    """What to show. ``largest_change`` is the largest move of a logit of another document; None: not proven."""

    sentence: str
    largest_change: float | None


def prove_isolation(
    loss_model: LossModel, *, isolate_documents: bool, vocabulary_size: int, sequence_length: int
) -> IsolationProof:
    """Run the proof, or say why there is none (``packing.isolate_documents: false``).

    Ids are drawn below ``vocabulary_size``; the row is cut to ``sequence_length``. The model's mode, its gradients
    and the global random state stay as they are. Raises :class:`ModelError` when documents leak, when the proof is
    void (A's own logits stood still) and when logits are not finite.
    """
    if not isolate_documents:
        return IsolationProof("documents of a row see each other (packing.isolate_documents: false)", None)
    lengths = _document_lengths(sequence_length)
    row, changed = _rows(lengths, vocabulary_size)
    device = next(loss_model.parameters()).device
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    with evaluating(loss_model), torch.no_grad():
        before, after = (loss_model.logits(ids.to(device), positions, [lengths])[0] for ids in (row, changed))
    change_T = (after - before).abs().amax(dim=-1)
    _check_change(change_T, lengths[0], loss_model, _tolerance(loss_model, before))
    largest = change_T[lengths[0] :].max().item()
    amount = "by exactly 0" if largest == 0 else f"by at most {largest:.1e}, which is rounding among experts"
    moved = change_T[lengths[0] - 1].item()
    return IsolationProof(
        f"documents are isolated ({loss_model.attention.name}): replacing one moved the logits of the others {amount}, "
        f"and its own by {moved:.2g}",
        largest,
    )


def _check_change(change_T: torch.Tensor, first_tokens: int, loss_model: LossModel, tolerance: float) -> None:
    name = loss_model.attention.name
    if not torch.isfinite(change_T).all():
        raise ModelError(
            "the model's logits are not finite before the first step; check its weights, or set precision: fp32"
        )
    if change_T[first_tokens - 1] <= tolerance:
        raise ModelError(
            "isolation cannot be proven: the model's logits do not depend on earlier tokens; check its weights"
        )
    leak = change_T[first_tokens:].max().item()
    if leak > tolerance:
        kernel = "" if name == "eager" else "model.attention: eager, "
        raise ModelError(
            f"model.attention: {name} leaks between documents (replacing one moved another's logits by {leak:.2g}); "
            f"set {kernel}packing.strategy: none or packing.isolate_documents: false"
        )


def _document_lengths(sequence_length: int) -> list[int]:
    """Three documents within the row, the first of at least two tokens."""
    whole = sum(_DOCUMENT_TOKENS)
    if sequence_length >= whole:
        return list(_DOCUMENT_TOKENS)
    first = max(2, sequence_length * _DOCUMENT_TOKENS[0] // whole)
    second = max(1, (sequence_length - first) // 2)
    return [first, second, sequence_length - first - second]


def _rows(lengths: Sequence[int], vocabulary_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row, and the row in which every token of the first document but its last is another; shape (1, T) each."""
    generator = torch.Generator().manual_seed(_SEED)
    row = torch.randint(vocabulary_size, (1, sum(lengths)), generator=generator)
    changed = row.clone()
    replaced = slice(0, lengths[0] - 1)
    shift = torch.randint(1, vocabulary_size, (lengths[0] - 1,), generator=generator)
    changed[0, replaced] = (row[0, replaced] + shift) % vocabulary_size
    return row, changed


def _tolerance(loss_model: LossModel, logits: torch.Tensor) -> float:
    config = loss_model.model.config.get_text_config()
    if not any(getattr(config, key, None) for key in _EXPERT_KEYS):
        return 0.0
    return _ROUNDING_UNITS * torch.finfo(loss_model.precision.compute).eps * logits.abs().max().item()
