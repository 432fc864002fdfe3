"""One broken line in a file of many: its true number is named, and the file is never in memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.bad_input.room import Room, Said, content_of, conversation, error_lines
from trainkit.cli import run

LINES = 700_100
PLACES = [1, 10_001, 700_001, LINES]
MOST_MEMORY_BYTES = 200 * 10**6
BROKEN = '{"text": "the fox", "text"\n'
READ = """
import sys
from pathlib import Path
from trainkit.data.sources import read_source
from trainkit.errors import DataError
from trainkit.recipe.schema import Source

try:
    for example in read_source(Source(path=sys.argv[1])):
        pass
except DataError as error:
    print(error)
(peak,) = [line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(peak[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux")
@pytest.mark.parametrize("line", PLACES)
def test_the_line_is_named_in_little_memory(line: int, tmp_path: Path) -> None:
    text = '{"text": "the quick brown fox jumps over the lazy dog"}\n'
    with (tmp_path / "train.jsonl").open("w") as file:
        file.writelines((text * (line - 1), BROKEN, text * (LINES - line)))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", READ, "train.jsonl"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    message, peak_kib = done.stdout.splitlines()
    assert re.match(rf"train\.jsonl:{line}: broken JSON at column 27 ", message), message
    assert len(message) <= 200
    assert int(peak_kib) * 1024 <= MOST_MEMORY_BYTES


@pytest.mark.long
@pytest.mark.parametrize("line", PLACES)
@pytest.mark.parametrize("command", ["fine-tune", "inspect-data"])
def test_the_commands_name_the_line(line: int, command: str, room: Room, capfd: Said) -> None:
    good = json.dumps(conversation(0)) + "\n"
    with room.data.open("w") as file:
        file.writelines((good * (line - 1), BROKEN, good * (LINES - line)))
    room.write_recipe()
    before = content_of(room.folder)
    capfd.readouterr()
    assert run([command, "recipe.yaml"]) == 3
    (message,) = error_lines(capfd, room.folder)
    assert re.match(rf"train\.jsonl:{line}: broken JSON at column 27 ", message), message
    assert content_of(room.folder) == before
