"""`scripts/bench reliability` measures what it says it measures; the figures themselves are for the page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.reliability import table

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.long
def test_it_prints_a_table_of_what_it_found() -> None:
    command = [sys.executable, "scripts/bench", "reliability", "--quick", "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    saving, start = found["saving"], found["start"]
    assert saving["saves"] == 2  # of three, the last has no step after it
    assert saving["checkpoint_bytes"] > 1_000_000
    assert 0 < saving["share_at_default_interval"] < saving["share_here"] < 1
    assert start["ratio_of_medians"] == start["resumed_seconds"][0] / start["fresh_seconds"][0]
    assert found["position"]["next_step_seconds"] < found["position"]["first_step_seconds"]
    assert found["inspection"]["bytes"] >= 4_000_000
    assert found["inspection"]["seconds"] > 0
    lines = table(found).splitlines()
    assert lines[:2] == ["| what | measured |", "|---|---|"]
    assert all(line.count("|") == 3 for line in lines)


@pytest.mark.long
def test_pauses_are_those_of_another_thread() -> None:
    command = [sys.executable, "scripts/bench", "pauses", "--quick", "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    works = json.loads(done.stdout)["works"]
    assert len(works) == 8
    assert all(0 <= one["longest_pause_seconds"] < 5 for one in works.values())
    assert any(one["longest_pause_seconds"] > 0 for one in works.values())
