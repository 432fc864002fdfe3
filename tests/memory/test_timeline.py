"""The step as a picture: what is drawn is what was estimated."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from trainkit.errors import MachineError, UsageError
from trainkit.memory.estimate import PARTS, Estimate, Phase, Point
from trainkit.memory.timeline import COLOURS, draw_timeline
from trainkit.memory.verdict import Capacity
from trainkit.plotting import check_plot_path, new_figure, save

GIB = 2**30
PHASES: list[tuple[Phase, str]] = [
    ("forward", "layer 1"),
    ("loss", "head"),
    ("backward", "layer 1"),
    ("optimizer", "step"),
]
POINTS = tuple(
    Point(phase, place, {"weights": 4 * GIB, "activations": size * GIB})
    for (phase, place), size in zip(PHASES, (1, 2, 3, 0), strict=True)
)
FOUND = Estimate(10**9, 10**9, 7 * GIB, 8 * GIB, "backward", "layer 1", POINTS[2].parts, POINTS, "trace", 1.0)


def test_every_part_has_a_colour_of_its_own() -> None:
    assert tuple(COLOURS) == PARTS
    assert len(set(COLOURS.values())) == len(PARTS)


def test_each_part_that_is_there_is_stacked_with_its_bytes() -> None:
    figure = new_figure(8, 4)
    draw_timeline(figure, FOUND, "a title", Capacity("h100-80gb", 10 * GIB))
    [axes] = figure.axes
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "h100-80gb: 10.00 GiB",
        "activations",
        "weights",
    ]
    heights = [np.asarray(path.vertices)[:, 1].max() for stack in axes.collections for path in stack.get_paths()]
    assert heights == [4, 7]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["forward", "loss", "backward", "optimizer", "peak 7.00 GiB\nbackward: layer 1"]
    assert axes.get_title() == "a title"


def test_a_capacity_far_above_is_left_out() -> None:
    figure = new_figure(8, 4)
    draw_timeline(figure, FOUND, "", Capacity("h100-80gb", 80 * GIB))
    assert figure.axes[0].get_ylim()[1] < 10


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_a_file_of_each_kind(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plot{suffix}"
    figure = new_figure(8, 4)
    draw_timeline(figure, FOUND, "LoRA & <more>", None)
    save(figure, path, "LoRA & <more>")
    content = path.read_bytes()
    if suffix == ".png":
        assert content.startswith(b"\x89PNG")
    elif suffix == ".svg":
        assert b"peak 7.00 GiB" in content
    else:
        text = content.decode()
        assert "<title>LoRA &amp; &lt;more&gt;</title>" in text
        assert not re.search(r"(src|href)=\"(?!data:)", text)  # nothing is fetched


def test_a_plot_that_cannot_be_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"plot\.pdf must end in \.png, \.svg or \.html"):
        check_plot_path(tmp_path / "plot.pdf")
    with pytest.raises(UsageError, match="nowhere is no folder"):
        check_plot_path(tmp_path / "nowhere" / "plot.png")
    monkeypatch.setattr("trainkit.plotting.find_spec", lambda _name: None)
    with pytest.raises(MachineError, match=r"needs matplotlib, .*pip install 'trainkit\[plot\]'"):
        check_plot_path(tmp_path / "plot.png")


def test_a_plot_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "plot.png").mkdir()
    with pytest.raises(MachineError, match="cannot be written: Is a directory"):
        save(new_figure(1, 1), tmp_path / "plot.png", "")
