from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainkit.errors import DivergedError, MachineError, ModelError, UsageError
from trainkit.model.adapters import attach_adapter
from trainkit.model.attention import choose_attention, install_attention
from trainkit.model.checking import DIGESTS, check_model
from trainkit.model.export import logits_of, save_result, verify_result
from trainkit.model.loading import load_model, load_tokenizer
from trainkit.model.locating import ModelLocation, locate_model
from trainkit.model.merging import merge_adapter
from trainkit.recipe.schema import Adapter, Model, Packing

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU = torch.device("cpu")
IDS_T = list(range(20, 60))
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "target_modules": ("q_proj", "down_proj")},
    "saved modules": {"modules_to_save": ("norm", "lm_head")},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


def located(folder: Path) -> ModelLocation:
    return locate_model(Model(name=str(folder)))


def trained_model(base: Path, adapter: Adapter | None, dtype: torch.dtype = torch.float32) -> Any:
    """A model as a run leaves it: its trained weights have moved."""
    model, _ = attach_adapter(load_model(located(base), adapter, dtype, CPU).model, adapter, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)
    return model.train()


def save(model: Any, base: Path, final: Path, **options: Any) -> tuple[str, ...]:
    facts = {
        "recipe_yaml": "model:\n  name: x\n",
        "ledger_lines": ["read 12"],
        "metrics": {"step": 7, "eval_loss": 1.25},
    }
    return save_result(model, load_tokenizer(located(base)), final, location=located(base), **(facts | options))


