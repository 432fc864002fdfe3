"""Models, tokenizers and chat templates that cannot be used."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file

from tests.faults.bad_input.room import POSITIONS, Case, Room, both, given


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
    Case("tokenizer broken", broken_tokenizer, 4, r"model/tokenizer\.json:1: not valid JSON .*; restore the file"),
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


def config(**changes: object) -> Callable[[Room], object]:
    return lambda room: room.edit_json("config.json", **changes)


def tokenizer_config(**changes: object) -> Callable[[Room], object]:
    return lambda room: room.edit_json("tokenizer_config.json", **changes)


def written(name: str, content: str | bytes) -> Callable[[Room], object]:
    """A file of the model folder, of these very bytes."""
    data = content.encode() if isinstance(content, str) else content
    return lambda room: (room.model / name).write_bytes(data)


def index(weight_map: object) -> Callable[[Room], object]:
    """Shards whose index says something else."""

    def write(room: Room) -> None:
        room.shard()
        (room.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def one_shard_missing(room: Room) -> None:
    room.shard()
    (room.model / "model-00002-of-00002.safetensors").unlink()


def index_missing(room: Room) -> None:
    room.shard()
    (room.model / "model.safetensors.index.json").unlink()


def cut_off(room: Room) -> None:
    room.weights.write_bytes(room.weights.read_bytes()[:-1000])


def longer(room: Room) -> None:
    room.weights.write_bytes(room.weights.read_bytes() + b"more")


def flip_a_bit(room: Room) -> None:
    """One bit of the weights, after their sum was recorded."""
    data = bytearray(room.weights.read_bytes())
    (room.model / "SHA256SUMS").write_text(f"{hashlib.sha256(data).hexdigest()}  model.safetensors\n")
    data[-5] ^= 1
    room.weights.write_bytes(data)


def header(content: bytes) -> Callable[[Room], object]:
    return lambda room: room.weights.write_bytes(struct.pack("<Q", len(content)) + content + bytes(8))


def whole_numbers(room: Room) -> None:
    save_file({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}, room.weights, {"format": "pt"})


def no_tensors(room: Room) -> None:
    save_file({}, room.weights, {"format": "pt"})


def infinite_weight(room: Room) -> None:
    room.edit_weights(lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(float("inf")))


def template_folder(room: Room) -> None:
    (room.folder / "chat.jinja").mkdir()
    room.set("data.chat_template", "chat.jinja")


def template_in_latin_1(room: Room) -> None:
    (room.folder / "chat.jinja").write_bytes("{# gr\xfcn #}".encode("latin-1"))
    room.set("data.chat_template", "chat.jinja")


def no_spare_token(room: Room) -> None:
    """A tokenizer with no token that could pad, and none that could end."""
    room.edit_json("tokenizer_config.json", pad_token=None, eos_token=None, unk_token=None)
    values = json.loads((room.model / "tokenizer.json").read_text())
    for token in values["added_tokens"]:
        token["special"] = False
    (room.model / "tokenizer.json").write_text(json.dumps(values))


MORE_MODEL_CASES = [
    Case(
        "a model in a file of weights",
        given("model.name", "model/model.safetensors"),
        4,
        r"^model\.name: model/model\.safetensors is a file; give the folder that it lies in$",
    ),
    Case(
        "an absolute folder that is missing",
        given("model.name", "/nowhere/at/all"),
        4,
        r"^model\.name: no such folder: /nowhere/at/all; give a folder, a hub id \(owner/name\) or `tiny`$",
    ),
    Case(
        "a name that can be no id",
        given("model.name", "my model!"),
        4,
        r"^model\.name: my model! is neither a folder here nor a hub id \(owner/name\)$",
    ),
    Case(
        "a revision of a folder",
        given("model.revision", "main"),
        2,
        r"^model\.revision: model is a folder, and only models of the hub have revisions; leave it out$",
    ),
    Case(
        "an empty model folder",
        both(lambda room: (room.folder / "m").mkdir(), lambda room: room.set("model.name", "m")),
        4,
        r"^m: no config\.json; is this a model folder\?$",
    ),
    Case(
        "config.json is empty",
        written("config.json", ""),
        4,
        r"^model/config\.json:1: not valid JSON \(Expecting value\); restore the file$",
    ),
    Case(
        "config.json is a list",
        written("config.json", "[]"),
        4,
        r"^model/config\.json: must be a JSON object; restore the file$",
    ),
    Case(
        "config.json in latin-1",
        written("config.json", b'{"a": "\xe4"}'),
        4,
        r"^model/config\.json: cannot be read: 'utf-8' codec.*continuation byte; restore the file$",
    ),
    Case(
        "config.json is a pointer of Git LFS",
        written("config.json", "version https://git-lfs.github.com/spec/v1\n"),
        4,
        r"^model/config\.json: this is a Git LFS pointer, not.*run `git lfs pull` in its folder$",
    ),
    Case(
        "config.json without model_type",
        config(model_type=None),
        4,
        r"^model/config\.json: no `model_type`, so nothing says which architecture this is$",
    ),
    Case(
        "model_type is a number",
        config(model_type=5),
        4,
        r"^model/config\.json: no `model_type`, so nothing says which architecture this is$",
    ),
    Case(
        "code of its own",
        config(model_type="mymodel", auto_map={"AutoConfig": "a.B"}),
        4,
        r"^model/config\.json: model_type `mymodel` needs Python code.*not run from a folder.*OWNER/NAME@COMMIT$",
    ),
    Case(
        "an encoder",
        config(model_type="bert", architectures=["BertForMaskedLM"]),
        4,
        r"^model/config\.json: BertForMaskedLM is not a causal.*that predicts the next token\)$",
    ),
    Case(
        "an encoder and decoder",
        config(model_type="t5", architectures=["T5ForConditionalGeneration"]),
        4,
        r"^model/config\.json: T5ForConditionalGeneration is.*that predicts the next token\)$",
    ),
    Case(
        "quantised weights",
        config(quantization_config={"quant_method": "gptq"}),
        4,
        r"^model/config\.json: the weights are quantised.*\(adapter\.type: qlora quantises it\)$",
    ),
    Case(
        "heads that do not divide",
        config(num_attention_heads=5, num_key_value_heads=5),
        4,
        r"^model/config\.json: The hidden size \(32\) is not a multiple of the.*; restore the file$",
    ),
    Case(
        "a width in words",
        config(hidden_size="wide"),
        4,
        r"^model/config\.json: Field 'hidden_size' expected.*\(value: 'wide'\); restore the file$",
    ),
    Case(
        "a width below 0",
        config(hidden_size=-32),
        4,
        r"^model/config\.json: `hidden_size` is -32, and no model is that small; restore the file$",
    ),
    Case(
        "no layer",
        config(num_hidden_layers=0),
        4,
        r"^model/config\.json: `num_hidden_layers` is 0, and no model is that small; restore the file$",
    ),
    Case(
        "more layers than there are weights",
        config(num_hidden_layers=3),
        4,
        r"^model: 9 weights are in none of the files:.*restore the files or their index$",
        in_weights=True,
    ),
    Case(
        "an unknown activation",
        config(hidden_act="gleu"),
        4,
        r"^model/config\.json: it describes no model: `hidden_act` is 'gleu', which transformers does not know; ",
    ),
    Case(
        "one of two shards missing",
        one_shard_missing,
        4,
        r"^model: 1 of 2 weight files are missing: model-00002-of-00002\.safetensors$",
    ),
    Case(
        "shards without index",
        index_missing,
        4,
        r"^model: holds model-00001-of-00002\.safetensors,.*copy the index too$",
    ),
    Case(
        "an index without weights",
        index({}),
        4,
        r"^model/model\.safetensors\.index\.json: no `weight_map`; copy or download it again$",
    ),
    Case(
        "an index of numbers",
        index({"a": 5}),
        4,
        r"^model/model\.safetensors\.index\.json: `5` is not the name of a safetensors file in this folder$",
    ),
    Case(
        "an index that points out of the folder",
        index({"a": "../../secret.safetensors"}),
        4,
        r"^model/model\.safetensors\.index\.json:.*a safetensors file in this folder$",
    ),
    Case(
        "an index that is a list",
        index([1]),
        4,
        r"^model/model\.safetensors\.index\.json: no `weight_map`; copy or download it again$",
    ),
    Case(
        "a broken index",
        written("model.safetensors.index.json", "{"),
        4,
        r"^model/model\.safetensors\.index\.json:1: not valid.*in double quotes\); restore the file$",
    ),
    Case(
        "weights cut off",
        cut_off,
        4,
        r"^model/model\.safetensors: expected 114,808 bytes,.*cut off: copy or download it again$",
    ),
    Case(
        "weights with more behind",
        longer,
        4,
        r"^model/model\.safetensors: expected 114,808 bytes,.*damaged: copy or download it again$",
    ),
    Case(
        "one bit of the weights",
        flip_a_bit,
        4,
        r"^model/model\.safetensors: SHA-256 is abe5d812a7e1.*,.*written; copy or download it again$",
    ),
    Case(
        "weights of no bytes",
        written("model.safetensors", b""),
        4,
        r"^model/model\.safetensors: cut off: 0 bytes; copy or download it again$",
    ),
    Case(
        "a header that is no JSON",
        header(b"{{{{"),
        4,
        r"^model/model\.safetensors: its safetensors header is damaged; copy or download it again$",
    ),
    Case(
        "a header that is a list",
        header(b"[]"),
        4,
        r"^model/model\.safetensors: its safetensors header is damaged; copy or download it again$",
    ),
    Case(
        "a header without places",
        header(b'{"a": {"dtype": "F32", "shape": [2]}}'),
        4,
        r"^model/model\.safetensors: its safetensors header is damaged; copy or download it again$",
    ),
    Case(
        "a header of another size",
        header(b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}'),
        4,
        r"^model/model\.safetensors: its safetensors header is damaged; copy or download it again$",
    ),
    Case(
        "weights in whole numbers",
        whole_numbers,
        4,
        r"^model: the weights are stored as I8; give a model in fp32, fp16 or bf16$",
    ),
    Case("weights without a tensor", no_tensors, 4, r"^model: the weight files hold no tensor$"),
    Case(
        "an infinite weight",
        infinite_weight,
        4,
        r"^model/model\.safetensors:.*are not finite; restore the model$",
        in_weights=True,
    ),
    Case(
        "tokenizer_config.json broken",
        written("tokenizer_config.json", "{"),
        4,
        r"^model/tokenizer_config\.json:1: not valid JSON.*in double quotes\); restore the file$",
    ),
    Case(
        "tokenizer_config.json is a list",
        written("tokenizer_config.json", "[]"),
        4,
        r"^model/tokenizer_config\.json: must be a JSON object; restore the file$",
    ),
    Case(
        "tokenizer.json of another program",
        written("tokenizer.json", "{}"),
        4,
        r"^model: its tokenizer cannot be loaded: KeyError:.*of the model anew$",
    ),
    Case(
        "no token to pad with",
        no_spare_token,
        4,
        r"^model: the tokenizer has no pad, unk or eos token; name one in tokenizer_config\.json$",
    ),
    Case(
        "an unknown class of tokenizer with code",
        tokenizer_config(tokenizer_class="MyTokenizer", auto_map={"AutoTokenizer": ["a.B", None]}),
        4,
        r"^model: its tokenizer needs Python code .*not run from a folder.*--trust-remote-code OWNER/NAME@COMMIT$",
    ),
    Case(
        "generation_config.json broken",
        written("generation_config.json", "{"),
        4,
        r"^model/generation_config\.json:1: not valid JSON.*in double quotes\); restore the file$",
    ),
    Case(
        "the template is a folder",
        template_folder,
        2,
        r"^data\.chat_template: chat\.jinja: Is a directory; give a \.jinja file or one of chatml, plain$",
    ),
    Case(
        "the template in latin-1",
        template_in_latin_1,
        2,
        r"^data\.chat_template: chat\.jinja: it is not UTF-8; give a \.jinja file or one of chatml, plain$",
    ),
    Case(
        "the template is empty",
        lambda room: room.template(""),
        4,
        r"^train\.jsonl:1: chat\.jinja: it loses '0: what is.*or set another data\.chat_template$",
    ),
    Case(
        "the template names what is not there",
        lambda room: room.template("{{ system_message.text }}"),
        4,
        r"^train\.jsonl:1: chat\.jinja: 'system_message' is.*or set another data\.chat_template$",
    ),
    Case(
        "the template divides by 0",
        lambda room: room.template("{{ 1 / 0 }}"),
        4,
        r"^train\.jsonl:1: chat\.jinja: ZeroDivisionError:.*or set another data\.chat_template$",
    ),
    Case(
        "the template never ends",
        lambda room: room.template("{% for a in range(10**9) %}{% endfor %}"),
        4,
        r"^train\.jsonl:1: chat\.jinja: OverflowError: Range too.*or set another data\.chat_template$",
    ),
    Case(
        "the template takes another file in",
        lambda room: room.template("{% include 'a.jinja' %}"),
        4,
        r"^train\.jsonl:1: chat\.jinja: TypeError: no loader for.*or set another data\.chat_template$",
    ),
]
