"""Models, tokenizers, templates, recipes, data, caches, checkpoints and results that were made to do harm.

Each case spoils one thing in a room that works and runs a command over it. Whatever the command says of it, no payload
may run, nothing outside the room may be read or written, no other machine may be asked, and a refusal is one line.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file

OK, USAGE, DATA, MODEL, MACHINE, CHECKPOINT = 0, 2, 3, 4, 5, 6
Spoil = Callable[[Any], "list[str] | None"]


@dataclass(frozen=True)
class Case:
    name: str
    codes: tuple[int, ...]
    says: str
    spoil: Spoil
    seconds: float = 60
    long: bool = False


CASES: list[Case] = []


def case(*codes: int, says: str = "") -> Callable[[Spoil], Spoil]:
    """Registers what spoils a room; it returns the command line, or None for ``fine-tune recipe.yaml``."""

    def register(spoil: Spoil) -> Spoil:
        CASES.append(Case(spoil.__name__, codes, says, spoil))
        return spoil

    return register


class Payload:
    """An object whose unpickling runs a line of Python."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.code,)


def plant_pickle(path: Path, code: str) -> None:
    path.write_bytes(pickle.dumps(Payload(code)))


def plant_torch_archive(path: Path, code: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(code)))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def plant_module(path: Path, code: str, *classes: str) -> None:
    bases = "from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast\n"
    path.write_text(
        bases + code + "\n" + "".join(f"class {name}(PretrainedConfig): model_type = 'evil'\n" for name in classes)
    )


