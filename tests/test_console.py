"""What a person sees, on a terminal and off it."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainkit.console import Console, TrainingView, is_live, printable

CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Captured:
    """A console on two strings, as a pipe would see it."""

    def __init__(self, *, json_only: bool = False, encoding: str = "utf-8") -> None:
        self._out, self._err = io.BytesIO(), io.BytesIO()
        self.console = Console(
            json_only=json_only,
            stdout=io.TextIOWrapper(self._out, encoding=encoding, write_through=True),
            stderr=io.TextIOWrapper(self._err, encoding=encoding, write_through=True),
            environment={},
        )
        self._encoding = encoding

    @property
    def out(self) -> str:
        return self._out.getvalue().decode(self._encoding)

    @property
    def err(self) -> str:
        return self._err.getvalue().decode(self._encoding)


def on_a_terminal(program: str, environment: dict[str, str] | None = None, *, columns: int = 80) -> str:
    """What a program prints when stdout and stderr are one terminal of this width."""
    leader, follower = pty.openpty()
    cleared = {name: value for name, value in os.environ.items() if name not in {"CI", "NO_COLOR"}}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=cleared | {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "24"} | (environment or {}),
    )
    os.close(follower)
    printed = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # Linux's way to say that the other side has closed
            break
        if not chunk:
            break
        printed += chunk
    os.close(leader)
    assert process.wait() == 0, printed.decode(errors="replace")
    return printed.decode()


TRAINING = """
from trainkit.console import Console, TrainingView
with Console() as console, TrainingView(console) as view:
    view.update(step=0, steps=40, eval_loss=4.2424)
    for step in range(1, 41):
        view.update(step=step, steps=40, loss=4 / step, learning_rate=2e-4, tokens_per_second=12345.6)
        if step == 20:
            view.message("[bold]saved[/bold] checkpoint")
            console.progress("evaluating", 1, 3)
            console.progress("evaluating", 3, 3)
"""


def visible_lines(printed: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", CONTROL_SEQUENCE.sub("", printed)) if line]


def test_importing_it_loads_neither_rich_nor_torch() -> None:
    program = "import sys, trainkit.console; print([m for m in ('rich', 'torch', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_bars_are_as_long_as_their_counts() -> None:
    captured = Captured()
    captured.console.bars("lengths", [("1-2", 1000), ("3-4", 500), ("5-8", 0), ("9-16", 1)])
    assert captured.out.splitlines() == [
        "lengths",
        " 1-2  1,000  " + 40 * "█",
        " 3-4    500  " + 20 * "█",
        " 5-8      0",
        "9-16      1  █",
    ]
    in_ascii = Captured(encoding="ascii")
    in_ascii.console.bars("lengths", [("1", 2)])
    assert in_ascii.out == f"lengths\n1  2  {40 * '#'}\n"


def test_bars_without_anything_to_show() -> None:
    captured = Captured()
    captured.console.bars("none", [])
    captured.console.bars("empty", [("1", 0)])
    assert captured.out == "none\nempty\n1  0\n"


@pytest.mark.parametrize("columns", [40, 100])
def test_bars_fill_a_terminal_and_no_more(columns: int) -> None:
    program = """
from trainkit.console import Console
with Console() as console:
    console.bars("[bold]lengths", [("1-2", 1000), ("3-4", 1)])
"""
    assert visible_lines(on_a_terminal(program, columns=columns)) == [
        "[bold]lengths",
        "1-2  1,000  " + (columns - 12) * "█",
        "3-4      1  █",
    ]


@pytest.mark.parametrize("columns", [30, 80])
def test_a_sentence_is_broken_between_words_on_a_terminal(columns: int) -> None:
    program = """
from trainkit.console import Console
with Console() as console:
    console.prose("  1. [bold] and enough words for 30 columns", hang=5)
