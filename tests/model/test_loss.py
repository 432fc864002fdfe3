"""The sum over trained tokens equals transformers' own loss, on every path, and its gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trainkit.errors import ModelError
from trainkit.model import loss as loss_module
from trainkit.model.attention import choose_attention
from trainkit.model.loss import HeadPath, LossModel, evaluating, verify_head
from trainkit.model.precision import plan_precision

CPU = torch.device("cpu")
VOCABULARY = 307
TOKENS = 40
PATHS = ("plain", "fused", "chunked", "model")


def make_model(architecture: str = "Llama", **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**{**settings, **changes})
    return AutoModelForCausalLM.from_config(config)


def make_loss_model(model: Any, precision: Any = "fp32", head: HeadPath | None = None) -> LossModel:
    return LossModel(model, choose_attention("auto", CPU, model.config), plan_precision(precision, CPU), head)


def take_path(path: str, monkeypatch: pytest.MonkeyPatch) -> HeadPath:
    """Make the small test sizes take one of the ways that the loss can go."""
    monkeypatch.setattr(loss_module, "_PLAIN_LOGITS", 2**22 if path == "plain" else 0)
    monkeypatch.setitem(loss_module.CHUNK_TOKENS, "cpu", 7)
    if path == "chunked":
        monkeypatch.setattr(loss_module, "_TORCH_HAS_CHUNKS", False)
    return HeadPath(apart=path != "model", sentence="")


def make_batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (1, TOKENS), generator=generator)
    labels = ids.roll(-1, dims=1)
    labels[0, :9] = labels[0, 20:23] = labels[0, -1] = -100
    return {
        "input_ids_RT": ids,
        "labels_RT": labels,
        "position_ids_RT": torch.arange(TOKENS)[None],
        "segment_lengths": [[TOKENS]],
    }


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, over all gradients together."""
    assert one.keys() == other.keys()
    difference = sum((one[name] - other[name]).square().sum() for name in one)
    return float((difference / sum(gradient.square().sum() for gradient in other.values())) ** 0.5)