def header_of(room: Any) -> tuple[dict[str, Any], bytes]:
    content = (room.model / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_safetensors(path: Path, header: Any, data: bytes, *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


# --- models ----------------------------------------------------------------------------------------------------------


@case(MODEL, says="only safetensors weights are read")
def a_pickle_in_place_of_the_weights(room: Any) -> None:
    (room.model / "model.safetensors").unlink()
    plant_pickle(room.model / "pytorch_model.bin", room.payload())


@case(MODEL, says="only safetensors weights are read")
def a_torch_archive_in_place_of_the_weights(room: Any) -> None:
    (room.model / "model.safetensors").unlink()
    plant_torch_archive(room.model / "pytorch_model.bin", room.payload())


@case(MODEL, says="only safetensors weights are read")
def shards_of_pickles_with_an_index(room: Any) -> None:
    (room.model / "model.safetensors").unlink()
    plant_pickle(room.model / "pytorch_model-00001-of-00001.bin", room.payload())
    index = {"weight_map": {"model.embed_tokens.weight": "pytorch_model-00001-of-00001.bin"}}
    (room.model / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@case(OK)
def pickles_beside_good_weights(room: Any) -> None:
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "model.pkl",
    ):
        plant_pickle(room.model / name, room.payload())


@case(MODEL, says="damaged|no safetensors")
def a_pickle_called_safetensors(room: Any) -> None:
    plant_pickle(room.model / "model.safetensors", room.payload())


@case(MODEL, says="no safetensors")
def a_torch_archive_called_safetensors(room: Any) -> None:
    plant_torch_archive(room.model / "model.safetensors", room.payload())


@case(MODEL, says="is not the name of a safetensors file")
def an_index_that_names_a_pickle(room: Any) -> None:
    plant_pickle(room.model / "weights.bin", room.payload())
    names = list(load_file(room.model / "model.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "weights.bin")}
    (room.model / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of(room: Any, shard: str) -> None:
    names = list(load_file(room.model / "model.safetensors"))
    (room.model / "model.safetensors").unlink()
    (room.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))


@case(MODEL, says="is not the name of a safetensors file")
def an_index_that_climbs_out(room: Any) -> None:
    shutil.copy(room.model / "model.safetensors", room.outside)
    index_of(room, "../../outside/model.safetensors")


@case(MODEL, says="is not the name of a safetensors file")
def an_index_with_an_absolute_path(room: Any) -> None:
    shutil.copy(room.model / "model.safetensors", room.outside)
    index_of(room, str(room.outside / "model.safetensors"))


@case(MODEL)
def an_index_with_a_nul_in_a_name(room: Any) -> None:
    index_of(room, "model\0.safetensors")


@case(MODEL, says="no `weight_map`")
def an_index_that_is_a_list(room: Any) -> None:
    (room.model / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}')


@case(MODEL, says="link")
def weights_that_are_a_link_out(room: Any) -> None:
    shutil.move(room.model / "model.safetensors", room.outside)
    (room.model / "model.safetensors").symlink_to(room.outside / "model.safetensors")


@case(MODEL, says="link")
def a_configuration_that_is_a_link_out(room: Any) -> None:
    shutil.move(room.model / "config.json", room.outside)
    (room.model / "config.json").symlink_to("../../outside/config.json")


@case(MODEL, says="link")
def a_link_out_in_the_digests_place(room: Any) -> None:
    (room.model / "SHA256SUMS").symlink_to(room.secret)


@case(MODEL, says="link")
def generation_settings_that_are_a_secret(room: Any) -> None:
    (room.model / "generation_config.json").unlink(missing_ok=True)
    (room.model / "generation_config.json").symlink_to(room.secret)
    room.recipe.pop("adapter")


@case(OK)
def digests_that_name_files_outside(room: Any) -> None:
    lines = ["0" * 64 + "  ../../outside/secret.txt", "1" * 64 + f"  {room.secret}"]
    (room.model / "SHA256SUMS").write_text("\n".join(lines) + "\n")


@case(MODEL, says="header")
def a_header_longer_than_the_file(room: Any) -> None:
    header, data = header_of(room)
    write_safetensors(room.model / "model.safetensors", header, data, length=2**62)


@case(MODEL, says="header")
def a_header_of_a_gigabyte(room: Any) -> None:
    with (room.model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2**31))
        file.truncate(2**31 + 8)  # a hole, no gigabytes on the disk


@case(MODEL, says="header is damaged")
def a_header_nested_without_end(room: Any) -> None:
    write_safetensors(room.model / "model.safetensors", b"[" * 3_000_000, b"")


@case(MODEL)
def tensors_that_overlap(room: Any) -> None:
    header, data = header_of(room)
    for facts in header.values():
        if "data_offsets" in facts:
            size = facts["data_offsets"][1] - facts["data_offsets"][0]
            facts["data_offsets"] = [0, size]
    write_safetensors(room.model / "model.safetensors", header, data)


@case(MODEL)
def offsets_below_zero(room: Any) -> None:
    header, data = header_of(room)
    name = next(name for name in header if name != "__metadata__")
    start, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [start - 4096, end - 4096]
    write_safetensors(room.model / "model.safetensors", header, data)


@case(MODEL)
def a_shape_that_overflows(room: Any) -> None:
    header, data = header_of(room)
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"] = [2**63, 2**63]
    write_safetensors(room.model / "model.safetensors", header, data)


@case(MODEL)
def shapes_and_offsets_of_wrong_types(room: Any) -> None:
    header, data = header_of(room)
    name = next(name for name in header if name != "__metadata__")
    header[name] = {"dtype": ["F32"], "shape": "abc", "data_offsets": {"a": 1, "b": 2}}
    write_safetensors(room.model / "model.safetensors", header, data)


@case(MODEL, says="code")
def a_configuration_with_code_of_its_own(room: Any) -> None:
    room.edit_json("config.json", model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})
    plant_module(room.model / "evil.py", room.payload(), "EvilConfig")


@case(OK)
def a_known_model_type_with_code_of_its_own(room: Any) -> None:
    auto_map = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.EvilModel",
        "AutoTokenizer": ["evil.T", "evil.T"],
    }
    room.edit_json("config.json", auto_map=auto_map)
    plant_module(room.model / "evil.py", room.payload(), "EvilConfig", "EvilModel", "T")


@case(OK, MODEL)
def code_that_lies_in_another_repository(room: Any) -> None:
    auto_map = {"AutoConfig": "evil/repository--evil.EvilConfig", "AutoModelForCausalLM": "evil/repository--evil.M"}
    room.edit_json("config.json", auto_map=auto_map)


@case(MODEL, says="code")
def code_for_the_estimate(room: Any) -> list[str]:
    room.edit_json("config.json", model_type="evil", architectures=["Evil"], auto_map={"AutoConfig": "evil.EvilConfig"})
    plant_module(room.model / "evil.py", room.payload(), "EvilConfig")
    return ["estimate-memory", "--model", "./model", "--memory", "8GiB"]


@case(OK, MODEL)
def python_files_that_shadow_libraries(room: Any) -> None:
    for name in (
        "json.py",
        "torch.py",
        "conftest.py",
        "sitecustomize.py",
        "setup.py",
        "__init__.py",
        "modeling_llama.py",
    ):
        (room.model / name).write_text(room.payload())
        (room.folder / name).write_text(room.payload())


@case(OK, MODEL)
def generation_code(room: Any) -> None:
    (room.model / "custom_generate").mkdir()
    (room.model / "custom_generate" / "generate.py").write_text(f"{room.payload()}\ndef generate(*a, **k): pass\n")
    room.edit_json("generation_config.json", custom_generate="./model")


@case(MODEL, says="attn_implementation")
def attention_kernels_from_a_repository(room: Any) -> None:
    room.edit_json("config.json", _attn_implementation="evil/kernels", attn_implementation="evil/kernels@main:run")


@case(MODEL, says="attn_implementation")
def attention_kernels_in_the_inner_configuration(room: Any) -> list[str]:
    room.edit_json("config.json", text_config={"_attn_implementation": "evil/kernels"})
    return ["estimate-memory", "--model", "./model"]


@case(OK, MODEL)
def a_configuration_that_names_paths(room: Any) -> None:
    room.edit_json(
        "config.json",
        _name_or_path=str(room.outside),
        name_or_path=str(room.outside),
        base_model_name_or_path=str(room.outside),
        tokenizer_class="GPT2Tokenizer",
        gguf_file="../../outside/secret.txt",
        peft_config={"default": str(room.outside)},
    )


@case(MODEL)
def a_configuration_of_wrong_types(room: Any) -> None:
    room.edit_json("config.json", hidden_size="__import__('os')", num_hidden_layers=[2], rope_theta={"a": 1})


@case(MODEL, MACHINE)
def a_configuration_of_enormous_sizes(room: Any) -> None:
    room.edit_json("config.json", hidden_size=2**40, num_hidden_layers=10**6, vocab_size=2**40)


@case(MODEL)
def a_configuration_nested_without_end(room: Any) -> None:
    (room.model / "config.json").write_text('{"a":' * 200_000 + "1" + "}" * 200_000)


@case(MODEL, says="quantised")
def a_quantisation_that_names_code(room: Any) -> None:
    room.edit_json("config.json", quantization_config={"quant_method": "evil", "modules": "evil.py"})


def adapter_folder(room: Any) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": str(room.outside), "r": 4, "target_modules": ["q_proj"]}
    (room.model / "adapter_config.json").write_text(json.dumps(config))


@case(OK, MODEL)
def an_adapter_with_a_pickle_beside_the_model(room: Any) -> None:
    adapter_folder(room)
    plant_pickle(room.model / "adapter_model.bin", room.payload())


@case(MODEL)
def an_adapter_with_a_pickle_in_place_of_the_model(room: Any) -> None:
    (room.model / "model.safetensors").unlink()
    (room.model / "config.json").unlink()
    adapter_folder(room)
    plant_pickle(room.model / "adapter_model.bin", room.payload())


@case(OK)
def a_startup_file_of_python_in_the_folder(room: Any) -> None:
    (room.model / "evil.pth").write_text(f"import os; {room.payload()}\n")
    (room.folder / "evil.pth").write_text(f"import os; {room.payload()}\n")


@case(MODEL)
def weights_that_are_a_folder(room: Any) -> None:
    (room.model / "model.safetensors").unlink()
    (room.model / "model.safetensors").mkdir()


@case(MODEL)
def a_model_of_enormous_sizes_trained_whole(room: Any) -> None:
    room.edit_json("config.json", hidden_size=2**40, num_hidden_layers=10**6, vocab_size=2**40)
    room.recipe.pop("adapter")


@case(MODEL)
def weights_that_never_end(room: Any) -> None:
    (room.model / "model.safetensors").unlink()
    (room.model / "model.safetensors").symlink_to("/dev/zero")


@case(MODEL)
def a_configuration_that_never_ends(room: Any) -> None:
    (room.model / "config.json").unlink()
    (room.model / "config.json").symlink_to("/dev/zero")


@case(MODEL)
def a_configuration_that_is_a_pipe(room: Any) -> None:
    (room.model / "config.json").unlink()
    os.mkfifo(room.model / "config.json")


# --- models of the hub with code of their own ------------------------------------------------------------------------


def trusting(repository: Any, **changes: str) -> list[str]:
    """The command line that runs the code of the repository, or of another, or of another commit."""
    name, commit = changes.get("name", repository.name), changes.get("commit", repository.commit)
    return ["fine-tune", "recipe.yaml", "--trust-remote-code", f"{name}@{commit}"]


def planted(room: Any) -> Any:
    """A repository whose every Python file makes the canary, at both commits."""
    repository = room.own_llama()
    for commit in (repository.commit, repository.other_commit):
        repository.plant(room.payload(), commit)
    return repository


@case(MODEL, says="add --trust-remote-code owner/own-llama@0123456789abcdef0123456789abcdef01234567")
def code_that_nobody_trusted(room: Any) -> None:
    planted(room)


@case(USAGE, says="trusts owner/another")
def trust_in_another_repository(room: Any) -> list[str]:
    return trusting(planted(room), name="owner/another")


@case(USAGE, says="trusts owner/Own-Llama")
def trust_in_a_name_that_looks_alike(room: Any) -> list[str]:
    return trusting(planted(room), name="owner/Own-Llama")


@case(USAGE, says="model.revision is 89abcdef")
def trust_in_another_commit_than_the_recipe_names(room: Any) -> list[str]:
    repository = planted(room)
    room.recipe["model"]["revision"] = repository.other_commit
    return trusting(repository)


@case(USAGE, says="which is 89abcdef")
def a_branch_that_has_moved_on_from_the_trusted_commit(room: Any) -> list[str]:
    repository = planted(room)
    room.recipe["model"]["revision"] = "main"
    repository.refer("main", repository.other_commit)
    return trusting(repository)


@case(MODEL)
def trust_in_a_commit_that_is_not_there(room: Any) -> list[str]:
    return trusting(planted(room), commit="f" * 40)


@case(USAGE, says="no whole commit")
def trust_in_a_branch(room: Any) -> list[str]:
    return trusting(planted(room), commit="main")


@case(OK)
def evil_code_at_another_commit(room: Any) -> list[str]:
    repository = room.own_llama()
    repository.plant(room.payload(), repository.other_commit)
    repository.refer("main", repository.other_commit)
    return trusting(repository)


@case(MODEL, says="another repository")
def trusted_code_that_names_another_repository(room: Any) -> list[str]:
    repository = room.own_llama()
    evil = room.make_own_llama(room.folder / "hub")
    evil.name = "evil/repository"
    evil.fill(room.model)
    evil.plant(room.payload())
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "evil/repository--modeling_own.OwnForCausalLM",
    }
    repository.edit_json("config.json", auto_map=auto_map)
    return trusting(repository)