"""
    whole = "  1. [bold] and enough words for 30 columns"
    lines = visible_lines(on_a_terminal(program, columns=columns))
    assert lines == (["  1. [bold] and enough words", "     for 30 columns"] if columns == 30 else [whole])
    captured = Captured()
    captured.console.prose(f"{whole}{100 * ' long'}", hang=5)
    assert captured.out == f"{whole}{100 * ' long'}\n"


def test_results_go_to_stdout_and_the_rest_to_stderr() -> None:
    captured = Captured()
    captured.console.show("result")
    captured.console.note("passing by")
    captured.console.warn("careful")
    captured.console.error("cannot")
    assert captured.out == "result\n"
    assert captured.err == "passing by\nwarning: careful\nerror: cannot\n"


def test_with_json_stdout_is_one_object_and_nothing_else() -> None:
    captured = Captured(json_only=True)
    captured.console.show("result")
    captured.console.table("t", ["a"], [[1]])
    captured.console.highlight([("x", True)])
    captured.console.result({"steps": 3, "name": "ü"})
    assert json.loads(captured.out) == {"steps": 3, "name": "ü"}
    assert captured.out.count("\n") == 1
    assert "result" in captured.err
    assert "⟦x⟧" in captured.err


def test_without_json_the_object_is_not_printed() -> None:
    captured = Captured()
    captured.console.result({"steps": 3})
    assert captured.out == ""


def test_a_plain_table_is_aligned_with_numbers_at_the_right() -> None:
    captured = Captured()
    captured.console.table("Tokens", ["part", "tokens"], [["trained", 1234567], ["pad", 8]])
    assert captured.out == "Tokens\npart        tokens\ntrained  1,234,567\npad              8\n"


def test_trained_tokens_are_marked_and_neighbours_joined() -> None:
    captured = Captured()
    captured.console.highlight([("hi ", False), ("the", True), ("re\n", True), ("you", False)])
    assert captured.out == "hi ⟦there↵\n⟧you\n"


def test_an_ascii_stream_gets_ascii() -> None:
    captured = Captured(encoding="ascii")
    captured.console.show("a → b · 3 × 4 ≤ 12 жук")
    captured.console.highlight([("ü\n", True)])
    assert captured.out == "a -> b - 3 x 4 <= 12 \\u0436\\u0443\\u043a\n[[\\xfc\\n\n]]\n"


def test_control_characters_are_made_visible() -> None:
    assert printable("a\x1b[31mb\rc\x07\x9bd\te\n", "utf-8") == "a␛[31mb␍c␇\ufffdd\te\n"
    assert "\x1b" not in printable("\x1b", "ascii")


def test_a_lone_surrogate_does_not_break_the_output() -> None:
    captured = Captured()
    captured.console.show("a\ud800b")
    assert captured.out == "a\\ud800b\n"


@pytest.mark.parametrize("reason", [{"NO_COLOR": "1"}, {"CI": "true"}, {"TERM": "dumb"}])
def test_what_makes_a_terminal_plain(reason: dict[str, str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert is_live(Terminal(), {"TERM": "xterm"})
    assert not is_live(Terminal(), {"TERM": "xterm"} | reason)
    assert not is_live(io.StringIO(), {"TERM": "xterm"})


def test_plain_training_says_first_last_tenths_and_evaluations() -> None:
    captured = Captured()
    with TrainingView(captured.console) as view:
        view.update(step=0, steps=1000, eval_loss=4.25)
        for step in range(1, 1001):
            view.update(step=step, steps=1000, loss=1.5, learning_rate=2e-4, tokens_per_second=1234.5)
    lines = captured.err.splitlines()
    assert lines[0] == "step 0/1000  eval loss 4.2500"
    assert [line.split()[1] for line in lines[1:]] == [f"{tenth * 100}/1000" for tenth in range(1, 11)]
    assert lines[-1] == "step 1000/1000  loss 1.5000  lr 2.00e-04  1,234 tokens/s"
    assert lines[1].endswith(" left")
    assert captured.out == ""


def test_plain_training_messages_stand_between_the_lines() -> None:
    captured = Captured()
    with TrainingView(captured.console) as view:
        view.update(step=1, steps=2, loss=1.0)
        view.message("[red]saved[/red]")
        captured.console.progress("evaluating", 1, 2)
        view.update(step=2, steps=2, loss=0.5)
    assert captured.err == "step 1/2  loss 1.0000\n[red]saved[/red]\nstep 2/2  loss 0.5000\n"


def test_a_long_evaluation_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one before the first step, when there is no step to speak of."""
    times = iter(range(0, 1000, 10))
    monkeypatch.setattr("trainkit.console.time.monotonic", lambda: float(next(times)))
    captured = Captured()
    with TrainingView(captured.console):
        for done in range(1, 8):
            captured.console.progress("evaluating rows", done, 7)
    assert captured.err == "evaluating rows 3 of 7\nevaluating rows 6 of 7\n"


def test_the_evaluation_before_the_first_step_shows_on_a_terminal() -> None:
    program = """
from trainkit.console import Console, TrainingView
with Console() as console, TrainingView(console) as view:
    console.progress("evaluating rows", 3, 7)
    view.update(step=0, steps=2, eval_loss=4.0)
"""
    printed = visible_lines(on_a_terminal(program))
    assert printed[0].startswith("evaluating rows  ")
    assert printed[0].endswith("3 of 7")
    assert printed[-1].startswith("eval loss 4.0")


