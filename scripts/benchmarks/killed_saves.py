"""What other trainers make of a kill in the middle of a save: half a checkpoint is left, and the next start takes it.

A process that has imported everything forks; the child trains a tiny model with transformers' Trainer, saving after
each step, and is killed at a random moment of a save; another child then resumes from the newest checkpoint, as its
documentation says. Nothing of trainkit takes part.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STEPS = 200


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, resume, count, and print one line of a Markdown table."""
    parser = argparse.ArgumentParser(prog="compare_saves", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    import transformers
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401 - loaded once, before the forks

    draw = random.Random(options.seed)
    partial = crashed = 0
    for _ in range(options.kills):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            child = _forked(lambda folder=folder: _train(folder, None))  # type: ignore[misc]
            _kill_in_a_save(child, folder, draw)
            newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
            whole = (newest / "trainer_state.json").is_file()
            resumed = _forked(lambda folder=folder: _train(folder, True))  # type: ignore[misc]
            _, status = os.waitpid(resumed, 0)
            partial += not whole
            crashed += status != 0
    print("| trainer | kills in a save | newest checkpoint not whole | could not resume |")
    print("|---|---|---|---|")
    print(f"| transformers {transformers.__version__}, Trainer | {options.kills} | {partial} | {crashed} |")
    return 0


def _forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            work()
    except BaseException:  # any of them is a crash
        os._exit(1)
    os._exit(0)


def _kill_in_a_save(child: int, folder: Path, draw: random.Random) -> None:
    """Wait for the third checkpoint to appear, then kill within the time that a save takes."""
    while not (folder / "checkpoint-3").is_dir():
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit("the training to be killed ended by itself")
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _train(folder: Path, resume: bool | None) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_attention_heads=4, num_key_value_heads=2, **sizes))
    rows = [{"input_ids": list(range(16)), "labels": list(range(16))} for _ in range(8)]
    options = TrainingArguments(
        output_dir=str(folder),
        max_steps=6 if resume else STEPS,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    Trainer(model=model, args=options, train_dataset=rows).train(resume_from_checkpoint=resume)


if __name__ == "__main__":
    sys.exit(main())
