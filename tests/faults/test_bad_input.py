"""What bad input gets, through the real command line: the right exit code, one line that helps, nothing touched.

Each case takes a recipe, a data file and a model folder that work, and breaks one thing. Weights are read only where
the fault lies in them.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import re
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trainkit.cli import run

Said = pytest.CaptureFixture[str]
LONGEST_LINE = 250
POSITIONS = 256  # of the tiny model


def conversation(number: int, answer: str = "the lazy dog") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"{number}: what is it?"},
            {"role": "assistant", "content": answer},
        ]
    }


GOOD_LINES = [json.dumps(conversation(number)) for number in range(12)]


@dataclass
class Room:
    """A folder with `recipe.yaml` (from `recipe`), `train.jsonl` and `model/`, all of which work until broken."""

    folder: Path
    recipe: dict[str, Any]
    monkeypatch: pytest.MonkeyPatch

    @property
    def data(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def weights(self) -> Path:
        return self.model / "model.safetensors"

    def set(self, key: str, value: Any) -> None:
        *sections, name = key.split(".")
        target = self.recipe
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value

    def take_out(self, key: str) -> None:
        *sections, name = key.split(".")
        target = self.recipe
        for section in sections:
            target = target[section]
        del target[name]

    def write_lines(self, *lines: str | dict[str, Any]) -> None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.data.write_text("\n".join(texts) + "\n")

    def edit_json(self, name: str, **changes: Any) -> None:
        """Change keys of a JSON file of the model; None takes one out."""
        path = self.model / name
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    def edit_weights(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, {"format": "pt"})

    def shard(self) -> None:
        """Cut the weights into two shards with an index."""
        tensors = load_file(self.weights)
        names = sorted(tensors)
        weight_map: dict[str, str] = {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            shard = f"model-0000{number}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, self.model / shard, {"format": "pt"})
            weight_map |= dict.fromkeys(part, shard)
        (self.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        self.weights.unlink()

    def template(self, text: str) -> None:
        (self.folder / "chat.jinja").write_text(text)
        self.set("data.chat_template", "chat.jinja")

    def without_package(self, name: str) -> None:
        there = importlib.util.find_spec
        self.monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda asked, package=None: None if asked == name else there(asked, package),
        )

    def write_recipe(self) -> Path:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe))
        return path

    def fine_tune(self, *arguments: str) -> int:
        return run(["fine-tune", self.write_recipe().name, *arguments])


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed data of all cases: most of them have the same."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def room(
    tmp_path: Path, tiny_model_folder: Path, small_recipe: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Room:
    folder = tmp_path / "room"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TRAINKIT_CACHE", str(cache))
    shutil.copytree(tiny_model_folder, folder / "model")
    small_recipe["model"]["name"] = "model"
    small_recipe["data"] = {"train": "train.jsonl", "eval": 0.3}
    small_recipe["output_dir"] = "run"
    small_recipe["training"] |= {"steps": 2, "tokens_per_step": 512}
    small_recipe["evaluation"] = {"every_steps": 1, "samples": 0}
    made = Room(folder, small_recipe, monkeypatch)
    made.write_lines(*GOOD_LINES)
    return made


def content_of(folder: Path) -> dict[str, str]:
    """Everything below `folder`: relative path → kind, time of change and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = f"{path.lstat().st_mtime_ns} {content}"
    return found


def error_lines(capfd: Said, folder: Path) -> list[str]:
    """What stands behind `error: `, without the length of this machine's paths."""
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    lines = said.err.replace(f"{folder}/", "").replace(str(folder), ".").splitlines()
    return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]


def weights_were_read(*_: object, **__: object) -> None:
    raise AssertionError("the weights were read before this was found")


@dataclass(frozen=True)
class Case:
    """One thing that is broken, and what must be said of it. `in_weights`: it can only be found by loading them."""

    name: str
    break_it: Callable[[Room], object]
    code: int
    says: str
    in_weights: bool = False
    example_shown: bool = False


def without_data(room: Room) -> None:
    room.data.rename(room.folder / "trian.jsonl")


def folder_without_data(room: Room) -> None:
    (room.folder / "empty").mkdir()
    (room.folder / "empty" / "notes.pdf").write_text("")
    room.set("data.train", "empty")


