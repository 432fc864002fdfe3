from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from trainkit.memory.shapes import read_model_shape, tensor_shapes, trainable_parameters
from trainkit.recipe.schema import Adapter


def test_counts_what_the_loaded_model_has(tiny_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    shape = read_model_shape(AutoConfig.from_pretrained(tiny_model_folder), tensor_shapes(tiny_model_folder))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.hidden_size, shape.key_value_size, shape.layers) == (32, 16, 2)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
def test_counts_the_adapter_that_peft_makes(tiny_model_folder: Path, targets: str | tuple[str, ...]) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    names = targets if isinstance(targets, str) else list(targets)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    expected, _all = adapted.get_nb_trainable_parameters()
    adapter = Adapter(r=4, target_modules=targets)  # type: ignore[arg-type]
    assert trainable_parameters(tensor_shapes(tiny_model_folder), adapter) == expected
    assert trainable_parameters(tensor_shapes(tiny_model_folder), None) > expected
