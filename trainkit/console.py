"""What a person sees: results on stdout, everything that passes by on stderr. The only module that knows rich.

A terminal gets colours and a live view of two lines; anything else (a pipe, a file, ``NO_COLOR``, ``TERM=dumb``,
``CI``) gets plain lines without control codes. Text is always printed as it stands: it is never read as markup, control
characters in it are made visible, and what the stream's encoding cannot say is written in ASCII.
Nothing in this module loads torch, and rich is imported only when something is drawn on a terminal.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
import time
from typing import TYPE_CHECKING, Any, Self, TextIO

from trainkit.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.live import Live

REFRESH_SECONDS = 0.1  # a live view is redrawn at most this often
STAGE_LINE_SECONDS = 5.0  # plain output: a stage that goes on says so this often
TRAINING_LINE_SECONDS = 30.0  # plain output: training says where it is this often, and at every tenth of the way
VIEW_LINES = 2  # the height of the live view
BAR_SIGN, BAR_COLUMNS = "█", 40
TRAINED_OPEN, TRAINED_CLOSE, NEWLINE_SIGN = "⟦", "⟧", "↵"

# Control characters become the signs that Unicode has for showing them; line feed and tab stay.
_VISIBLE_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE_CONTROLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
# Our own signs, for a stream that is not UTF-8.
_OUR_SIGNS = {"·": "-", "×": "x", "≤": "<=", "≥": ">=", "→": "->", "…": "...", "—": "-", "–": "-", "≡": "=", "█": "#"}
_IN_ASCII = str.maketrans(_OUR_SIGNS | {TRAINED_OPEN: "[[", TRAINED_CLOSE: "]]", NEWLINE_SIGN: "\\n"})


def printable(text: str, encoding: str | None) -> str:
    """``text`` as a stream of this encoding can show it: no control characters, nothing that cannot be encoded."""
    text = text.translate(_VISIBLE_CONTROLS)
    try:
        text.encode(encoding or "ascii")
    except UnicodeEncodeError:
        name = encoding or "ascii"
        return text.translate(_IN_ASCII).encode(name, "backslashreplace").decode(name)
    return text


def is_live(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether colours and a moving progress view make sense on ``stream``."""
    plain = environment.get("NO_COLOR") or environment.get("CI") or environment.get("TERM") in {"dumb", ""}
    return stream.isatty() and not plain


class Screen:
    """Two streams and at most one live view below them; knows how to write without tearing that view."""

    def __init__(self, stdout: TextIO, stderr: TextIO, environment: Mapping[str, str]) -> None:
        self.stdout = stdout
        self.stderr = stderr
        self.stdout_is_live = is_live(stdout, environment)
        self.stderr_is_live = is_live(stderr, environment)
        self._live: Live | None = None
        self._drawn_at = 0.0

    def rich(self, stream: TextIO) -> RichConsole:
        """A rich console on ``stream`` that takes every text literally."""
        from rich.console import Console as RichConsole

        return RichConsole(file=stream, force_terminal=True, markup=False, emoji=False, highlight=False)

    def write(self, stream: TextIO, text: str) -> None:
        """Write ``text`` and a line end.

        A reader that has left (``| head``) ends the output, not the program; what cannot be said on stderr is not
        worth a run either. Raises MachineError when stdout takes no more (a full disk): a result would be lost.
        """
        with self._live_set_aside(), self._failures_handled(stream):
            stream.write(printable(text, stream.encoding) + "\n")
            stream.flush()

    def paint(self, stream: TextIO, renderable: RenderableType) -> None:
        """Print something of rich's on a terminal."""
        with self._live_set_aside(), self._failures_handled(stream):
            self.rich(stream).print(renderable, soft_wrap=False)

    def draw(self, renderable: RenderableType, *, now: bool = False) -> None:
        """Show ``renderable`` as the live view on stderr, in place of what stood there."""
        from rich.live import Live

        with self._failures_handled(self.stderr):
            if self._live is None:
                self._live = Live(console=self.rich(self.stderr), auto_refresh=False, transient=True)
                self._live.start()
                now = True
            if now or time.monotonic() - self._drawn_at >= REFRESH_SECONDS:
                self._live.update(renderable, refresh=True)
                self._drawn_at = time.monotonic()

    def due(self) -> bool:
        """Whether a redraw would happen now; lets callers skip the work of preparing one."""
        return self._live is None or time.monotonic() - self._drawn_at >= REFRESH_SECONDS

    def end_live(self, *, keep: bool) -> None:
        """Take the live view down; ``keep`` leaves its last state on the terminal."""
        if self._live is not None:
            with self._failures_handled(self.stderr):
                self._live.transient = not keep
                self._live.stop()
            self._live = None

    @contextlib.contextmanager
    def _live_set_aside(self) -> Iterator[None]:
        """Erase the live view while something is written above it, then bring it back."""
        if self._live is None:
            yield
            return
        with self._failures_handled(self.stderr):
            self._live.stop()
        yield
        with self._failures_handled(self.stderr):
            self._live.start(refresh=True)

    @contextlib.contextmanager
    def _failures_handled(self, stream: TextIO) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            _send_to_nowhere(stream)
        except OSError as error:
            if stream is self.stdout:
                _send_to_nowhere(stream)
                raise MachineError(f"stdout: {error.strerror}; the result could not be written") from error