@case(MODEL, says="another repository")
def a_tokenizer_of_trusted_code_that_names_another_repository(room: Any) -> list[str]:
    repository = room.own_llama()
    repository.edit_json("tokenizer_config.json", auto_map=["evil/repository--evil.Evil", None])
    return trusting(repository)


@case(MODEL, says="is no module.Class")
def trusted_code_that_climbs_out(room: Any) -> list[str]:
    repository = room.own_llama()
    plant_module(room.outside / "evil.py", room.payload(), "Evil")
    repository.edit_json("config.json", auto_map={"AutoConfig": f"{room.outside}/evil.Evil"})
    return trusting(repository)


@case(MODEL, says="link")
def trusted_code_that_is_a_link_out(room: Any) -> list[str]:
    repository = room.own_llama()
    plant_module(room.outside / "evil.py", room.payload(), "OwnConfig")
    repository.path("configuration_own.py").unlink()
    repository.path("configuration_own.py").symlink_to(room.outside / "evil.py")
    return trusting(repository)


@case(MODEL, says="changed after it was fetched")
def trusted_code_that_was_changed_in_the_cache(room: Any) -> list[str]:
    repository = room.own_llama()
    with repository.path("modeling_own.py").open("a") as file:
        file.write(f"\n{room.payload()}\n")
    return trusting(repository)


