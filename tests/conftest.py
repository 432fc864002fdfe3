"""What every test may lean on: the real material where it is there, and small models made on the spot."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPOSITORY = Path(__file__).resolve().parent.parent

# The hub must never be reached from a test, and a tokenizer's own thread pool must not fight with forked processes.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

# How long an example takes says something about the machine, not about the code.
hypothesis.settings.register_profile("trainkit", deadline=None)
hypothesis.settings.load_profile("trainkit")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def material() -> Path:
    """Real models, tokenizers and data sets that nobody here made, in `shared/` beside the repository."""
    folder = Path(os.environ.get("TRAINKIT_MATERIAL", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real material in {folder}; set TRAINKIT_MATERIAL")
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (2 layers, width 32, vocabulary 300, 256 positions) with byte-level BPE and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]
    bpe.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog, and what is it then? it is the end of the day."] * 4,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_for_4_bit(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model_folder` with widths of 64 and more, which bitsandbytes packs and decodes alike on every processor."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model-for-4-bit") / "model"
    shutil.copytree(tiny_model_folder, folder)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(folder, hidden_size=64, intermediate_size=128, head_dim=16)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `tiny_model_folder`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="session")
def conversations_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 conversations of one to three turns and very different lengths, as messages jsonl."""
    draw = random.Random(7)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "what", "is", "it", "then"]
    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    with path.open("w") as file:
        for number in range(96):
            messages = []
            for _ in range(draw.randint(1, 3)):
                question = " ".join(draw.choices(words, k=draw.randint(1, 8)))
                answer = " ".join(draw.choices(words, k=draw.randint(1, 12)))
                messages += [
                    {"role": "user", "content": f"{number}: {question}?"},
                    {"role": "assistant", "content": answer},
                ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@dataclass(frozen=True)
class FinishedRun:
    """What a run left: its folder and what `--json` printed."""

    folder: Path
    summary: dict[str, Any]

    def lines(self, key: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that have `key`."""
        metrics = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in metrics if key in line]

    def losses(self) -> list[float]:
        """The training curve."""
        return [line["loss"] for line in self.lines("loss")]


RunCommand = Callable[..., FinishedRun]


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with nested `changes`; None takes a key out."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


@pytest.fixture
def small_recipe(tiny_model_folder: Path, conversations_file: Path, tmp_path: Path) -> dict[str, Any]:
    """A LoRA recipe over `conversations_file` that takes about a second: 96 conversations, rows of 128 tokens."""
    return {
        "model": {"name": str(tiny_model_folder)},
        "precision": "fp32",
        "adapter": {"type": "lora", "r": 4, "alpha": 8},
        "data": {"train": str(conversations_file), "eval": 0.1},
        "packing": {"sequence_length": 128, "overlap": 8},
        "training": {"steps": 6, "tokens_per_step": 1024, "micro_batch_size": 4, "learning_rate": 1e-2},
        "evaluation": {"every_steps": 3, "samples": 2, "max_new_tokens": 4},
        "checkpoints": {"every_steps": 2},
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def fine_tune(
    small_recipe: dict[str, Any],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> RunCommand:
    """`fine_tune(changes, name="run")` runs `small_recipe` with changes through the command line, to the end."""
    from trainkit.cli import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))

    def command(changes: dict[str, Any] | None = None, *, name: str = "run", fresh: bool = False) -> FinishedRun:
        recipe = merged(small_recipe, {**(changes or {}), "output_dir": str(tmp_path / name)})
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        capfd.readouterr()
        code = run(["fine-tune", str(path), "--json", *(["--fresh"] if fresh else [])])
        output, errors = capfd.readouterr()
        assert code == 0, errors
        return FinishedRun(tmp_path / name, json.loads(output))

    return command


CONFIGURATION_OF_ITS_OWN = """\
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODEL_OF_ITS_OWN = """\
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER_OF_ITS_OWN = """\
from transformers import PreTrainedTokenizerFast

class OwnTokenizerFast(PreTrainedTokenizerFast):
    pass
"""


@dataclass
class CachedRepository:
    """A repository of the hub, as it lies in the hub's cache on this machine: snapshots that link to blobs."""

    cache: Path
    name: str = "owner/own-llama"
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    other_commit: str = "89abcdef0123456789abcdef0123456789abcdef"

    @property
    def folder(self) -> Path:
        """Where the repository lies."""
        return self.cache / f"models--{self.name.replace('/', '--')}"

    @property
    def trust(self) -> str:
        """What the flag says."""
        return f"{self.name}@{self.commit}"

    def path(self, name: str, commit: str = "") -> Path:
        """A file of a snapshot."""
        return self.folder / "snapshots" / (commit or self.commit) / name

    def write(self, name: str, content: bytes, commit: str = "") -> None:
        """Put a file into a snapshot, by a link to its content: weights by their SHA-256, the rest by git's id."""
        large = name.endswith(".safetensors")
        digest = hashlib.sha256(content) if large else hashlib.sha1(b"blob %d\0%b" % (len(content), content))
        blob = self.folder / "blobs" / digest.hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        path = self.path(name, commit)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(os.path.relpath(blob, path.parent))

    def edit_json(self, name: str, **changes: Any) -> None:
        """Change keys of a JSON file; None takes one out."""
        values = json.loads(self.path(name).read_text()) | changes
        self.write(name, json.dumps({key: value for key, value in values.items() if value is not None}).encode())

    def plant(self, code: str, commit: str = "") -> None:
        """Let every Python file of a snapshot run a line of code."""
        for file in list(self.path("", commit).glob("*.py")):
            self.write(file.name, f"{file.read_text()}\n{code}\n".encode(), commit)

    def refer(self, branch: str, commit: str) -> None:
        """Let a branch stand for a commit."""
        ref = self.folder / "refs" / branch
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)

    def fill(self, model: Path) -> None:
        """Two commits with the files of ``model`` and code of its own; ``main`` is the first."""
        for commit in (self.commit, self.other_commit):
            for file in model.iterdir():
                self.write(file.name, file.read_bytes(), commit)
            self.write("configuration_own.py", CONFIGURATION_OF_ITS_OWN.encode(), commit)
            self.write("modeling_own.py", MODEL_OF_ITS_OWN.encode(), commit)
            config = json.loads(self.path("config.json", commit).read_text()) | {
                "model_type": "own_llama",
                "architectures": ["OwnForCausalLM"],
                "auto_map": {
                    "AutoConfig": "configuration_own.OwnConfig",
                    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
                },
            }
            self.write("config.json", json.dumps(config).encode(), commit)
        self.refer("main", self.commit)

    def give_tokenizer_code(self) -> None:
        """Let the tokenizer be of a class that transformers does not know."""
        auto_map = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]}
        self.edit_json("tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)
        self.write("tokenization_own.py", TOKENIZER_OF_ITS_OWN.encode())


@pytest.fixture
def make_own_llama(tiny_model_folder: Path) -> Callable[[Path], CachedRepository]:
    """`make_own_llama(home)` puts `tiny_model_folder`, of an architecture of its own, into the cache of HF_HOME."""

    def make(home: Path) -> CachedRepository:
        repository = CachedRepository(home / "hub")
        repository.fill(tiny_model_folder)
        return repository

    return make


@pytest.fixture
def own_llama(
    make_own_llama: Callable[[Path], CachedRepository], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> CachedRepository:
    """The repository in `tmp_path / "hub"`, which is HF_HOME to the libraries of this process while the test runs."""
    home = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    for module in ("transformers.dynamic_module_utils", "transformers.utils"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", str(home / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]  # what an earlier test imported from another folder
    return make_own_llama(home)