def _send_to_nowhere(stream: TextIO) -> None:
    """Point the stream's descriptor at the null device, so that later writes and the flush at exit succeed."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class Console:
    """The one way for a command to say something.

    With ``json_only`` stdout carries what :meth:`result` is given and nothing else; what would have been shown there
    goes to stderr.
    """

    def __init__(
        self,
        *,
        json_only: bool = False,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.json_only = json_only
        self.screen = Screen(
            stdout or sys.stdout, stderr or sys.stderr, os.environ if environment is None else environment
        )
        self._stage: _Stage | None = None
        self._view: TrainingView | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def _results(self) -> tuple[TextIO, bool]:
        """Where results for people go, and whether that is a terminal."""
        if self.json_only:
            return self.screen.stderr, self.screen.stderr_is_live
        return self.screen.stdout, self.screen.stdout_is_live

    def show(self, line: str = "") -> None:
        """Print a line of the result, on stdout."""
        self._end_stage()
        self.screen.write(self._results[0], line)

    def prose(self, line: str, *, hang: int = 0) -> None:
        """Print a sentence of the result, on stdout.

        On a terminal it is broken between words, its later lines set in by ``hang``; elsewhere it stays one line.
        """
        stream, live = self._results
        if live:
            columns = self.screen.rich(stream).width
            line = textwrap.fill(line, columns, subsequent_indent=" " * hang, break_on_hyphens=False)
        self.show(line)

    def note(self, line: str) -> None:
        """Print a line about what is going on, on stderr."""
        self._end_stage()
        self.screen.write(self.screen.stderr, line)

    def warn(self, line: str) -> None:
        """Print a line that should be read, on stderr."""
        self._marked("warning: ", "yellow", line)

    def error(self, line: str) -> None:
        """Print why the program ends, on stderr."""
        self._marked("error: ", "bold red", line)

    def at_once(self, line: str) -> None:
        """Print a line on stderr from within a signal handler: past the buffers, which the interrupted code may hold.

        The live view stays as it was and is drawn anew below.
        """
        stderr = self.screen.stderr
        text = f"{printable(line, stderr.encoding)}\n"
        if self.screen.stderr_is_live:
            text = "\n" + text + "\n" * VIEW_LINES
        with contextlib.suppress(OSError, ValueError):
            os.write(stderr.fileno(), text.encode(stderr.encoding or "ascii", "backslashreplace"))

    def result(self, value: Mapping[str, Any]) -> None:
        """Print ``value`` as one JSON object on one line of stdout; does nothing unless ``json_only``."""
        if self.json_only:
            self.screen.write(self.screen.stdout, json.dumps(value, ensure_ascii=False, allow_nan=False))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table on stdout. Numbers stand at the right with thousands separated; other cells as ``str`` says."""
        self._end_stage()
        stream, live = self._results
        cells = [[_cell(value) for value in row] for row in rows]
        right = [bool(rows) and all(_is_number(row[index]) for row in rows) for index in range(len(columns))]
        if live:
            self.screen.paint(stream, _rich_table(title, columns, cells, right, stream.encoding))
        else:
            self.screen.write(stream, "\n".join(_plain_table(title, columns, cells, right)))

    def bars(self, title: str, bars: Sequence[tuple[str, int]]) -> None:
        """Print a horizontal bar for each (label, count) on stdout; the largest count has the longest bar.

        A count above zero has at least one sign. On a terminal the bars take the width there is.
        """
        self._end_stage()
        stream, live = self._results
        label_columns = max((len(label) for label, _ in bars), default=0)
        count_columns = max((len(f"{count:,}") for _, count in bars), default=0)
        heads = [f"{label:>{label_columns}}  {count:>{count_columns},}  " for label, count in bars]
        columns = self.screen.rich(stream).width - len(heads[0]) if live and heads else BAR_COLUMNS
        signs = [BAR_SIGN * length for length in _bar_lengths([count for _, count in bars], columns)]
        if live:
            from rich.text import Text

            text = Text().append(printable(title, stream.encoding), "bold")
            for head, bar in zip(heads, signs, strict=True):
                text.append("\n" + printable(head, stream.encoding)).append(printable(bar, stream.encoding), "cyan")
            self.screen.paint(stream, text)
        else:
            lines = [(head + bar).rstrip() for head, bar in zip(heads, signs, strict=True)]
            self.screen.write(stream, "\n".join([title, *lines]))

    def highlight(self, spans: Sequence[tuple[str, bool]]) -> None:
        """Print text whose parts are (text, trained?): trained parts in colour, or between ⟦ and ⟧ in plain output.

        Line ends are marked by a sign, so that a trained one can be seen.
        """
        self._end_stage()
        stream, live = self._results
        parts = [(text.replace("\n", f"{NEWLINE_SIGN}\n"), trained) for text, trained in _joined(spans)]
        if live:
            from rich.text import Text

            pieces = [(printable(text, stream.encoding), "bold green" if trained else "dim") for text, trained in parts]
            self.screen.paint(stream, Text.assemble(*pieces))
        else:
            marked = (f"{TRAINED_OPEN}{text}{TRAINED_CLOSE}" if trained else text for text, trained in parts)
            self.screen.write(stream, "".join(marked))

    def progress(self, stage: str, done: int, total: int | None = None) -> None:
        """Say how far a stage is; fits every ``on_progress`` callback. A stage ends when ``done`` reaches ``total``.

        During training it shows in the training view.
        """
        if self._view is not None:
            self._view.stage(stage, done, total)
            return
        if self._stage is None or self._stage.name != stage:
            self._end_stage()
            self._stage = _Stage(stage)
        finished = done == total
        if self.screen.stderr_is_live:
            if finished or self.screen.due():
                self.screen.draw(_bar(stage, done, total, _out_of(done, total)), now=finished)
        elif finished or self._stage.line_is_due():
            self.screen.write(self.screen.stderr, f"{stage}: {_out_of(done, total)}")
        if finished:
            self._end_stage(keep=True)

    def enter_training(self, view: TrainingView | None) -> None:
        """Give the live view to training, or take it back (``None``)."""
        self._end_stage()
        self._view = view

    def close(self) -> None:
        """Take down whatever moves; the terminal is as it was found."""
        self._view = None
        self._stage = None
        self.screen.end_live(keep=False)

    def _end_stage(self, *, keep: bool = False) -> None:
        if self._stage is not None:
            self._stage = None
            self.screen.end_live(keep=keep)

    def _marked(self, mark: str, style: str, line: str) -> None:
        self._end_stage()
        stderr = self.screen.stderr
        if self.screen.stderr_is_live:
            from rich.text import Text

            self.screen.paint(stderr, Text.assemble((mark, style), printable(line, stderr.encoding)))
        else:
            self.screen.write(stderr, mark + line)


