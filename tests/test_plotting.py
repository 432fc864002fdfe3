"""Pictures in files: what is refused before any work, and that each form is what its name says and complete."""

from __future__ import annotations

import importlib.util
import re
from base64 import b64decode
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from trainkit.errors import MachineError, UsageError
from trainkit.plotting import check_plot_path, new_figure, save


@pytest.fixture
def figure() -> Any:
    pytest.importorskip("matplotlib")
    figure = new_figure(3, 2)
    figure.add_subplot().plot([1, 2], [3, 4])
    return figure


def test_png_svg_and_html_are_that(figure: Any, tmp_path: Path) -> None:
    for name in ("a.png", "a.svg", "a.HTML"):
        check_plot_path(tmp_path / name)
        save(figure, tmp_path / name, "a <title>")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("}svg")
    page = (tmp_path / "a.HTML").read_text()
    assert page.startswith("<!doctype html>")
    assert "<title>a &lt;title&gt;</title>" in page
    assert "://" not in page  # self-contained: no picture, style or script of another place
    [picture] = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert ET.fromstring(b64decode(picture)).tag.endswith("}svg")


def test_equal_figures_are_equal_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        figure = new_figure(3, 2)
        figure.add_subplot().hist([1, 2, 2])
        save(figure, tmp_path / name, "t")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_no_display_is_asked_for(figure: Any) -> None:
    assert type(figure.canvas).__name__ == "FigureCanvasAgg"


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.png.gz", ".png"])
def test_another_suffix_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--plot: .* must end in \.png, \.svg or \.html"):
        check_plot_path(tmp_path / name)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match=r"nowhere is no folder; create it first"):
        check_plot_path(tmp_path / "nowhere" / "a.png")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UsageError, match=r"a\.png is a folder; name a file"):
        check_plot_path(tmp_path / "a.png")


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainkit.plotting.find_spec", lambda _: None)
    with pytest.raises(MachineError, match=r"--plot: needs matplotlib, .*pip install 'trainkit\[plot\]'"):
        check_plot_path(tmp_path / "a.png")


def test_a_disk_that_takes_no_more_leaves_what_was_there(
    figure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_text("earlier")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MachineError, match=r"a\.png cannot be written: No space left on device"):
        save(figure, tmp_path / "a.png", "t")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.png", "earlier")]


def test_only_one_module_knows_matplotlib() -> None:
    spec = importlib.util.find_spec("trainkit")
    assert spec is not None
    assert spec.origin is not None
    knowing = [
        path.name
        for path in Path(spec.origin).parent.rglob("*.py")
        if re.search(r"^\s*(import|from) matplotlib", path.read_text(), re.MULTILINE)
    ]
    assert knowing == ["plotting.py"]
