from __future__ import annotations

import json
import shutil
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainkit.errors import MachineError, ModelError
from trainkit.model import checking
from trainkit.model.checking import check_model, check_vocabulary, read_header, sha256, stored_dtype
from trainkit.model.loading import check_extras, load_model, load_tokenizer, tokenizer_sentences
from trainkit.model.locating import SHIPPED_MODELS, ModelLocation, locate_model
from trainkit.recipe.schema import Adapter, Data, Model, Packing, Recipe, Source, Training

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def located(folder: Path) -> ModelLocation:
    return locate_model(Model(name=str(folder)))


def check(folder: Path, sequence_length: int = 64) -> Any:
    return check_model(located(folder), Packing(sequence_length=sequence_length))


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path, count: int) -> None:
    """Split the weights of `folder` into files, as large models come."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for index in range(count):
        name = f"model-{index + 1:05}-of-{count:05}.safetensors"
        part = dict(list(state.items())[index::count])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ---- where a model lies


def test_tiny_is_the_model_of_the_package() -> None:
    location = locate_model(Model(name="tiny"))
    assert location.folder == SHIPPED_MODELS / "tiny"
    assert location.folder.is_absolute()


def test_a_relative_folder_becomes_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    location = locate_model(Model(name="./model"))
    assert location.folder == folder
    assert location.reference == str(folder)
    assert locate_model(Model(name="model")).folder == folder


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-at-all"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        locate_model(Model(name=name))


def test_the_nearest_folder_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match=rf"did you mean {folder}\?"):
        locate_model(Model(name=str(folder.parent / "modle")))


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file; give the folder"):
        locate_model(Model(name=str(folder / "model.safetensors")))


def test_a_hub_id_without_network() -> None:  # conftest sets HF_HUB_OFFLINE
    with pytest.raises(ModelError, match=r"cannot be fetched from the hub.*give a local folder") as caught:
        locate_model(Model(name="nobody/no-such-model"))
    assert "\n" not in str(caught.value)


def hub_error(name: str) -> Exception:
    """The hub client's own error, made as it makes it: with the response of the server."""
    from huggingface_hub import errors

    kind = getattr(errors, name)
    try:
        import httpx2 as http
    except ImportError:
        import httpx as http  # type: ignore[import-not-found, no-redef, unused-ignore]
    response = http.Response(403, request=http.Request("GET", "https://huggingface.co/x/y"))
    error: Exception = kind("first line\nsecond line", response=response)
    return error


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("GatedRepoError", "is gated: accept its terms on https://huggingface.co/x/y"),
        ("RepositoryNotFoundError", "the hub has no model x/y"),
        ("RevisionNotFoundError", "model.revision: x/y has no branch, tag or commit 'v9'"),
        ("HfHubHTTPError", "cannot be fetched from the hub"),
    ],
)
def test_what_the_hub_refuses_becomes_one_line(kind: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise hub_error(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError) as caught:
        locate_model(Model(name="x/y", revision="v9"))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_full_disk_during_a_download_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(MachineError, match="disk is full"):
        locate_model(Model(name="x/y"))


def test_a_hub_model_is_known_by_id_and_commit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def give(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", give)
    location = locate_model(Model(name="x/y", revision="main"))
    assert (location.reference, location.revision) == ("x/y", folder.name)
    assert asked["revision"] == "main"
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in patterns)  # nothing that runs code


# ---- what is checked before a weight is read


def test_a_whole_model_passes(folder: Path) -> None:
    assert check(folder, 256).model_type == "llama"


def test_a_row_longer_than_the_positions(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"packing\.sequence_length: 257 is beyond the 256 positions.*set it to 256"):
        check(folder, 257)


def test_config_json_is_missing_broken_or_of_an_unknown_kind(folder: Path) -> None:
    config = folder / "config.json"
    text = config.read_text()
    config.write_text('{\n"model_type": }')
    with pytest.raises(ModelError, match=r"config\.json:2: not valid JSON"):
        check(folder)
    config.write_text("[]")
    with pytest.raises(ModelError, match="must be a JSON object"):
        check(folder)
    config.write_text("{}")
    with pytest.raises(ModelError, match="no `model_type`"):
        check(folder)
    config.write_text(text)
    edit_json(config, model_type="lama")
    with pytest.raises(ModelError, match="does not know model_type `lama`; did you mean `llama`"):
        check(folder)
    config.unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        check(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "vit", "architectures": None},
    ],
)
def test_only_causal_language_models(folder: Path, values: dict[str, Any]) -> None:
    edit_json(folder / "config.json", **values)
    with pytest.raises(ModelError, match="is not a causal language model"):
        check(folder)


def test_quantised_weights_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="quantised already"):
        check(folder)


def test_a_config_that_transformers_refuses(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers="two")
    with pytest.raises(ModelError) as caught:
        check(folder)
    assert "\n" not in str(caught.value)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights: neither model\.safetensors nor"):
        check(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only safetensors weights are read.*save_pretrained"):
        check(folder)


def test_shards_without_their_index(folder: Path) -> None:
    shard(folder, 2)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match="copy the index too"):
        check(folder)