def test_a_signal_handler_may_speak_in_the_middle_of_a_write() -> None:
    """A buffered stream refuses to be entered twice; the line goes past it."""
    program = """
import io, os, signal, sys
from trainkit.console import Console

class Raw(io.FileIO):
    def write(self, data):
        signal.raise_signal(signal.SIGINT)
        return super().write(data)

stderr = io.TextIOWrapper(io.BufferedWriter(Raw(os.dup(2), "w")), encoding="utf-8")
console = Console(stderr=stderr)
signal.signal(signal.SIGINT, lambda *_: console.at_once("heard"))
console.note("a line")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "heard\na line\n")


def test_a_plain_stage_says_when_it_is_done() -> None:
    captured = Captured()
    for done in range(0, 1001, 100):
        captured.console.progress("encoding", done, 1000)
    captured.console.progress("counting", 5)
    captured.console.show("next")
    assert captured.err == "encoding: 1,000 of 1,000\n"


def test_a_long_plain_stage_says_so_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = Captured()
    times = iter(range(0, 1000, 2))
    monkeypatch.setattr("trainkit.console.time.monotonic", lambda: float(next(times)))
    for done in range(10):
        captured.console.progress("reading", done)
    assert captured.err.splitlines() == ["reading: 2", "reading: 5", "reading: 8"]


@pytest.mark.parametrize("columns", [40, 80])
def test_a_terminal_gets_a_view_that_fits(columns: int) -> None:
    printed = on_a_terminal(TRAINING, columns=columns)
    assert CONTROL_SEQUENCE.search(printed)
    lines = visible_lines(printed)
    assert all(len(line) <= columns for line in lines), lines
    assert any(line.startswith("step 40/40") for line in lines)
    assert any("loss 0.1000" in line for line in lines)
    assert "[bold]saved[/bold] checkpoint" in lines
    assert printed.endswith("\x1b[?25h")  # the cursor is back
    if columns == 80:
        assert any("loss 0.1000 · lr 2.00e-04 · 12,346 tokens/s" in line for line in lines)


@pytest.mark.parametrize("reason", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"CI": "true"}])
def test_a_terminal_that_asks_for_plain_lines_gets_no_control_codes(reason: dict[str, str]) -> None:
    printed = on_a_terminal(TRAINING, reason)
    assert "\x1b" not in printed
    assert "step 40/40  loss 0.1000" in printed


def test_a_terminal_without_utf8_gets_ascii() -> None:
    printed = on_a_terminal(TRAINING, {"PYTHONIOENCODING": "ascii"})
    assert printed.isascii()
    assert "step 40/40" in printed


def test_markup_and_control_codes_in_data_stay_text_on_a_terminal() -> None:
    program = """
from trainkit.console import Console
console = Console()
console.table("[red]t[/red]", ["[b]col[/b]"], [["[link=x]cell[/link] :smile: \\x1b[5m"]])
console.highlight([("[/]open ", True), ("[bold]no", False)])
console.warn("[oops")
"""
    printed = on_a_terminal(program)
    visible = CONTROL_SEQUENCE.sub("", printed)
    for text in [
        "[red]t[/red]",
        "[b]col[/b]",
        "[link=x]cell[/link] :smile: ␛[5m",
        "[/]open [bold]no",
        "warning: [oops",
    ]:
        assert text in visible
    assert "\x1b[5m" not in printed


def test_a_stage_on_a_terminal_leaves_its_last_state() -> None:
    program = """
from trainkit.console import Console
console = Console()
for done in range(101):
    console.progress("encoding", done, 100)
console.progress("reading", 3)
console.show("result")
"""
    lines = visible_lines(on_a_terminal(program))
    assert any(re.fullmatch(r"encoding\s+━+\s+100 of 100\s*", line) for line in lines)
    assert lines[-1] == "result"


def test_a_reader_that_leaves_does_not_break_the_program() -> None:
    program = """
from trainkit.console import Console, TrainingView
console = Console()
for number in range(100_000):
    console.show(f"line {number}")
console.note("end of the work")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.stderr.read() == "end of the work\n"
    process.stderr.close()
    assert process.wait() == 0


def test_a_result_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    program = """
from trainkit.console import Console
from trainkit.errors import MachineError
console = Console(json_only=True)
try:
    console.result({"steps": 1})
except MachineError as error:
    console.error(str(error))
    raise SystemExit(error.exit_code)
"""
    with Path("/dev/full").open("w") as full, (tmp_path / "err").open("w") as err:
        code = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=err, check=False).returncode
    assert (
        (tmp_path / "err")
        .read_text()
        .startswith("error: stdout: No space left on device; the result could not be written\n")
    )
    assert code == 5