class TrainingView:
    """Where training is: a bar and the newest numbers on a terminal, now and then a line elsewhere.

    A context manager; while it is open, :meth:`Console.progress` shows inside it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._screen = console.screen
        self._numbers: dict[str, str] = {}
        self._step = 0
        self._steps: int | None = None
        self._first: tuple[int, float] | None = None  # step and time of the first update: what the ETA counts from
        self._line_step = 0
        self._line_time = 0.0
        self._stage_line_time = time.monotonic()
        self._stage_text = ""

    def __enter__(self) -> Self:
        self._console.enter_training(self)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._screen.stderr_is_live and self._steps is not None:
            self._draw(now=True)
        self._screen.end_live(keep=True)
        self._console.enter_training(None)

    def update(
        self,
        *,
        step: int,
        steps: int,
        loss: float | None = None,
        learning_rate: float | None = None,
        tokens_per_second: float | None = None,
        eval_loss: float | None = None,
    ) -> None:
        """Show that ``step`` of ``steps`` is done; a number that is left out keeps its last value."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        self._step, self._steps, self._stage_text = step, steps, ""
        if loss is not None:
            self._numbers["loss"] = f"loss {loss:.4f}"
        if eval_loss is not None:
            self._numbers["eval"] = f"eval loss {eval_loss:.4f}"
        if learning_rate is not None:
            self._numbers["learning_rate"] = f"lr {learning_rate:.2e}"
        if tokens_per_second is not None:
            self._numbers["tokens_per_second"] = f"{tokens_per_second:,.0f} tokens/s"
        if self._screen.stderr_is_live:
            if self._screen.due() or step == steps:
                self._draw(now=step == steps)
        elif eval_loss is not None or self._line_is_due(now):
            self._line_step, self._line_time = step, now
            numbers = [text for name, text in self._numbers.items() if name != "eval" or eval_loss is not None]
            self._screen.write(
                self._screen.stderr, "  ".join([f"step {step}/{steps}", *numbers, self._remaining(now)]).rstrip()
            )

    def message(self, line: str) -> None:
        """Print a line above the view."""
        self._console.note(line)

    def stage(self, stage: str, done: int, total: int | None) -> None:
        """Show what goes on between two steps, or before the first (evaluating)."""
        self._stage_text = "" if done == total else f"{stage} {_out_of(done, total)}"
        now = time.monotonic()
        if self._screen.stderr_is_live:
            if self._screen.due():
                if self._steps is None:
                    self._screen.draw(_bar(stage, done, total, _out_of(done, total)))
                else:
                    self._draw()
        elif self._stage_text and now - self._stage_line_time >= TRAINING_LINE_SECONDS:
            self._stage_line_time = now
            self._screen.write(self._screen.stderr, self._stage_text)

    def _line_is_due(self, now: float) -> bool:
        assert self._steps is not None
        tenth = self._step * 10 // self._steps > self._line_step * 10 // self._steps
        return (
            self._line_time == 0 or self._step == self._steps or tenth or now - self._line_time >= TRAINING_LINE_SECONDS
        )

    def _remaining(self, now: float) -> str:
        """The time left at the mean pace since the first update, evaluations and saves included."""
        assert self._steps is not None
        if self._first is None or self._step <= self._first[0] or self._step >= self._steps:
            return ""
        first_step, first_time = self._first
        seconds = (now - first_time) / (self._step - first_step) * (self._steps - self._step)
        return f"{clock(seconds)} left"

    def _draw(self, *, now: bool = False) -> None:
        from rich.console import Group
        from rich.text import Text

        left = self._remaining(time.monotonic())
        bar = _bar(f"step {self._step:,}/{self._steps:,}", self._step, self._steps, left)
        numbers = " · ".join([*self._numbers.values(), *filter(None, [self._stage_text])])
        second = Text(printable(numbers, self._screen.stderr.encoding), no_wrap=True, overflow="ellipsis")
        self._screen.draw(Group(bar, second), now=now)