@case(MODEL, says="only safetensors weights are read")
def pickles_beside_trusted_code(room: Any) -> list[str]:
    repository = room.own_llama()
    repository.path("model.safetensors").unlink()
    plant_pickle(repository.path("pytorch_model.bin"), room.payload())
    return trusting(repository)


@case(OK)
def evil_code_beside_an_adapter_whose_base_is_trusted(room: Any) -> list[str]:
    repository = room.own_llama()
    assert room.run(*trusting(repository)).code == OK
    final = room.folder / "run/final"
    auto_map = {"AutoConfig": "evil.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = json.loads(repository.path("config.json").read_text()) | {"auto_map": auto_map}
    (final / "config.json").write_text(json.dumps(config))
    for name in ("evil.py", "modeling_own.py", "configuration_own.py", "tokenization_own.py"):
        plant_module(final / name, room.payload(), "OwnConfig", "OwnForCausalLM")
    (final / "SHA256SUMS").unlink()
    return [*EXPORT, "--trust-remote-code", repository.trust]


@case(USAGE, says="a folder has no commit")
def trust_in_a_folder(room: Any) -> list[str]:
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    room.edit_json("config.json", model_type="evil", architectures=["EvilModel"], auto_map=auto_map)
    plant_module(room.model / "evil.py", room.payload(), "EvilConfig", "EvilModel")
    return ["fine-tune", "recipe.yaml", "--trust-remote-code", f"owner/own-llama@{'0' * 40}"]


@case(USAGE, says="needs no code of its own")
def trust_where_transformers_has_the_code(room: Any) -> list[str]:
    repository = planted(room)
    repository.edit_json("config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    return trusting(repository)


@case(MODEL, says="its tokenizer needs Python code")
def code_in_the_tokenizer_only(room: Any) -> None:
    repository = room.own_llama()
    repository.edit_json("config.json", model_type="llama", architectures=["LlamaForCausalLM"], auto_map=None)
    repository.give_tokenizer_code()
    repository.plant(room.payload())


@case(MODEL, says="its tokenizer needs Python code")
def code_in_the_tokenizer_of_packed_data(room: Any) -> list[str]:
    repository = room.own_llama()
    repository.give_tokenizer_code()
    repository.plant(room.payload())
    return ["pack-data", "recipe.yaml"]


@case(MODEL, says="which an estimate never runs")
def code_of_the_hub_for_the_estimate(room: Any) -> list[str]:
    planted(room)
    return ["estimate-memory", "recipe.yaml", "--memory", "8GiB"]


@case(MODEL, says="does not name it")
def an_adapter_whose_base_brings_trusted_code(room: Any) -> list[str]:
    command = adapter_config(room, base_model_name_or_path="owner/own-llama", revision="0" * 40)
    repository = planted(room)
    return [*command, "--trust-remote-code", repository.trust]


# --- tokenizers ------------------------------------------------------------------------------------------------------


@case(MODEL, OK)
def a_tokenizer_with_code_of_its_own(room: Any) -> None:
    room.edit_json(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil"
    )
    plant_module(room.model / "evil.py", room.payload(), "Evil")


@case(MODEL, OK)
def a_tokenizer_with_code_elsewhere(room: Any) -> None:
    room.edit_json("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil/repository--evil.Evil"]})


@case(MODEL, OK)
def a_tokenizer_that_packs(room: Any) -> list[str]:
    room.edit_json(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil"
    )
    plant_module(room.model / "evil.py", room.payload(), "Evil")
    (room.model / "config.json").unlink()
    return ["pack-data", "--data", "train.jsonl", "--tokenizer", "model", "--sequence-length", "64"]


@case(MODEL)
def a_vocabulary_that_is_a_pickle(room: Any) -> None:
    (room.model / "tokenizer.json").unlink()
    plant_pickle(room.model / "tokenizer.model", room.payload())


@case(MODEL)
def a_pickled_vocabulary_of_transfo_xl(room: Any) -> None:
    (room.model / "tokenizer.json").unlink()
    plant_pickle(room.model / "vocab.pkl", room.payload())
    plant_pickle(room.model / "vocab.json", room.payload())
    room.edit_json("tokenizer_config.json", tokenizer_class="TransfoXLTokenizer", pretrained_vocab_file="vocab.pkl")


@case(MODEL, OK)
def a_tokenizer_that_names_files_outside(room: Any) -> None:
    shutil.copy(room.model / "tokenizer.json", room.outside)
    names = (
        "vocab_file",
        "merges_file",
        "tokenizer_file",
        "chat_template_file",
        "special_tokens_map_file",
        "added_tokens_file",
    )
    room.edit_json("tokenizer_config.json", **dict.fromkeys(names, str(room.outside / "tokenizer.json")))


@case(MODEL)
def only_files_outside(room: Any) -> None:
    (room.outside / "vocab.json").write_text(json.dumps({"a": 0, SECRET: 1}))
    (room.outside / "merges.txt").write_text("#version: 0.2\n")
    (room.model / "tokenizer.json").unlink()
    (room.model / "vocab.txt").write_text("a\nb\n")
    room.edit_json(
        "tokenizer_config.json",
        tokenizer_class="GPT2Tokenizer",
        vocab_file=str(room.outside / "vocab.json"),
        merges_file=str(room.outside / "merges.txt"),
        tokenizer_file=str(room.outside / "tokenizer.json"),
    )


@case(MODEL, says="link")
def a_vocabulary_that_is_a_link_out(room: Any) -> None:
    shutil.move(room.model / "tokenizer.json", room.outside)
    (room.model / "tokenizer.json").symlink_to(room.outside / "tokenizer.json")


