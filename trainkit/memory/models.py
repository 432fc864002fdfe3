"""What is known of a model before anything is downloaded: a table of well-known ones, or one config.json. Torch-free.

The table is ``configs/models/*.yaml``: for each model its hub ids, the names that people type, its exact number of
parameters and the shape keys of its config.json. A name that stands there needs no network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import TYPE_CHECKING, Any

from trainkit.errors import ModelError, UsageError
from trainkit.memory.families import ROTATIONS
from trainkit.memory.tables import configs_folder, near_names, plain_name, read_table
from trainkit.model.checking import CONFIG_FILE, check_architecture, read_config
from trainkit.model.locating import SHIPPED_NAMES, download_config, locate_model, looks_like_path
from trainkit.recipe.yaml_nodes import shown
from trainkit.run_folder import expanded

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trainkit.recipe.schema import Model

# What the names of tuned versions end with: their shapes are those of the base model.
_TUNED = re.compile(r"-(instruct|chat|base|it|hf|pt)$")

_LAYERS = ("num_hidden_layers", "n_layer")
_WIDTH = ("hidden_size", "n_embd")
_HEADS = ("num_attention_heads", "n_head")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_WIDTH = ("head_dim", "qk_nope_head_dim")
_POSITIONS = ("max_position_embeddings", "n_positions")

# Far beyond every model, and small enough that the bytes of each tensor are a number of 64 bits.
_MOST_LAYERS, _WIDEST, _MOST_TOKENS = 10_000, 2**20, 2**31 - 1
_SIZES = (
    (_LAYERS, _MOST_LAYERS),
    ((*_WIDTH, *_HEADS, *_KEY_VALUE_HEADS, "intermediate_size", "n_inner", "head_dim"), _WIDEST),
    (("vocab_size", *_POSITIONS), _MOST_TOKENS),  # ids and places of tokens are 32-bit numbers
)
_KINDS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("tie_word_embeddings", (bool,), "true or false"),
    ("sliding_window", (int, list), "a whole number or null"),
    ("rope_scaling", (dict,), "an object with a type and its numbers, or null"),
    ("rope_parameters", (dict,), "an object with a type and its numbers, or null"),
)


@dataclass(frozen=True)
class KnownModel:
    """A model of the table."""

    name: str
    hub_ids: tuple[str, ...]
    aliases: tuple[str, ...]
    parameters: int
    config: Mapping[str, Any]


@dataclass(frozen=True)
class ModelFacts:
    """A model by its config.json: the name to show, the file's content, and where it comes from, as a clause.

    ``place`` is what an error calls the configuration: the file's path.
    """

    name: str
    config: Mapping[str, Any]
    source: str
    place: str

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of a multimodal configuration that describes the language model; else the configuration itself."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def positions(self) -> int | None:
        """The longest row that the model has positions for; None where its configuration sets no bound."""
        found = self.text_config.get(self.positions_key)
        return found if isinstance(found, int) else None

    @property
    def positions_key(self) -> str:
        """What the configuration calls its positions."""
        return next((key for key in _POSITIONS if key in self.text_config), _POSITIONS[0])


@cache
def known_models() -> Mapping[str, KnownModel]:
    """Every model of the table by its name, families together."""
    found = {}
    for path in sorted((configs_folder() / "models").glob("*.yaml")):
        for name, facts in read_table(path).items():
            found[name] = KnownModel(
                name,
                hub_ids=tuple(facts["hub_ids"]),
                aliases=tuple(facts.get("aliases", ())),
                parameters=facts["parameters"],
                config=facts["config"],
            )
    return found


def known_model(name: str) -> KnownModel | None:
    """The model of the table that ``name`` stands for: its name, an alias or a hub id; None where it is not there.

    >>> [known_model(name).name for name in ("llama-70b", "Llama 3.1 8B Instruct", "qwen/qwen3-8b", "mistral-7b")]
    ['llama-3.3-70b', 'llama-3.1-8b', 'qwen3-8b', 'mistral-7b-v0.3']
    """
    plain = plain_name(name)
    for spelling in (plain, _TUNED.sub("", plain), _TUNED.sub("", plain).removeprefix("meta-")):
        if spelling in _by_spelling():
            return _by_spelling()[spelling]
    return None


@cache
def _by_spelling() -> Mapping[str, KnownModel]:
    spellings: dict[str, KnownModel] = {}
    for model in known_models().values():
        for spelling in (model.name, *model.aliases, *model.hub_ids):
            spellings[plain_name(spelling)] = model
    return spellings


def model_facts(model: Model) -> ModelFacts:
    """What ``model.name`` of a recipe stands for: the shipped model, a folder, a model of the table, or a hub id.

    Of a folder, config.json is all that must be there; of a hub id, it is all that is downloaded. Raises ModelError for
    what cannot be found, read or trained, and UsageError for an empty name.
    """
    name = model.name
    if not name.strip():
        raise UsageError("model.name: is empty; give a known model, a folder with config.json or a hub id")
    if name in SHIPPED_NAMES or expanded(name).is_dir():
        path = locate_model(model).folder / CONFIG_FILE
        source = "which ships with trainkit" if name in SHIPPED_NAMES else f"from its {CONFIG_FILE}"
        if not path.is_file() and known_model(name):
            raise ModelError(
                f"model.name: the folder {name} hides the known model of that name, and holds no {CONFIG_FILE}; rename "
                "the folder, or run in another one"
            )
    elif known := known_model(name):
        return ModelFacts(known.name, known.config, "from the table of known models", f"model.name: {known.name}")
    elif name.count("/") != 1 or looks_like_path(name) or expanded(name).exists():
        raise _unknown(name)
    else:
        path = download_config(name, model.revision)
        source = f"from its {CONFIG_FILE}, downloaded"
    facts = ModelFacts(name, read_config(path.parent), source, str(path))
    if not _surely_causal(facts.config):
        check_architecture(path, facts.config)  # takes a second: it asks transformers
    _check_numbers(facts, path)
    return facts


def check_sequence_length(facts: ModelFacts, sequence_length: int) -> None:
    """Raise ModelError for a row longer than the model has positions for, as a run would."""
    positions = facts.positions
    if positions is not None and sequence_length > positions:
        raise ModelError(
            f"packing.sequence_length: {sequence_length:,} is beyond the {positions:,} positions of {facts.name} "
            f"({facts.positions_key}); set it to {positions} or less"
        )


def _unknown(name: str) -> ModelError:
    if expanded(name).exists():
        return ModelError(f"model.name: {name} is a file; give the folder that holds config.json")
    near = near_names(name, [*known_models(), *(alias for model in known_models().values() for alias in model.aliases)])
    hint = f"near: {', '.join(near)}; or" if near else "`--fits 24GiB` lists the known ones;"
    return ModelError(f"model.name: no model `{name[:60]}` is known; {hint} give a folder with config.json or a hub id")


def _surely_causal(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is, by its words alone, of a kind that the table holds."""
    named = config.get("architectures") or []
    return (
        config["model_type"] in {model.config["model_type"] for model in known_models().values()}
        and all(isinstance(name, str) and name.endswith(("ForCausalLM", "LMHeadModel")) for name in named)
        and not config.get("is_encoder_decoder")
        and not config.get("quantization_config")
        and not config.get("auto_map")  # its architecture may be of its own
    )


