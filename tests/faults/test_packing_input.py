"""What `pack-data` makes of bad and of odd input, through the command line: the exit code, one line, nothing touched.

Everything happens in a folder with a tokenizer, good data and things that are somebody else's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from trainkit.cli import run
from trainkit.data.packed_store import PackedRows
from trainkit.data.sealed_folder import verify

Said = pytest.CaptureFixture[str]
LONGEST_LINE = 200
TEXTS = ["the quick brown fox", "jumps over", "the lazy dog and what is it then"]


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture
def room(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`data.jsonl`, `tok/` (a tokenizer and no model), a recipe, and `taken/` and `thesis.tex`, which are not ours."""
    folder = tmp_path / "room"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TRAINKIT_CACHE", str(tmp_path / "cache"))
    (folder / "tok").mkdir()
    for path in tiny_model_folder.glob("token*"):
        shutil.copy(path, folder / "tok")
    (folder / "data.jsonl").write_text(lines(*TEXTS))
    (folder / "recipe.yaml").write_text(
        "model: {name: tok}\ndata: {train: data.jsonl}\ntraining: {epochs: 1}\noutput_dir: run\n"
    )
    (folder / "thesis.tex").write_text("precious")
    (folder / "taken").mkdir()
    (folder / "taken" / "notes.txt").write_text("precious")
    return folder


