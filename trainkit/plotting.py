"""Pictures in files. The only module that knows matplotlib, which is an optional extra."""

from __future__ import annotations

import base64
import html
import io
import tempfile
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from trainkit.errors import MachineError, UsageError
from trainkit.run_folder import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".html")
DOTS_PER_INCH = 150


def check_plot_path(path: Path) -> None:
    """Raise UsageError for a suffix that says no format and for a folder that takes no file, before any work.

    MachineError where matplotlib is missing.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot: {path} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if find_spec("matplotlib") is None:
        raise MachineError("--plot: needs matplotlib, which is not installed; pip install 'trainkit[plot]'")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(
            f"--plot: {path} is a folder; name a file"
            if path.is_dir()
            else f"--plot: {path.parent} is no folder; create it first"
        )
    try:  # whether a folder takes a file, only trying tells: permissions are not all that there is
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"--plot: {path.parent} takes no file ({error.strerror}); name another folder") from error


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure that belongs to no window (Agg draws it)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path, title: str) -> None:
    """Write a figure as the suffix of ``path`` says; ``.html`` is one page with the picture (SVG) inside.

    The file appears complete or not at all. Raises MachineError where it cannot be written.
    """
    from matplotlib import rc_context

    picture = io.BytesIO()
    form = "png" if path.suffix.lower() == ".png" else "svg"
    metadata: dict[str, Any] = {"Title": title} | ({"Date": None} if form == "svg" else {})
    with rc_context({"svg.hashsalt": "trainkit", "svg.fonttype": "none"}):  # equal figures, equal files
        figure.savefig(picture, format=form, dpi=DOTS_PER_INCH, metadata=metadata)
    content = picture.getvalue()
    if path.suffix.lower() == ".html":
        content = _page(content, title).encode()
    try:
        write_atomically(path, content)
    except OSError as error:
        raise MachineError(f"--plot: {path} cannot be written: {error.strerror}") from error


def _page(svg: bytes, title: str) -> str:
    picture = base64.b64encode(svg).decode()
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title></head>\n'
        f'<body><img alt="{name}" style="max-width:100%" src="data:image/svg+xml;base64,{picture}"></body></html>\n'
    )
