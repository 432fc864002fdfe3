"""A folder with an adapter, read as somebody else's: what it may say, and what it may not.

peft's configuration can name modules to import, other adapters to fetch and experts to build. Of all its fields only
those are taken that :mod:`trainkit.model.adapters` sets itself.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from trainkit.errors import ModelError
from trainkit.model.loading import quiet_libraries

if TYPE_CHECKING:
    from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"

OUR_FIELDS = frozenset(
    {
        "alpha_pattern",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "fan_in_fan_out",  # peft sets it itself for GPT-2's layers
        "inference_mode",
        "init_lora_weights",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "peft_version",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json of a folder whose weights are safetensors.

    Raises ModelError for weights in another format, a configuration that is damaged or of another kind than LoRA, and
    for a field that trainkit does not set and that is not peft's default.
    """
    path = folder / ADAPTER_CONFIG
    if not (folder / ADAPTER_FILE).is_file():
        raise ModelError(f"{folder}: no {ADAPTER_FILE}; only safetensors weights are read: restore it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        name, revision = config["base_model_name_or_path"], config.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ModelError(f"{path}: cannot be read; restore it") from error
    if not isinstance(name, str) or not isinstance(revision, str | None):
        raise ModelError(f"{path}: its base model is no name; restore it")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: holds no LoRA adapter; only what `trainkit fine-tune` made is read")
    defaults = _defaults()
    for field, value in config.items():
        if field not in OUR_FIELDS and value != defaults.get(field):
            raise ModelError(f"{path}: `{field}` is not what trainkit writes, and may run code; restore the file")
    return dict(config)


def _defaults() -> dict[str, Any]:
    """Peft's own default of every field, as JSON gives it back."""
    with quiet_libraries():
        from peft import LoraConfig

        fields = LoraConfig().to_dict()
    return dict(json.loads(json.dumps(fields, default=sorted)))