def transformers_loss(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradients as plain transformers computes them (it shifts the labels itself)."""
    model.zero_grad()
    labels = torch.full_like(batch["labels_RT"], -100)
    labels[:, 1:] = batch["labels_RT"][:, :-1]
    loss = model(batch["input_ids_RT"], labels=labels, use_cache=False).loss
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_equals_transformers_own_loss_and_gradients(
    path: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "fused" and not loss_module._TORCH_HAS_CHUNKS:
        pytest.skip("this torch has no chunked linear_cross_entropy")
    model = make_model(tie_word_embeddings=tied)
    batch = make_batch()
    expected_loss, expected = transformers_loss(model, batch)
    loss_model = make_loss_model(model, head=take_path(path, monkeypatch))
    model.zero_grad()
    loss_sum, trained = loss_model(**batch)
    torch.autograd.backward(loss_sum / trained)
    assert trained == (batch["labels_RT"] != -100).sum()
    assert trained.dtype == torch.int64
    assert loss_sum.dtype == torch.float32
    assert loss_sum.shape == ()
    assert abs(loss_sum.item() / trained.item() - expected_loss) <= 1e-6 * expected_loss
    assert relative(gradients(model), expected) <= 1e-6


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Cohere", {"logit_scale": 0.25}),
    ],
)
def test_logits_that_the_model_changes_afterwards_are_its_own(architecture: str, changes: dict[str, Any]) -> None:
    model = make_model(architecture, **changes)
    batch = make_batch()
    expected_loss, expected = transformers_loss(model, batch)
    loss_model = make_loss_model(model)
    assert not loss_model.head.apart
    assert "own logits" in loss_model.sentences[0]
    model.zero_grad()
    loss_sum, trained = loss_model(**batch)
    torch.autograd.backward(loss_sum / trained)
    assert abs(loss_sum.item() / trained.item() - expected_loss) <= 1e-6 * expected_loss
    assert relative(gradients(model), expected) <= 2e-6


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3", "Mistral", "Phi3", "GPT2", "SmolLM3"])
def test_a_plain_head_runs_apart(architecture: str) -> None:
    path = verify_head(make_model(architecture), plan_precision("fp32", CPU))
    assert path.apart
    assert "trained tokens only" in path.sentence


def test_a_cap_shows_even_on_a_fresh_models_small_logits() -> None:
    path = verify_head(make_model("Gemma2", head_dim=8), plan_precision("fp32", CPU))
    assert not path.apart


def test_a_head_whose_input_is_scaled_first_is_seen() -> None:
    model = make_model()
    model.lm_head.register_forward_pre_hook(lambda _, arguments: (arguments[0] / 2,))
    assert not verify_head(model, plan_precision("fp32", CPU)).apart


def test_verifying_changes_nothing() -> None:
    model = make_model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    verify_head(model, plan_precision("fp32", CPU))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks


def test_every_module_gets_its_own_mode_back() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()).train()
    model[1].eval()
    with evaluating(model):
        assert [module.training for module in model.modules()] == [False, False, False]
    assert [module.training for module in model.modules()] == [True, True, False]


def test_a_model_without_positions_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(
        transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)
    )
    with pytest.raises(ModelError, match="takes no position_ids"):
        verify_head(model, plan_precision("fp32", CPU))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj"]])
def test_adapters_get_their_gradients_and_the_frozen_base_none(
    path: str, targets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter on the head itself works on every path: the head is called, not its weight."""
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    batch = make_batch()
    expected_loss, expected = transformers_loss(model, batch)
    loss_model = make_loss_model(model, head=take_path(path, monkeypatch))
    model.zero_grad()
    loss_sum, trained = loss_model(**batch)
    torch.autograd.backward(loss_sum / trained)
    assert abs(loss_sum.item() / trained.item() - expected_loss) <= 1e-6 * expected_loss
    assert all("lora_" in name for name in gradients(model))
    assert relative(gradients(model), expected) <= 2e-6


def test_a_head_that_is_saved_with_the_adapter_trains() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(make_model(tie_word_embeddings=False), config)
    loss_model = make_loss_model(model)
    torch.autograd.backward(loss_model(**make_batch())[0])
    assert any("modules_to_save" in name for name in gradients(model))


@pytest.mark.parametrize("path", ["plain", "fused", "model"])
def test_activation_checkpointing_gives_the_same_gradients(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().train()
    loss_model = make_loss_model(model, head=take_path(path, monkeypatch))
    batch = {**make_batch(), "segment_lengths": [[25, 10, 5]]}
    torch.autograd.backward(loss_model(**batch)[0])
    expected = gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable()
    torch.autograd.backward(loss_model(**batch)[0])
    assert relative(gradients(model), expected) == 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_stays_near_fp32_and_is_summed_in_fp32(
    path: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    batch = make_batch()
    _, expected = transformers_loss(model, batch)
    exact = make_loss_model(model)(**batch)[0].item()
    loss_model = make_loss_model(model, precision, take_path(path, monkeypatch))
    model.zero_grad()
    loss_sum, trained = loss_model(**batch)
    torch.autograd.backward(loss_sum / trained)
    assert loss_sum.dtype == torch.float32
    assert abs(loss_sum.item() - exact) <= 2e-3 * exact
    assert loss_sum.item() != loss_sum.bfloat16().item()  # more digits than 16 bit hold
    assert relative(gradients(model), expected) <= 0.03


@pytest.mark.parametrize("path", PATHS)
def test_a_micro_batch_without_trained_tokens_is_zero_with_zero_gradients(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    batch = make_batch()
    batch["labels_RT"].fill_(-100)
    loss_sum, trained = make_loss_model(model, head=take_path(path, monkeypatch))(**batch)
    torch.autograd.backward(loss_sum)
    assert loss_sum.item() == trained.item() == 0
    assert all(not gradient.any() for gradient in gradients(model).values())


def test_the_loss_works_without_gradients() -> None:
    loss_model = make_loss_model(make_model())
    with torch.no_grad():
        loss_sum, _ = loss_model(**make_batch())
    assert not loss_sum.requires_grad


def test_the_logits_are_the_models_own_in_fp32() -> None:
    model = make_model().eval()
    batch = make_batch()
    expected = model(batch["input_ids_RT"]).logits
    logits = make_loss_model(model).logits(batch["input_ids_RT"], batch["position_ids_RT"], [[TOKENS]])
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("asked", [True, False])
def test_the_router_loss_of_a_mixture_of_experts_is_spoken_of(asked: bool) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    loss_model = make_loss_model(make_model("Qwen3Moe", output_router_logits=asked, **experts))
    assert ("although its config asks for it" in loss_model.sentences[-1]) is asked
    assert "router" in loss_model.sentences[-1]
    assert len(make_loss_model(make_model()).sentences) == 1