@case(MODEL, says="link")
def a_vocabulary_that_is_a_secret(room: Any) -> None:
    (room.model / "tokenizer.json").unlink()
    (room.model / "vocab.txt").symlink_to(room.secret)
    room.edit_json("tokenizer_config.json", tokenizer_class="BertTokenizer")


@case(MODEL, says="link")
def a_chat_template_that_is_a_secret(room: Any) -> None:
    (room.model / "chat_template.jinja").unlink(missing_ok=True)
    (room.model / "chat_template.jinja").symlink_to(room.secret)


@case(MODEL, says="link")
def another_chat_template_that_is_a_secret(room: Any) -> None:
    (room.model / "additional_chat_templates").mkdir()
    (room.model / "additional_chat_templates" / "tool_use.jinja").symlink_to(room.secret)


@case(MODEL, says="link")
def a_folder_of_chat_templates_that_lies_outside(room: Any) -> None:
    (room.outside / "x.jinja").write_text(SECRET)
    (room.model / "additional_chat_templates").symlink_to(room.outside)


@case(MODEL)
def a_tokenizer_of_wrong_types(room: Any) -> None:
    room.edit_json("tokenizer_config.json", added_tokens_decoder={"evil": 1}, model_max_length={"a": 1}, eos_token=[1])


@case(MODEL)
def a_tokenizer_nested_without_end(room: Any) -> None:
    (room.model / "tokenizer.json").write_text("[" * 1_000_000)


@case(MODEL)
def a_tokenizer_that_is_a_list(room: Any) -> None:
    (room.model / "tokenizer_config.json").write_text('["evil"]')


