"""Known models are what they say, and everything else is found or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainkit.errors import ModelError, UsageError
from trainkit.memory.models import KnownModel, check_sequence_length, known_model, known_models, model_facts
from trainkit.recipe.schema import Model

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}

# One of each family whose configuration has keys of its own; all of them in the long tier.
FEW = ("llama-3.3-70b", "qwen3-30b-a3b", "gemma-2-27b", "phi-4-mini", "deepseek-v2-lite", "gpt2-xl", "falcon-40b")


def counted_parameters(model: KnownModel) -> int:
    """On the meta device, with ties, every parameter once."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    values = dict(model.config)
    config = CONFIG_MAPPING[values.pop("model_type")](**values)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    built.tie_weights()
    return sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize("name", FEW)
def test_a_known_model_has_the_parameters_it_says(name: str) -> None:
    model = known_models()[name]
    assert counted_parameters(model) == model.parameters


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(known_models()))
def test_every_known_model_has_the_parameters_it_says(name: str) -> None:
    model = known_models()[name]
    assert counted_parameters(model) == model.parameters


def test_there_are_many_and_every_spelling_means_one() -> None:
    assert len(known_models()) == 78
    spellings = [
        spelling.lower()
        for model in known_models().values()
        for spelling in {model.name, *model.aliases, *(hub_id.lower() for hub_id in model.hub_ids)}
    ]
    assert len(spellings) == len(set(spellings))
    for model in known_models().values():
        assert model.config["tie_word_embeddings"] in (True, False), model.name


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("llama-70b", "llama-3.3-70b"),
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("mistral 7b", "mistral-7b-v0.3"),
        ("gpt2", "gpt2"),
        ("llama-2-70b", "llama-2-70b"),
    ],
)
def test_what_people_type(typed: str, name: str) -> None:
    facts = model_facts(Model(name=typed))
    assert facts.name == name
    assert facts.config == known_models()[name].config


def test_someone_elses_model_of_a_known_name_is_not_taken_for_it() -> None:
    assert known_model("somebody/Llama-3.1-8B") is None


def test_the_shipped_model_and_a_folder_are_read_from_their_config(tmp_path: Path) -> None:
    assert model_facts(Model(name="tiny")).positions == 512
    folder = tmp_path / "llama-70b"  # a folder comes before the table
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    facts = model_facts(Model(name=str(folder)))
    assert (facts.config, facts.positions) == (LLAMA, 256)


def test_the_positions_of_a_multimodal_model_are_those_of_its_text_part(tmp_path: Path) -> None:
    inner = {key: value for key, value in LLAMA.items() if key != "architectures"}
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": inner}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    assert model_facts(Model(name=str(tmp_path))).positions == 256


def test_rows_beyond_the_positions_are_refused() -> None:
    facts = model_facts(Model(name="gpt2"))
    check_sequence_length(facts, 1024)
    with pytest.raises(ModelError, match=r"2,048 is beyond the 1,024 positions of gpt2 \(n_positions\); set"):
        check_sequence_length(facts, 2048)


