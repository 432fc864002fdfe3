"""`scripts/bench pack`: its works at their smallest, with and without another project's packer; no time is judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import packing_peers
from benchmarks.command import main
from benchmarks.packing import WORKS

KNAPSACK = """
def greedy_knapsack(numbers, capacity):
    assert max(numbers) <= capacity
    return [[number] for number in numbers]
"""


@pytest.fixture(autouse=True)
def no_material(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is measured here is drawn, so that it is the same everywhere."""
    monkeypatch.setenv("TRAINKIT_MATERIAL", str(tmp_path / "nothing"))


@pytest.fixture
def peers(tmp_path: Path) -> Path:
    """A folder in which a package of one of the peers' names is installed. It puts each document into its own row."""
    folder = tmp_path / "peers" / "llamafactory"
    package = folder / "llamafactory" / "data" / "processor"
    package.mkdir(parents=True)
    (package / "processor_utils.py").write_text(KNAPSACK)
    (folder / "llamafactory" / "__init__.py").write_text("raise AssertionError('not to be initialised')")
    information = folder / "llamafactory-9.9.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: llamafactory\nVersion: 9.9\n")
    return folder.parent


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["pack", "--quick", "--json", *arguments]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_help_names_every_work_and_how_to_install_every_peer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["pack", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {work} " in text for work in WORKS)
    assert all(f"--target DIR/{peer.folder} {peer.requirements[0]}" in text for peer in packing_peers.PEERS)


def test_a_peer_is_run_where_it_is_installed_and_named_where_it_is_not(
    peers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = found(capsys, "--work", "alpaca", "--peers", str(peers))
    (table,) = result["tables"]
    ours, *others = table["lines"]
    assert ours["rows"] >= table["lower_bound_rows"] > 0
    assert ours["rows"] <= table["lower_bound_rows"] + 1
    assert ours["seconds"] > 0
    assert ours["peak_bytes"] > 2**20
    run = [line for line in others if not line["absent"]]
    assert [line["rows"] for line in run] == [1000], "the stand-in for LLaMA-Factory opens a row for each document"
    assert result["peers"]["llamafactory"] == "9.9"
    absent = {line["absent"] for line in others} - {""}
    assert absent == {f"not installed in --peers/{peer}" for peer in result["peers"] if peer != "llamafactory"}


def test_what_fails_or_takes_too_long_is_a_line_in_the_table(peers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = peers / "llamafactory" / "llamafactory" / "data" / "processor" / "processor_utils.py"
    broken.write_text("raise ImportError('half of the world is missing')")
    arguments = ["pack", "--quick", "--work", "alpaca", "--peers", str(peers)]
    assert main(arguments) == 0
    assert (
        "| LLaMA-Factory: windows of 1,000 | failed: ImportError: half of the world is missing |"
        in capsys.readouterr().out
    )
    broken.write_text("import time; time.sleep(60)")
    assert main([*arguments, "--limit", "3"]) == 0
    assert "| LLaMA-Factory: windows of 1,000 | stopped after 3 s |" in capsys.readouterr().out


def test_the_packing_step_loses_nothing_and_its_overlap_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    packing, overlap = found(capsys, "--work", "step")["tables"]
    line = packing["lines"][0]
    assert line["lost_tokens"] == 0
    assert packing["lower_bound_rows"] <= line["rows"] <= packing["lower_bound_rows"] + 8
    short, long = (one["overlap_tokens"] for one in overlap["lines"])
    assert short > long > 0
    assert short % 64 == long % 64 == 0


@pytest.mark.long
def test_the_other_works_run(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [word for work in ("million", "ten-million", "prepare", "memory") for word in ("--work", work)]
    tables = {table["work"]: table for table in found(capsys, *arguments)["tables"]}
    assert tables["prepare"]["lines"][0]["trained_tokens"] > 0
    assert [line["absent"] for line in tables["memory"]["lines"]] == ["", ""]
    assert tables["million"]["lines"][0]["rows"] >= tables["million"]["lower_bound_rows"]


def test_a_packer_is_loaded_without_the_packages_above_it(peers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    peer = next(one for one in packing_peers.PEERS if one.folder == "llamafactory")
    before = set(sys.modules)
    try:
        assert peer.ready(peers / peer.folder, np.full(2500, 7), 8)() == 2500
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("llamafactory"):
                del sys.modules[name]
    assert peer.version(peers) == "9.9"
    assert peer.version(peers.parent) is None
