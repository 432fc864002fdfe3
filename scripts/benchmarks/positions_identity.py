"""What resetting positions changes in the logits of an isolated document, with nothing trained.

A document that stands behind ``offset`` tokens of others sees positions from ``offset`` on where they run through the
row, and from 0 where they are reset. Isolated, it sees nothing else of its row; so one document at shifted positions is
all there is to look at, and no long row is needed for a large offset.

Legend: R rows, T tokens in a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainkit.errors import TrainkitError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from benchmarks.setting import Material
    from trainkit.model.loss import LossModel

    Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids (1, T), positions (1, T) → logits (1, T, V)

PRECISIONS = ("fp32", "bf16")
OFFSETS = (100, 1_000, 10_000, 100_000, 1_000_000)
TOKENS = 256
VOCABULARY = 512
ORIGINAL_POSITIONS = 512
"""Where the scaled kinds of RoPE begin to stretch, in the configurations below."""
ROWS = 8
BLOOM_HEADS = 32


def models() -> dict[str, Callable[[], Any]]:
    """Freshly drawn models, by how they know positions. None has read anything: only arithmetic is compared."""
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        FalconConfig,
        FalconForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        MptConfig,
        MptForCausalLM,
    )

    ends = {"bos_token_id": 1, "eos_token_id": 2}

    def llama(rope: dict[str, Any], positions: int) -> Callable[[], Any]:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=positions,
            rope_parameters={"rope_theta": 10_000.0, **rope},
        )
        return lambda: LlamaForCausalLM(config)

    scaled = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL_POSITIONS}
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0 + index for index in range(8)]}
    llama3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    sizes = {"vocab_size": VOCABULARY, **ends}
    return {
        "RoPE": llama({"rope_type": "default"}, 131_072),
        "RoPE, llama3": llama(llama3 | scaled, 2048),
        "RoPE, yarn": llama({"rope_type": "yarn"} | scaled, 2048),
        "RoPE, dynamic": llama({"rope_type": "dynamic", "factor": 4.0}, ORIGINAL_POSITIONS),
        "RoPE, longrope": llama({"rope_type": "longrope"} | scaled | factors, 2048),
        "learned (GPT-2)": lambda: GPT2LMHeadModel(
            GPT2Config(n_positions=2048, n_embd=64, n_layer=4, n_head=4, **sizes)
        ),
        "ALiBi (BLOOM)": lambda: BloomForCausalLM(BloomConfig(hidden_size=64, n_layer=4, n_head=4, **sizes)),
        "ALiBi (MPT)": lambda: MptForCausalLM(MptConfig(d_model=64, n_layers=4, n_heads=4, **sizes)),
        "ALiBi (Falcon)": lambda: FalconForCausalLM(
            FalconConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, alibi=True, **sizes)
        ),
    }


def shifted_documents(pretrained: Material | None, only: tuple[str, ...] = ("",)) -> Iterator[dict[str, Any]]:
    """For each model and precision: how far a shift moves the logits, relative to the largest of them.

    ``only`` are beginnings of names of models.
    ``rounding`` is what that precision itself moves them by, against fp32 at the same positions: the yardstick.
    """
    import torch

    found: dict[str, Callable[[], Any]] = models()
    if pretrained is not None:
        found = {f"RoPE, {pretrained.base.location.public_name}": lambda: _pretrained(pretrained), **found}
    ids = torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    for name, make in found.items():
        if not name.startswith(only):
            continue
        exact = None
        for precision in PRECISIONS:
            torch.manual_seed(0)
            model = make().eval()
            refusal: str | None = None
            try:
                logits = _through_trainkit(model, precision)
            except TrainkitError as error:
                refusal = str(error)
                if name != "ALiBi (BLOOM)":
                    yield {"model": name, "precision": precision, "refusal": refusal}
                    break
                logits = _through_bloom(model, precision)
            start = logits(ids, torch.arange(TOKENS)[None])
            exact = start if exact is None else exact
            moved = {offset: _moved(logits, ids, offset, start) for offset in OFFSETS}
            yield {
                "model": name,
                "precision": precision,
                "rounding": _relative(start, exact),
                "moved": moved,
                "refusal": refusal,
            }


def shifted_biases() -> Iterator[dict[str, Any]]:
    """What ALiBi's bias alone makes of attention, all scores equal: the largest change of a probability.

    transformers builds BLOOM's bias from the place of a key in the row, in the type of the weights.
    """
    import torch
    from transformers import BloomConfig, BloomModel

    bias_of_row = BloomModel(BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=1)).build_alibi_tensor
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)

    def probabilities(offset: int, dtype: torch.dtype) -> torch.Tensor:
        bias = bias_of_row(torch.ones(1, offset + TOKENS), BLOOM_HEADS, dtype)[..., offset:]
        scores: torch.Tensor = bias.float().expand(-1, TOKENS, -1)
        return scores.masked_fill(later, float("-inf")).softmax(dim=-1)

    exact = probabilities(0, torch.float32)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        start = probabilities(0, dtype)
        moved = {offset: float((probabilities(offset, dtype) - start).abs().max()) for offset in OFFSETS}
        rounding = float((start - exact).abs().max())
        yield {"model": "ALiBi's bias alone", "precision": precision, "rounding": rounding, "moved": moved}


def packed_rows(material: Material) -> Iterator[dict[str, Any]]:
    """On real packed rows, batches made with and without each switch: how far the logits move, as above."""
    import torch

    from trainkit.data.batches import make_batch

    rows = [material.rows.row(index) for index in range(min(ROWS, len(material.rows)))]
    packing, pad_id = material.recipe.packing, material.base.tokenizer.pad_token_id
    exact = None
    for precision in PRECISIONS:
        loss_model = _loss_model(_pretrained(material).eval(), precision)

        def logits(isolate: bool, reset: bool, loss_model: LossModel = loss_model) -> torch.Tensor:
            switched = replace(packing, isolate_documents=isolate, reset_positions=reset)
            batch = make_batch(rows, switched, pad_id)
            with torch.no_grad():
                every = loss_model.logits(batch.input_ids_RT, batch.position_ids_RT, batch.segment_lengths)
            return torch.cat([one[: row.ids_T.size] for one, row in zip(every, rows, strict=True)])

        start = logits(isolate=True, reset=True)
        exact = start if exact is None else exact
        yield {
            "model": material.base.location.public_name,
            "precision": precision,
            "rounding": _relative(start, exact),
            "isolated, not reset": _relative(logits(isolate=True, reset=False), start),
            "not isolated, not reset": _relative(logits(isolate=False, reset=False), start),
        }


def _moved(logits: Logits, ids: torch.Tensor, offset: int, start: torch.Tensor) -> float | None:
    """None where the model has no such position."""
    import torch

    try:
        return _relative(logits(ids, offset + torch.arange(TOKENS)[None]), start)
    except IndexError:
        return None


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def _pretrained(material: Material) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(material.base.location.folder, dtype=torch.float32)


def _loss_model(model: Any, precision: Any) -> LossModel:
    """The model with trainkit's attention. Raises ModelError where it cannot have it."""
    import torch

    from trainkit.model.attention import choose_attention
    from trainkit.model.loss import LossModel
    from trainkit.model.precision import plan_precision

    cpu = torch.device("cpu")
    return LossModel(model, choose_attention("auto", cpu, model.config), plan_precision(precision, cpu))


def _through_trainkit(model: Any, precision: str) -> Logits:
    import torch

    loss_model = _loss_model(model, precision)

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return loss_model.logits(ids, positions, [[ids.shape[1]]])

    return logits


def _through_bloom(model: Any, precision: str) -> Logits:
    """BLOOM's own forward pass, its bias taken from where the document stands: trainkit does not train BLOOM.

    In 16 bit the weights are so too, as such a model is loaded: its bias takes their type.
    """
    import torch

    if precision == "bf16":
        model = model.to(torch.bfloat16)
    whole_row = model.transformer.build_alibi_tensor

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        begin, end = int(positions[0, 0]), int(positions[0, -1]) + 1
        model.transformer.build_alibi_tensor = lambda _, heads, dtype: whole_row(torch.ones(1, end), heads, dtype)[
            ..., begin:
        ]
        with torch.no_grad():
            found: torch.Tensor = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
        return found

    return logits
