"""No command asks another machine for anything, unless the recipe names something that lies on the hub.

Counted are Python's own events (connect, send, look up a name) and, where there is a tracer, the system's calls: the
libraries' own threads and languages are seen too. The server has HF_HUB_OFFLINE and its like unset.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest

from trainkit.__main__ import main
from trainkit.signals import SIGNALS

TELEMETRY = ("DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY")

COMMANDS = [
    ["--version"],
    ["--help"],
    ["schema"],
    ["show", "recipe.yaml"],
    ["inspect-data", "recipe.yaml"],
    ["inspect-data", "quickstart", "--examples", "1"],
    ["pack-data", "recipe.yaml"],
    [
        "pack-data",
        "--data",
        "train.jsonl",
        "--tokenizer",
        "model",
        "--sequence-length",
        "64",
        "--format",
        "parquet",
        "--output",
        "packed",
    ],
    ["estimate-memory", "recipe.yaml"],
    ["estimate-memory", "--model", "llama-3.1-8b", "--adapter", "lora", "--gpu", "h100-80gb"],
    ["estimate-memory", "--model", "meta-llama/Llama-3.1-8B"],
    ["estimate-memory", "--model", "llama-70b", "--view", "textbook"],
    ["fine-tune", "recipe.yaml", "--json"],
    ["fine-tune", "recipe.yaml", "--set", "adapter=null"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_command_on_local_folders_opens_no_connection(room: Any, arguments: list[str]) -> None:
    done = room.run(*arguments)
    assert done.code == 0, done.stderr
    assert not done.network()
    assert not room.escapes(done)


def test_continuing_and_exporting_a_run_opens_no_connection(room: Any) -> None:
    run = room.trained()
    for arguments in (["fine-tune", "recipe.yaml"], ["export", "run", "--merge"]):
        done = room.run(*arguments)
        assert done.code == 0, done.stderr
        assert not done.network()
    assert (run / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["fine-tune", "recipe.yaml", "--set", "model.name=owner/name"], 4),
        (["pack-data", "--data", "train.jsonl", "--tokenizer", "owner/name"], 4),
        (["estimate-memory", "--model", "owner/name"], 4),
        (["inspect-data", "recipe.yaml", "--set", "data.train=owner/name"], 3),
    ],
)
def test_a_hub_id_without_a_network_is_one_line(room: Any, arguments: list[str], code: int) -> None:
    room.environment["HF_HUB_OFFLINE"] = "1"
    done = room.run(*arguments)
    assert done.code == code
    assert not done.network()
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "owner/name" in errors[0]


def test_importing_everything_opens_no_connection(watched_commands: Any) -> None:
    assert watched_commands.asked_while_importing == []


def test_what_is_counted_is_seen(room: Any) -> None:
    done = room.run("misbehave")
    assert done.code == 0
    seen = "\n".join(room.escapes(done))
    for part in ("wrote ", "started true", "network: ", "the payload ran"):
        assert part in seen
    assert "read " in seen
    assert any("connect" in line and "127.0.0.1" in line for line in done.network())
    assert any("::1" in line for line in done.network())


def test_libraries_are_told_not_to_count_their_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TELEMETRY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["trainkit", "--version"])
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with pytest.raises(SystemExit):
            main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert [os.environ[name] for name in TELEMETRY] == ["true"] * 3
