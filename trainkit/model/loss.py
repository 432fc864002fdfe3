"""The training loss: a sum over the trained tokens, and their count. Whoever calls it divides.

Legend: R rows, T tokens in a row, N trained tokens of a micro-batch, D hidden width, V vocabulary.

The output head is the most expensive layer in memory: R x T x V logits. So it runs on the trained tokens only, and
in pieces (chunks of tokens) where the logits would be large. That takes the decoder and the head apart, which is the
same arithmetic only where the model does nothing between or after them; :func:`verify_head` finds that out on the
model itself. Where it does more (capped or scaled logits), the model's own forward pass makes the logits.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainkit.errors import ModelError
from trainkit.model.attention import SegmentLengths, document_segments, install_attention
from trainkit.model.precision import PrecisionPlan, autocast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftModel
    from transformers import PreTrainedModel

    from trainkit.model.attention import AttentionChoice

UNTRAINED = -100  # the label of a token that is no target; torch's and transformers' own value

# Up to this many logits (16 MiB in fp32), chunks save no memory worth having and cost time. Measured on two shared
# AVX2 cores in fp32, forward and backward, frozen head, D = 256: V = 512 with N = 2,048 takes 19 ms plain and 20 ms in
# chunks of 256; V = 32,000 takes 4.0 s plain and 3.3 s in chunks; V = 128,256 with N = 1,024 takes 4.1 s and 3.8 s
# (with a head that trains: 13.0 s and 5.1 s). torch's automatic chunk size took 33 s there, so the size is ours.
_PLAIN_LOGITS = 2**22
# A GPU needs a taller matrix to be busy: every chunk reads the whole head once.
CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}

_TORCH_HAS_CHUNKS = hasattr(torch.nn, "LinearCrossEntropyOptions")  # 2.13

# Hidden states are scaled by this power of two when the head is verified, so that a cap on the logits shows even
# where a freshly made model's logits are tiny.
_AMPLIFICATION = 16.0


@dataclass(frozen=True)
class HeadPath:
    """How logits are made. ``apart``: decoder, then the head on trained tokens; otherwise the model's own forward."""

    apart: bool
    sentence: str


