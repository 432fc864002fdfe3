from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trainkit.errors import UsageError
from trainkit.model.adapters import attach_adapter, check_adapter, trained_share, trained_tensor_names
from trainkit.model.checking import empty_model
from trainkit.model.loading import load_model
from trainkit.model.locating import ModelLocation, locate_model
from trainkit.recipe.schema import Adapter, Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    model: PreTrainedModel = LlamaForCausalLM(config).to(dtype)
    return model


def attach(model: PreTrainedModel | None = None, *, seed: int = 0, **adapter: Any) -> Any:
    attached, _ = attach_adapter(model or llama(), Adapter(**({"r": 4} | adapter)), seed)
    return attached


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    model = attach()
    assert {target.name: target.modules for target in trained_share(model).targets} == dict.fromkeys(ALL_LINEAR, 3)


def test_a_new_adapter_changes_nothing() -> None:
    ids_RT = torch.arange(12)[None]
    expected = llama()(ids_RT).logits
    assert torch.equal(attach()(ids_RT).logits, expected)


def test_the_share_is_what_the_shapes_say() -> None:
    model = llama()
    base = sum(weight.numel() for weight in model.parameters())
    model, sentences = attach_adapter(model, Adapter(r=4, target_modules=("q_proj", "v_proj")), 0)
    added = 3 * (4 * (16 + 16) + 4 * (16 + 8))  # r × (inputs + outputs) in three layers
    share = trained_share(model)
    assert (share.trained, share.total) == (added, base + added)
    assert (
        sentences[0] == f"LoRA: {added:,} of {base + added:,} parameters trained ({100 * added / (base + added):.1f} %)"
    )
    assert sentences[1] == "per target: q_proj × 3, r 4: 384; v_proj × 3, r 4: 288"


def test_full_fine_tuning_trains_all() -> None:
    model = llama(tied=True)
    size = sum(weight.numel() for weight in model.parameters())
    attached, sentences = attach_adapter(model, None, 0)
    assert attached is model
    assert all(weight.requires_grad for weight in model.parameters())
    assert sentences == (f"full fine-tuning: {size:,} of {size:,} parameters trained (100.0 %)",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ("norm", "lm_head")}])
