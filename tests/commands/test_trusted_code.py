"""A model of the hub with code of its own, from recipe to result: every command in a process of its own, offline."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainkit.cli import run

FLAG = "--trust-remote-code"
FORWARD = "    def forward(self, input_ids=None, position_ids=None, **named):\n"
"""The beginning of a method that takes the place of the model's own."""


@dataclass
class Said:
    """What a command line said."""

    stdout: str
    stderr: str


@dataclass
class Bench:
    """A folder with a recipe for a repository in the hub's cache."""

    folder: Path
    repository: Any
    capfd: pytest.CaptureFixture[str]

    @property
    def environment(self) -> dict[str, str]:
        """For a process of its own, in which the libraries read it when they are imported."""
        own = {"HF_HOME": str(self.folder / "hub"), "TRAINKIT_CACHE": str(self.folder / "cache")}
        return os.environ | own | {"OMP_NUM_THREADS": "1"}

    def run(self, *arguments: str, code: int = 0) -> Said:
        """A command line, which must end with this exit code, and in one line where that is not 0."""
        self.capfd.readouterr()
        ended = run(list(arguments))
        said = Said(*self.capfd.readouterr())
        assert ended == code, said.stderr
        assert len(re.findall(r"^error: ", said.stderr, flags=re.MULTILINE)) == bool(code), said.stderr
        return said

    def trusting(self, *arguments: str, code: int = 0) -> Said:
        """`fine-tune recipe.yaml` with the flag."""
        return self.run("fine-tune", "recipe.yaml", FLAG, self.repository.trust, *arguments, code=code)

    def code_of_card(self, folder: str) -> str:
        """The one Python block of a result's card."""
        card = self.text(f"{folder}/README.md")
        (code,) = re.findall(r"^```python\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE)
        return str(code)

    def load_as_card_says(self, folder: str) -> None:
        """In a process of its own, as somebody else has it."""
        command = [sys.executable, "-c", self.code_of_card(folder)]
        subprocess.run(command, check=True, env=self.environment, cwd=self.folder / folder, stdout=subprocess.DEVNULL)

    def text(self, name: str) -> str:
        """A file."""
        return (self.folder / name).read_text()

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file."""
        return dict(json.loads(self.text(name)))


@pytest.fixture
def bench(
    own_llama: Any,
    small_recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Bench:
    """A recipe for `own_llama`."""
    small_recipe["model"] = {"name": own_llama.name}
    small_recipe["output_dir"] = "run"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_recipe))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    return Bench(tmp_path, own_llama, capfd)


def test_without_the_flag_the_line_names_it_with_the_commit(bench: Bench) -> None:
    line = bench.run("fine-tune", "recipe.yaml", code=4).stderr
    (flag,) = re.findall(rf"{FLAG} \S+$", line, flags=re.MULTILINE)
    command = [sys.executable, "-W", "error", "-m", "trainkit", "fine-tune", "recipe.yaml", *shlex.split(flag)]
    subprocess.run(command, check=True, env=bench.environment, cwd=bench.folder, capture_output=True)
    assert (bench.folder / "run/final/adapter_model.safetensors").is_file()


def test_an_adapter_is_trained_continued_verified_and_merged(bench: Bench) -> None:
    trust, commit = bench.repository.trust, bench.repository.commit
    first = bench.trusting("--set", "training.steps=4")
    assert f"Python code of owner/own-llama, commit {commit}, is run for the model" in first.stdout
    assert f"copied to {bench.folder / 'hub/modules'}" in first.stdout
    assert "documents are isolated" in first.stdout
    assert "loaded anew by plain peft: same weights, the same logits" in first.stdout
    assert "not estimated: " in first.stdout
    assert "model_type 'own_llama' needs code of its own" in " ".join(first.stdout.split())
    assert bench.json("run/run.json")["trusted_code"] == trust
    assert bench.json("run/environment.json")["trusted_code"] == trust
    card = bench.text("run/final/README.md")
    assert f'`trust_remote_code=True, revision="{commit}", code_revision="{commit}"`' in card
    assert f"`trainkit fine-tune {FLAG} {trust}` runs it" in card
    assert not list((bench.folder / "run/final").glob("*.py"))

    assert "continues after step 4" in bench.trusting().stdout
    assert "already finished" in bench.trusting().stdout

    refused = bench.run("fine-tune", "recipe.yaml", FLAG, f"owner/own-llama@{bench.repository.other_commit}", code=6)
    assert f"{FLAG}: {trust} → owner/own-llama@{bench.repository.other_commit}. Give the same recipe" in refused.stderr

    assert f"add {FLAG} {trust}" in bench.run("export", "run", "--merge", code=4).stderr
    merged = bench.run("export", "run", "--merge", FLAG, trust).stdout
    assert "14 of 21 tensors changed, exactly those with an adapter" in merged
    assert "Loading this folder runs the Python files in it" in bench.text("run/merged/README.md")
    bench.load_as_card_says("run/final")
    bench.load_as_card_says("run/merged")


def test_a_full_model_carries_the_code_and_loads_anew(bench: Bench) -> None:
    done = bench.trusting("--set", "adapter=null")
    assert "loaded anew by plain transformers: same weights, the same logits" in done.stdout
    final = bench.folder / "run/final"
    for name in ("configuration_own.py", "modeling_own.py"):
        assert (final / name).read_bytes() == bench.repository.path(name).read_bytes()
        assert name in (final / "SHA256SUMS").read_text()
    subprocess.run(
        [sys.executable, "-c", bench.code_of_card("run/final")], check=True, env=bench.environment, cwd=final
    )


def test_a_tokenizer_of_its_own_is_trained_with_and_kept(bench: Bench) -> None:
    bench.repository.give_tokenizer_code()
    for command in ("inspect-data", "pack-data"):
        assert f"add {FLAG}" in bench.run(command, "recipe.yaml", code=4).stderr
        done = bench.run(command, "recipe.yaml", FLAG, bench.repository.trust)
        assert "code: the tokenizer runs Python code of owner/own-llama" in done.stdout
    done = bench.trusting()
    assert "is run for the model and the tokenizer" in done.stdout
    assert "found again" in done.stdout
    final = bench.folder / "run/final"
    assert (final / "tokenization_own.py").is_file()
    assert "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)" in bench.code_of_card("run/final")
    subprocess.run(
        [sys.executable, "-c", bench.code_of_card("run/final")], check=True, env=bench.environment, cwd=final
    )


def test_a_merged_model_keeps_the_tokenizer_of_its_own(bench: Bench) -> None:
    bench.repository.edit_json("config.json", model_type="llama", architectures=["LlamaForCausalLM"], auto_map=None)
    bench.repository.give_tokenizer_code()
    assert "is run for the tokenizer\n" in bench.trusting().stdout
    refused = bench.run("export", "run", "--merge", FLAG, bench.repository.trust, code=2)
    assert "needs no code of its own" in refused.stderr
    bench.run("export", "run", "--merge")
    for folder in ("run/final", "run/merged"):
        assert "trust_remote_code" not in bench.code_of_card(folder).partition("tokenizer =")[0]
        bench.load_as_card_says(folder)


def test_what_is_shared_out_over_processes_comes_to_the_same(bench: Bench) -> None:
    launch = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}, "num_machines": 1, "num_processes": 2}
    (bench.folder / "launch.yaml").write_text(yaml.safe_dump(launch | {"use_cpu": True}))
    bench.trusting("--set", "output_dir=alone")
    command = [sys.executable, "-m", "trainkit", "fine-tune", "recipe.yaml", "--launch", "launch.yaml"]
    command += [FLAG, bench.repository.trust]
    subprocess.run(command, check=True, env=bench.environment, cwd=bench.folder, capture_output=True)
    alone, shared = (bench.json(f"{run}/summary.json")["eval_loss_after"] for run in ("alone", "run"))
    assert shared == pytest.approx(alone, rel=1e-5)


def test_commands_that_need_no_code_say_so(bench: Bench) -> None:
    for command in ("inspect-data", "pack-data"):
        done = bench.run(command, "recipe.yaml", FLAG, bench.repository.trust)
        assert "code: none of owner/own-llama was run, its tokenizer needs none" in done.stdout
    assert not (bench.folder / "hub/modules/transformers_modules").exists()


def test_a_flag_without_use_is_refused(bench: Bench) -> None:
    bench.repository.edit_json("config.json", model_type="llama", architectures=["LlamaForCausalLM"], auto_map=None)
    assert "needs no code of its own" in bench.trusting(code=2).stderr
    assert not (bench.folder / "run").exists()


def test_code_that_names_its_own_repository_is_taken_from_the_commit(bench: Bench) -> None:
    own = bench.repository.name
    auto_map = {
        "AutoConfig": f"{own}--configuration_own.OwnConfig",
        "AutoModelForCausalLM": f"{own}--modeling_own.OwnForCausalLM",
    }
    bench.repository.edit_json("config.json", auto_map=auto_map)
    bench.repository.refer("main", bench.repository.other_commit)
    bench.repository.plant("raise SystemExit('of another commit')", bench.repository.other_commit)
    bench.trusting()


def test_a_known_type_with_an_architecture_of_its_own_is_run_by_its_code(bench: Bench) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    bench.repository.edit_json("config.json", model_type="llama", auto_map=auto_map)
    code = bench.repository.path("modeling_own.py").read_text()
    bench.repository.write(
        "modeling_own.py", re.sub(r"from \..*\n", "", code.replace("config_class = OwnConfig", "pass")).encode()
    )
    assert "its architecture needs Python code" in bench.run("fine-tune", "recipe.yaml", code=4).stderr
    assert "is run for the model" in bench.trusting().stdout


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_package", "the code of owner/own-llama@0123.* cannot be used: .*no_such_package"),
        ("def broken(:", "the code of owner/own-llama@0123.* cannot be used: invalid syntax"),
        ("raise ZeroDivisionError", "the code of owner/own-llama@0123.* cannot be used: ZeroDivisionError"),
    ],
)
def test_code_that_cannot_be_used_is_one_line(bench: Bench, code: str, message: str) -> None:
    bench.repository.plant(code)
    assert re.search(message, bench.trusting(code=4).stderr)


def test_a_failure_inside_of_the_code_is_its_own(bench: Bench) -> None:
    bench.repository.plant(f"{FORWARD}        return self.no_such_thing")
    assert re.search(
        r"modeling_own\.py:\d+: the model's own code failed: AttributeError: .*no_such_thing",
        bench.trusting(code=4).stderr,
    )


def test_code_whose_documents_see_each_other_is_refused(bench: Bench) -> None:
    leak = (
        f"{FORWARD}"
        "        out = super().forward(input_ids=input_ids, position_ids=position_ids, **named)\n"
        "        out.logits = out.logits + out.logits[:, :1]\n"
        "        return out"
    )
    bench.repository.plant(leak)
    assert "leaks between documents" in bench.trusting(code=4).stderr


def test_a_stopped_run_says_the_whole_command_that_continues_it(bench: Bench) -> None:
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "trainkit",
            "fine-tune",
            "recipe.yaml",
            FLAG,
            bench.repository.trust,
            "--set",
            "training.steps=100000",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=bench.environment,
        cwd=bench.folder,
    ) as process:
        metrics = bench.folder / "run/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    (said,) = re.findall(r"to continue: trainkit (.*)$", errors, flags=re.MULTILINE)
    assert shlex.split(said) == ["fine-tune", str(bench.folder / "run/recipe.yaml"), FLAG, bench.repository.trust]
