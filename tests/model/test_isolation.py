"""The proof passes on an isolating model, fails on a leak, and is void where nothing could have leaked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from trainkit.errors import ModelError
from trainkit.model.attention import choose_attention
from trainkit.model.isolation import IsolationProof, prove_isolation
from trainkit.model.loss import LossModel
from trainkit.model.precision import plan_precision

CPU = torch.device("cpu")
VOCABULARY = 101


def make_loss_model(
    architecture: str = "Llama", *, requested: Any = "auto", precision: Any = "fp32", **changes: Any
) -> LossModel:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**{**settings, **changes})
    model = AutoModelForCausalLM.from_config(config)
    return LossModel(model, choose_attention(requested, CPU, config), plan_precision(precision, CPU))


def prove(loss_model: LossModel, *, isolate: bool = True, tokens: int = 128) -> IsolationProof:
    return prove_isolation(loss_model, isolate_documents=isolate, vocabulary_size=VOCABULARY, sequence_length=tokens)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("requested", ["sdpa", "eager"])
def test_isolated_documents_do_not_move_at_all(requested: str, precision: str) -> None:
    proof = prove(make_loss_model(requested=requested, precision=precision))
    assert proof.largest_change == 0
    assert proof.sentence.startswith(
        f"documents are isolated ({requested}): replacing one moved the logits of the others by"
    )
    assert "by exactly 0, and its own by" in proof.sentence


@pytest.mark.parametrize("tokens", [8, 9, 64, 4096])
def test_rows_of_any_length_are_proven(tokens: int) -> None:
    assert prove(make_loss_model(), tokens=tokens).largest_change == 0


def test_experts_may_round_differently() -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    proof = prove(make_loss_model("Qwen3Moe", **experts))
    assert proof.largest_change is not None
    assert proof.largest_change < 1e-5


def test_isolation_switched_off_is_said_and_not_proven() -> None:
    proof = prove(make_loss_model(), isolate=False)
    assert proof.largest_change is None
    assert "see each other" in proof.sentence


def test_a_leak_stops_the_run_and_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    loss_model = make_loss_model()
    monkeypatch.setattr(loss_model, "logits", lambda ids, positions, _: leaking(loss_model, ids, positions))
    with pytest.raises(
        ModelError, match=r"sdpa leaks .*set model.attention: eager, .*isolate_documents: false"
    ) as caught:
        prove(loss_model)
    assert len(str(caught.value)) <= 200


def leaking(loss_model: LossModel, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return LossModel.logits(loss_model, ids, positions, [[ids.shape[1]]])


def test_a_state_that_no_mask_knows_is_found() -> None:
    """A convolution over the row carries tokens across documents, whatever the attention does."""
    loss_model = make_loss_model()
    layer = loss_model.model.model.layers[1]
    layer.register_forward_hook(lambda _, __, hidden: hidden + 0.1 * hidden.roll(1, dims=1))
    with pytest.raises(ModelError, match="leaks"):
        prove(loss_model)


def test_a_recurrent_model_is_refused_and_may_train_unisolated() -> None:
    config = transformers.Lfm2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    loss_model = LossModel(model, choose_attention("auto", CPU, config), plan_precision("fp32", CPU))
    with pytest.raises(ModelError, match="leaks"):
        prove(loss_model)
    assert prove(loss_model, isolate=False).largest_change is None


def test_a_model_that_never_looks_back_makes_the_proof_void() -> None:
    loss_model = make_loss_model()
    with torch.no_grad():
        for layer in loss_model.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    with pytest.raises(ModelError, match="cannot be proven"):
        prove(loss_model)


def test_logits_that_are_not_finite_stop_the_run() -> None:
    loss_model = make_loss_model()
    with torch.no_grad():
        loss_model.model.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        prove(loss_model)


def test_the_proof_leaves_mode_gradients_and_randomness_as_they_were() -> None:
    loss_model = make_loss_model(attention_dropout=0.3).train()
    loss_model.model.model.layers[0].eval()
    state = torch.get_rng_state()
    prove(loss_model)
    assert torch.equal(torch.get_rng_state(), state)
    assert loss_model.training
    assert not loss_model.model.model.layers[0].training
    assert all(parameter.grad is None for parameter in loss_model.parameters())
