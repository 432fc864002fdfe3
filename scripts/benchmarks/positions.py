"""``scripts/bench positions``: must positions be reset when documents are packed? In logits, and in training."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.packing_data import find_material

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

QUICK_STEPS = 2
ROUNDING = "rounding of the precision itself"
COLOURS = ("#7f7f7f", "#d62728", "#1f77b4", "#2ca02c")


def measure_positions(options: argparse.Namespace) -> dict[str, Any]:
    """Both parts, or the one that ``--part`` names; with ``--plot`` the curves of the second as a picture."""
    from benchmarks.positions_training import cases, train_case
    from benchmarks.trl_trainer import quiet_libraries

    quiet_libraries()
    material = find_material(options.material)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        chosen = cases(material, Path(folder), QUICK_STEPS if options.quick else None, 200 if options.quick else 4000)
        if options.part in (None, "identity"):
            print("identity", file=sys.stderr, flush=True)
            found |= _identity(chosen[0], Path(folder))
        if options.part in (None, "training"):
            found["training"] = []
            for case in chosen:
                print(f"training: {case.name}", file=sys.stderr, flush=True)
                found["training"].append(train_case(case, 1 if options.quick else options.seeds))
    if options.plot:
        plot(found["training"], Path(options.plot))
    return found


def _identity(case: Any, folder: Path) -> dict[str, Any]:
    from benchmarks.positions_identity import packed_rows, shifted_biases, shifted_documents
    from benchmarks.positions_training import ARMS, REFERENCE, prepared
    from benchmarks.setting import Material

    recipe, base, rows, _ = prepared(case, ARMS[REFERENCE], case.rows_per_step, 0, folder)
    material = Material(recipe, base, rows)
    shifted = [*shifted_documents(material), *shifted_biases()]
    return {"rows": list(packed_rows(material)), "shifted": shifted}


def table(found: dict[str, Any]) -> str:
    """What :func:`measure_positions` found, as Markdown."""
    parts = []
    if "rows" in found:
        parts += [_rows_table(found["rows"]), _shifted_table(found["shifted"])]
    parts += [_training_table(one) for one in found.get("training", [])]
    return "\n\n".join(parts)


def _rows_table(lines: Sequence[dict[str, Any]]) -> str:
    names = ("isolated, not reset", "not isolated, not reset")
    return "\n".join(
        [
            "**How far logits move on real packed rows, against isolated and reset (largest, relative)**",
            "",
            f"| model | precision | {' | '.join(names)} | {ROUNDING} |",
            "|---" * 5 + "|",
            *(
                f"| {line['model']} | {line['precision']} | "
                f"{' | '.join(f'{line[name]:.1e}' for name in names)} | {_rounding(line)} |"
                for line in lines
            ),
        ]
    )


def _shifted_table(lines: Sequence[dict[str, Any]]) -> str:
    measured = [line for line in lines if "moved" in line]
    offsets = list(measured[0]["moved"])
    heads = " | ".join(f"{offset:,}" for offset in offsets)
    refusals = {line["model"]: line["refusal"] for line in lines if line.get("refusal")}
    return "\n".join(
        [
            "**How far the logits of an isolated document move by the tokens before it, where positions run on**",
            "",
            f"| positions | precision | {heads} | {ROUNDING} |",
            "|---" * (len(offsets) + 3) + "|",
            *(
                f"| {line['model']} | {line['precision']} | "
                f"{' | '.join(_moved(line['moved'][offset]) for offset in offsets)} | {_rounding(line)} |"
                for line in measured
            ),
            "",
            *(f"trainkit refuses {model}: {refusal}." for model, refusal in refusals.items()),
        ]
    )


def _training_table(found: dict[str, Any]) -> str:
    runs = found["runs"]
    seeds = len({run["seed"] for run in runs})
    shape = f"{found['documents_a_row']:.1f} documents in a row of {found['sequence_length']}"
    heads = ("rows", "held-out loss", "against isolated and reset (range)", "trained tokens a step", "tokens/s (ratio)")
    return "\n".join(
        [
            f"**{found['case']}: {found['steps']} steps, {shape}, means of {seeds} seeds**",
            "",
            f"| {' | '.join(heads)} |",
            "|---" * 5 + "|",
            *(
                f"| {one['arm']} | {one['eval_loss']:.4f} | {one['against_reference']:+.1e} "
                f"({one['against_reference_range'][0]:+.1e} to {one['against_reference_range'][1]:+.1e}) | "
                f"{one['trained_tokens_per_step']:,.0f} | {one['tokens_per_second']:,.0f} ({one['speed_ratio']:.2f}) |"
                for one in found["summary"]
            ),
        ]
    )


def _moved(value: float | None) -> str:
    return "no such position" if value is None else f"{value:.0e}"


def _rounding(line: dict[str, Any]) -> str:
    return "" if line["precision"] == "fp32" else f"{line['rounding']:.0e}"


def plot(cases: Sequence[dict[str, Any]], file: Path) -> None:
    """The curves, and beneath them their distance to isolated and reset, as a picture (SVG or PNG by its ending)."""
    import matplotlib as mpl
    import numpy as np

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "trainkit", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt

    from benchmarks.positions_training import ARMS, REFERENCE

    figure, axes = plt.subplots(2, len(cases), figsize=(4.6 * len(cases), 5), squeeze=False, sharex="col")
    for column, found in enumerate(cases):
        above, below = axes[:, column]
        curves = {
            arm: np.array([run["curve"] for run in found["runs"] if run["arm"] == arm]) for arm in ARMS
        }  # (seeds, evaluations, 2)
        for colour, (arm, points) in zip(COLOURS, curves.items(), strict=True):
            tokens, losses = points[..., 0].mean(axis=0) / 1e3, points[..., 1]
            apart = losses - curves[REFERENCE][..., 1]
            style = {"linestyle": (0, (2, 2)) if arm == REFERENCE else "-", "color": colour}  # two of them coincide
            above.plot(tokens, losses.mean(axis=0), label=arm, **style)
            below.plot(tokens, apart.mean(axis=0), **style)
            below.fill_between(tokens, apart.min(axis=0), apart.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        above.set_title(found["case"], fontsize=9)
        below.set_xlabel("trained tokens, thousands")
    axes[0, 0].set_ylabel("loss on held-out documents")
    axes[1, 0].set_ylabel("against isolated and reset")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
