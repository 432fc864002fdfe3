"""Isolation must be exact on every architecture: each document of a row as if it stood alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.masking_utils import create_causal_mask

from trainkit.errors import MachineError, ModelError
from trainkit.model import attention
from trainkit.model.attention import (
    AttentionChoice,
    DocumentMask,
    choose_attention,
    document_segments,
    install_attention,
    register,
)

CPU = torch.device("cpu")
VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW = 5
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": WINDOW},
    "Gemma2": {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "Gemma3Text": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "Phi3": {},
    "SmolLM3": {},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Qwen3Moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
    },
    "GptOss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
# Documents of two rows of 24 slots: longer and shorter than the window, equal neighbours, a single token, a tail.
SEGMENTS = ((13, 4, 4, 1, 2), (9, 15))


def make_model(architecture: str, **changes: Any) -> Any:
    config_class = getattr(transformers, f"{architecture}Config")
    common = {"vocab_size": VOCABULARY} if architecture == "GPT2" else COMMON
    config = config_class(**{**common, **ARCHITECTURES[architecture], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than a fresh model's, so that a leak would be seen
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


def make_batch(segments: tuple[tuple[int, ...], ...] = SEGMENTS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (len(segments), sum(segments[0])), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in segments])
    return ids, positions


def each_alone(model: Any, ids: torch.Tensor, segments: tuple[tuple[int, ...], ...] = SEGMENTS) -> torch.Tensor:
    """Logits of transformers' own forward pass on every document by itself."""
    rows = [
        torch.cat([model(piece[None], use_cache=False).logits[0] for piece in row.split(list(lengths))])
        for row, lengths in zip(ids, segments, strict=True)
    ]
    return torch.stack(rows)


def packed(model: Any, ids: torch.Tensor, positions: torch.Tensor, segments: Any = SEGMENTS) -> torch.Tensor:
    with document_segments(segments):
        return cast("torch.Tensor", model(ids, position_ids=positions, use_cache=False).logits)


@pytest.mark.parametrize("requested", ["auto", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_packed_documents_equal_each_alone_and_leak_nothing(architecture: str, requested: Any) -> None:
    model = make_model(architecture)
    ids, positions = make_batch()
    alone = each_alone(model, ids)
    choice = choose_attention(requested, CPU, model.config)
    install_attention(model, choice)
    together = packed(model, ids, positions)
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()
    ids[0, :12] = (ids[0, :12] + 1) % VOCABULARY
    change = (packed(model, ids, positions) - together).abs()
    others = 1e-5 * alone.abs().max() if architecture in ("Qwen3Moe", "GptOss") else 0.0  # experts share products
    assert change[0, 13:].max() <= others
    assert change[1].max() <= others
    assert change[0, 12].max() > 1e-3


@pytest.mark.parametrize(("architecture", "expected"), [("Llama", "sdpa"), ("Gemma2", "eager"), ("GptOss", "eager")])
def test_auto_takes_what_computes_the_model_exactly(architecture: str, expected: str) -> None:
    choice = choose_attention("auto", CPU, make_model(architecture).config)
    assert choice.name == expected
    assert choice.reason.startswith(f"{expected}: ")


def test_the_cpu_reason_names_what_is_faster_elsewhere() -> None:
    reason = choose_attention("auto", CPU, transformers.LlamaConfig()).reason
    assert reason == "sdpa: one causal call per document; varlen needs CUDA"


@pytest.mark.parametrize("requested", ["varlen", "flash_attention_2", "flex"])
def test_a_kernel_that_this_machine_lacks_is_refused_with_the_alternative(requested: Any) -> None:
    with pytest.raises(MachineError, match=r"use sdpa or auto"):
        choose_attention(requested, CPU, transformers.LlamaConfig())


@pytest.mark.parametrize("architecture", ["Gemma2", "GptOss"])
def test_sdpa_is_refused_where_it_would_drop_arithmetic(architecture: str) -> None:
    with pytest.raises(ModelError, match="eager"):
        choose_attention("sdpa", CPU, make_model(architecture).config)


def test_an_architecture_without_the_kernel_names_eager() -> None:
    with pytest.raises(ModelError, match=r"Gemma2ForCausalLM has no attention sdpa; .*eager"):
        install_attention(make_model("Gemma2"), AttentionChoice("sdpa", "trainkit_sdpa", ""))


def test_chunked_attention_is_refused() -> None:
    config = transformers.LlamaConfig()
    config.attention_chunk_size = 8
    with pytest.raises(ModelError, match="chunked"):
        choose_attention("auto", CPU, config)


class TestChoiceOnCuda:
    @pytest.fixture
    def capability(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], torch.device]:
        def set_capability(major: int, minor: int) -> torch.device:
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (major, minor))
            return torch.device("cuda")

        return set_capability

    def test_auto_takes_varlen(self, capability: Callable[[int, int], torch.device]) -> None:
        assert choose_attention("auto", capability(9, 0), transformers.LlamaConfig()).name == "varlen"

    def test_an_old_gpu_goes_by_document(self, capability: Callable[[int, int], torch.device]) -> None:
        choice = choose_attention("auto", capability(7, 5), transformers.LlamaConfig())
        assert choice.name == "sdpa"
        assert "capability 8.0" in choice.reason

    def test_dropout_and_odd_heads_go_by_document(self, capability: Callable[[int, int], torch.device]) -> None:
        device = capability(9, 0)
        assert "dropout" in choose_attention("auto", device, transformers.LlamaConfig(attention_dropout=0.1)).reason
        assert "width 12" in choose_attention("auto", device, transformers.LlamaConfig(head_dim=12)).reason

    def test_flash_attention_needs_its_package(self, capability: Callable[[int, int], torch.device]) -> None:
        with pytest.raises(MachineError, match="flash-attn"):
            choose_attention("flash_attention_2", capability(9, 0), transformers.LlamaConfig())

    def test_flex_refuses_dropout(self, capability: Callable[[int, int], torch.device]) -> None:
        with pytest.raises(ModelError, match="dropout"):
            choose_attention("flex", capability(9, 0), transformers.LlamaConfig(attention_dropout=0.1))