@pytest.mark.parametrize("name", ["lama-3.1-8b", "llama-3.1-8bb", "Lama 3.1 8B"])
def test_an_unknown_name_lists_the_near_ones(name: str) -> None:
    with pytest.raises(ModelError, match=r"no model `.*` is known; near: llama-3\.1-8b, "):
        model_facts(Model(name=name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_attention_heads": 5},
            "hidden_size 64 is no multiple of num_attention_heads 5, and no head_dim is given",
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number above 0"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2; it must be"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; it must be"),
        ({"vocab_size": 10**15}, "vocab_size is 1000000000000000; it must be at most 2,147,483,647"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000; it must be at most 1,048,576"),
        ({"intermediate_size": -5}, "intermediate_size is -5; it must be a whole number above 0"),
        ({"intermediate_size": 0}, "intermediate_size is 0; it must be"),
        ({"intermediate_size": "512"}, "intermediate_size is '512'; it must be"),
        ({"intermediate_size": True}, "intermediate_size is True; it must be"),
        ({"head_dim": -64}, "head_dim is -64; it must be"),
        ({"head_dim": "64"}, "head_dim is '64'; it must be"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'; it must be"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; it must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: the type linear needs a number as `factor`"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling: the type linear needs a number as"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"sliding_window": "128"}, "sliding_window is '128'; it must be a whole number or null"),
        ({"max_position_embeddings": "2048"}, "max_position_embeddings is '2048'; it must be"),
        ({"max_position_embeddings": 2048.0}, r"max_position_embeddings is 2048\.0; it must be"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0; it must be"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1; it must be"),
        ({"model_type": "gpt2", "n_embd": 0}, "n_embd is 0; it must be"),
        ({"model_type": "gpt2", "n_inner": 0}, "n_inner is 0; it must be"),
        ({"model_type": "gpt2", "n_positions": -1}, "n_positions is -1; it must be"),
        ({"text_config": {"hidden_size": 0}}, r"text_config\.hidden_size is 0; it must be"),
        ({"hidden_size": "9" * 300}, "hidden_size is '9{38}…; it must be"),
        ({"model_type": None}, "no `model_type`"),
        ({"model_type": "lama"}, "does not know model_type `lama`; did you mean `llama`?"),
        (
            {"model_type": "chatglm_x", "auto_map": {"AutoModelForCausalLM": "modeling.Chat"}},
            r"needs Python code of the model's own, which an estimate never runs",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not a causal language model"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "is not a causal language model"),
        ({"model_type": "vit", "architectures": []}, "vit is not a causal language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised already"),
    ],
)
def test_a_config_that_is_no_model_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    with pytest.raises(ModelError, match=message) as caught:
        model_facts(Model(name=str(tmp_path)))
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(tmp_path), "")) <= 200


@pytest.mark.parametrize(
    "changes",
    [
        *({key: None} for key in ("num_key_value_heads", "head_dim", "rope_scaling", "sliding_window", "n_inner")),
        *({key: None} for key in ("max_position_embeddings", "tie_word_embeddings", "intermediate_size")),
        {"intermediate_size": [128, 128], "num_key_value_heads": [2, 2], "sliding_window": -1},
    ],
)
def test_null_and_lists_are_for_the_class_to_judge(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    assert model_facts(Model(name=str(tmp_path))).config == LLAMA | changes


def test_what_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json; is this a model folder\?"):
        model_facts(Model(name=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        model_facts(Model(name=str(tmp_path)))
    with pytest.raises(ModelError, match="is a file; give the folder"):
        model_facts(Model(name=str(tmp_path / "config.json")))


def test_a_folder_that_hides_a_known_model_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-3.1-8b").mkdir()
    with pytest.raises(ModelError, match=r"the folder llama-3\.1-8b hides the known model of that name, and holds no"):
        model_facts(Model(name="llama-3.1-8b"))


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_current_folder(name: str) -> None:
    with pytest.raises(UsageError, match=r"model\.name: is empty; give a known model"):
        model_facts(Model(name=name))


def test_of_a_hub_id_only_the_config_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hf_hub_download(name: str, file: str, *, revision: str | None) -> str:
        asked.append((name, file, revision))
        (tmp_path / file).write_text(json.dumps(LLAMA))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    facts = model_facts(Model(name="somebody/new-model", revision="v2"))
    assert asked == [("somebody/new-model", "config.json", "v2")]
    assert (facts.name, facts.config) == ("somebody/new-model", LLAMA)


def test_a_hub_id_without_a_network_is_one_line() -> None:
    # tests/conftest.py forbids the hub
    with pytest.raises(ModelError, match="cannot be fetched from the hub") as caught:
        model_facts(Model(name="somebody/new-model"))
    assert "\n" not in str(caught.value)


def test_a_hub_id_without_a_config_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    def hf_hub_download(*_given: object, **_named: object) -> str:
        raise EntryNotFoundError("404")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    with pytest.raises(ModelError, match=r"somebody/data has no config\.json on the hub"):
        model_facts(Model(name="somebody/data"))
