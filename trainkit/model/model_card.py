"""The README.md of a result: where it comes from, what it was trained on, how it did, and how to load it."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trainkit
from trainkit.model.trusted_code import FLAG

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trainkit.model.trusted_code import Trust

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors")
LOADING_HEADING = "## Loading it"
METRIC_NAMES = {
    "step": "steps",
    "updates": "updates of the weights",
    "tokens": "tokens seen, without padding",
    "trained_tokens": "trained tokens seen",
    "eval_loss_before": "evaluation loss before",
    "eval_loss": "evaluation loss after",
    "best_eval_loss": "lowest evaluation loss",
    "best_step": "step of the lowest evaluation loss",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card states. ``method`` is "LoRA adapter", "full model", ...; ``metrics`` are plain numbers by name.

    ``model_code`` and ``tokenizer_code`` say whose Python code is run when the one or the other is loaded.
    """

    base_model: str
    base_revision: str | None
    model_code: Trust | None
    tokenizer_code: Trust | None
    method: str
    is_adapter: bool
    has_chat_template: bool
    recipe_yaml: str
    ledger_lines: Sequence[str]
    metrics: Mapping[str, Any]
    sentences: Sequence[str]


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with YAML front matter (https://huggingface.co/docs/hub/model-cards)."""
    base = f"`{facts.base_model}`" + (f" at revision `{facts.base_revision}`" if facts.base_revision else "")
    parts = [
        _front_matter(facts.base_model, is_adapter=facts.is_adapter),
        f"# A {facts.method} on {facts.base_model}",
        f"Fine-tuned from {base} with trainkit {trainkit.__version__}.",
        "\n".join(f"- {sentence}" for sentence in facts.sentences),
        _loading(
            is_adapter=facts.is_adapter,
            chat=facts.has_chat_template,
            model_code=facts.model_code,
            tokenizer_code=facts.tokenizer_code,
        ),
        "## Metrics\n\n" + _metrics_table(facts.metrics),
        "## Data ledger\n\nEvery token that was read, and where it went.\n\n"
        + _fenced("text", "\n".join(facts.ledger_lines)),
        f"## Recipe\n\nComplete, with all defaults; `trainkit fine-tune{_flag(facts)}` runs it.\n\n"
        + _fenced("yaml", facts.recipe_yaml),
        "## Versions\n\n" + _versions(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _flag(facts: CardFacts) -> str:
    """What the command needs besides the recipe."""
    code = facts.model_code or facts.tokenizer_code
    return f" {FLAG} {code}" if code else ""


def merged_card(
    adapter_card: str,
    base_model: str,
    sentences: Sequence[str],
    *,
    chat: bool,
    model_code: Trust | None = None,
    tokenizer_code: Trust | None = None,
) -> str:
    """The card of an adapter's run, rewritten for the model that the adapter was merged into."""
    body = re.sub(r"\A---\n.*?\n---\n+", "", adapter_card, flags=re.DOTALL)
    loading = _loading(is_adapter=False, chat=chat, model_code=model_code, tokenizer_code=tokenizer_code)
    merge = "## Merge\n\n" + "\n".join(f"- {sentence}" for sentence in sentences)
    section = re.compile(rf"^{LOADING_HEADING}\n.*?(?=^## |\Z)", flags=re.DOTALL | re.MULTILINE)
    body, replaced = section.subn(lambda _: f"{loading}\n\n{merge}\n\n", body, count=1)
    if not replaced:
        body = f"{body.rstrip()}\n\n{loading}\n\n{merge}\n"
    return f"{_front_matter(base_model, is_adapter=False)}\n\n{body.lstrip()}"


def _front_matter(base_model: str, *, is_adapter: bool) -> str:
    import yaml

    values: dict[str, Any] = {
        "base_model": base_model,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["trainkit", *(["lora"] if is_adapter else [])],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _loading(*, is_adapter: bool, chat: bool, model_code: Trust | None, tokenizer_code: Trust | None) -> str:
    """How to load the result. A full model has its code beside it; the base of an adapter is pinned to its commit."""
    with_code = ", trust_remote_code=True"
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if is_adapter:
        lines.insert(0, "from peft import PeftConfig, PeftModel")
        lines += [
            "",
            'folder = "."  # where this file lies',
            "config = PeftConfig.from_pretrained(folder)",
            *_loading_base(model_code),
            "model = PeftModel.from_pretrained(base, folder).eval()",
        ]
    else:
        lines += [
            "",
            'folder = "."  # where this file lies',
            f"model = AutoModelForCausalLM.from_pretrained(folder{with_code if model_code else ''}).eval()",
        ]
    # transformers looks for a config.json beside the tokenizer too, and there lies one of a full model
    needs_code = tokenizer_code or (model_code and not is_adapter)
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained(folder{with_code if needs_code else ''})")
    if chat:
        lines += [
            "",
            'messages = [{"role": "user", "content": "Hello"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    else:
        lines += ["", 'inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)']
    lines += [
        "output = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id)",
        "print(tokenizer.decode(output[0]))",
    ]
    said = _code_sentences(model_code, tokenizer_code, is_adapter=is_adapter)
    return f"{LOADING_HEADING}\n\n{said}" + _fenced("python", "\n".join(lines))


def _loading_base(code: Trust | None) -> list[str]:
    """The lines that load an adapter's base."""
    if code is None:
        return ["base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, revision=config.revision)"]
    return [
        "base = AutoModelForCausalLM.from_pretrained(",
        "    config.base_model_name_or_path,",
        "    trust_remote_code=True,",
        f'    revision="{code.commit}",',
        f'    code_revision="{code.commit}",',
        ")",
    ]


def _code_sentences(model_code: Trust | None, tokenizer_code: Trust | None, *, is_adapter: bool) -> str:
    """That loading runs code, whose, and where it lies; a paragraph, or nothing."""
    sentences = []
    if model_code:
        commit = model_code.commit
        sentences.append(
            f"Loading the base model runs Python code of `{model_code.repository}`: read that code first. It needs "
            f'`trust_remote_code=True, revision="{commit}", code_revision="{commit}"`.'
        )
    if here := tokenizer_code or (None if is_adapter else model_code):
        sentences.append(
            f"Loading this folder runs the Python files in it, which are those of `{here.repository}` at commit "
            f"`{here.commit}`; it needs `trust_remote_code=True`."
        )
    return " ".join(sentences) + "\n\n" if sentences else ""


def _metrics_table(metrics: Mapping[str, Any]) -> str:
    rows = [
        (METRIC_NAMES[name], value) for name, value in metrics.items() if name in METRIC_NAMES and value is not None
    ]
    if not rows:
        return "None were measured."
    cells = [
        f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value:,} |" for name, value in rows
    ]
    return "\n".join(["| | |", "|---|---:|", *cells])


def _versions() -> str:
    import torch

    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    versions |= {"torch": torch.__version__}  # which says which build it is, where its package does not
    known = [("trainkit", trainkit.__version__), *versions.items()]
    return ", ".join(f"{name} {version}" for name, version in known)


def _fenced(language: str, text: str) -> str:
    """A code block whose fence is longer than any that the text holds."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