class LossModel(nn.Module):
    """A causal language model (plain or with an adapter) whose forward pass is the loss.

    The chosen attention is installed in the model, and every forward pass runs in the plan's precision. ``head`` is
    found by :func:`verify_head` unless given (a model without real weights cannot be tried out). ``chunk_tokens`` is
    how many tokens the head takes at once; None: what is fastest on the device.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        attention: AttentionChoice,
        precision: PrecisionPlan,
        head: HeadPath | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__()
        install_attention(model, attention)
        self.model = model
        self.attention = attention
        self.precision = precision
        self.head = head or verify_head(model, precision)
        self.chunk_tokens = chunk_tokens

    @property
    def sentences(self) -> tuple[str, ...]:
        """What a run says about its loss at the start."""
        return (self.head.sentence, *_router_sentence(_base(self.model)))

    def forward(
        self,
        input_ids_RT: torch.Tensor,
        labels_RT: torch.Tensor,
        position_ids_RT: torch.Tensor,
        segment_lengths: SegmentLengths,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the cross entropies over the trained tokens (fp32 scalar), and their number (int64 scalar).

        ``labels_RT[r, t]`` is the token that follows token t of row r, or -100 where it is not trained.
        """
        trained_RT = labels_RT != UNTRAINED
        with document_segments(segment_lengths), autocast(self.precision, input_ids_RT.device):
            if self.head.apart:
                base = _base(self.model)
                hidden_RTD = _hidden_states(base, input_ids_RT, position_ids_RT)
                loss = self._head_loss(base, hidden_RTD[trained_RT], labels_RT[trained_RT])
            else:
                loss = self._logits_loss(input_ids_RT, labels_RT, position_ids_RT, trained_RT)
        return loss, trained_RT.sum()

    def logits(
        self, input_ids_RT: torch.Tensor, position_ids_RT: torch.Tensor, segment_lengths: SegmentLengths
    ) -> torch.Tensor:
        """The model's own logits under the run's attention and precision; fp32, shape (R, T, V)."""
        with document_segments(segment_lengths), autocast(self.precision, input_ids_RT.device):
            output = _base(self.model)(input_ids=input_ids_RT, position_ids=position_ids_RT, use_cache=False)
        return cast("torch.Tensor", output.logits).float()

    def generate(self, **arguments: Any) -> torch.Tensor:
        """Transformers' own ``generate``; whoever calls it sets the precision. Returns token ids, shape (R, T)."""
        return cast("torch.Tensor", self.model.generate(**arguments))

    def find_head(self) -> None:
        """Verify anew how logits are made; see :func:`verify_head`."""
        self.head = verify_head(self.model, self.precision)

    def _head_loss(self, base: Any, hidden_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        head = base.get_output_embeddings()
        if labels_N.numel() * base.config.get_text_config().vocab_size <= _PLAIN_LOGITS:
            return _cross_entropy_sum(head, hidden_ND, labels_N)
        chunk_tokens = self.chunk_tokens or CHUNK_TOKENS["cpu" if hidden_ND.device.type == "cpu" else "cuda"]
        # torch's own chunks compute the gradients in the forward pass, in the type of their input and before the loss
        # scale: in 16 bit that loses digits of the sum and small fp16 gradients. So it serves fp32 alone.
        if self.precision.compute == torch.float32 and type(head) is nn.Linear and _TORCH_HAS_CHUNKS:
            return _fused_cross_entropy_sum(head, hidden_ND, labels_N, chunk_tokens)
        return _chunked_cross_entropy_sum(head, hidden_ND, labels_N, chunk_tokens)

    def _logits_loss(
        self,
        input_ids_RT: torch.Tensor,
        labels_RT: torch.Tensor,
        position_ids_RT: torch.Tensor,
        trained_RT: torch.Tensor,
    ) -> torch.Tensor:
        base = _base(self.model)
        arguments: dict[str, Any] = {"input_ids": input_ids_RT, "position_ids": position_ids_RT, "use_cache": False}
        if "logits_to_keep" in inspect.signature(base.forward).parameters:
            kept = trained_RT.any(dim=0).nonzero().squeeze(1)
            arguments["logits_to_keep"] = kept
            labels_RT = labels_RT[:, kept]
        logits = base(**arguments).logits
        return F.cross_entropy(
            logits.float().flatten(0, 1), labels_RT.flatten(), ignore_index=UNTRAINED, reduction="sum"
        )


def verify_head(model: PreTrainedModel | PeftModel, precision: PrecisionPlan) -> HeadPath:
    """Whether the model's logits are its head applied to its decoder's output, tried on eight tokens.

    The head's input is compared with the decoder's output, and, with that input scaled up, the head's output with the
    model's logits. The model's mode and the random state stay as they are.
    Raises :class:`ModelError` where the model takes no positions, so that they could not restart in a document.
    """
    base = _base(model)
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise ModelError(f"{type(base).__name__} takes no position_ids, which packing needs; use another model")
    head = base.get_output_embeddings()
    if head is None:
        return HeadPath(apart=False, sentence="on the model's own logits (it shows no output head)")
    device = head.weight.device
    ids_RT = torch.arange(8, device=device)[None] % base.config.get_text_config().vocab_size
    seen: list[torch.Tensor] = []

    def amplify(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen.append(arguments[0])
        return (arguments[0] * _AMPLIFICATION, *arguments[1:])

    def keep(_: nn.Module, __: object, logits: torch.Tensor) -> None:
        seen.append(logits)

    with evaluating(base), torch.no_grad(), document_segments([[8]]), autocast(precision, device):
        positions = torch.arange(8, device=device)[None]
        hidden = _hidden_states(base, ids_RT, positions)
        hooks = (head.register_forward_pre_hook(amplify), head.register_forward_hook(keep))
        try:
            logits = base(input_ids=ids_RT, position_ids=positions, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
    apart = len(seen) == 2 and _agree(seen[0], hidden, tolerance=1e-3) and _agree(seen[1], logits, tolerance=0.0)
    if apart:
        return HeadPath(apart=True, sentence="output head on trained tokens only, in chunks where logits are large")
    changes = "the model does more than apply its output head"
    return HeadPath(
        apart=False, sentence=f"on the model's own logits, since {changes}; more memory at a large vocabulary"
    )


class evaluating:  # noqa: N801 - a context manager, used like a function
    """Inside, every module is in evaluation mode (no dropout); each one's own mode comes back afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self._modes:
            module.training = training


def _base(model: Any) -> Any:
    """The transformers model itself; adapters live inside its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _hidden_states(base: Any, ids_RT: torch.Tensor, position_ids_RT: torch.Tensor) -> torch.Tensor:
    """What the decoder hands to the output head; shape (R, T, D)."""
    output = base.get_decoder()(input_ids=ids_RT, position_ids=position_ids_RT, use_cache=False)
    return cast("torch.Tensor", output[0])


def _cross_entropy_sum(head: nn.Module, hidden_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden_ND).float(), labels_N, reduction="sum")


def _fused_cross_entropy_sum(
    head: nn.Linear, hidden_ND: torch.Tensor, labels_N: torch.Tensor, chunk_tokens: int
) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_tokens, chunking_method=None)
    return F.linear_cross_entropy(
        hidden_ND, head.weight, labels_N, linear_bias=head.bias, reduction="sum", options=options
    )


def _chunked_cross_entropy_sum(
    head: nn.Module, hidden_ND: torch.Tensor, labels_N: torch.Tensor, chunk_tokens: int
) -> torch.Tensor:
    """Any head, any type: each chunk's logits are made again in the backward pass instead of being kept."""
    return torch.stack(list(_chunk_sums(head, hidden_ND, labels_N, chunk_tokens))).sum()


def _chunk_sums(
    head: nn.Module, hidden_ND: torch.Tensor, labels_N: torch.Tensor, chunk_tokens: int
) -> Iterator[torch.Tensor]:
    for hidden, labels in zip(torch.split(hidden_ND, chunk_tokens), torch.split(labels_N, chunk_tokens), strict=True):
        yield cast("torch.Tensor", checkpoint(_cross_entropy_sum, head, hidden, labels, use_reentrant=False))


def _agree(one: torch.Tensor, other: torch.Tensor, *, tolerance: float) -> bool:
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance)


def _router_sentence(base: Any) -> tuple[str, ...]:
    """A mixture of experts may balance its router by a second loss; transformers adds it on request only."""
    config = base.config.get_text_config()
    if getattr(config, "router_aux_loss_coef", None) is None:
        return ()
    asked = getattr(config, "output_router_logits", False)
    why = (
        "although its config asks for it: it is a mean over a batch, not a sum over trained tokens"
        if asked
        else "as in transformers"
    )
    return (f"the router's balancing loss is not added, {why}",)