class _Stage:
    """A stage under way, and when plain output last spoke of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._spoken = time.monotonic()

    def line_is_due(self) -> bool:
        now = time.monotonic()
        if now - self._spoken < STAGE_LINE_SECONDS:
            return False
        self._spoken = now
        return True


def clock(seconds: float) -> str:
    """A duration as h:mm:ss.

    >>> clock(3725.4)
    '1:02:05'
    """
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _out_of(done: int, total: int | None) -> str:
    return f"{done:,}" if total is None else f"{done:,} of {total:,}"


def _bar_lengths(counts: Sequence[int], columns: int) -> list[int]:
    """Signs for each count, the largest given all ``columns``; what is there at all has at least one.

    >>> _bar_lengths([0, 1, 500, 1000], 40)
    [0, 1, 20, 40]
    """
    most = max(counts, default=0)
    return [max(1, round(columns * count / most)) if count else 0 for count in counts]


def _joined(spans: Sequence[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Neighbours of the same kind made one, so that marks stand only where the kind changes."""
    text, kind = "", False
    for part, trained in spans:
        if trained != kind and text:
            yield text, kind
            text = ""
        text, kind = text + part, trained
    if text:
        yield text, kind


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object) -> str:
    return f"{value:,}" if _is_number(value) else str(value)


def _plain_table(title: str, columns: Sequence[str], cells: list[list[str]], right: list[bool]) -> Iterator[str]:
    """Aligned columns, two spaces apart, under a title."""
    widths = [max(len(row[index]) for row in [list(columns), *cells]) for index in range(len(columns))]
    if title:
        yield title
    for row in [list(columns), *cells]:
        padded = (
            text.rjust(width) if end else text.ljust(width) for text, width, end in zip(row, widths, right, strict=True)
        )
        yield ("  ".join(padded)).rstrip()


def _rich_table(
    title: str, columns: Sequence[str], cells: list[list[str]], right: list[bool], encoding: str | None
) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(printable(title, encoding), "bold") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
    )
    for name, end in zip(columns, right, strict=True):
        table.add_column(Text(printable(name, encoding)), justify="right" if end else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(printable(text, encoding)) for text in row))
    return table


def _bar(label: str, done: int, total: int | None, tail: str) -> RenderableType:
    """One line as wide as the terminal: what, how far, and what is left."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, justify="right")
    grid.add_row(Text(label), ProgressBar(total=total, completed=done, pulse=total is None), Text(tail))
    return grid
