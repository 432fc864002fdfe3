"""What a launcher says of this process, and who of several speaks.

A launcher (``trainkit fine-tune --launch``, torchrun, ``accelerate launch``) starts the processes of a run and says in
their environment who they are. The first one prints. Where one fails, its message appears once, whichever it is.
Nothing in this module loads torch.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from trainkit.errors import UsageError


@dataclass(frozen=True)
class Launched:
    """``rank`` counts over all machines, ``local_rank`` on this one. ``shards``: weights are shared out (FSDP2)."""

    processes: int = 1
    rank: int = 0
    local_rank: int = 0
    local_processes: int = 1
    shards: bool = False

    @property
    def speaks(self) -> bool:
        """Whether this process prints, and writes what is written once."""
        return self.rank == 0


ALONE = Launched()
OUR_LAUNCHER = "TRAINKIT_LAUNCHER"  # its process id, for the processes that it starts
LAUNCH_FILE = "TRAINKIT_LAUNCH_FILE"  # what it was given
AGENTS_FILE = "TORCHELASTIC_ERROR_FILE"  # a file of this process in the folders of torch's elastic agent
UNSET = "unset it, or start the processes with --launch or torchrun"
_OFF = ("", "0", "no", "false")
NOT_SUPPORTED: dict[str, tuple[tuple[str, ...], str]] = {  # each with the values that ask for nothing
    "ACCELERATE_USE_DEEPSPEED": (_OFF, "DeepSpeed is not supported"),
    "ACCELERATE_USE_MEGATRON_LM": (_OFF, "Megatron is not supported"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (_OFF, "tensor and context parallelism are not supported"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "compiling the model is not supported"),
    "ACCELERATE_TORCH_DEVICE": ((), "choosing the device is not supported, only ACCELERATE_USE_CPU=true is"),
}


def launched() -> Launched:
    """Read the launcher's environment.

    Raises UsageError for a variable that no launcher sets so, and for FSDP in its first version.
    """
    processes, rank = _number("WORLD_SIZE", 1, least=1), _number("RANK", 0)
    local_processes, local_rank = _number("LOCAL_WORLD_SIZE", 1, least=1), _number("LOCAL_RANK", 0)
    if processes == 1:
        return ALONE
    if rank >= processes:
        raise UsageError(f"RANK: {rank} of {processes} processes (WORLD_SIZE); they count from 0; {UNSET}")
    shards = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if shards and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("fsdp_config.fsdp_version: 1 is not supported; set it to 2 in the launch file")
    return Launched(
        processes=processes,
        rank=rank,
        local_rank=local_rank,
        local_processes=local_processes,
        shards=shards,
    )


def _number(variable: str, otherwise: int, least: int = 0) -> int:
    text = os.environ.get(variable, str(otherwise))
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < least:
        raise UsageError(f"{variable}: {text[:40]!r} is no whole number of at least {least}; {UNSET}")
    return number


def check_environment() -> None:
    """Raise UsageError for a variable that Accelerate would obey and this program does not know how to."""
    for name, (harmless, what) in NOT_SUPPORTED.items():
        if name in os.environ and os.environ[name].lower() not in harmless:
            raise UsageError(f"{name}: {what}; unset it")
    missing = next((name for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR") if name not in os.environ), None)
    if "LOCAL_RANK" in os.environ and missing and launched().processes == 1:
        raise UsageError(f"LOCAL_RANK: is set, and {missing} is not; {UNSET}")


def address_towards(address: str, port: int) -> str | None:
    """An address of this machine, on its way to another one; None where there is no way. Nothing is sent."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return None


_terminals: list[TextIO] = []  # stderr as it was, once output goes elsewhere


def send_output_to(path: Path) -> None:
    """From now on everything this process prints goes to the end of ``path``, libraries and all; see `terminal`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _terminals.append(os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)


def terminal() -> TextIO:
    """Where a message for people goes: stderr as it was when the process began."""
    return _terminals[0] if _terminals else sys.stderr


def has_our_launcher() -> bool:
    """Whether ``trainkit fine-tune --launch`` started this process; see :mod:`trainkit.commands.launch`."""
    return os.environ.get(OUR_LAUNCHER) == str(os.getppid())


def launch_option() -> tuple[str, ...]:
    """What belongs on a command line that is to start the same processes again; nothing under another launcher."""
    file = os.environ.get(LAUNCH_FILE) if has_our_launcher() else None
    return ("--launch", file) if file else ()


def is_first_to_fail(exit_code: int) -> bool:
    """Whether no other process of this launch, on this machine, has said why it fails.

    Always so where no known launcher started this process: who else did, is not told of here.
    """
    mark = _mark()
    if mark is None:
        return True
    try:
        if _is_of_another_launch(mark):
            mark.unlink(missing_ok=True)
        descriptor = os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return False
    except OSError:
        return True
    os.write(descriptor, f"{exit_code} {_own_rank()} {os.getpid()}".encode())
    os.close(descriptor)
    return True


def first_exit_code() -> int | None:
    """For the launcher: the exit code of the process that said why it fails; None where none did. Asked once."""
    mark = _mark_of(os.getpid())
    try:
        code = int(mark.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    with suppress(OSError):
        mark.unlink()
    return code


def _mark() -> Path | None:
    """A file that the first process to fail makes; None where nothing tells this launch from others.

    torch's agent, which is also torchrun's, gives each attempt of each launch a folder, with one for each process.
    """
    if has_our_launcher():
        return _mark_of(os.getppid())
    file = os.environ.get(AGENTS_FILE)
    return Path(file).parent.parent / "trainkit.failed" if file else None


def _mark_of(launcher: int) -> Path:
    """That of our own launcher, which removes it; an earlier one with the same id began at another moment."""
    import psutil

    began = int(psutil.Process(launcher).create_time() * 1000)
    return Path(tempfile.gettempdir()) / f"trainkit-{os.getuid()}-{launcher}-{began}.failed"


def _is_of_another_launch(mark: Path) -> bool:
    """Whether a mark is older than this process, or made by an earlier one in its place.

    An agent's variables may stand in a shell that starts one command after another.
    """
    import psutil

    try:
        _, rank, process = mark.read_text().split()
        made = mark.stat().st_mtime
    except (OSError, ValueError):  # there is none, or it is just being written
        return False
    return made < psutil.Process().create_time() or (rank == _own_rank() and process != str(os.getpid()))


def _own_rank() -> str:
    return os.environ.get("RANK", "0")