def test_an_unknown_request_of_a_layer_is_refused() -> None:
    """Gemma-2 with a kernel installed by hand: the cap on its scores must not be dropped."""
    model = make_model("Gemma2")
    ids, positions = make_batch()
    install_attention(model, AttentionChoice("varlen", "trainkit_varlen", ""))
    with pytest.raises(ModelError, match=r"softcap.*eager"):
        packed(model, ids, positions)


def test_a_layer_whose_window_is_not_its_masks_is_refused() -> None:
    model = make_model("Mistral")
    ids, positions = make_batch()
    install_attention(model, choose_attention("sdpa", CPU, model.config))
    layer = model.model.layers[0].self_attn
    layer.config = SimpleNamespace(
        **{**model.config.to_dict(), "sliding_window": 7, "_attn_implementation": "trainkit_sdpa"}
    )
    with pytest.raises(ModelError, match="window of 7"):
        packed(model, ids, positions)


def test_a_bidirectional_mask_is_refused() -> None:
    register()
    config = transformers.LlamaConfig(attn_implementation="trainkit_sdpa")
    with document_segments([[4]]), pytest.raises(ModelError, match="bidirectional"):
        create_causal_mask(
            config=config,
            inputs_embeds=torch.zeros(1, 4, 8),
            attention_mask=None,
            past_key_values=None,
            or_mask_function=lambda *_: True,
        )


def test_a_model_that_drops_our_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("Llama")
    install_attention(model, choose_attention("sdpa", CPU, model.config))
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda **_: None)
    ids, positions = make_batch()
    with pytest.raises(ModelError, match="leak"):
        packed(model, ids, positions)


def test_segments_must_cover_the_batch() -> None:
    model = make_model("Llama")
    install_attention(model, choose_attention("sdpa", CPU, model.config))
    ids, positions = make_batch()
    with pytest.raises(ValueError, match="do not cover"):
        packed(model, ids, positions, ((13, 4), (9, 15)))


@pytest.mark.parametrize("requested", ["sdpa", "eager"])
@torch.no_grad()
def test_isolation_and_position_reset_are_independent(requested: Any) -> None:
    """Positions that restart do not isolate by themselves, and isolation does not need them to restart."""
    model = make_model("Llama")
    ids, positions = make_batch()
    running = torch.arange(24).expand(2, 24)
    whole = ((24,), (24,))
    install_attention(model, choose_attention(requested, CPU, model.config))
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % VOCABULARY

    def leak(where: torch.Tensor, segments: Any) -> float:
        return (
            (packed(model, changed, where, segments) - packed(model, ids, where, segments))[0, 13:].abs().max().item()
        )

    assert leak(positions, whole) > 1e-4
    assert leak(running, whole) > 1e-4
    assert leak(running, SEGMENTS) == 0
    assert leak(positions, SEGMENTS) == 0


@pytest.mark.parametrize("requested", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["Llama", "Mistral"])
def test_activation_checkpointing_replays_the_same_mask(architecture: str, requested: Any) -> None:
    """The backward pass runs outside of `document_segments`, and must still see the documents apart."""
    model = make_model(architecture)
    ids, positions = make_batch()
    install_attention(model, choose_attention(requested, CPU, model.config))
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.autograd.backward(packed(model, ids, positions).square().sum())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(plain, replayed) for plain, replayed in zip(*gradients, strict=True))


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Gemma3Text"])
@torch.no_grad()
def test_generation_with_cache_and_left_padding_is_transformers_own(architecture: str) -> None:
    model = make_model(architecture)
    prompts = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    padding = torch.ones_like(prompts)
    prompts[1, :4], padding[1, :4] = 0, 0
    arguments = {"attention_mask": padding, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompts, **arguments)
    install_attention(model, choose_attention("sdpa", CPU, model.config))
    assert torch.equal(model.generate(prompts, **arguments), expected)


