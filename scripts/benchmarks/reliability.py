"""What it costs to lose nothing: saving beside training, checksums, starting again, finding a place, looking first."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trainkit.errors import MachineError
from trainkit.recipe.schema import Checkpoints, Training
from trainkit.run_folder import write_new_file

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

SAVE_EVERY = 10
MANY_ROWS = 10_000_000
PATIENCE_SECONDS = 300.0
WORDS = ("the", "training", "memory", "gradient", "model", "packing", "a", "token", "is", "and", "to", "sequence")


def measure_reliability(options: argparse.Namespace) -> dict[str, Any]:
    """All of it, on this machine; with ``options.quick`` so short that the figures mean nothing.

    Raises MachineError where a run ends before it has been measured.
    """
    turns = 1 if options.quick else 5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            "saving": _saving(folder, steps=30 if options.quick else 200),
            "checksum": _checksum(folder, megabytes=16 if options.quick else 512, turns=turns),
            "start": _start(folder, turns),
            "position": _position(turns),
            "inspection": _inspection(folder, megabytes=4 if options.quick else 1000),
        }


def _recipe(folder: Path, name: str, *, steps: int, save_every: int) -> Path:
    """Every weight of the shipped model trains, so that a checkpoint is three times the model."""
    sections = {
        "model": {"name": "tiny"},
        "precision": "fp32",
        "data": {"train": "quickstart"},
        "packing": {"sequence_length": 256},
        "training": {"steps": steps, "tokens_per_step": 2048, "micro_batch_size": 8},
        "checkpoints": {"every_steps": save_every, "keep_last": 2, "keep_best": False},
        "output_dir": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def _begin(recipe: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainkit", "fine-tune", str(recipe)],
        env={**os.environ, "TRAINKIT_CACHE": str(recipe.parent / "cache")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _ended_early(process: subprocess.Popen[str]) -> MachineError:
    _, errors = process.communicate()
    return MachineError(f"a run ended with exit code {process.returncode}: {errors.strip()[-300:]}")


def _saving(folder: Path, steps: int) -> dict[str, Any]:
    process = _begin(_recipe(folder, "saving", steps=steps, save_every=SAVE_EVERY))
    process.communicate()
    if process.returncode:
        raise _ended_early(process)
    lines = [json.loads(line) for line in (folder / "saving" / "metrics.jsonl").read_text().splitlines()]
    # A pause stands in the line of the step after it, which is also the step beside which the checkpoint is written.
    pauses = [line["save_pause_seconds"] for line in lines if "save_pause_seconds" in line]
    beside = [line["step_seconds"] for line in lines if "save_pause_seconds" in line]
    alone = [line["step_seconds"] for line in lines[2:] if "save_pause_seconds" not in line]
    every = Checkpoints().every_steps
    assert every is not None
    step, pause = statistics.median(alone), statistics.median(pauses)
    slower = max(statistics.median(beside) - step, 0.0)
    saved = folder / "saving" / "checkpoints" / f"step-{steps:06d}"
    return {
        "checkpoint_bytes": sum(path.stat().st_size for path in saved.iterdir()),
        "saves": len(pauses),
        "step_seconds": step,
        "pause_seconds": pause,
        "longest_pause_seconds": max(pauses),
        "slower_step_seconds": slower,
        "default_interval_steps": every,
        "share_at_default_interval": (pause + slower) / (every * step + pause + slower),
        "share_here": (pause + slower) / (SAVE_EVERY * step + pause + slower),
    }


def _checksum(folder: Path, megabytes: int, turns: int) -> dict[str, float]:
    data = os.urandom(2**20)

    def written() -> None:
        write_new_file(folder / "large", (data for _ in range(megabytes)))
        (folder / "large").unlink()

    def summed() -> None:
        digest = hashlib.sha256()
        for _ in range(megabytes):
            digest.update(data)

    size = megabytes * 2**20 / 1e9
    return {
        "sha256_gb_per_second": size / _least_seconds(summed, turns),
        "written_gb_per_second": size / _least_seconds(written, turns),
    }


def _least_seconds(work: Callable[[], object], turns: int) -> float:
    times = []
    for _ in range(turns):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def _start(folder: Path, turns: int) -> dict[str, Any]:
    """Seconds from the command to the end of its first step, begun anew and gone on from a checkpoint, in turns."""
    recipe = _recipe(folder, "start", steps=10_000, save_every=5)
    run, stopped = folder / "start", folder / "stopped"
    _seconds_to_step(recipe, run, 12)
    shutil.copytree(run, stopped)
    fresh, resumed = [], []
    for _ in range(turns):
        shutil.rmtree(run)
        fresh.append(_seconds_to_step(recipe, run, 1))
        shutil.rmtree(run)
        shutil.copytree(stopped, run)
        saved = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
        (run / "metrics.jsonl").write_text(_first_steps(run / "metrics.jsonl", saved))
        resumed.append(_seconds_to_step(recipe, run, saved + 1))
    return {
        "fresh_seconds": fresh,
        "resumed_seconds": resumed,
        "ratio_of_medians": statistics.median(resumed) / statistics.median(fresh),
        "ratio_of_least": min(resumed) / min(fresh),
    }


def _first_steps(metrics: Path, steps: int) -> str:
    """The lines up to ``steps``, so that the next one that appears is new."""
    lines = metrics.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps)


def _seconds_to_step(recipe: Path, run: Path, step: int) -> float:
    """Begin the recipe, wait until ``step`` is recorded, and kill it."""
    started = time.perf_counter()
    process = _begin(recipe)
    metrics = run / "metrics.jsonl"
    try:
        while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
            if process.poll() is not None or time.perf_counter() - started > PATIENCE_SECONDS:
                process.kill()
                raise _ended_early(process)
            time.sleep(0.002)
        return time.perf_counter() - started
    finally:
        process.kill()
        process.communicate()


def _position(turns: int) -> dict[str, float]:
    """Seconds to find the rows of a step in the middle of an epoch: the first after a start, and the next."""
    from trainkit.data.batches import epoch_order
    from trainkit.training.loop import rows_of_step
    from trainkit.training.plan import make_plan

    training = Training(epochs=3, tokens_per_step=65536)
    plan = make_plan(training, rows=MANY_ROWS, sequence_length=2048, micro_batch_size=1)
    step = plan.steps // 2

    def first() -> None:
        epoch_order.cache_clear()
        rows_of_step(plan, training.seed, step)

    return {
        "rows": MANY_ROWS,
        "first_step_seconds": _least_seconds(first, turns),
        "next_step_seconds": _least_seconds(lambda: rows_of_step(plan, training.seed, step + 1), turns),
    }


def _inspection(folder: Path, megabytes: int) -> dict[str, float]:
    """Seconds of ``inspect-data`` on a jsonl file of conversations: read, rendered, encoded, every mask checked."""
    path = folder / "conversations.jsonl"
    draw = random.Random(0)
    written = examples = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1_000_000:
            question, answer = (" ".join(draw.choices(WORDS, k=length)) for length in (30, 120))
            roles = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
            written += file.write(json.dumps({"messages": roles}) + "\n")
            examples += 1
    recipe = folder / "inspection.yaml"
    sections = {"model": {"name": "tiny"}, "data": {"train": str(path)}, "training": {"steps": 1}}
    recipe.write_text(yaml.safe_dump(sections | {"output_dir": str(folder / "never")}))
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "trainkit", "inspect-data", str(recipe), "--examples", "1", "--json"],
        env={**os.environ, "TRAINKIT_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise MachineError(f"inspect-data ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    assert json.loads(done.stdout)["sources"][0]["examples"] == examples
    return {"bytes": written, "examples": examples, "seconds": time.perf_counter() - started}


def table(found: dict[str, Any]) -> str:
    """The measurements as a Markdown table."""
    saving, checksum, start, position = (found[name] for name in ("saving", "checksum", "start", "position"))
    inspection = found["inspection"]
    size, longest = saving["checkpoint_bytes"] / 1e6, 1e3 * saving["longest_pause_seconds"]
    medians = start["ratio_of_medians"]
    rows = [
        (
            f"a save of {size:.1f} MB pauses training",
            f"{1e3 * saving['pause_seconds']:.1f} ms (longest of {saving['saves']}: {longest:.1f})",
        ),
        (
            f"the step beside it, of {1e3 * saving['step_seconds']:.0f} ms, is slower by",
            f"{1e3 * saving['slower_step_seconds']:.1f} ms",
        ),
        (
            f"share of the wall time, a save every {saving['default_interval_steps']} steps (default)",
            f"{saving['share_at_default_interval']:.2%}",
        ),
        (f"share of the wall time, a save every {SAVE_EVERY} steps", f"{saving['share_here']:.2%}"),
        ("checksum (SHA-256), one core", f"{checksum['sha256_gb_per_second']:.2f} GB/s"),
        ("written with its checksum, on disk", f"{checksum['written_gb_per_second']:.2f} GB/s"),
        (
            "start to the first step, anew",
            f"{min(start['fresh_seconds']):.2f} s (least of {len(start['fresh_seconds'])})",
        ),
        (
            "start to the first step, from a checkpoint",
            f"{min(start['resumed_seconds']):.2f} s; {start['ratio_of_least']:.2f} × ({medians:.2f} × of medians)",
        ),
        (
            f"rows of a step in the middle of {position['rows']:,} rows, after a start",
            f"{position['first_step_seconds']:.2f} s",
        ),
        ("rows of the next step", f"{1e6 * position['next_step_seconds']:.0f} µs"),
        (
            f"inspect-data of {inspection['bytes'] / 1e9:.1f} GB of jsonl, {inspection['examples']:,} conversations",
            f"{inspection['seconds']:.0f} s",
        ),
    ]
    return "\n".join(["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