def broken_line(room: Room) -> None:
    lines = (GOOD_LINES * 1000)[:10_000]
    room.write_lines(*lines, '{"messages": [{"role": "user", content: 1}]}', *GOOD_LINES)


def broken_parquet(room: Room) -> None:
    (room.folder / "train.parquet").write_bytes(b"PAR1" + bytes(100))
    room.set("data.train", "train.parquet")


def mixed_schemas(room: Room) -> None:
    room.write_lines(*GOOD_LINES[:6], {"prompt": "a", "completion": "b"}, *GOOD_LINES[6:])


def mixed_kinds(room: Room) -> None:
    room.write_lines(*GOOD_LINES[:6], json.dumps("plain text"))


def wrong_type(room: Room) -> None:
    room.write_lines(*[{"text": "the quick brown fox"}] * 150, {"text": 5})


def content_is_a_number(room: Room) -> None:
    room.write_lines(*GOOD_LINES, {"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "a"}]})


def message(room: Room, **turn: str) -> None:
    room.write_lines(*GOOD_LINES, {"messages": [turn, {"role": "assistant", "content": "yes"}]})


def all_masked(room: Room) -> None:
    masked = [conversation(number) for number in range(12)]
    for one in masked:
        one["messages"][1]["weight"] = 0
    room.write_lines(*masked)


def endless_turns(room: Room) -> None:
    room.template("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    room.set("packing.separator", "none")


def prompt_fills_the_row(room: Room) -> None:
    long = [conversation(number) for number in range(12)]
    for one in long:
        one["messages"][0]["content"] += " the dog" * 200
    room.write_lines(*long)
    room.set("packing.long_documents", "truncate")
    room.take_out("packing.overlap")
    room.take_out("data.eval")  # of equal prompts' examples none might be held out


def document_too_long(room: Room) -> None:
    room.write_lines(*GOOD_LINES, conversation(12, "the lazy dog " * 200))
    room.set("packing.long_documents", "error")
    room.take_out("packing.overlap")


def mostly_empty_answers(room: Room) -> None:
    room.write_lines(*({"prompt": f"{number}?", "completion": "b" * (number % 2)} for number in range(20)))


def other_weights(room: Room) -> None:
    room.weights.rename(room.model / "pytorch_model.bin")


def missing_shards(room: Room) -> None:
    room.shard()
    for shard in room.model.glob("model-*"):
        shard.unlink()


def truncated_shard(room: Room) -> None:
    room.shard()
    shard = next(room.model.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-100])


def lfs_pointer(room: Room) -> None:
    room.weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n")


def flip_to_nan(room: Room) -> None:
    data = bytearray(room.weights.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    start = 8 + length + header["model.norm.weight"]["data_offsets"][0]
    data[start : start + 4] = struct.pack("<f", float("nan"))
    room.weights.write_bytes(data)


def tensor_gone(room: Room) -> None:
    room.edit_weights(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def gone_from_shard(room: Room) -> None:
    room.shard()
    shard = room.model / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    tensors.pop(min(tensors))
    save_file(tensors, shard, {"format": "pt"})


def changed_after_release(room: Room) -> None:
    (room.model / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")


def long_rows(room: Room) -> None:
    room.set("packing.sequence_length", 512)
    room.set("training.micro_batch_size", 1)


def broken_config(room: Room) -> None:
    (room.model / "config.json").write_text('{"model_type": "llama",\n "hidden_size": }')


def no_chat_template(room: Room) -> None:
    (room.model / "chat_template.jinja").unlink(missing_ok=True)
    room.edit_json("tokenizer_config.json", chat_template=None)


def no_eos(room: Room) -> None:
    room.edit_json("tokenizer_config.json", eos_token=None)


def broken_tokenizer(room: Room) -> None:
    (room.model / "tokenizer.json").write_text("{")


def foreign_tokenizer(room: Room) -> None:
    values = json.loads((room.model / "tokenizer.json").read_text())
    values["added_tokens"].append({**values["added_tokens"][-1], "id": 300, "content": "<|new|>"})
    (room.model / "tokenizer.json").write_text(json.dumps(values))


def output_is_a_file(room: Room) -> None:
    (room.folder / "run").write_text("precious")


def output_below_a_file(room: Room) -> None:
    (room.folder / "taken").write_text("precious")
    room.set("output_dir", "taken/run")


def output_is_others(room: Room) -> None:
    (room.folder / "run").mkdir()
    (room.folder / "run" / "thesis.tex").write_text("precious")


def cache_below_a_file(room: Room) -> None:
    (room.folder / "taken").write_text("precious")
    room.monkeypatch.setenv("TRAINKIT_CACHE", "taken/cache")


def without_bitsandbytes(room: Room, key: str, value: str) -> None:
    room.without_package("bitsandbytes")
    room.set(key, value)


def without_tracker(room: Room) -> None:
    room.without_package("wandb")
    room.set("tracking", ["wandb"])


DATA_CASES = [
    Case("data file missing", without_data, 3, r"train\.jsonl: no such file.*trian\.jsonl"),
    Case("folder without data", folder_without_data, 3, r"empty is a folder without data files .*notes\.pdf"),
    Case("empty file", lambda room: room.data.write_text(""), 3, r"train\.jsonl has 0 examples"),
    Case("blank lines only", lambda room: room.data.write_text("\n\n"), 3, r"train\.jsonl has 0 examples"),
    Case("broken JSON at line 10,001", broken_line, 3, r"train\.jsonl:10001: .*content: 1"),
    Case(
        "last line cut off",
        lambda room: room.data.write_text("\n".join(GOOD_LINES)[:-20]),
        3,
        r"train\.jsonl:12: the last line is cut off.*copy the file again",
    ),
    Case(
        "a byte that is not UTF-8",
        lambda room: room.data.write_bytes("\n".join(GOOD_LINES).replace("lazy", "l\xe4zy").encode("latin-1")),
        3,
        r"train\.jsonl:1: byte 0xe4 at offset [0-9]+ is not UTF-8",
    ),
    Case(
        "UTF-16",
        lambda room: room.data.write_text("\n".join(GOOD_LINES), encoding="utf-16"),
        3,
        r"train\.jsonl is UTF-16, not UTF-8; convert it",
    ),
    Case(
        "a key twice in one object",
        lambda room: room.write_lines(*GOOD_LINES, '{"messages": [], "messages": []}'),
        3,
        r"train\.jsonl:13: the key .?messages.? stands twice",
    ),
    Case("NaN in JSON", lambda room: room.write_lines(*GOOD_LINES, '{"messages": NaN}'), 3, r"train\.jsonl:13: NaN"),
    Case("truncated parquet", broken_parquet, 3, r"train\.parquet is no intact parquet file \(104 bytes\)"),
    Case(
        "unknown columns",
        lambda room: room.write_lines({"x": "a", "y": "b"}, {"x": "c", "y": "d"}),
        3,
        r"train\.jsonl: no format fits the columns .?x.?, .?y",
    ),
    Case(
        "missing column",
        lambda room: room.set("data.train", {"path": "train.jsonl", "format": "text"}),
        3,
        r"train\.jsonl: text needs a column `text`, and there are messages",
    ),
    Case("mixed schemas", mixed_schemas, 3, r"train\.jsonl:7: no column .?messages.?, only prompt, completion"),
    Case("mixed kinds", mixed_kinds, 3, r"train\.jsonl:7: a string, but the first examples were of another kind"),
    Case("a number for a text", wrong_type, 3, r"train\.jsonl:151: `text` must be text, not "),
    Case("a number for a message", content_is_a_number, 3, r"train\.jsonl:13.* message 1.*content.*number"),
    Case(
        "unknown role",
        lambda room: message(room, role="asistant", content="x"),
        3,
        r"train\.jsonl:13.* message 1: unknown role .?asistant.?; roles are .*did you mean .?assistant",
    ),
    Case(
        "rol for role",
        lambda room: message(room, rol="user", content="x"),
        3,
        r"train\.jsonl:13.* message 1 has no `role`, only rol, content",
    ),
    Case("all masked", all_masked, 3, r"train\.jsonl:1: 0 of [0-9,]+ tokens .* are trained", example_shown=True),
    Case(
        "turns without an end",
        endless_turns,
        3,
        r"train\.jsonl:1: the end of 12 trained turns is not trained.*packing\.separator: eos",
        example_shown=True,
    ),
    Case(
        "prompts fill their rows",
        prompt_fills_the_row,
        3,
        r"of [0-9]+ documents none has a trained token",
    ),
    Case(
        "a document too long",
        document_too_long,
        3,
        r"train\.jsonl:13: [0-9]+ tokens, and packing\.sequence_length is 128.*long_documents: split",
    ),
    Case("half of the answers empty", mostly_empty_answers, 3, r"10 of 20 .*empty completion: 10.*max_dropped"),
    Case(
        "a data set of the hub without network",
        lambda room: room.set("data.train", "owner/data"),
        3,
        r"owner/data is no local file or folder.*hub cannot be reached",
    ),
]

MODEL_CASES = [
    Case("folder missing", lambda room: room.set("model.name", "./modle"), 4, r"no such folder: \./modle.*mean model"),
    Case("home of nobody", lambda room: room.set("model.name", "~nobody-here/m"), 4, r"no such folder: ~nobody-here/m"),
    Case("name is a file", lambda room: room.set("model.name", "train.jsonl"), 4, r"name: train\.jsonl is a file"),
    Case(
        "hub id without network",
        lambda room: room.set("model.name", "owner/model"),
        4,
        r"model\.name: owner/model .*cannot be fetched from the hub.*local folder",
    ),
    Case("no weights", lambda room: room.weights.unlink(), 4, r"model: no weights: neither model\.safetensors"),
    Case("only unsafe weights", other_weights, 4, r"model: holds pytorch_model\.bin but no model\.safetensors"),
    Case("missing shards", missing_shards, 4, r"2 of 2 weight files are missing: model-00001.*, model-00002"),
    Case("truncated shard", truncated_shard, 4, r"model-00002-of-00002\.\w+: expected [0-9,]+ bytes, there are"),
    Case("LFS pointer", lfs_pointer, 4, r"model\.safetensors: this is a Git LFS pointer.*git lfs pull"),
    Case("no safetensors file", lambda room: room.weights.write_bytes(b"\x01"), 4, r"safetensors: cut off: 1 byte"),
    Case("a tensor that the index promises", gone_from_shard, 4, r"model-00001.*index\.json says it holds .*does not"),
    Case("another SHA-256", changed_after_release, 4, r"model\.safetensors: SHA-256 is .*recorded is 000000000000"),
    Case(
        "NaN weight",
        flip_to_nan,
        4,
        r"model\.safetensors: `model\.norm\.weight` has 1 values that are not finite",
        in_weights=True,
    ),
    Case(
        "tensor missing",
        tensor_gone,
        4,
        r"1 weights are in none of the files: model\.layers\.1\.mlp\.up_proj\.weight",
        in_weights=True,
    ),
    Case(
        "another shape than config.json says",
        lambda room: room.edit_json("config.json", intermediate_size=96),
        4,
        r"`model\.layers\.0\.mlp\.\w+\.weight` has shape \(.*64.*\) in the files, config\.json asks for \(.*96.*\)",
        in_weights=True,
    ),
    Case("config.json broken", broken_config, 4, r"config\.json:2: not valid JSON"),
    Case("config.json missing", lambda room: (room.model / "config.json").unlink(), 4, r"model: no config\.json"),
    Case(
        "unknown architecture",
        lambda room: room.edit_json("config.json", model_type="lama"),
        4,
        r"does not know model_type `lama`; did you mean `llama`",
    ),
    Case(
        "sequence_length beyond the positions",
        long_rows,
        4,
        rf"packing\.sequence_length: 512 is beyond the {POSITIONS} positions",
    ),
    Case("no tokenizer", lambda room: (room.model / "tokenizer.json").unlink(), 4, r"model: no tokenizer: copy"),
    Case("tokenizer broken", broken_tokenizer, 4, r"model: its tokenizer cannot be loaded"),
    Case("no chat template", no_chat_template, 4, r"has no chat template; set data\.chat_template to chatml or plain"),
    Case("no eos for the separator", no_eos, 4, r"no end-of-sequence token; set packing\.separator"),
    Case("more tokens than embeddings", foreign_tokenizer, 4, r"'<\|new\|>' has id 300, .* embedding has 300 rows"),
    Case(
        "template is not Jinja",
        lambda room: room.template("{% for m in messages %}\n{{ m['content'] }"),
        4,
        r"chat\.jinja:2: the chat template is not valid Jinja",
    ),
    Case(
        "template raises",
        lambda room: room.template("{{ raise_exception('roles must alternate') }}"),
        4,
        r"train\.jsonl:1: chat\.jinja: .*roles must alternate.*data\.chat_template",
    ),
    Case(
        "template escapes",
        lambda room: room.template("{{ messages.__class__.__base__.__subclasses__() }}"),
        4,
        r"train\.jsonl:1: chat\.jinja: it reaches for `__class__`, which the sandbox",
    ),
    Case(
        "template writes without end",
        lambda room: room.template("{% for a in range(90000) %}{{ 'x' * 1000 }}{% endfor %}"),
        4,
        r"train\.jsonl:1: chat\.jinja: it writes far more than it was given",
    ),
    Case(
        "template loses what the user said",
        lambda room: room.template(
            "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}<|end|>{% endfor %}"
        ),
        4,
        r"train\.jsonl:1: chat\.jinja: it loses .*0: what is it\?.* of message 1 \(user\)",
    ),
]

RECIPE_CASES = [
    Case("learning rate NaN", lambda room: room.set("training.learning_rate", float("nan")), 2, r"learning_rate"),
    Case("learning rate infinite", lambda room: room.set("training.learning_rate", float("inf")), 2, r"learning_rate"),
    Case("learning rate 0", lambda room: room.set("training.learning_rate", 0), 2, r"learning_rate: must be above 0"),
    Case("learning rate negative", lambda room: room.set("training.learning_rate", -1e-4), 2, r"be above 0; got -"),
    Case("no steps", lambda room: room.set("training.steps", 0), 2, r"training\.steps: must be at least 1; got 0"),
    Case("micro-batch 0", lambda room: room.set("training.micro_batch_size", 0), 2, r"training\.micro_batch_size"),
    Case("alpha NaN", lambda room: room.set("adapter.alpha", float("nan")), 2, r"adapter\.alpha"),
    Case("rank 0", lambda room: room.set("adapter.r", 0), 2, r"adapter\.r: must be at least 1; got 0"),
    Case("dropout 1", lambda room: room.set("adapter.dropout", 1.0), 2, r"adapter\.dropout: .*below 1"),
    Case("grad norm 0", lambda room: room.set("training.max_grad_norm", 0), 2, r"max_grad_norm: must be above 0"),
    Case("save every 0 steps", lambda room: room.set("checkpoints.every_steps", 0), 2, r"checkpoints\.every_steps"),
    Case(
        "too few tokens for a step",
        lambda room: room.set("training.tokens_per_step", 64),
        2,
        r"tokens_per_step: 64 is no multiple of `packing\.sequence_length` 128; the smallest is 128",
    ),
    Case("unknown optimizer", lambda room: room.set("training.optimizer", "adamv"), 2, r"optimizer.*adamw"),
    Case("unknown key", lambda room: room.set("training.learning_rte", 1e-3), 2, r"learning_rte.*learning_rate"),
    Case(
        "separator that is no token",
        lambda room: room.set("packing.separator", "<|sep|>"),
        2,
        r"packing\.separator: '<\|sep\|>' is not in the vocabulary",
    ),
    Case(
        "template that is not there",
        lambda room: room.set("data.chat_template", "chatlm"),
        2,
        r"data\.chat_template: chatlm: No such file.*chatml, plain",
    ),
    Case(
        "target that matches nothing",
        lambda room: room.set("adapter.target_modules", ["query_key_value"]),
        2,
        r"adapter\.target_modules: `query_key_value` matches no module; .*there are: .*q_proj",
    ),
    Case(
        "one of two targets misspelt",
        lambda room: room.set("adapter.target_modules", ["q_proj", "v_prj"]),
        2,
        r"adapter\.target_modules: `v_prj` matches no module; did you mean `v_proj`",
    ),
    Case(
        "rank beyond the matrix",
        lambda room: room.set("adapter.r", 64),
        2,
        r"adapter\.r: 64 is more than \d+, the full rank of model\.layers\.0\.\S+ \(.*\); set r: \d+ or less",
    ),
    Case(
        "nothing left to adapt",
        lambda room: room.set(
            "adapter.exclude_modules", [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        ),
        2,
        r"adapter: exclude_modules leaves no module to adapt",
    ),
    Case("output_dir is not ours", output_is_others, 2, r"output_dir: run is not empty and no run of trainkit's"),
]

MACHINE_CASES = [
    Case("output_dir is a file", output_is_a_file, 5, r"output_dir: run is a file; name a new folder"),
    Case("output_dir below a file", output_below_a_file, 5, r"output_dir: taken/run cannot be made: taken is a file"),
    Case("cache below a file", cache_below_a_file, 5, r"cannot write packed data in .*TRAINKIT_CACHE"),
    Case(
        "qlora without bitsandbytes",
        lambda room: without_bitsandbytes(room, "adapter.type", "qlora"),
        5,
        r"adapter\.type: qlora: needs bitsandbytes, .*pip install 'trainkit\[qlora\]'",
    ),
    Case(
        "adamw_8bit without bitsandbytes",
        lambda room: without_bitsandbytes(room, "training.optimizer", "adamw_8bit"),
        5,
        r"training\.optimizer: adamw_8bit: needs bitsandbytes, .*pip install 'trainkit\[qlora\]'",
    ),
    Case(
        "tracker not installed",
        without_tracker,
        5,
        r"tracking: wandb is not installed; pip install 'train",
    ),
]

NEEDS_CUDA = [
    Case("flex", lambda room: room.set("model.attention", "flex"), 5, r"model\.attention: flex .*use sdpa or auto"),
    Case("varlen", lambda room: room.set("model.attention", "varlen"), 5, r"model\.attention: .*use sdpa or auto"),
    Case(
        "flash_attention_2",
        lambda room: room.set("model.attention", "flash_attention_2"),
        5,
        r"model\.attention: flash_attention_2 needs CUDA; use sdpa or auto",
    ),
]


def check_refused(case: Case, room: Room, capfd: Said) -> None:
    case.break_it(room)
    room.write_recipe()
    if not case.in_weights:
        room.monkeypatch.setattr("trainkit.training.assembly.load_model", weights_were_read)
    before = content_of(room.folder)
    capfd.readouterr()

    code = room.fine_tune()

    lines = error_lines(capfd, room.folder)
    assert code == case.code, lines
    assert re.search(case.says, lines[0]), lines
    assert len(lines[0]) <= LONGEST_LINE, f"{len(lines[0])} characters: {lines[0]}"
    assert len(lines) == 1 or case.example_shown, lines
    after = content_of(room.folder)
    assert after | {"recipe.yaml": ""} == before | {"recipe.yaml": ""}  # written anew by `fine_tune`, with the same


def named(cases: list[Case]) -> list[Any]:
    return [pytest.param(case, id=case.name.replace(" ", "-")) for case in cases]


EARLY = [case for case in [*DATA_CASES, *MODEL_CASES, *RECIPE_CASES, *MACHINE_CASES] if not case.in_weights]
LATE = [case for case in [*MODEL_CASES, *RECIPE_CASES] if case.in_weights]


@pytest.mark.parametrize("case", named(EARLY))
def test_refused_before_a_weight_is_read(case: Case, room: Room, capfd: Said) -> None:
    check_refused(case, room, capfd)


@pytest.mark.parametrize("case", named(LATE))
def test_refused_once_the_weights_are_read(case: Case, room: Room, capfd: Said) -> None:
    check_refused(case, room, capfd)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can do what is refused elsewhere")
@pytest.mark.parametrize("case", named(NEEDS_CUDA))
def test_refused_where_there_is_no_gpu(case: Case, room: Room, capfd: Said) -> None:
    check_refused(case, room, capfd)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sixteen_bits_on_a_cpu_are_done_and_said(precision: str, room: Room, capfd: Said) -> None:
    room.set("precision", precision)
    assert room.fine_tune() == 0
    assert re.search(rf"{precision} \(as the recipe says.*compute {precision}", capfd.readouterr().out)


# Runs that exist


@pytest.fixture
def finished(room: Room, cache: Path, capfd: Said) -> Room:
    """A run that is over. It ran once; each test has a copy."""
    kept, folder = cache.with_name("finished-run"), room.folder / "run"
    if not kept.exists():
        assert room.fine_tune() == 0, capfd.readouterr().err
        folder.rename(kept)
    shutil.copytree(kept, folder)
    return room


def test_the_good_input_is_good(finished: Room) -> None:
    assert (finished.folder / "run" / "final" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("training.seed", 43, r"differs in training\.seed: 42 → 43"),
        ("training.micro_batch_size", 2, r"differs in training\.micro_batch_size: 4 → 2"),
        ("training.steps", 9, r"differs in training\.steps: 2 → 9"),
    ],
)
def test_another_recipe_does_not_continue_a_run(finished: Room, capfd: Said, key: str, value: Any, says: str) -> None:
    check_refused(
        Case(key, lambda room: room.set(key, value), 6, rf"run: holds a run that {says}.*--fresh"), finished, capfd
    )


def test_other_data_does_not_continue_a_run(finished: Room, capfd: Said) -> None:
    case = Case(
        "data", lambda room: room.write_lines(*GOOD_LINES[:-1]), 6, r"run: holds a run that differs in the data"
    )
    check_refused(case, finished, capfd)


def test_another_base_model_does_not_continue_a_run(finished: Room, capfd: Said) -> None:
    def change(room: Room) -> None:
        room.edit_json("config.json", rms_norm_eps=1e-3)

    check_refused(Case("base", change, 6, r"run: holds a run that differs in the base model"), finished, capfd)


def test_a_damaged_record_does_not_continue_a_run(finished: Room, capfd: Said) -> None:
    def damage(room: Room) -> None:
        (room.folder / "run" / "run.json").write_text("{")

    check_refused(Case("record", damage, 6, r"run/run\.json: damaged .*--fresh"), finished, capfd)


def test_a_second_process_is_kept_out(room: Room, capfd: Said) -> None:
    (room.folder / "run").mkdir()
    with (room.folder / "run" / "run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        case = Case("lock", lambda _: None, 2, r"output_dir: another trainkit process is running in run; wait for it")
        check_refused(case, room, capfd)


def test_a_refusal_after_fresh_leaves_the_earlier_run_in_place(finished: Room, capfd: Said) -> None:
    finished.set("adapter.target_modules", ["nowhere"])
    before = content_of(finished.folder / "run")
    assert finished.fine_tune("--fresh") == 2
    assert len(error_lines(capfd, finished.folder)) == 1
    assert content_of(finished.folder / "run") == before
    assert not (finished.folder / "run.1").exists()


# Training that leaves the numbers


@pytest.mark.parametrize(("steps", "held_out"), [(1, 0.3), (4, 0.3), (4, None), (1, None)])
def test_an_absurd_learning_rate_is_exit_7_and_leaves_no_result(
    room: Room, capfd: Said, steps: int, held_out: float | None
) -> None:
    room.set("training.learning_rate", 1e30)
    room.set("training.steps", steps)
    room.set("checkpoints.every_steps", 1)
    room.set("data.eval", held_out)
    assert room.fine_tune() == 7
    (line,) = error_lines(capfd, room.folder)
    assert re.match(r"(after )?step \d: the .*loss is nan.* lower training\.learning_rate", line, re.IGNORECASE), line
    assert len(line) <= LONGEST_LINE, line
    assert not (room.folder / "run" / "final").exists()
    saved = [*(room.folder / "run").rglob("*.safetensors")]
    assert all(bool(torch.isfinite(one).all()) for path in saved for one in load_file(path).values())


# Looking at data


def test_inspect_data_needs_no_weights(room: Room, capfd: Said) -> None:
    room.weights.unlink()
    assert run(["inspect-data", room.write_recipe().name]) == 0, capfd.readouterr().err


@pytest.mark.parametrize(
    "case", named([case for case in DATA_CASES if case.name not in {"prompts fill their rows", "a document too long"}])
)
def test_inspect_data_finds_what_is_wrong_with_the_data(case: Case, room: Room, capfd: Said) -> None:
    case.break_it(room)
    code = run(["inspect-data", room.write_recipe().name, "--examples", "1"])
    lines = error_lines(capfd, room.folder)
    if case.name == "half of the answers empty":
        assert code == 0  # it counts what it drops, and shows the count
        return
    assert (code, len(lines) == 1 or case.example_shown) == (3, True), lines
    assert re.search(case.says, lines[0]), lines


# Anything at all

PROCESSOR_SECONDS_FOR_ONE = 20
EXPECTED_CODES = {0, 2, 3, 4, 5}
HOSTILE_IN_RECIPE = [
    b"\t",
    b"\n",
    b"[",
    b"{",
    b"}",
    b": ",
    b"- ",
    b"&a ",
    b"*a",
    b"!!python/object:os.system ",
    b"|",
    b"'",
    b"#",
]
HOSTILE_IN_RECIPE += [b".nan", b"-1", b"1e999", b"null", b"true", b"\x00", b"\xff", b"\xef\xbb\xbf", b"---\n", b"<<: "]
HOSTILE_IN_DATA = [b"\n", b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u0000", b"\\ud800", b"\x00", b"\xff"]
HOSTILE_IN_DATA += [b"\xef\xbb\xbf", b"null", b"NaN", b"1e999", b"9" * 5000, b"[" * 5000, "\u2028🦊e\u0301".encode()]
HOSTILE_IN_DATA += [b"<|end|>", b"<|assistant|>", b"assistant", b"system", b"tool_calls", b"weight", b"name"]

Mutation = tuple[float, int, bytes]


def mutations_with(hostile: list[bytes]) -> st.SearchStrategy[list[Mutation]]:
    """Places in a file (0 to 1), how many bytes are taken out there, and what is put in."""
    inserted = st.sampled_from(hostile) | st.binary(max_size=4)
    return st.lists(st.tuples(st.floats(0, 1), st.integers(0, 60), inserted), min_size=1, max_size=4)


def mutated(content: bytes, mutations: list[Mutation]) -> bytes:
    for share, length, inserted in mutations:
        at = int(share * len(content))
        content = content[:at] + inserted + content[at + length :]
    return content


def check_inspect_data(capfd: Said) -> None:
    capfd.readouterr()
    started = time.process_time()
    code = run(["inspect-data", "recipe.yaml", "--examples", "1"])
    said = capfd.readouterr()
    assert code in EXPECTED_CODES, said.err
    assert "Traceback" not in said.out + said.err
    assert (code != 0) == ("error: " in said.err), said.err
    assert time.process_time() - started < PROCESSOR_SECONDS_FOR_ONE


def check_mutated_recipe(room: Room, capfd: Said, mutations: list[Mutation]) -> None:
    path = room.write_recipe()
    path.write_bytes(mutated(path.read_bytes(), mutations))
    check_inspect_data(capfd)


def check_mutated_data(room: Room, capfd: Said, mutations: list[Mutation]) -> None:
    room.write_recipe()
    room.data.write_bytes(mutated("\n".join(GOOD_LINES[:4]).encode(), mutations))
    check_inspect_data(capfd)


def tries(count: int) -> settings:
    """So many examples; each leaves the room as the next one needs it."""
    return settings(
        max_examples=count, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    )


@tries(30)
@given(mutations=mutations_with(HOSTILE_IN_RECIPE))
def test_no_recipe_makes_a_traceback(room: Room, capfd: Said, mutations: list[Mutation]) -> None:
    check_mutated_recipe(room, capfd, mutations)


@tries(40)
@given(mutations=mutations_with(HOSTILE_IN_DATA))
def test_no_data_makes_a_traceback(room: Room, capfd: Said, mutations: list[Mutation]) -> None:
    check_mutated_data(room, capfd, mutations)


@pytest.mark.long
@tries(2000)
@given(mutations=mutations_with(HOSTILE_IN_RECIPE))
def test_none_of_many_recipes_makes_a_traceback(room: Room, capfd: Said, mutations: list[Mutation]) -> None:
    check_mutated_recipe(room, capfd, mutations)


@pytest.mark.long
@tries(2000)
@given(mutations=mutations_with(HOSTILE_IN_DATA))
def test_none_of_many_data_files_makes_a_traceback(room: Room, capfd: Said, mutations: list[Mutation]) -> None:
    check_mutated_data(room, capfd, mutations)