@case(MODEL, OK)
def a_tokenizer_whose_pattern_takes_for_ever(room: Any) -> None:
    content = json.loads((room.model / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"(a+)+$"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    (room.model / "tokenizer.json").write_text(json.dumps(content))


@case(MODEL)
def a_chat_template_that_is_a_number(room: Any) -> None:
    (room.model / "chat_template.jinja").unlink(missing_ok=True)
    room.edit_json("tokenizer_config.json", chat_template=5)


@case(MODEL)
def chat_templates_of_odd_names(room: Any) -> None:
    (room.model / "chat_template.jinja").unlink(missing_ok=True)
    templates = [{"name": "../../../outside/planted", "template": "{{ 1 }}"}, {"name": "x", "template": 7}]
    room.edit_json("tokenizer_config.json", chat_template=templates)


# --- chat templates --------------------------------------------------------------------------------------------------

DOUBLING = "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
REACHING_OUT = {
    "globals_of_a_message": "{{ messages.__class__.__init__.__globals__ }}",
    "globals_of_cycler": "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "globals_of_joiner": "{{ joiner.__init__.__globals__['os'].system('touch CANARY') }}",
    "globals_of_lipsum": "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "globals_of_raise_exception": "{{ raise_exception.__globals__['__builtins__'] }}",
    "globals_of_nothing": "{{ nothing.__init__.__globals__ }}",
    "the_template_itself": "{{ self._TemplateReference__context.environment }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the_class_by_a_filter": "{{ ''|attr('__class__') }}",
    "the_class_by_map": "{{ ['']|map(attribute='__class__')|list }}",
    "the_class_by_groupby": "{{ messages|groupby('__class__')|list }}",
    "the_class_by_a_format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "the_class_by_a_format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "a_file_included": "{% include 'SECRET' %}",
    "a_file_imported": "{% import 'SECRET' as secret %}{{ secret }}",
    "a_file_extended": "{% extends 'SECRET' %}",
    "a_file_from_which_is_imported": "{% from '../outside/secret.txt' import x %}",
}
WITHOUT_END = {
    "thirty_million_characters": "{% for i in range(100000) %}{% for j in range(300) %}x{% endfor %}{% endfor %}",
    "a_recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a_text_that_doubles": DOUBLING.replace("[1]", "'xx'").replace("[ns.x, ns.x]", "ns.x ~ ns.x"),
    "a_list_that_doubles": DOUBLING.replace("[ns.x, ns.x]", "ns.x + ns.x"),
    "a_wide_format": "{{ '%2000000000d' % 1 }}",
    "a_wide_filter": "{{ 'x'|center(2000000000) }}",
    "a_wide_method": "{{ 'x'.ljust(2000000000) }}",
    "many_bytes": "{{ (1).to_bytes(2000000000) }}",
    "a_long_batch": "{{ [1]|batch(500000000, 'x')|list|length }}",
    "a_deep_indent": "{{ [1, [2]]|tojson(indent=1000000000) }}",
}
NEVER_DONE = {
    "loops_that_write_nothing": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "paragraphs": "{{ lipsum(n=100000000) }}",
    "a_round_number": "{{ 1.5|round(100000000, 'ceil') }}",
    "many_slices": "{{ [1]|slice(300000000)|list|length }}",
    "a_nest_written_out": DOUBLING + "{{ ns.x }}",
    "a_nest_as_json": DOUBLING + "{{ ns.x|tojson }}",
    "a_nest_compared": DOUBLING.replace("[1]", "[2]") + DOUBLING.replace("ns", "other") + "{{ ns.x == other.x }}",
}


def template_case(kind: str, name: str, text: str) -> Case:
    def spoil(room: Any) -> list[str]:
        room.template(text.replace("CANARY", str(room.canary)).replace("SECRET", str(room.secret)))
        return ["inspect-data", "recipe.yaml"]

    return Case(f"a_template_with_{name}", (MODEL,), "chat template", spoil, seconds=120, long=kind == "never")


for kind, texts in (("reaching", REACHING_OUT), ("without", WITHOUT_END), ("never", NEVER_DONE)):
    CASES += [template_case(kind, name, text) for name, text in texts.items()]


# --- recipes ---------------------------------------------------------------------------------------------------------


def recipe_text(room: Any, before: str = "", after: str = "") -> None:
    (room.folder / "recipe.yaml").write_text(before + yaml.safe_dump(room.recipe) + after)


@case(USAGE)
def a_tag_that_runs_a_program(room: Any) -> None:
    recipe_text(room, after=f"precision: !!python/object/apply:os.system ['touch {room.canary}']\n")


@case(USAGE)
def a_tag_that_makes_an_object(room: Any) -> None:
    recipe_text(room, after=f"seed: !!python/object/new:pathlib.Path ['{room.secret}']\n")


@case(USAGE)
def a_tag_that_evaluates(room: Any) -> None:
    recipe_text(room, before=f'x: !!python/object/apply:builtins.eval ["{room.payload()}"]\n')


@case(USAGE)
def a_tag_that_includes_a_file(room: Any) -> None:
    recipe_text(room, after=f"note: !include {room.secret}\n")


@case(USAGE)
def aliases_that_double(room: Any) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    recipe_text(room, before="\n".join(lines) + "\n")


@case(USAGE)
def an_alias_that_holds_itself(room: Any) -> None:
    recipe_text(room, after="loop: &loop [*loop]\n")


@case(USAGE)
def lists_without_end(room: Any) -> None:
    (room.folder / "recipe.yaml").write_text("model: " + "[" * 100_000)


@case(USAGE)
def a_recipe_of_many_megabytes(room: Any) -> None:
    (room.folder / "recipe.yaml").write_text("model:\n" + "  - x\n" * 3_000_000)


@case(USAGE)
def a_recipe_that_never_ends(room: Any) -> None:
    (room.folder / "recipe.yaml").symlink_to("/dev/zero")


@case(USAGE)
def a_recipe_that_extends_itself(room: Any) -> None:
    recipe_text(room, before="extends: recipe.yaml\n")


@case(USAGE)
def a_name_with_a_nul(room: Any) -> None:
    recipe_text(room, after='chat: "a\\0b"\n')


@case(USAGE, MODEL)
def a_model_name_with_a_nul(room: Any) -> None:
    room.set("model.name", "model\0/../../outside")
    recipe_text(room)


@case(USAGE, MODEL, MACHINE)
def an_output_folder_with_a_nul(room: Any) -> None:
    room.set("output_dir", "run\0")
    recipe_text(room)


@case(USAGE, OK)
def names_that_run_the_other_way(room: Any) -> None:
    room.set("output_dir", "run\u202etxt.exe\u2066")


@case(USAGE)
def an_output_folder_that_holds_other_things(room: Any) -> None:
    room.set("output_dir", "model")


@case(MODEL)
def a_revision_that_climbs_out(room: Any) -> None:
    room.recipe["model"] = {"name": "owner/name", "revision": "../../../../outside"}
    room.environment["HF_HUB_OFFLINE"] = "1"


@case(MODEL)
def a_hub_id_that_climbs_out(room: Any) -> None:
    room.recipe["model"] = {"name": "owner/..name"}
    room.environment["HF_HUB_OFFLINE"] = "1"


@case(USAGE)
def code_from_a_repository_asked_for_by_a_recipe(room: Any) -> None:
    room.set("model.trust_remote_code", True)


@case(USAGE)
def a_chat_template_that_is_no_file(room: Any) -> None:
    room.set("data.chat_template", "model")


@case(USAGE)
def a_tracker_that_is_a_module(room: Any) -> None:
    (room.folder / "evil.py").write_text(room.payload())
    room.set("tracking", ["evil"])


@case(USAGE)
def an_override_that_runs(room: Any) -> list[str]:
    return [
        "fine-tune",
        "recipe.yaml",
        "--set",
        f"training.seed=!!python/object/apply:os.system ['touch {room.canary}']",
    ]


# --- data ------------------------------------------------------------------------------------------------------------


@case(DATA, says="link")
def a_data_folder_with_a_link_out(room: Any) -> None:
    (room.folder / "data").mkdir()
    shutil.copy(room.data, room.folder / "data")
    (room.folder / "data" / "notes.txt").symlink_to(room.secret)
    room.set("data.train", "data")


@case(DATA)
def a_data_folder_with_a_device(room: Any) -> None:
    (room.folder / "data").mkdir()
    (room.folder / "data" / "notes.txt").symlink_to("/dev/zero")
    room.set("data.train", "data")


@case(DATA)
def a_data_file_that_is_a_pipe(room: Any) -> None:
    room.data.unlink()
    os.mkfifo(room.data)


@case(DATA)
def data_that_is_a_pickle(room: Any) -> None:
    room.data.unlink()
    plant_pickle(room.folder / "train.pkl", room.payload())
    room.set("data.train", "train.pkl")


@case(DATA)
def a_pickle_called_parquet(room: Any) -> None:
    plant_pickle(room.folder / "train.parquet", room.payload())
    room.set("data.train", "train.parquet")


@case(DATA)
def data_with_a_script_of_its_own(room: Any) -> None:
    (room.folder / "data").mkdir()
    (room.folder / "data" / "data.py").write_text(room.payload())
    (room.folder / "data" / "dataset_infos.json").write_text("{}")
    room.set("data.train", "data")


@case(OK)
def parquet_with_pickled_pandas_metadata(room: Any) -> None:
    table = pa.table({"text": ["the lazy dog"] * 20})
    odd = {b"pandas": pickle.dumps(Payload(room.payload())), b"ARROW:schema": b"evil", b"huggingface": b"{evil"}
    pq.write_table(table.replace_schema_metadata(odd), room.folder / "train.parquet", store_schema=False)
    room.set("data.train", "train.parquet")


@case(OK, DATA)
def parquet_with_an_extension_type_that_pickles(room: Any) -> None:
    storage = pa.array(["the lazy dog"] * 20)
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Payload(room.payload())),
    }
    schema = pa.schema([pa.field("text", pa.string(), metadata=metadata)])
    pq.write_table(pa.table([storage], schema=schema), room.folder / "train.parquet")
    room.set("data.train", "train.parquet")