def test_what_is_trained_is_fp32_and_the_base_is_frozen(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = attach(llama(dtype=dtype), **options)
    assert {weight.dtype for weight in trained(model).values()} == {torch.float32}
    assert all("lora_" in name or ".modules_to_save." in name for name in trained(model))
    frozen = [w for n, w in model.named_parameters() if n not in trained(model)]
    assert {weight.dtype for weight in frozen} == {dtype}


def test_the_start_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = trained(attach(seed=7))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = trained(attach(llama(), seed=7))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert any(not torch.equal(weight, first[name]) for name, weight in trained(attach(seed=8)).items())
    torch.set_rng_state(state)
    model = llama()
    state = torch.get_rng_state()
    attach(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"target_modules": ("q_proj", "v_prok")},
            "adapter.target_modules: `v_prok` matches no module; did you mean `v_proj`? there are: down_proj, ",
        ),
        ({"target_modules": ("mlp",)}, "`mlp` matches no module"),  # peft has no adapter for the whole block
        ({"target_modules": ("proj",)}, "`proj` matches no module"),
        ({"exclude_modules": ("lm_head",)}, "adapter.exclude_modules: `lm_head` matches no module"),
        (
            {"modules_to_save": ("lm_hed",)},
            "adapter.modules_to_save: `lm_hed` matches no module; did you mean `lm_head`?",
        ),
        (
            {"rank_pattern": {"q_prj": 2}},
            "adapter.rank_pattern: `q_prj` matches no module with an adapter; there are: ",
        ),
        ({"alpha_pattern": {"lm_head": 2.0}}, "adapter.alpha_pattern: `lm_head` matches no module with an adapter"),
        ({"rank_pattern": {"q_(": 2}}, "adapter.rank_pattern: `q_(` is no regular expression"),
        (
            {"layers_to_transform": (0, 3)},
            "adapter.layers_to_transform: no layer 3 among the targets; the model's layers",
        ),
        (
            {"r": 17},
            "adapter.r: 17 is more than 16, the full rank of model.layers.0.self_attn.q_proj (16 × 16); set r: 16",
        ),
        (
            {"rank_pattern": {"k_proj": 9}},
            "adapter.r: 9 is more than 8, the full rank of model.layers.0.self_attn.k_proj",
        ),
        ({"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, "nothing would be trained"),
    ],
)
def test_a_name_or_number_that_does_not_fit(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        attach(**options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError) as before_weights:
        check_adapter(llama(), Adapter(**({"r": 4} | options)))
    assert str(before_weights.value) == str(caught.value)


def test_what_fits_is_passed_without_weights_and_without_a_trace() -> None:
    config = llama(tied=True).config
    location = ModelLocation("llama", Path("llama"))
    before, state = config.to_dict(), torch.get_rng_state()
    model = empty_model(location, config)
    check_adapter(model, Adapter(r=4, modules_to_save=("embed_tokens",)))
    check_adapter(model, None)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_every_setting_shows_in_the_adapter() -> None:
    model = attach(
        r=4,
        alpha=6,
        dropout=0.25,
        use_rslora=True,
        exclude_modules=("layers.0.self_attn.q_proj",),
        rank_pattern={r"layers\.1\..*q_proj": 2},
        alpha_pattern={"v_proj": 3.0},
        modules_to_save=("model.norm",),
    )
    layers = model.get_base_model().model.layers
    assert not hasattr(layers[0].self_attn.q_proj, "lora_A")
    assert layers[1].self_attn.q_proj.r["default"] == 2
    assert layers[2].self_attn.q_proj.r["default"] == 4
    assert layers[2].self_attn.q_proj.scaling["default"] == 6 / 4**0.5
    assert layers[2].self_attn.v_proj.scaling["default"] == 3 / 4**0.5
    assert layers[2].self_attn.q_proj.lora_dropout["default"].p == 0.25
    assert [n for n in trained(model) if "norm" in n] == ["base_model.model.model.norm.modules_to_save.default.weight"]
    assert trained_tensor_names(model) >= {"model.norm.weight", "model.layers.1.self_attn.q_proj.weight"}
    assert "model.layers.0.self_attn.q_proj.weight" not in trained_tensor_names(model)


def test_layers_to_transform_holds_for_all_linear_too() -> None:
    model = attach(layers_to_transform=(1,))
    assert {name.split(".layers.")[1][0] for name in trained(model)} == {"1"}
    assert {target.name for target in trained_share(model).targets} == ALL_LINEAR


def test_dora_trains_magnitudes() -> None:
    assert any("lora_magnitude_vector" in name for name in trained(attach(use_dora=True)))


@pytest.mark.parametrize("start", ["gaussian", "pissa", "olora", "orthogonal"])
def test_other_starts(start: str) -> None:
    ids_RT = torch.arange(12)[None]
    model = attach(init_lora_weights=start)
    torch.testing.assert_close(model(ids_RT).logits, llama()(ids_RT).logits, rtol=1e-4, atol=1e-5)
    plain, other = trained(attach()), trained(model)
    assert any(not torch.equal(weight, other[name]) for name, weight in plain.items())


def test_a_tied_embedding_stays_one_matrix() -> None:
    model = attach(llama(tied=True), modules_to_save=("lm_head",))
    ends = [name for name in trained(model) if "lora_" not in name]
    assert len(ends) == 1
    base = model.get_base_model()
    assert base.get_input_embeddings().weight.data_ptr() == base.get_output_embeddings().weight.data_ptr()


def test_what_would_pull_a_tied_embedding_apart_is_refused() -> None:
    with pytest.raises(UsageError, match=r"one matrix.*modules_to_save: \[embed_tokens\]"):
        attach(llama(tied=True), target_modules=("q_proj", "embed_tokens"))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UsageError, match="one matrix, and this peft cannot keep them one"):
        attach(gpt2, modules_to_save=("wte",))


def test_conv1d_layers_are_linear() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    targets = {target.name for target in trained_share(attach(gpt2)).targets}
    assert targets == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra [qlora]")
@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")
def test_qlora_trains_on_a_4_bit_base(model_for_4_bit: Path) -> None:
    adapter = Adapter(type="qlora", r=4)
    base = load_model(locate_model(Model(name=str(model_for_4_bit))), adapter, torch.float32, torch.device("cpu")).model
    model, sentences = attach_adapter(base, adapter, 0)
    whole = load_model(locate_model(Model(name=str(model_for_4_bit))), None, torch.float32, torch.device("cpu")).model
    share = trained_share(model)
    assert share.total - share.trained == sum(weight.numel() for weight in whole.parameters())  # packed, but counted
    assert sentences[0].startswith("QLoRA: ")
    ids_RT = torch.arange(10, 30)[None]
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids_RT, labels=ids_RT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_modules_that_peft_would_choose_itself_are_refused() -> None:
    """For mixtures of experts peft rewrites the list of targets."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )
    with pytest.raises(UsageError, match="peft has a rule of its own for DeepseekV2ForCausalLM") as caught:
        attach_adapter(DeepseekV2ForCausalLM(config), Adapter(r=2), seed=0)
    names = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    assert str(caught.value).endswith(f"set adapter.target_modules: [{', '.join(names)}]")
    attach_adapter(DeepseekV2ForCausalLM(config), Adapter(r=2, target_modules=names), seed=0)
