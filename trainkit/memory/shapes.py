"""A model's shape from its folder, without reading a weight: config.json and the headers of its safetensors files."""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, Any

from trainkit.memory.formula import ModelShape

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trainkit.recipe.schema import Adapter


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in the folder's ``*.safetensors``.

    A safetensors file starts with the length of its header (8 bytes, little endian) and the header, which is JSON.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def read_model_shape(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> ModelShape:
    """Shape of the model that ``config`` (a transformers configuration of a language model) and ``shapes`` describe."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        key_value_size=head_size * (getattr(config, "num_key_value_heads", None) or heads),
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
    )


def trainable_parameters(shapes: Mapping[str, tuple[int, ...]], adapter: Adapter | None) -> int:
    """Numbers that train: all of them, or the two factors, r x inputs and outputs x r, of every adapted matrix.

    The matrices of the layers are those two-dimensional tensors that are neither embedding nor output head.

    >>> from trainkit.recipe.schema import Adapter
    >>> shapes = {"embed_tokens.weight": (100, 8), "layers.0.q_proj.weight": (8, 8), "layers.0.up_proj.weight": (32, 8)}
    >>> trainable_parameters(shapes, Adapter(r=2, target_modules=("q_proj",)))
    32
    >>> trainable_parameters(shapes, Adapter(r=2))
    112
    """
    if adapter is None:
        return sum(math.prod(shape) for shape in shapes.values())
    trained = 0
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.endswith(tuple(adapter.modules_to_save)):
            trained += math.prod(shape)
        elif len(shape) == 2 and _is_adapted(module, adapter):
            trained += adapter.r * sum(shape)
    return trained


def _is_adapted(module: str, adapter: Adapter) -> bool:
    if adapter.exclude_modules and module.endswith(adapter.exclude_modules):
        return False
    if adapter.target_modules == "all-linear":
        return not module.endswith(("embed_tokens", "lm_head", "wte", "wpe", "embed_in", "embed_out"))
    return module.endswith(tuple(adapter.target_modules))