@case(DATA)
def parquet_that_claims_more_rows_than_it_holds(room: Any) -> None:
    path = room.folder / "train.parquet"
    pq.write_table(pa.table({"text": ["the lazy dog"] * 20}), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\xff" * 8 + content[len(content) // 2 + 8 :])
    room.set("data.train", "train.parquet")


@case(DATA)
def a_line_nested_without_end(room: Any) -> None:
    room.data.write_text("[" * 200_000 + "]" * 200_000 + "\n")


@case(DATA)
def a_number_without_end(room: Any) -> None:
    room.data.write_text('{"text": "a", "n": ' + "9" * 5_000_000 + "}\n")


@case(DATA, MACHINE)
def a_compressed_line_of_many_megabytes(room: Any) -> None:
    with gzip.open(room.folder / "train.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(64):
            file.write(b"a" * 2**20)
    room.set("data.train", "train.jsonl.gz")


@case(OK)
def a_repository_around_the_data_whose_settings_run_programs(room: Any) -> None:
    git = ["git", "-C", str(room.folder), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "train.jsonl"], ["commit", "-qm", "data"]):
        subprocess.run([*git, *command], check=True, env={"PATH": os.environ["PATH"], "HOME": str(room.folder)})
    program = room.folder / "program.sh"
    program.write_text(f"#!/bin/sh\ntouch '{room.canary}'\ncat\n")
    program.chmod(0o755)
    for key in (
        "core.fsmonitor",
        "filter.evil.clean",
        "filter.evil.smudge",
        "core.pager",
        "diff.external",
        "core.sshCommand",
    ):
        subprocess.run([*git, "config", key, str(program)], check=True)
    subprocess.run([*git, "config", "filter.evil.process", ""], check=True)
    (room.folder / ".gitattributes").write_text("* filter=evil\n")
    for hook in ("post-index-change", "pre-commit", "fsmonitor-watchman"):
        shutil.copy(program, room.folder / ".git" / "hooks" / hook)
    os.utime(room.data)


# --- the cache of packed data ----------------------------------------------------------------------------------------


def pack(room: Any) -> None:
    done = room.run("pack-data", "recipe.yaml")
    assert done.code == OK, done.stderr


@case(OK)
def pickles_in_the_cache(room: Any) -> None:
    pack(room)
    for folder in (room.folder / "cache").glob("*"):
        plant_pickle(folder / "arrays.pkl", room.payload())
        plant_pickle(folder / "facts.npy", room.payload())


@case(OK, DATA, MACHINE)
def a_cache_that_lists_files_outside(room: Any) -> None:
    import hashlib

    pack(room)
    for manifest in (room.folder / "cache").rglob("manifest.json"):
        content = json.loads(manifest.read_text())
        content.pop("sha256")
        first = next(iter(content["files"]))
        content["files"]["../../../outside/secret.txt"] = content["files"][first] | {
            "bytes": room.secret.stat().st_size
        }
        text = json.dumps(content, sort_keys=True)
        content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        manifest.write_text(json.dumps(content))


# --- runs, checkpoints and results -----------------------------------------------------------------------------------


EXPORT = ["export", "run", "--merge"]


@case(MODEL, USAGE)
def a_result_whose_adapter_is_a_pickle(room: Any) -> list[str]:
    final = room.trained() / "final"
    (final / "adapter_model.safetensors").unlink()
    plant_pickle(final / "adapter_model.bin", room.payload())
    return EXPORT


def adapter_config(room: Any, **changes: Any) -> list[str]:
    final = room.trained() / "final"
    config = json.loads((final / "adapter_config.json").read_text()) | changes
    (final / "adapter_config.json").write_text(json.dumps(config))
    (final / "SHA256SUMS").unlink()
    return EXPORT


@case(MODEL)
def an_adapter_that_imports_a_module(room: Any) -> list[str]:
    (room.folder / "megatron.py").write_text(room.payload())
    return adapter_config(room, megatron_config={"a": 1}, megatron_core="megatron")


@case(MODEL)
def an_adapter_with_classes_of_its_own(room: Any) -> list[str]:
    (room.folder / "evil.py").write_text(room.payload())
    return adapter_config(room, auto_mapping={"base_model_class": "Evil", "parent_library": "evil"}, task_type=None)


@case(MODEL)
def an_adapter_of_another_kind(room: Any) -> list[str]:
    return adapter_config(room, peft_type="XLORA", adapters={"a": "evil/adapter"})


@case(MODEL)
def an_adapter_whose_base_is_on_the_hub(room: Any) -> list[str]:
    return adapter_config(room, base_model_name_or_path="evil/base")


@case(MODEL)
def an_adapter_of_wrong_types(room: Any) -> list[str]:
    return adapter_config(room, base_model_name_or_path=7, revision=["x"], r={"a": 1})


@case(MODEL, says="link")
def a_result_with_a_link_to_a_secret(room: Any) -> list[str]:
    final = room.trained() / "final"
    (final / "notes.txt").symlink_to(room.secret)
    return EXPORT


@case(MODEL, says="link")
def a_card_that_is_a_secret(room: Any) -> list[str]:
    final = room.trained() / "final"
    (final / "README.md").unlink()
    (final / "README.md").symlink_to(room.secret)
    return EXPORT


@case(USAGE)
def a_run_whose_recipe_runs_code(room: Any) -> list[str]:
    run = room.trained()
    (run / "recipe.yaml").write_text(f"adapter: !!python/object/apply:os.system ['touch {room.canary}']\n")
    return EXPORT


@case(OK, CHECKPOINT)
def pickles_in_a_checkpoint(room: Any) -> None:
    checkpoint = next((room.trained() / "checkpoints").iterdir())
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
        "pytorch_model.bin",
        ".metadata",
    ):
        plant_pickle(checkpoint / name, room.payload())
    shutil.rmtree(room.folder / "run" / "final")


