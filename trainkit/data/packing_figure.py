"""A packing at a glance, drawn: how long documents are, how full rows are, and what padding would take instead.

Legend: N documents, R rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trainkit.data.packing_quality import MUCH, padding_share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trainkit.data.packed_store import PackedRows

FIGURE_INCHES = (10.5, 6.2)
# Told apart by lightness as well as by hue (from Okabe and Ito's palette).
TOKENS, EMPTY, LIMIT = "#0072b2", "#d9d9d9", "#d55e00"
LENGTH_BANDS = 40
LENGTHS_BESIDE = 3  # so that a single length is a bar and no wall
FILL_BANDS = 20
MARGIN_FOR_NUMBERS = 1.15


def draw_packing(figure: Any, rows: PackedRows, layouts: Sequence[tuple[str, float]]) -> None:
    """Fill an empty figure of matplotlib's. ``layouts`` are names and slots, as the report says them."""
    figure.suptitle(
        f"documents: {rows.ledger.documents:,}  ·  tokens: {rows.ledger.tokens:,}  ·  "
        f"rows of {rows.sequence_length:,}: {len(rows):,}",
        fontsize=12,
    )
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2))
    _draw_lengths(figure.add_subplot(grid[0, 0]), _document_lengths(rows), rows.sequence_length)
    _draw_fill(figure.add_subplot(grid[0, 1]), _tokens_of_rows(rows), rows.sequence_length)
    _draw_layouts(figure.add_subplot(grid[1, :]), rows.ledger.tokens, layouts)


def length_edges(shortest: int, longest: int) -> NDArray[np.float64]:
    """Edges of bars over lengths: equally wide, or on a logarithmic scale where lengths differ much.

    A bar holds whole lengths, so edges lie between them and no bar is narrower than one:

    >>> length_edges(3, 5).tolist()
    [2.5, 3.5, 4.5, 5.5]
    >>> edges = length_edges(1, 1000)
    >>> (float(edges[0]), float(edges[1]), float(edges[-1])), bool(np.all(np.diff(edges) >= 1))
    ((0.5, 1.5, 1000.5), True)
    """
    if longest < MUCH * shortest:
        width = -(-(longest - shortest + 1) // LENGTH_BANDS)
        number = -(-(longest - shortest + 1) // width)
        return shortest - 0.5 + width * np.arange(number + 1, dtype=np.float64)
    spread = np.geomspace(shortest, longest + 1, LENGTH_BANDS + 1)
    return np.unique(np.floor(spread)) - 0.5


def _document_lengths(rows: PackedRows) -> NDArray[np.int64]:
    in_rows_N = np.zeros(len(rows.documents), np.bool_)  # marking is many times faster than sorting
    in_rows_N[rows.plan.pieces.document_P] = True
    lengths_N: NDArray[np.int64] = np.diff(rows.documents.offsets_N)[in_rows_N]
    return lengths_N


def _tokens_of_rows(rows: PackedRows) -> NDArray[np.int64]:
    ends_P = np.concatenate(([0], np.cumsum(rows.plan.pieces.length_P, dtype=np.int64)))
    return np.diff(ends_P[rows.plan.offsets_R])


def _draw_lengths(axes: Any, lengths_N: NDArray[np.int64], sequence_length: int) -> None:
    shortest, longest = int(lengths_N.min()), int(lengths_N.max())
    axes.hist(lengths_N, bins=length_edges(shortest, longest), color=TOKENS)
    if longest >= MUCH * shortest:
        axes.set_xscale("log", base=2)
    else:
        axes.locator_params(axis="x", integer=True)
        axes.set_xlim(shortest - LENGTHS_BESIDE, longest + LENGTHS_BESIDE)
    axes.locator_params(axis="y", integer=True)
    axes.xaxis.set_major_formatter(lambda length, _: f"{length:,.0f}")
    left, right = axes.get_xlim()
    if left <= sequence_length <= 4 * right:  # far away it would squeeze the bars
        axes.axvline(sequence_length, color=LIMIT, linestyle="--", linewidth=1.5)
        axes.annotate(
            f"a row: {sequence_length:,}",
            (sequence_length, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            rotation=90,
            color=LIMIT,
            fontsize=9,
        )
    longer = int(np.count_nonzero(lengths_N > sequence_length))
    note = f"median {np.median(lengths_N):,.0f}, longer than a row: {longer:,}"
    _label(axes, "Length of documents", note, "tokens, before long documents are cut", "documents")


def _draw_fill(axes: Any, tokens_R: NDArray[np.int64], sequence_length: int) -> None:
    counts, edges = np.histogram(100 * tokens_R / sequence_length, bins=np.linspace(0, 100, FILL_BANDS + 1))
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=TOKENS, edgecolor="white", linewidth=0.5)
    axes.set_xlim(0, 100)
    axes.set_yscale("symlog", linthresh=1)  # the few rows that are not full are what one looks for
    axes.set_ylim(0, MARGIN_FOR_NUMBERS * 2 * counts.max())
    full = np.count_nonzero(tokens_R == sequence_length) / tokens_R.size
    note = f"mean {tokens_R.mean() / sequence_length:.2%}, filled to the last slot: {full:.1%}"
    _label(axes, "Fill of rows", note, "% of the slots of a row that hold a token", "rows (logarithmic)")


def _draw_layouts(axes: Any, tokens: int, layouts: Sequence[tuple[str, float]]) -> None:
    names, slots = [name.replace(", ", ",\n") for name, _ in layouts], [count for _, count in layouts]
    axes.barh(names, slots, color=EMPTY, label="padding")
    axes.barh(names, tokens, color=TOKENS, label="tokens")
    for name, count in zip(names, slots, strict=True):
        axes.annotate(
            f"{padding_share(tokens, count):.1%} padding",
            (count, name),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.invert_yaxis()
    axes.set_xlim(0, MARGIN_FOR_NUMBERS * max(slots))
    axes.xaxis.set_major_formatter(lambda count, _: _short(count))
    axes.tick_params(axis="y", labelsize=9)
    _label(axes, "Packed, and padded instead", "", "slots that a model computes in one epoch", "")
    axes.legend(loc="upper right", frameon=False, fontsize=9)


def _label(axes: Any, title: str, note: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=20 if note else 6)
    if note:
        axes.annotate(note, (0, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points", fontsize=9)
    axes.set_xlabel(x)
    if y:
        axes.set_ylabel(y)
        axes.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)


def _short(count: float) -> str:
    """A count with at most three digits.

    >>> _short(0), _short(2_500_000), _short(4e9), _short(1500)
    ('0', '2.5 M', '4 G', '1.5 k')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"