def test_all_missing_shards_at_once(folder: Path) -> None:
    shard(folder, 3)
    for index in (1, 3):
        (folder / f"model-0000{index}-of-00003.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"2 of 3 weight files are missing: model-00001-of-00003.*model-00003-of-00003"
    ):
        check(folder)


def test_a_sharded_model_loads(folder: Path) -> None:
    shard(folder, 3)
    check(folder)
    load_model(located(folder), None, torch.float32, CPU)


def test_an_index_that_leads_out_of_the_folder(folder: Path) -> None:
    shard(folder, 2)
    edit_json(folder / "model.safetensors.index.json", weight_map={"x": "../model.safetensors"})
    with pytest.raises(ModelError, match="is not the name of a safetensors file in this folder"):
        check(folder)


def test_a_tensor_that_its_shard_does_not_hold(folder: Path) -> None:
    shard(folder, 2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.extra.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(ModelError, match=r"says it holds model\.extra\.weight, and it does not"):
        check(folder)


def test_a_truncated_file_names_both_sizes(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(
        ModelError, match=f"expected {len(whole):,} bytes, there are {len(whole) - 100:,}; the file is cut"
    ):
        check(folder)
    path.write_bytes(whole[:20])
    with pytest.raises(ModelError, match="cut off or no safetensors file"):
        check(folder)
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="cut off: 0 bytes"):
        check(folder)
    path.write_bytes(whole + b"x")
    with pytest.raises(ModelError, match="the file is damaged"):
        check(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_git_lfs_pointer(folder: Path, name: str) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    with pytest.raises(ModelError, match=r"Git LFS pointer.*git lfs pull"):
        check(folder)


def test_a_header_that_is_no_json(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"oops")
    with pytest.raises(ModelError, match="header is damaged"):
        check(folder)


def test_headers_tell_what_the_library_reads(folder: Path) -> None:
    stored = read_header(folder / "model.safetensors")
    state = load_file(folder / "model.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {n: tuple(t.shape) for n, t in state.items()}
    assert stored_dtype(located(folder)) == torch.float32


def test_a_flipped_bit_is_found_where_digests_are_recorded(folder: Path) -> None:
    path = folder / "model.safetensors"
    (folder / checking.DIGESTS).write_text(f"{sha256(path)}  {path.name}\n")
    check(folder)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"SHA-256 is .* recorded is .*: the file changed"):
        check(folder)


def test_a_flipped_bit_is_found_in_the_hubs_cache(folder: Path) -> None:
    snapshot = folder.parent / "cache" / "snapshots" / "main"
    shutil.copytree(folder, snapshot)
    folder, path = snapshot, snapshot / "model.safetensors"
    blob = folder.parent.parent / "blobs" / sha256(path)  # the cache names its files by their SHA-256 and links to them
    blob.parent.mkdir()
    path.rename(blob)
    path.symlink_to(blob)
    check(folder)
    content = bytearray(blob.read_bytes())
    content[-3] ^= 1
    blob.write_bytes(content)
    with pytest.raises(ModelError, match="SHA-256"):
        check(folder)


# ---- tokenizers


def test_the_tokenizers_own_pad_is_kept(folder: Path) -> None:
    tokenizer = load_tokenizer(located(folder))
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.chat_template
    assert "the tokenizer's own" in tokenizer_sentences(located(folder), tokenizer)[0]


@pytest.mark.parametrize("pad", [None, "<|end|>"])
def test_a_spare_token_pads_where_pad_is_missing_or_eos(folder: Path, pad: str | None) -> None:
    edit_json(folder / "tokenizer_config.json", pad_token=pad)
    tokenizer = load_tokenizer(located(folder))
    assert tokenizer.pad_token == "<|pad|>"  # it is named so in the vocabulary, and nothing else uses it
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert "chosen" in tokenizer_sentences(located(folder), tokenizer)[0]


def test_unk_pads_where_there_is_no_spare_token(material: Path) -> None:
    location = located(material / "models/stories260K")
    tokenizer = load_tokenizer(location)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<unk>", 0)
    assert "pad token <unk> (id 0), chosen" in tokenizer_sentences(location, tokenizer)[0]


def test_eos_pads_only_where_there_is_nothing_else(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    text = (folder / "tokenizer.json").read_text().replace("<|pad|>", "<|first|>")
    (folder / "tokenizer.json").write_text(text)
    tokenizer = load_tokenizer(located(folder))
    assert tokenizer.pad_token == tokenizer.eos_token
    assert "eos: there is no spare token" in tokenizer_sentences(located(folder), tokenizer)[0]


def test_tokenizer_json_wins_over_a_class_that_rebuilds_it(material: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = tmp_path / "model"
    folder.mkdir()
    for path in (material / "models/stories260K").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    location = located(folder)
    tokenizer = load_tokenizer(location)
    text = "  Once upon a time </s>  there was"
    assert tokenizer(text).input_ids == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert any("LlamaTokenizer would cut text differently" in line for line in tokenizer_sentences(location, tokenizer))


def test_a_chat_template_in_a_file_of_its_own(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    tokenizer = load_tokenizer(located(folder))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello!"


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer: copy tokenizer\.json"):
        load_tokenizer(located(folder))


def test_a_broken_tokenizer_is_one_line(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"broken": ')
    with pytest.raises(ModelError, match=r"tokenizer\.json:1: not valid JSON") as caught:
        load_tokenizer(located(folder))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_embedding(folder: Path) -> None:
    config = check(folder)
    tokenizer = load_tokenizer(located(folder))
    check_vocabulary(tokenizer, config)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match=r"token '<new>' has id 300, but the model's embedding has 300 rows"):
        check_vocabulary(tokenizer, config)


# ---- weights


def test_full_fine_tuning_holds_fp32_whatever_is_stored(folder: Path) -> None:
    edit_weights(folder, lambda state: state.update({n: t.bfloat16() for n, t in state.items()}))
    loaded = load_model(located(folder), None, torch.bfloat16, CPU)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.config.use_cache
    assert "stored as bfloat16, held as float32" in loaded.sentences[0]


def test_the_frozen_base_has_the_dtype_of_the_plan(folder: Path) -> None:
    loaded = load_model(located(folder), Adapter(), torch.bfloat16, CPU)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_loading_writes_nothing_to_the_terminal(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit_weights(folder, lambda state: state.update(extra=torch.ones(3)))
    loaded = load_model(located(folder), None, torch.float32, CPU)
    assert "1 tensors of the files have no place in the model: extra" in loaded.sentences[1]
    assert capfd.readouterr() == ("", "")


def test_a_weight_missing_from_the_index(folder: Path) -> None:
    shard(folder, 2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    gone = "model.layers.1.mlp.up_proj.weight"
    path = folder / weight_map.pop(gone)
    state = load_file(path)
    del state[gone]
    save_file(state, path, metadata={"format": "pt"})
    edit_json(index, weight_map=weight_map)
    check(folder)  # the files agree with their index
    with pytest.raises(ModelError, match=f"1 weights are in none of the files: {gone}"):
        load_model(located(folder), None, torch.float32, CPU)


def test_another_shape_than_config_json_says(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=310)
    with pytest.raises(ModelError, match=r"has shape \(300, 32\) in the files, config.json asks for \(310, 32\)"):
        load_model(located(folder), None, torch.float32, CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(folder: Path, value: float) -> None:
    edit_weights(folder, lambda state: state["model.norm.weight"][3:5].fill_(value))
    with pytest.raises(ModelError, match=r"model\.safetensors: `model\.norm\.weight` has 2 values that are not finite"):
        load_model(located(folder), Adapter(), torch.bfloat16, CPU)


def test_weights_beyond_fp16(folder: Path) -> None:
    edit_weights(folder, lambda state: state["model.norm.weight"][0].fill_(1e6))
    with pytest.raises(ModelError, match="1 values beyond the range of float16; set precision: bf16 or fp32"):
        load_model(located(folder), Adapter(), torch.float16, CPU)
    load_model(located(folder), Adapter(), torch.bfloat16, CPU)


def test_activation_checkpointing_gives_the_same_gradients(folder: Path) -> None:
    gradients = []
    for recompute in (False, True):
        model = load_model(located(folder), None, torch.float32, CPU, None, recompute).model.train()
        calls = 0

        def count(*args: object) -> None:
            nonlocal calls
            calls += 1

        model.model.layers[0].mlp.register_forward_pre_hook(count)
        ids_RT = torch.arange(20)[None]
        model(input_ids=ids_RT, labels=ids_RT).loss.backward()
        assert calls == (2 if recompute else 1)  # once more in the backward pass
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


# ---- 4 bit


def recipe(**adapter: Any) -> Recipe:
    return Recipe(
        model=Model(name="tiny"),
        adapter=Adapter(**adapter),
        data=Data(train=(Source(path="x.jsonl"),)),
        training=Training(steps=1),
        output_dir="runs/x",
    )


def test_a_missing_extra_is_said_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MachineError, match=r"adapter\.type: qlora: needs bitsandbytes.*pip install 'trainkit\[qlora\]'"
    ):
        check_extras(recipe(type="qlora"))
    check_extras(recipe())


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra [qlora]")
@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")
def test_a_4_bit_base_computes_with_its_dequantised_weights(model_for_4_bit: Path) -> None:
    import bitsandbytes as bnb

    model = load_model(located(model_for_4_bit), Adapter(type="qlora"), torch.float32, CPU).model
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert layer.weight.dtype == torch.uint8
    x_RD = torch.randn(3, 64)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(layer(x_RD), x_RD @ weight.T, rtol=1e-4, atol=1e-5)
    stored = load_file(model_for_4_bit / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert 0 < float((weight - stored).abs().max()) < 0.2 * float(stored.abs().max())


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra [qlora]")
@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")
def test_4_bit_weights_that_are_decoded_wrongly_are_refused(
    model_for_4_bit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes import functional

    right = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda packed, state: right(packed, state).flip(0))
    with pytest.raises(MachineError, match=r"adapter\.type: qlora: .* layers with 64 inputs wrongly on this processor"):
        load_model(located(model_for_4_bit), Adapter(type="qlora"), torch.float32, CPU)