@case(OK, CHECKPOINT)
def a_pickle_in_place_of_the_optimizer(room: Any) -> None:
    checkpoint = next((room.trained() / "checkpoints").iterdir())
    plant_pickle(checkpoint / "optimizer.safetensors", room.payload())
    shutil.rmtree(room.folder / "run" / "final")


def reseal(checkpoint: Path) -> dict[str, Any]:
    """The manifest, as the one would write it who changed the files."""
    import hashlib

    content: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
    for name in content["files"]:
        data = (checkpoint / name).read_bytes()
        content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    return content


@case(OK, CHECKPOINT)
def a_state_of_wrong_types(room: Any) -> None:
    checkpoint = next((room.trained() / "checkpoints").iterdir())
    (checkpoint / "state.json").write_text(
        '{"step": "x", "counters": [], "log_bytes": 5, "optimizer": {}, "random": 1}'
    )
    reseal(checkpoint)
    shutil.rmtree(room.folder / "run" / "final")


@case(OK, CHECKPOINT)
def a_state_that_is_a_list(room: Any) -> None:
    checkpoint = next((room.trained() / "checkpoints").iterdir())
    (checkpoint / "state.json").write_text("[1, 2]")
    reseal(checkpoint)
    shutil.rmtree(room.folder / "run" / "final")


@case(OK, CHECKPOINT)
def a_manifest_that_climbs_out(room: Any) -> None:
    checkpoint = next((room.trained() / "checkpoints").iterdir())
    content = reseal(checkpoint)
    content["files"]["../../../../outside/secret.txt"] = {"bytes": room.secret.stat().st_size, "sha256": "0" * 64}
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    shutil.rmtree(room.folder / "run" / "final")


@case(OK, CHECKPOINT)
def a_checkpoint_file_that_is_a_link_out(room: Any) -> None:
    checkpoint = next((room.trained() / "checkpoints").iterdir())
    shutil.move(checkpoint / "random.safetensors", room.outside)
    (checkpoint / "random.safetensors").symlink_to(room.outside / "random.safetensors")
    shutil.rmtree(room.folder / "run" / "final")


@case(CHECKPOINT, MACHINE)
def a_log_that_is_a_link_out(room: Any) -> None:
    run = room.trained()
    shutil.move(run / "metrics.jsonl", room.outside / "metrics.jsonl")
    (run / "metrics.jsonl").symlink_to(room.outside / "metrics.jsonl")
    shutil.rmtree(run / "final")


@case(MACHINE)
def a_lock_that_is_a_link_out(room: Any) -> None:
    run = room.trained()
    (run / "run.lock").unlink()
    (run / "run.lock").symlink_to(room.outside / "made")
    shutil.rmtree(run / "final")


@case(OK, CHECKPOINT)
def checkpoints_that_lie_outside(room: Any) -> None:
    run = room.trained()
    shutil.move(run / "checkpoints", room.outside / "checkpoints")
    (run / "checkpoints").symlink_to(room.outside / "checkpoints")
    shutil.rmtree(run / "final")


@case(OK, CHECKPOINT)
def a_record_of_wrong_types(room: Any) -> None:
    run = room.trained()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(
        json.dumps(record | {"micro_batch_size": "x", "run_id": ["../.."], "finished": False})
    )
    shutil.rmtree(run / "final")


def test_trusted_code_is_run_and_seen_to_be(room: Any) -> None:
    """Otherwise nothing would follow from the canaries above that stayed silent."""
    repository = room.own_llama()
    repository.plant(room.payload())
    done = room.run(*trusting(repository))
    assert done.code == OK, done.stderr
    assert "the payload ran" in room.escapes(done)


SECRET = "bait-4f1d-not-for-anyone"


def as_parameter(one: Case) -> Any:
    return pytest.param(one, id=one.name, marks=[pytest.mark.long] * one.long)


@pytest.mark.parametrize("one", [as_parameter(one) for one in CASES])
def test_harm(room: Any, one: Case) -> None:
    arguments = one.spoil(room)
    done = room.run(*(arguments or ("fine-tune", "recipe.yaml")), seconds=one.seconds)
    escapes = room.escapes(done)
    assert not escapes, (escapes, done.stderr[-800:])
    assert done.code in one.codes, (done.code, done.seconds, done.stderr[-3000:])
    assert done.code == OK or "Traceback" not in done.stderr
    refusals = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert one.says == "" or any(part in done.stderr for part in one.says.split("|")), done.stderr
    assert len(refusals) <= 1 or done.code == USAGE, refusals  # a recipe's mistakes are told all at once