@torch.no_grad()
def test_without_segments_the_forward_pass_is_transformers_own() -> None:
    model = make_model("Llama")
    ids, _ = make_batch()
    expected = model(ids).logits
    install_attention(model, choose_attention("sdpa", CPU, model.config))
    assert torch.equal(model(ids).logits, expected)


def test_attention_dropout_is_honoured_in_training() -> None:
    model = make_model("Llama", attention_dropout=0.5)
    ids, positions = make_batch()
    install_attention(model, choose_attention("sdpa", CPU, model.config))
    still = packed(model, ids, positions)
    assert torch.equal(packed(model, ids, positions), still)
    model.train()
    assert not torch.equal(packed(model, ids, positions), packed(model, ids, positions))


def test_our_kernel_names_never_reach_a_saved_config(tmp_path: Any) -> None:
    model = make_model("Llama")
    install_attention(model, choose_attention("sdpa", CPU, model.config))
    model.save_pretrained(tmp_path)
    assert "trainkit" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), window=st.one_of(st.none(), st.integers(1, 10)))
@settings(deadline=None, max_examples=40)
def test_by_document_equals_a_dense_mask(lengths: list[int], window: int | None) -> None:
    total = sum(lengths)
    generator = torch.Generator().manual_seed(total)
    query = torch.randn(1, 4, total, 8, generator=generator)
    key, value = (torch.randn(1, 2, total, 8, generator=generator) for _ in range(2))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(total)
    distance = position[:, None] - position[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= 0) & (distance < (window or total))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    got = attention._by_document(query, key, value, document_mask(lengths, window), 0.0, None)
    torch.testing.assert_close(got, expected.transpose(1, 2), atol=2e-6, rtol=0)


def document_mask(lengths: list[int], window: int | None) -> DocumentMask:
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return DocumentMask(tuple(lengths), window, boundaries)


class FlattenedKernel:
    """Stands in for a GPU kernel: checks what it is given, and computes it document by document."""

    def __init__(self) -> None:
        self.calls = 0

    def compute(self, query: Any, key: Any, value: Any, boundaries: Any, longest: int, window: Any) -> torch.Tensor:
        self.calls += 1
        assert query.dim() == key.dim() == value.dim() == 3
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16
        lengths = boundaries.diff().tolist()
        assert boundaries.dtype == torch.int32
        assert longest == max(lengths)
        assert window[1] == 0
        mask = document_mask(lengths, None if window[0] == -1 else window[0] + 1)
        queries, keys, values = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        return attention._by_document(queries, keys, values, mask, 0.0, None)[0]

    def varlen_attn(
        self, query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, **options: Any
    ) -> torch.Tensor:
        assert cu_q is cu_k
        assert max_q == max_k
        return self.compute(query, key, value, cu_q, max_q, options["window_size"])

    def flash_attn_varlen_func(self, query: Any, key: Any, value: Any, **options: Any) -> torch.Tensor:
        assert options["causal"] is True
        assert options["dropout_p"] == options["softcap"] == 0.0
        return self.compute(query, key, value, options["cu_seqlens_q"], options["max_seqlen_k"], options["window_size"])


@pytest.mark.parametrize("implementation", ["trainkit_varlen", "trainkit_fa2"])
@pytest.mark.parametrize("architecture", ["Llama", "Mistral"])
@torch.no_grad()
def test_gpu_kernels_get_flattened_documents_in_16_bit(
    architecture: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = FlattenedKernel()
    flash_attn = ModuleType("flash_attn")
    flash_attn.flash_attn_varlen_func = kernel.flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel.varlen_attn)
    model = make_model(architecture)
    ids, positions = make_batch()
    alone = each_alone(model, ids)
    install_attention(model, AttentionChoice("varlen", implementation, ""))
    exact = packed(model, ids, positions)
    assert kernel.calls == 0  # fp32 goes by document
    assert (exact - alone).abs().max() <= 1e-5 * alone.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = packed(model, ids, positions)
    assert kernel.calls == model.config.num_hidden_layers
    assert (rounded - alone).abs().mean() <= 0.03 * alone.abs().mean()


@pytest.mark.gpu
@pytest.mark.parametrize("requested", ["varlen", "sdpa", "flex"])
@torch.no_grad()
def test_on_a_gpu_every_kernel_equals_each_document_alone(requested: Any) -> None:
    device = torch.device("cuda")
    model = make_model("Mistral").to(device)
    ids, positions = (tensor.to(device) for tensor in make_batch())
    alone = each_alone(model, ids)
    install_attention(model, choose_attention(requested, device, model.config))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert (packed(model, ids, positions) - alone).abs().mean() <= 0.03 * alone.abs().mean()


def test_config_classes_outside_transformers_are_taken_at_their_word() -> None:
    class Own(PretrainedConfig):  # type: ignore[misc]
        model_type = "own"

    assert choose_attention("sdpa", CPU, Own()).name == "sdpa"
