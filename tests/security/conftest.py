"""A server of watched commands, and a room with a bait outside of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

HERE = Path(__file__).resolve().parent
SECRET = "bait-4f1d-not-for-anyone"
TRACED = (
    "open,openat,openat2,creat,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,link,linkat,symlink,"
    "symlinkat,truncate,chmod,fchmodat,execve,connect,sendto,sendmsg,access,faccessat,faccessat2"
)
OPENED = re.compile(r"\b(?:open|openat|openat2|creat)\(.*= \d+<(?P<path>[^>]*)>")
FLAGS = re.compile(r"O_(WRONLY|RDWR|CREAT|TRUNC)")
CHANGED = re.compile(r"\b(rename|unlink|rmdir|mkdir|link|symlink|truncate|chmod|fchmodat)\w*\((?P<rest>.*)\) += 0$")
HARMLESS_PROGRAMS = {"git", "uname"}  # the commit of the data; the platform that environment.json names
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
NETWORK = re.compile(r"\b(connect|sendto|sendmsg)\(.*AF_INET")
STARTED = re.compile(r'\bexecve\("([^"]*)".*= 0$')


@dataclass(frozen=True)
class Watched:
    """What one command did: its end, what it said, and every way in which it reached out of its room."""

    code: int | None
    seconds: float
    stdout: str
    stderr: str
    events: list[list[str]]
    trace: list[str] = field(repr=False)

    def opened(self) -> list[tuple[str, bool]]:
        """Every path that was opened, resolved, and whether to write."""
        found = []
        for name, *arguments in self.events if not self.trace else ():
            if name == "open" and arguments[0].startswith("/"):
                flags = int(arguments[2]) if arguments[2].lstrip("-").isdigit() else 0
                if flags & os.O_NOFOLLOW and Path(arguments[0]).is_symlink():
                    continue  # told before it was refused
                found.append((os.path.realpath(arguments[0]), bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))))
        traced = [(match["path"], line) for line in self.trace if (match := OPENED.search(line))]
        return found + [(path, bool(FLAGS.search(line)) or "creat(" in line) for path, line in traced]

    def changed(self, folder: Path) -> list[str]:
        """Every path that was made, renamed or removed; ``folder`` is where the command was started."""
        paths = [match["rest"] for line in self.trace if (match := CHANGED.search(line))]
        return [os.path.realpath(folder / text) for rest in paths for text in QUOTED.findall(rest)]

    def programs(self) -> set[str]:
        """The names of the programs that were started."""
        traced = {Path(match[1]).name for line in self.trace if (match := STARTED.search(line))}
        told = {Path(one[1].strip("'\"")).name for one in self.events if one[0] in ("subprocess.Popen", "os.exec")}
        return traced | told

    def network(self) -> list[str]:
        """Every attempt to reach another machine, or to learn its address."""
        told = [
            " ".join(one)
            for one in self.events
            if one[0].startswith("socket.") and not any("/" in text and "AF_INET" not in text for text in one[2:3])
        ]
        return told + [line for line in self.trace if NETWORK.search(line)]


class WatchedCommands:
    """The server, and the tracer around it where this machine has one."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder.resolve()
        self._trace = folder / "trace.txt"
        self._cases = 0
        self._read_bytes = 0
        self.traced = _can_trace(folder)
        server = [sys.executable, str(HERE / "watched_server.py")]
        options = ["-f", "-y", "-qq", "-s", "4096", "-e", f"trace={TRACED}", "--seccomp-bpf", "-o", str(self._trace)]
        self._process = subprocess.Popen(
            ["strace", *options, *server] if self.traced else server,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(environment),
            cwd=folder,
        )
        assert self._process.stdout is not None
        self.asked_while_importing: list[str] = json.loads(_line(self._process.stdout))

    def run(self, arguments: list[str], folder: Path, environment: Mapping[str, str], seconds: float) -> Watched:
        """One command line, started in ``folder`` with additions to the environment."""
        self._cases += 1
        name = f"{os.getpid()}-{self._cases}"
        files = {kind: str(self.folder / f"{name}.{kind}") for kind in ("stdout", "stderr", "events")}
        request = {
            "name": name,
            "arguments": arguments,
            "folder": str(folder),
            "environment": dict(environment),
            "seconds": seconds,
            **files,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(_line(self._process.stdout))
        events = Path(files["events"])
        return Watched(
            answer["code"],
            answer["seconds"],
            Path(files["stdout"]).read_text(errors="replace"),
            Path(files["stderr"]).read_text(errors="replace"),
            [json.loads(line) for line in events.read_text().splitlines()] if events.is_file() else [],
            self._trace_of(name),
        )

    def own_files(self) -> tuple[str, ...]:
        """How the names of the server's own files begin."""
        return (f"{self.folder}/{os.getpid()}-",)

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()

    def _trace_of(self, name: str) -> list[str]:
        if not self.traced:
            return []
        end = f'"/case-ends-{name}"'
        for _ in range(200):
            with self._trace.open("rb") as file:
                file.seek(self._read_bytes)
                content = file.read()
            text = content.decode(errors="replace")
            if end in text:
                self._read_bytes += content.rindex(b"\n") + 1
                inside = text.partition(f'"/case-begins-{name}"')[2].partition(end)[0]
                return _whole_calls(inside.splitlines()[1:])
            time.sleep(0.02)
        raise AssertionError("the tracer lost a case")


def _whole_calls(lines: list[str]) -> list[str]:
    """The tracer's lines, where a call that another thread's interrupted is put together again."""
    begun: dict[str, str] = {}
    whole = []
    for line in lines:
        thread, _, call = line.partition(" ")
        if call.endswith("<unfinished ...>"):
            begun[thread] = line.removesuffix("<unfinished ...>")
        elif " resumed>" in call and call.lstrip().startswith("<..."):
            whole.append(begun.pop(thread, "") + call.partition(" resumed>")[2])
        else:
            whole.append(line)
    return whole


def _line(stream: IO[str]) -> str:
    line = stream.readline()
    assert line, "the server of watched commands has died"
    return line


def _can_trace(folder: Path) -> bool:
    if shutil.which("strace") is None:
        return False
    probe = ["strace", "-f", "-y", "-qq", "--seccomp-bpf", "-e", "trace=openat", "-o", str(folder / "probe"), "true"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="session")
def watched_commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedCommands]:
    folder = tmp_path_factory.mktemp("watched")
    home = folder / "home"
    home.mkdir()
    environment = {
        **{name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ},
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    server = WatchedCommands(folder, environment)
    yield server
    server.close()


@dataclass
class Room:
    """A folder with a recipe, a model and data that work until a case spoils them; ``outside`` is a bait beside it.

    ``canary`` is a file in ``outside`` that a payload makes when it runs.
    """

    folder: Path
    outside: Path
    recipe: dict[str, Any]
    commands: WatchedCommands
    make_own_llama: Callable[[Path], Any]
    environment: dict[str, str] = field(default_factory=dict)
    ending: str = ""

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def data(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def canary(self) -> Path:
        return self.outside / "canary"

    @property
    def secret(self) -> Path:
        return self.outside / "secret.txt"

    def payload(self) -> str:
        """A line of Python that makes the canary."""
        return f"open({str(self.canary)!r}, 'w').write('alive')"

    def set(self, key: str, value: Any) -> None:
        *sections, name = key.split(".")
        target = self.recipe
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value

    def edit_json(self, name: str, **changes: Any) -> None:
        """Change keys of a JSON file of the model."""
        path = self.model / name
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(values | changes))

    def own_llama(self) -> Any:
        """A model of the hub with code of its own in the cache, which the recipe then names; nothing is fetched."""
        self.recipe["model"] = {"name": "owner/own-llama"}
        self.environment["HF_HUB_OFFLINE"] = "1"
        return self.make_own_llama(self.folder / "hub")

    def template(self, text: str) -> None:
        """Make ``text`` the chat template of the model."""
        (self.model / "chat_template.jinja").write_text(text)

    def run(self, *arguments: str, seconds: float = 60) -> Watched:
        """A command line in the room; without arguments ``fine-tune recipe.yaml``."""
        path = self.folder / "recipe.yaml"
        if not path.exists() and not path.is_symlink():
            path.write_text(yaml.safe_dump(self.recipe))
        return self.commands.run(
            list(arguments or ("fine-tune", "recipe.yaml")), self.folder, self.environment, seconds
        )

    def trained(self) -> Path:
        """The folder of a finished run of one step; the room is as that run left it. It is trained only once."""
        kept = self.commands.folder / "kept"
        if kept.is_dir():
            shutil.rmtree(self.folder)
            shutil.copytree(kept, self.folder)
        else:
            done = self.run()
            assert done.code == 0, done.stderr
            shutil.copytree(self.folder, kept)
        return self.folder / "run"

    def escapes(self, done: Watched) -> list[str]:
        """Every way in which a command left the room: files touched outside, programs, the network, the canary."""
        free = (str(self.folder), *self.commands.own_files(), "/dev/", "/proc/", "pipe:", "socket:", "anon_inode:")
        found = [f"read {path}" for path, _ in done.opened() if path.startswith(str(self.outside))]
        written = [path for path, writes in done.opened() if writes] + done.changed(self.folder)
        found += [f"wrote {path}" for path in written if not path.startswith(free)]
        found += [f"started {name}" for name in done.programs() - HARMLESS_PROGRAMS]
        found += [f"network: {line}" for line in done.network()]
        found += ["the payload ran"] * self.canary.exists()
        found += ["the secret was said"] * (SECRET in done.stdout + done.stderr)
        found += [f"the secret is in {path}" for path in _files_with(self.folder, SECRET)]
        return found


def _files_with(folder: Path, text: str) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in files if path.stat().st_size < 2**24 and text.encode() in path.read_bytes()]


@pytest.fixture
def room(
    tiny_model_folder: Path,
    small_recipe: dict[str, Any],
    watched_commands: WatchedCommands,
    make_own_llama: Callable[[Path], Any],
) -> Room:
    """Always at the same place, so that a run that was kept finds its model again."""
    stage = watched_commands.folder / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    folder, outside = stage / "room", stage / "outside"
    for one in (folder, outside):
        one.mkdir(parents=True)
    shutil.copytree(tiny_model_folder, folder / "model")
    (outside / "secret.txt").write_text(f"{SECRET}\n")
    small_recipe["model"]["name"] = "model"
    small_recipe["data"] = {"train": "train.jsonl"}
    small_recipe["training"] |= {"steps": 1}
    small_recipe["checkpoints"] = {"every_steps": 1}
    del small_recipe["evaluation"]
    small_recipe["output_dir"] = "run"
    room = Room(folder, outside, small_recipe, watched_commands, make_own_llama)
    room.environment = {"TRAINKIT_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hub"), "TMPDIR": str(folder)}
    chat = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "the lazy dog"}]
    room.data.write_text((json.dumps({"messages": chat}) + "\n") * 24)
    return room