def _check_numbers(facts: ModelFacts, path: Path) -> None:
    """Raise ModelError, naming config.json and the key, for values that no model can have.

    Null is left to the model's class, and so are lists, which some have with an entry for each layer.
    """
    config = facts.text_config
    inside = "text_config." if config is not facts.config else ""
    for names, most in _SIZES:
        for name in names:
            value = config.get(name)
            if value is not None and not isinstance(value, list) and not (type(value) is int and 0 < value <= most):
                raise ModelError(f"{path}: {inside}{name} is {shown(repr(value))}; {_range(value, most)}")
    for name, kinds, what in _KINDS:
        if not isinstance(config.get(name), (*kinds, NoneType)):
            raise ModelError(f"{path}: {inside}{name} is {shown(repr(config[name]))}; it must be {what}")
    _check_rotation(config, f"{path}: {inside}rope_scaling")
    width, heads, key_value_heads = (_first(config, names) for names in (_WIDTH, _HEADS, _KEY_VALUE_HEADS))
    if not isinstance(width, int) or not isinstance(heads, int):
        return  # the class's own defaults decide
    if width % heads and not any(config.get(name) for name in _HEAD_WIDTH):
        raise ModelError(
            f"{path}: hidden_size {width} is no multiple of num_attention_heads {heads}, and no head_dim is given"
        )
    if isinstance(key_value_heads, int) and heads % key_value_heads:
        raise ModelError(f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {key_value_heads}")


def _check_rotation(config: Mapping[str, Any], place: str) -> None:
    """Raise ModelError for a well-known way of scaling positions that lacks one of its numbers."""
    rotation = config.get("rope_scaling") or {}
    kind = rotation.get("rope_type", rotation.get("type"))
    for name in ROTATIONS.get(kind, ()) if isinstance(kind, str) else ():
        if type(rotation.get(name)) not in (int, float):
            raise ModelError(f"{place}: the type {kind} needs a number as `{name}`; write it there")


def _range(value: object, most: int) -> str:
    return (
        f"it must be at most {most:,}" if type(value) is int and value > most else "it must be a whole number above 0"
    )


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if name in config), None)
