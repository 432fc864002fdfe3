"""How long a thread that beats is kept from it by what a run does between the meeting of its processes and its end.

Threads of one process share Python's lock. What holds it without a pause keeps the heartbeat waiting; see
``trainkit/training/heartbeats.py``.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from trainkit.data.batches import epoch_order

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

TICK_SECONDS = 0.01


def measure_pauses(options: argparse.Namespace) -> dict[str, Any]:
    """For each work: how long it took, and the longest time in which another thread did not run; seconds."""
    size = 64 if options.quick else 1024
    config = LlamaConfig(
        hidden_size=size, intermediate_size=4 * size, num_hidden_layers=16, num_attention_heads=16, vocab_size=32_000
    )
    tensors = {str(index): torch.randn(2 * size, 2 * size) for index in range(120)}
    with tempfile.TemporaryDirectory() as folder:
        file, model_folder = Path(folder) / "tensors.safetensors", Path(folder) / "model"
        model = AutoModelForCausalLM.from_config(config)
        ids = torch.randint(0, config.vocab_size, (1, 512))
        works: dict[str, Callable[[], object]] = {
            "write tensors": lambda: save_file(tensors, file),
            "read tensors, one by one": lambda: _read(file),
            "SHA-256 of their file": lambda: hashlib.sha256(file.read_bytes()).digest(),
            "make a model": lambda: AutoModelForCausalLM.from_config(config),
            "save it": lambda: model.save_pretrained(model_folder),
            "load it": lambda: AutoModelForCausalLM.from_pretrained(model_folder),
            "forward and backward": lambda: _train(model, ids),
            "the order of an epoch": lambda: epoch_order(50_000 * size, 1, 1),
        }
        found = {what: _measured(work) for what, work in works.items()}
    return {
        "tensor_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "model_bytes": sum(weight.nbytes for weight in model.parameters()),
        "works": found,
    }


def _read(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - it is no mapping
            opened.get_tensor(name).sum()


def _train(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()


def _measured(work: Callable[[], object]) -> dict[str, float]:
    longest, over = 0.0, threading.Event()

    def tick() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not over.wait(TICK_SECONDS):
            now = time.perf_counter()
            longest, last = max(longest, now - last - TICK_SECONDS), now

    ticking = threading.Thread(target=tick)
    ticking.start()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    time.sleep(2 * TICK_SECONDS)  # a tick that was kept waiting until now counts
    over.set()
    ticking.join()
    return {"seconds": seconds, "longest_pause_seconds": longest}


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"{found['tensor_bytes'] / 2**30:.2f} GiB of tensors, a model of {found['model_bytes'] / 2**30:.2f} GiB",
        "",
        "| what | seconds | longest pause of another thread |",
        "|---|---|---|",
    ]
    for what, one in found["works"].items():
        lines.append(f"| {what} | {one['seconds']:.2f} | {one['longest_pause_seconds']:.3f} |")
    return "\n".join(lines)
