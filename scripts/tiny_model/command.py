"""The verbs of ``scripts/build_tiny_model``: ``model`` trains and writes the model, ``data`` the quickstart's data."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tiny_model.cards import EVAL_EXAMPLES, TRAIN_EXAMPLES, examples

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tiny_model.chats import Messages
    from tiny_model.training import Settings, Trained

SHIPPED = Path(__file__).resolve().parents[2] / "trainkit" / "shipped"
REPORT_STEPS = 50

MODEL_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# tiny

The model that ships with trainkit, `model: {{name: tiny}}`: a Llama of {parameters:,} parameters, trained from random
weights on English stories and conversations that `scripts/tiny_model` generates. Text, generator and weights are the
project's own. It can say some 450 words and hardly a fact; it is for trying trainkit out, and for tests.

| | |
|---|---|
| made by | `scripts/build_tiny_model model` |
| settings | {settings} |
| trained on | {tokens:,} tokens, each seen once |
| time | {seconds:,.0f} s on {threads} CPU thread(s) |
| training loss, mean of the last 50 steps | {training_loss:.3f} nats a token |
| held-out loss | {held_out_loss:.3f} nats a token |
| with | torch {torch}, transformers {transformers}, tokenizers {tokenizers} |

The same settings give the same bits on the same machine with the same versions.

Tokenizer: byte-level BPE, {vocabulary:,} tokens; it gives every text back. Chat format: `<|user|>`, newline, text,
`<|end|>`, newline, and the same for the other roles. `<|end|>` is the end-of-sequence token.
"""


def jsonl(conversations: Iterable[Messages]) -> str:
    """One ``{"messages": [...]}`` a line."""
    return "".join(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations)


def write_data(output: Path) -> None:
    """Writes the quickstart's train.jsonl and eval.jsonl into the folder."""
    output.mkdir(parents=True, exist_ok=True)
    for name, count, held_out in (("train", TRAIN_EXAMPLES, False), ("eval", EVAL_EXAMPLES, True)):
        text = jsonl(examples(count, held_out=held_out))
        (output / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        print(f"{output / name}.jsonl: {count} examples, {len(text.encode()):,} bytes")


def model_card(trained: Trained, settings: Settings) -> str:
    """The model's README.md: how it was made, and what came out."""
    import tokenizers
    import torch
    import transformers

    return MODEL_CARD.format(
        parameters=trained.model.num_parameters(),
        settings=", ".join(f"{name} {value}" for name, value in asdict(settings).items()),
        tokens=trained.tokens,
        seconds=trained.seconds,
        threads=settings.threads,
        training_loss=trained.training_loss,
        held_out_loss=trained.held_out_loss,
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
        vocabulary=len(trained.tokenizer),
    )


def write_model(output: Path, settings: Settings) -> None:
    """Trains the model and writes weights, configuration, tokenizer, chat template and model card into the folder."""
    from tiny_model.training import train
    from trainkit.model.checking import DIGESTS, sha256

    def report(step: int, loss: float, seconds: float) -> None:
        if step % REPORT_STEPS == 0:
            print(f"step {step}/{settings.steps}  loss {loss:.3f}  {seconds:.0f} s", flush=True)

    trained = train(settings, report)
    trained.model.save_pretrained(output)
    trained.tokenizer.save_pretrained(output)
    (output / "README.md").write_text(model_card(trained, settings), encoding="utf-8")
    files = sorted(path for path in output.iterdir() if path.name != DIGESTS)
    (output / DIGESTS).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files), encoding="utf-8")
    for file in output.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner's eyes only
    print(
        f"{output}: held-out loss {trained.held_out_loss:.3f} after {trained.tokens:,} tokens, {trained.seconds:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; the exit code."""
    parser = argparse.ArgumentParser(
        prog="build_tiny_model", description="Makes the tiny model and the quickstart's data."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    data = verbs.add_parser("data", help="write the quickstart's examples (a second)")
    data.add_argument(
        "--output", type=Path, default=SHIPPED / "data" / "quickstart", help="folder (default: the shipped one)"
    )
    model = verbs.add_parser("model", help="train and write the tiny model (ten minutes or so)")
    model.add_argument(
        "--output", type=Path, default=SHIPPED / "models" / "tiny", help="folder (default: the shipped one)"
    )
    model.add_argument("--seed", type=int, help="of the text and the weights")
    model.add_argument("--steps", type=int, help="optimizer updates")
    chosen = parser.parse_args(arguments)
    if chosen.verb == "data":
        write_data(chosen.output)
        return 0

    from tiny_model.training import Settings

    wishes = {name: value for name in ("seed", "steps") if (value := getattr(chosen, name)) is not None}
    write_model(chosen.output, replace(Settings(), **wishes))
    return 0