def loading_code(card: str) -> str:
    """The one Python block of a model card."""
    (code,) = re.findall(r"^```python\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE)
    return str(code)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=[0o022, 0o077, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def half_model_folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model as most checkpoints come: in bf16."""
    folder = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(located(tiny_model_folder)).save_pretrained(folder)
    return folder


# ---- saving


def test_an_adapter_is_saved_alone(tiny_model_folder: Path, tmp_path: Path) -> None:
    save(trained_model(tiny_model_folder, Adapter(r=4)), tiny_model_folder, tmp_path / "run/final")
    final = tmp_path / "run/final"
    assert {path.name for path in final.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        DIGESTS,
    }
    weights = load_file(final / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    config = json.loads((final / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model_folder)
    assert Path(config["base_model_name_or_path"]).is_absolute()
    assert [path.name for path in final.parent.iterdir()] == ["final"]  # nothing temporary is left


@pytest.mark.usefixtures("umask")
def test_colleagues_can_read_what_the_umask_allows(tiny_model_folder: Path, tmp_path: Path) -> None:
    plain_file, plain_folder = tmp_path / "file", tmp_path / "folder"
    plain_file.touch()
    plain_folder.mkdir()
    save(trained_model(tiny_model_folder, Adapter(r=4)), tiny_model_folder, tmp_path / "final")
    assert {path.stat().st_mode for path in (tmp_path / "final").iterdir()} == {plain_file.stat().st_mode}
    assert (tmp_path / "final").stat().st_mode == plain_folder.stat().st_mode


def test_the_same_weights_give_the_same_files(tiny_model_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(trained_model(tiny_model_folder, Adapter(r=4)), tiny_model_folder, tmp_path / name)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_digests_are_those_of_sha256sum(tiny_model_folder: Path, tmp_path: Path) -> None:
    save(trained_model(tiny_model_folder, None), tiny_model_folder, tmp_path / "final")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", DIGESTS], cwd=tmp_path / "final", check=True)


def test_the_run_s_chat_template_goes_with_the_result(tiny_model_folder: Path, tmp_path: Path) -> None:
    save(trained_model(tiny_model_folder, Adapter(r=4)), tiny_model_folder, tmp_path / "final", chat_template="{{ 1 }}")
    assert AutoTokenizer.from_pretrained(tmp_path / "final").chat_template == "{{ 1 }}"


def test_our_own_earlier_result_is_replaced(tiny_model_folder: Path, tmp_path: Path) -> None:
    save(trained_model(tiny_model_folder, Adapter(r=2)), tiny_model_folder, tmp_path / "final")
    save(trained_model(tiny_model_folder, Adapter(r=4)), tiny_model_folder, tmp_path / "final")
    assert json.loads((tmp_path / "final/adapter_config.json").read_text())["r"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_what_somebody_put_there_is_never_lost(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = trained_model(tiny_model_folder, Adapter(r=4))
    save(model, tiny_model_folder, tmp_path / "final")
    (tmp_path / "final/notes.txt").write_text("precious")
    before = files(tmp_path / "final")
    with pytest.raises(UsageError, match=r"holds notes\.txt, which trainkit did not write; move it away"):
        save(model, tiny_model_folder, tmp_path / "final")
    assert files(tmp_path / "final") == before
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UsageError, match="is no folder"):
        save(model, tiny_model_folder, tmp_path / "file")


def test_nothing_that_is_not_finite_is_saved(tiny_model_folder: Path, tmp_path: Path) -> None:
    for adapter in (None, Adapter(r=4)):
        model = trained_model(tiny_model_folder, adapter)
        weight = next(weight for weight in model.parameters() if weight.requires_grad)
        weight.data[0, 0] = float("nan")
        with pytest.raises(DivergedError, match="is not finite, so nothing was saved"):
            save(model, tiny_model_folder, tmp_path / "final")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_leaves_nothing(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    model = trained_model(tiny_model_folder, Adapter(r=4))
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(MachineError, match=r"the disk is full \([\d,]+ bytes are needed in all\); free some space"):
        save(model, tiny_model_folder, tmp_path / "final")
    assert list(tmp_path.iterdir()) == []


def test_a_full_model_keeps_the_dtype_and_configuration_of_its_checkpoint(
    tiny_model_folder: Path, half_model_folder: Path, tmp_path: Path
) -> None:
    for base, dtype in ((tiny_model_folder, torch.float32), (half_model_folder, torch.bfloat16)):
        final = tmp_path / f"final-{dtype}"
        sentences = save(trained_model(base, None), base, final)
        assert {weight.dtype for weight in load_file(final / "model.safetensors").values()} == {dtype}
        assert "lm_head.weight" not in load_file(final / "model.safetensors")  # tied: written once
        assert any("rounded to bfloat16" in sentence for sentence in sentences) == (dtype == torch.bfloat16)
        config = json.loads((final / "config.json").read_text())
        source = json.loads((base / "config.json").read_text())
        assert config == source
        assert check_model(located(final), Packing(sequence_length=64)).use_cache


def test_a_full_model_that_fp16_cannot_hold_stays_fp32(tiny_model_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "fp16"
    AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float16).save_pretrained(base)
    load_tokenizer(located(tiny_model_folder)).save_pretrained(base)
    model = trained_model(base, None)
    model.model.norm.weight.data[0] = 1e5
    save(model, base, tmp_path / "final")
    assert load_file(tmp_path / "final/model.safetensors")["model.norm.weight"][0] == 1e5
    verify_result(tmp_path / "final", model, IDS_T)


# ---- loading it anew


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_loaded_anew_is_the_same(
    tiny_model_folder: Path, tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    model = trained_model(tiny_model_folder, Adapter(r=4, **VARIANTS[variant]), dtype)
    save(model, tiny_model_folder, tmp_path / "final")
    (sentence,) = verify_result(tmp_path / "final", model, IDS_T)
    assert "loaded anew by plain peft: same weights, the same logits" in sentence


def test_a_full_model_loaded_anew_is_the_same(half_model_folder: Path, tmp_path: Path) -> None:
    model = trained_model(half_model_folder, None)
    save(model, half_model_folder, tmp_path / "final")
    (sentence,) = verify_result(tmp_path / "final", model, IDS_T)
    assert "same weights, the same logits; rounding to bfloat16" in sentence
    assert "rounding to bfloat16 moved them by" in sentence


def test_verification_leaves_the_model_as_it_was(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = trained_model(tiny_model_folder, Adapter(r=4))
    install_attention(model, choose_attention("auto", CPU, model.config))
    before = model.config._attn_implementation
    assert before not in {"sdpa", "eager"}  # the run's own kernel
    save(model, tiny_model_folder, tmp_path / "final")
    verify_result(tmp_path / "final", model, IDS_T)
    assert (model.config._attn_implementation, model.training) == (before, True)


@pytest.mark.parametrize("damage", ["weight", "scale"])
def test_verification_finds_a_result_that_is_not_the_model(
    tiny_model_folder: Path, tmp_path: Path, damage: str
) -> None:
    model = trained_model(tiny_model_folder, Adapter(r=4))
    final = tmp_path / "final"
    save(model, tiny_model_folder, final)
    if damage == "weight":
        weights = load_file(final / "adapter_model.safetensors")
        next(iter(weights.values()))[0, 0] += 1e-6
        save_file(weights, final / "adapter_model.safetensors")
    else:
        config = json.loads((final / "adapter_config.json").read_text())
        (final / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 31}))
    with pytest.raises(
        ModelError, match="is not what the model holds" if damage == "weight" else "answers differently"
    ):
        verify_result(final, model, IDS_T)


def test_plain_peft_gives_the_same_logits_from_another_folder(material: Path, tmp_path: Path) -> None:
    base = material / "models/stories260K"
    model = trained_model(base, Adapter(r=8))
    save(model, base, tmp_path / "final")
    script = (
        "import sys, torch\n"
        "from peft import PeftConfig, PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "config = PeftConfig.from_pretrained('final')\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("
        "config.base_model_name_or_path, attn_implementation='eager'), 'final').eval()\n"
        "from safetensors.torch import save_file\n"
        f"save_file({{'logits': model(torch.tensor([{IDS_T}])).logits.detach()}}, 'logits.safetensors')\n"
        "assert 'trainkit' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)
    theirs = load_file(tmp_path / "logits.safetensors")["logits"]
    assert torch.equal(theirs, logits_of(model, torch.tensor([IDS_T]), torch.float32))


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra [qlora]")
@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")
def test_a_qlora_result_is_verified_on_a_4_bit_base(model_for_4_bit: Path, tmp_path: Path) -> None:
    model = trained_model(model_for_4_bit, Adapter(type="qlora", r=4))
    save(model, model_for_4_bit, tmp_path / "final")
    verify_result(tmp_path / "final", model, IDS_T)
    assert "# A QLoRA adapter on" in (tmp_path / "final/README.md").read_text()


# ---- the model card


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # peft uses names that transformers is about to drop
@pytest.mark.parametrize("adapter", [Adapter(r=4), None])
@pytest.mark.parametrize("template", [True, False])
def test_the_card_s_code_runs(
    tiny_model_folder: Path,
    tmp_path: Path,
    adapter: Adapter | None,
    template: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = Path(tiny_model_folder)
    tokenizer = load_tokenizer(located(base))
    if not template:
        tokenizer.chat_template = None
    save_result(
        trained_model(base, adapter),
        tokenizer,
        tmp_path / "final",
        location=located(base),
        recipe_yaml="text: |\n  ```\n  a fence in the recipe\n  ```\n",
        ledger_lines=["tokens read  12", "trained       5"],
        metrics={"step": 7, "eval_loss_before": 3.5, "eval_loss": 1.25, "best_step": None},
    )
    card = (tmp_path / "final/README.md").read_text()
    code = loading_code(card)
    assert ("apply_chat_template" in code) == template
    monkeypatch.chdir(tmp_path / "final")
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_the_card_states_what_was_done(tiny_model_folder: Path, tmp_path: Path) -> None:
    save(trained_model(tiny_model_folder, Adapter(r=4)), tiny_model_folder, tmp_path / "final")
    card = (tmp_path / "final/README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "base_model": tiny_model_folder.name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["trainkit", "lora"],
    }
    for part in (
        "| steps | 7 |",
        "| evaluation loss after | 1.2500 |",
        "read 12",
        "model:\n  name: x",
        "parameters trained",
    ):
        assert part in card
    assert f"torch {torch.__version__}" in card
    assert str(tiny_model_folder) not in card  # a card is shown to others; this machine's paths are not theirs


# ---- merging


def run_with(
    base: Path, tmp_path: Path, adapter: Adapter | None, dtype: torch.dtype = torch.float32
) -> tuple[Path, Any]:
    model = trained_model(base, adapter, dtype)
    save(model, base, tmp_path / "run/final")
    return tmp_path / "run", model


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_is_adapter_on_base(tiny_model_folder: Path, tmp_path: Path, variant: str) -> None:
    adapter = Adapter(r=4, **VARIANTS[variant])
    run, model = run_with(tiny_model_folder, tmp_path, adapter)
    report = merge_adapter(run)
    assert report.output == run / "merged"
    assert report.merge.relative <= 1e-4
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", attn_implementation="eager")
    ids_RT = torch.tensor([IDS_T])
    torch.testing.assert_close(merged(ids_RT).logits, logits_of(model, ids_RT, torch.float32), rtol=1e-4, atol=1e-4)
    before = load_file(tiny_model_folder / "model.safetensors")
    after = load_file(run / "merged/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(report.changed_tensors) - {"lm_head.weight"}
    if variant == "lora":
        assert changed == {name for name in before if name.endswith("_proj.weight")}
    if variant == "rslora":
        assert changed == {name for name in before if name.endswith(("q_proj.weight", "down_proj.weight"))}
    if variant == "saved modules":
        assert changed >= {"model.norm.weight", "model.embed_tokens.weight"}


def test_a_merge_into_16_bit_reports_what_rounding_costs(half_model_folder: Path, tmp_path: Path) -> None:
    run, _ = run_with(half_model_folder, tmp_path, Adapter(r=4), torch.bfloat16)
    report = merge_adapter(run, tmp_path / "elsewhere")
    assert report.dtype == "bfloat16"
    assert 0 < report.rounding.relative < 2e-2
    assert {w.dtype for w in load_file(tmp_path / "elsewhere/model.safetensors").values()} == {torch.bfloat16}
    assert any("rounded to bfloat16" in sentence for sentence in report.sentences())


def test_a_merge_whose_rounding_costs_too_much_is_refused(
    half_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = run_with(half_model_folder, tmp_path, Adapter(r=4))
    monkeypatch.setattr("trainkit.model.merging.ROUNDING_TOLERANCE", 1e-5)
    with pytest.raises(ModelError, match=r"rounding to torch\.bfloat16.*nothing was written, keep using the adapter"):
        merge_adapter(run)
    assert [path.name for path in run.iterdir()] == ["final"]


def test_a_merge_that_touches_another_tensor_is_refused(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def and_more(adapted: Any, final: Path) -> Any:
        merged = adapted.merge_and_unload()
        merged.model.norm.weight.data[0] += 1e-6
        return merged

    run, _ = run_with(tiny_model_folder, tmp_path, Adapter(r=4))
    monkeypatch.setattr("trainkit.model.merging._merge", and_more)
    with pytest.raises(ModelError, match=r"changed model\.norm\.weight, which has no adapter"):
        merge_adapter(run)


def test_a_merge_that_leaves_an_adapter_out_is_refused(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = run_with(tiny_model_folder, tmp_path, Adapter(r=4))
    monkeypatch.setattr("trainkit.model.merging._merge", lambda adapted, final: adapted.unload())
    with pytest.raises(ModelError, match="as it was, despite its adapter; nothing was written"):
        merge_adapter(run)


def test_an_adapter_that_learnt_nothing_merges_to_its_base(tiny_model_folder: Path, tmp_path: Path) -> None:
    adapter = Adapter(r=4, modules_to_save=("norm",))
    model, _ = attach_adapter(load_model(located(tiny_model_folder), adapter, torch.float32, CPU).model, adapter, 0)
    save(model, tiny_model_folder, tmp_path / "run/final")
    assert merge_adapter(tmp_path / "run").changed_tensors == ()


def test_the_merged_folder_is_a_whole_model_with_its_card(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = run_with(tiny_model_folder, tmp_path, Adapter(r=4))
    report = merge_adapter(run)
    check_model(located(report.output), Packing(sequence_length=64))
    assert load_tokenizer(located(report.output)).chat_template
    card = (report.output / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"
    assert "PeftModel" not in card
    assert all(sentence in card for sentence in report.sentences())
    assert "| steps | 7 |" in card
    monkeypatch.chdir(report.output)
    exec(loading_code(card), {})


def test_a_merge_of_a_qlora_run_says_that_the_base_differs(tiny_model_folder: Path, tmp_path: Path) -> None:
    run, _ = run_with(tiny_model_folder, tmp_path, Adapter(r=4))
    recipe = (
        "model: {name: tiny}\nadapter: {type: qlora}\ndata: {train: x.jsonl}\ntraining: {steps: 1}\noutput_dir: run\n"
    )
    (run / "recipe.yaml").write_text(recipe)
    assert any("trained on a 4-bit base" in sentence for sentence in merge_adapter(run).sentences())


def test_a_base_that_is_gone(tiny_model_folder: Path, tmp_path: Path) -> None:
    run, _ = run_with(tiny_model_folder, tmp_path, Adapter(r=4))
    path = run / "final/adapter_config.json"
    (run / "final" / DIGESTS).unlink()
    path.write_text(path.read_text().replace(str(tiny_model_folder), "/gone/model"))
    with pytest.raises(ModelError, match="no such folder: /gone/model"):
        merge_adapter(run)
    assert [entry.name for entry in run.iterdir()] == ["final"]


def test_a_damaged_adapter_is_not_merged(tiny_model_folder: Path, tmp_path: Path) -> None:
    run, _ = run_with(tiny_model_folder, tmp_path, Adapter(r=4))
    path = run / "final/adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="changed after it was written"):
        merge_adapter(run)
