"""Runs command lines of trainkit one after the other, each in a process of its own that is watched while it runs.

A program, not a test: ``python watched_server.py`` reads a request a line on stdin and answers each with a line on
stdout. The libraries are imported once; every request is answered by a fork of this process, so that a case costs what
the command itself does. What the fork opens, starts and connects to is told by Python's audit events; a tracer around
this process, where there is one, sees what libraries do below Python too, and finds where a case begins and ends by the
names that are asked for with ``os.access``.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MEMORY_BYTES = 6 * 2**30
NAMES_OF_EVENTS = (
    "open",
    "os.",
    "pickle.find_class",
    "shutil.",
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.sendto",
    "subprocess.Popen",
    "tempfile.",
    "urllib.Request",
    "webbrowser.open",
)
"""Beginnings of the names of the events that are told."""
SENDING = {"socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}


def serve() -> None:
    """Answer requests until stdin ends."""
    asked: list[str] = []
    importing = True
    sys.addaudithook(lambda name, _: asked.append(name) if importing and name in SENDING else None)
    import_everything()
    importing = False
    answers = os.fdopen(os.dup(1), "w")
    answers.write(json.dumps(asked) + "\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        os.access(f"/case-begins-{request['name']}", os.F_OK)
        code, seconds = run_forked(request)
        os.access(f"/case-ends-{request['name']}", os.F_OK)
        answers.write(json.dumps({"code": code, "seconds": seconds}) + "\n")
        answers.flush()


def import_everything() -> None:
    """What the commands import, so that no fork has to."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import trainkit.cli
    import trainkit.commands.estimate_memory
    import trainkit.commands.fine_tune
    import trainkit.commands.inspect_data
    import trainkit.commands.pack_data
    import trainkit.model.loading
    import trainkit.model.merging
    import trainkit.training.report

    with trainkit.model.loading.quiet_libraries():
        import peft  # noqa: F401
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    transformers.utils.logging.disable_progress_bar()


def run_forked(request: dict[str, Any]) -> tuple[int | None, float]:
    """The exit code of one request, None where it ran out of time or died of a signal, and its seconds."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            code = run(request)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    descriptor = os.pidfd_open(child)
    ended, _, _ = select.select([descriptor], [], [], request["seconds"])
    if not ended:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(descriptor)
    seconds = time.monotonic() - started
    return (os.waitstatus_to_exitcode(status) if ended and os.WIFEXITED(status) else None), seconds


def run(request: dict[str, Any]) -> int:
    """In the fork: the command line, with its output in files and its events in another."""
    os.setpgid(0, 0)
    for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        target = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(target, number)
        os.close(target)
    os.environ.update(request["environment"])
    if request["environment"].get("HF_HUB_OFFLINE"):  # the library has read its variables long ago
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True
    if home := request["environment"].get("HF_HOME"):
        import huggingface_hub.constants
        import transformers.dynamic_module_utils

        huggingface_hub.constants.HF_HUB_CACHE = f"{home}/hub"
        for module in (transformers.utils, transformers.dynamic_module_utils):
            module.HF_MODULES_CACHE = f"{home}/modules"
    os.chdir(request["folder"])
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    watch(request["events"])
    if request["arguments"] == ["misbehave"]:
        return misbehave(Path(request["folder"]).parent / "outside")
    from trainkit.cli import run as command

    return command(request["arguments"])


def misbehave(outside: Path) -> int:
    """What a payload would do, so that a test can see that it is seen; nothing listens at that port."""
    (outside / "canary").write_text((outside / "secret.txt").read_text())
    subprocess.run(["true"], check=True)
    for number, address in ((socket.AF_INET, ("127.0.0.1", 9)), (socket.AF_INET6, ("::1", 9))):
        with contextlib.suppress(OSError), socket.socket(number) as probe:
            probe.connect(address)
    return 0


def watch(path: str) -> None:
    """From here on, every event of interest is a line of the file ``path``: its name and its arguments as texts."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        if name.startswith(NAMES_OF_EVENTS):
            texts = [os.fsdecode(one) if isinstance(one, bytes | os.PathLike) else repr_of(one) for one in arguments]
            os.write(log, (json.dumps([name, *texts]) + "\n").encode())

    sys.addaudithook(hook)


def repr_of(value: object) -> str:
    """The value as a text of bounded length; a text is itself."""
    return value if isinstance(value, str) else repr(value)[:300]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
    serve()