def content_of(folder: Path) -> dict[str, str]:
    """Everything below `folder`: relative path → time of change and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = f"{path.lstat().st_mtime_ns} {content}"
    return found


GOOD = ["--data", "data.jsonl", "--tokenizer", "tok", "--sequence-length", "32"]


def good_but(**changes: str) -> list[str]:
    """The good options with some changed, by name; an empty value takes one out."""
    options = dict(zip(GOOD[::2], GOOD[1::2], strict=True))
    options |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return [part for option, value in options.items() if value for part in (option, value)]


@dataclass(frozen=True)
class Case:
    """What is asked for, with what broken before, and what must be said."""

    name: str
    code: int
    says: str
    arguments: list[str] = field(default_factory=lambda: GOOD)
    break_it: Callable[[Path], object] = lambda room: None


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda room: (room / name).write_bytes(data)


DATA = [
    Case("a file of 0 bytes", 3, r"^data\.jsonl has 0 examples", break_it=write("data.jsonl", "")),
    Case(
        "a broken line",
        3,
        r"^data\.jsonl:2: .*JSON",
        break_it=write("data.jsonl", lines(TEXTS[0]) + '{"text": \n' + lines(TEXTS[1])),
    ),
    Case(
        "a last line that is cut off",
        3,
        r"^data\.jsonl:3: the last line is cut off",
        break_it=write("data.jsonl", lines(*TEXTS)[:-9]),
    ),
    Case(
        "empty documents alone",
        3,
        r"^data\.jsonl: none of 3 examples is left to train on",
        break_it=write("data.jsonl", lines("", "", "")),
    ),
    Case(
        "more empty documents than data.max_dropped",
        3,
        r"^data\.jsonl: 1 of 4 examples leave nothing to train .*data\.jsonl:4",
        break_it=write("data.jsonl", lines(*TEXTS, "")),
    ),
    Case("no such file", 3, r"^dta\.jsonl: no such file.*data\.jsonl", good_but(data="dta.jsonl")),
    Case(
        "a document too long where that is an error",
        3,
        r"^data\.jsonl:4: [0-9]+ tokens, and packing\.sequence_length is 32",
        [*GOOD, "--set", "packing.long_documents=error"],
        write("data.jsonl", lines(*TEXTS, "the dog " * 40)),
    ),
]

TOKENIZER = [
    Case("no such folder", 4, r"^--tokenizer: no such folder: tik/", good_but(tokenizer="tik/")),
    Case("a file", 4, r"^--tokenizer: thesis\.tex is a file; give the folder", good_but(tokenizer="thesis.tex")),
    Case("a folder without tokenizer", 4, r"^taken: no tokenizer: copy tokenizer\.json", good_but(tokenizer="taken")),
    Case(
        "a broken tokenizer",
        4,
        r"^tok/tokenizer\.json:1: not valid JSON .*; restore the file$",
        break_it=write("tok/tokenizer.json", "{"),
    ),
    Case("no hub", 4, r"^--tokenizer: owner/name .*give a local folder$", good_but(tokenizer="owner/name")),
    Case(
        "a separator that is no token",
        2,
        r"^packing\.separator: '<\|sep\|>' is not in the vocabulary",
        [*GOOD, "--set", "packing.separator=<|sep|>"],
    ),
    Case(
        "a template that is not there",
        2,
        r"^data\.chat_template: chatlm: No such file.*chatml, plain",
        [*GOOD, "--chat-template", "chatlm"],
    ),
]

OPTIONS = [
    Case("nothing", 2, r"^give a RECIPE, or --data and --tokenizer; see", []),
    Case("no tokenizer", 2, r"^--data: needs --tokenizer beside it", good_but(tokenizer="")),
    Case("no data", 2, r"^--tokenizer: needs --data beside it", good_but(data="")),
    Case("data and recipe", 2, r"^--data: RECIPE says it already", ["recipe.yaml", "--data", "data.jsonl"]),
    Case("rows of 1 token", 2, r"^--sequence-length: must be at least 8; got 1$", good_but(sequence_length="1")),
    Case(
        "rows of no number",
        2,
        r"^Invalid value for '--sequence-length': Input should be a valid integer",
        good_but(sequence_length="1k"),
    ),
    Case(
        "an overlap as long as a row",
        2,
        r"^--set packing\.overlap: 32 tokens are more than half of `sequence_length` 32; give at most 16$",
        [*GOOD, "--set", "packing.overlap=32"],
    ),
    Case(
        "an overlap below 0", 2, r"^--set packing\.overlap: must be at least 0", [*GOOD, "--set", "packing.overlap=-1"]
    ),
    Case("a recipe that is not there", 2, r"^nowhere\.yaml: no such recipe", ["nowhere.yaml"]),
    Case(
        "a mistake in --set",
        2,
        r"^--set packing\.sequnce_length: unknown key",
        [*GOOD, "--set", "packing.sequnce_length=8"],
    ),
]

OUTPUT = [
    Case("an unknown format", 2, r"^Invalid value for '--format': 'csv' is not one of", [*GOOD, "--format", "csv"]),
    Case("parquet without a place", 2, r"^--format parquet: needs --output", [*GOOD, "--format", "parquet"]),
    Case("a folder that is not ours", 2, r"^--output: taken holds notes\.txt", [*GOOD, "--output", "taken"]),
    Case("a file that is not ours", 2, r"^--output: thesis\.tex is a file", [*GOOD, "--output", "thesis.tex"]),
    Case(
        "below a file", 2, r"^--output: thesis\.tex/a cannot be made: thesis\.tex", [*GOOD, "--output", "thesis.tex/a"]
    ),
    Case(
        "a parquet file as store",
        2,
        r"^--output: a\.parquet is the name of a parquet file; add",
        [*GOOD, "--output", "a.parquet"],
    ),
    Case(
        "a parquet file that is not ours",
        2,
        r"^rows\.parquet: lies there already and is no file that trainkit wrote",
        [*GOOD, "--format", "parquet", "--output", "rows.parquet"],
        write("rows.parquet", b"PAR1 precious PAR1"),
    ),
    Case(
        "a folder of parquet that is not ours",
        2,
        r"^taken/train\.parquet: lies there already and is no file that trainkit wrote",
        [*GOOD, "--format", "parquet", "--output", "taken"],
        write("taken/train.parquet", b""),
    ),
    Case(
        "a file in place of a folder of parquet",
        2,
        r"^--output: thesis\.tex is a file; name a new folder, or a file that ends in \.parquet",
        [*GOOD, "--format", "parquet", "--output", "thesis.tex"],
    ),
    Case("a picture of no known kind", 2, r"^--plot: a\.pdf must end in \.png, \.svg or", [*GOOD, "--plot", "a.pdf"]),
    Case("a picture nowhere", 2, r"^--plot: no is no folder; create it first", [*GOOD, "--plot", "no/a.png"]),
    Case(
        "a picture that is a folder",
        2,
        r"^--plot: .* is a folder",
        [*GOOD, "--plot", "a.png"],
        lambda room: (room / "a.png").mkdir(),
    ),
]


def refuse(case: Case, arguments: list[str], capfd: Said) -> None:
    room = Path.cwd()
    before = content_of(room)
    capfd.readouterr()
    code = run(["pack-data", *arguments])
    said = capfd.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) == (case.code, 1), said.err
    line = errors[0].removeprefix("error: ").replace(f"{room}/", "")
    assert re.search(case.says, line), line
    assert len(line) <= LONGEST_LINE, line
    assert said.out == ""
    assert "Traceback" not in said.err
    assert content_of(room) == before
    cache = room.parent / "cache"
    assert all((path.parent / "manifest.json").is_file() for path in cache.rglob("*.bin")), "half of it was left"
    assert not list(cache.rglob(".building-*"))


def named(cases: list[Case]) -> list[Any]:
    return [pytest.param(case, id=case.name.replace(" ", "-")) for case in cases]


@pytest.mark.parametrize("case", named([*DATA, *TOKENIZER, *OPTIONS, *OUTPUT]))
@pytest.mark.usefixtures("room")
def test_it_is_refused_in_one_line(case: Case, room: Path, capfd: Said) -> None:
    case.break_it(room)
    if "--plot" in case.arguments:
        pytest.importorskip("matplotlib")
    refuse(case, case.arguments, capfd)


@pytest.mark.parametrize("case", named([case for case in OUTPUT if "not ours" in case.name]))
@pytest.mark.usefixtures("room")
def test_force_replaces_only_what_is_ours(case: Case, room: Path, capfd: Said) -> None:
    case.break_it(room)
    refuse(case, [*case.arguments, "--force"], capfd)


def test_the_missing_extra_is_found_before_any_work(room: Path, capfd: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainkit.plotting.find_spec", lambda _: None)
    case = Case("no matplotlib", 5, r"^--plot: needs matplotlib, .*pip install 'trainkit\[plot\]'$")
    refuse(case, [*good_but(data="nowhere.jsonl"), "--plot", "a.png"], capfd)


# Odd, and no mistake


def packed(*arguments: str, capfd: Said) -> tuple[dict[str, Any], PackedRows]:
    capfd.readouterr()
    code = run(["pack-data", *arguments, "--json"])
    said = capfd.readouterr()
    assert code == 0, said.err
    result = json.loads(said.out)
    return result, PackedRows.open(Path(result["output"]))


def test_a_document_longer_than_anything(room: Path, capfd: Said) -> None:
    (room / "data.jsonl").write_text(lines("1234567" * 30_000))
    result, rows = packed(*good_but(sequence_length="8"), capfd=capfd)
    assert result["document_lengths"]["longest"] == result["ledger"]["read"] + 1 > 200_000
    assert (result["documents"], result["ledger"]["truncated"], result["ledger"]["dropped"]) == (1, 0, {})
    assert result["trained_tokens"] == result["ledger"]["read"]  # every token but the first, and the separator
    assert max(rows.row(index).ids_T.size for index in range(len(rows))) == 8


def test_a_few_empty_documents_are_counted(room: Path, capfd: Said) -> None:
    (room / "data.jsonl").write_text(lines(*TEXTS, ""))
    result, _ = packed(*GOOD, "--set", "data.max_dropped=0.5", capfd=capfd)
    assert result["documents"] == 3
    assert sum(result["ledger"]["examples_dropped"].values()) == 1


def test_one_document_and_equal_lengths(room: Path, capfd: Said) -> None:
    (room / "data.jsonl").write_text(lines(TEXTS[0]))
    result, _ = packed(*GOOD, "--format", "parquet", "--output", "one", capfd=capfd)
    assert (result["documents"], result["rows"], result["lower_bound_rows"]) == (1, 1, 1)
    (room / "data.jsonl").write_text(lines(*["1234567"] * 9))  # 8 tokens each
    result, rows = packed(*good_but(sequence_length="16"), "--format", "parquet", "--output", "equal", capfd=capfd)
    assert (result["rows"], result["lower_bound_rows"]) == (5, 5)
    assert sorted(rows.row(index).ids_T.size for index in range(5)) == [8, 16, 16, 16, 16]


# The machine gives up


def program(*arguments: str, before: str = "") -> list[str]:
    code = f"import sys\n{before}\nfrom trainkit.cli import run\nsys.exit(run(['pack-data', *sys.argv[1:]]))"
    return [sys.executable, "-c", code, *arguments]


@pytest.mark.parametrize("form", ["store", "parquet"])
def test_a_full_disk_leaves_nothing_that_is_found_again(room: Path, form: str) -> None:
    """A process of its own, which may write no file larger than some bytes."""
    (room / "data.jsonl").write_text(lines(*TEXTS * 400))
    arguments = [*GOOD, "--output", "out", "--format", form]
    most = 4000
    if form == "parquet":  # the store is there already; the file is what finds no room
        subprocess.run(program(*GOOD), check=True, capture_output=True)
    limited = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))"
    before = content_of(room)
    done = subprocess.run(program(*arguments, before=limited), capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"File too large; make room,? or give another", line), line
    assert "Traceback" not in done.stderr
    assert not list(room.rglob("*.bin"))
    assert not list(room.rglob(".*building-*"))
    assert not list(room.rglob("*.parquet"))
    assert {name: content for name, content in content_of(room).items() if not name.startswith("out")} == before
    again = subprocess.run(program(*arguments, "--json"), capture_output=True, text=True, check=True)
    result = json.loads(again.stdout)
    assert result["found_again"] == (form == "parquet")
    verify(Path(result["output"]), "rows", Path(result["output"]).name)


def test_kill_9_leaves_nothing_that_is_found_again(room: Path) -> None:
    (room / "data.jsonl").write_text(lines(*TEXTS * 10_000))
    arguments = [*GOOD, "--output", "out"]
    started = subprocess.Popen(program(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(room.glob("out/.building-*/tokens.bin")) and time.monotonic() < deadline:
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    left = list(room.glob("out/.building-*"))
    assert left
    assert not list(room.glob("out/*/manifest.json"))
    for path in left:
        os.utime(path, (1, 1))  # long ago
    done = subprocess.run(program(*arguments, "--json"), capture_output=True, text=True, check=True)
    assert not json.loads(done.stdout)["found_again"]
    assert not list(room.glob("out/.building-*"))


def test_ctrl_c_is_one_line_and_exit_130(room: Path) -> None:
    (room / "data.jsonl").write_text(lines(*TEXTS * 10_000))
    started = subprocess.Popen(
        program(*GOOD, "--output", "out"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(room.glob("out/.building-*/tokens.bin")) and time.monotonic() < deadline:
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    shown, said = started.communicate(timeout=60)
    assert (started.returncode, shown) == (130, "")
    assert re.fullmatch(r"error: interrupted during \w+; nothing half is left, .*", said.splitlines()[-1]), said
    assert "Traceback" not in said
    assert list((room / "out").iterdir()) == []


def test_two_at_once_write_the_same(room: Path) -> None:
    (room / "data.jsonl").write_text(lines(*TEXTS * 2000))
    arguments = [*GOOD, "--output", "rows.parquet", "--format", "parquet", "--json"]
    both = [subprocess.Popen(program(*arguments), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(2)]
    results = [json.loads(one.communicate(timeout=120)[0]) for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert results[0]["output"] == results[1]["output"]
    assert len(pq.read_table("rows.parquet")) == results[0]["rows"]
    assert not list(room.glob(".rows.parquet*"))
