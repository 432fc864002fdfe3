"""`trainkit fine-tune --launch FILE`: start the processes that a launch file asks for, and end as they end.

The file is one of Accelerate's (``accelerate config`` writes such), and ``accelerate launch`` reads it too. Processes
are started, watched and stopped by torch's elastic agent. Each of them runs the same command without ``--launch``.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

from trainkit.errors import LostProcessError, MachineError, Stopped, UsageError, first_line
from trainkit.launched import LAUNCH_FILE, OUR_LAUNCHER, address_towards, first_exit_code
from trainkit.signals import EXIT_CTRL_C, EXIT_RESUMABLE, heeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import FrameType

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

KINDS = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP")
NUMBERS = {"num_machines", "num_processes", "machine_rank", "main_process_port"}
READ = NUMBERS | {"distributed_type", "main_process_ip", "use_cpu", "gpu_ids", "fsdp_config", "mixed_precision"}
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {  # what `accelerate config` writes where nothing was asked for
    "compute_environment": ("LOCAL_MACHINE",),
    "debug": (False,),
    "downcast_bf16": ("no", False),
    "enable_cpu_affinity": (False,),
    "main_training_function": ("main",),
    "rdzv_backend": ("static",),
    "same_network": (True,),
    "tpu_env": ([],),
    "tpu_use_cluster": (False,),
    "tpu_use_sudo": (False,),
}
SAVING_SECONDS = 600  # after a signal processes have this long to save before they are killed
MEETING_SECONDS = 900  # machines may be started one after another
STOPPED_SECONDS, LOOK_SECONDS = 110, 5  # longer than the other processes wait for one that is stopped
HEARD_SECONDS = 1  # so long after a signal its handler has run, unless torch is waiting


@dataclass(frozen=True)
class Launch:
    """What a launch file says: ``processes`` on each of ``machines``, of which this is number ``machine``."""

    machines: int
    machine: int
    processes: int
    address: str
    port: int
    environment: Mapping[str, str]


def launch(file: str, arguments: Sequence[str]) -> int:
    """Run ``trainkit ARGUMENTS`` in the processes that ``file`` asks for; returns the exit code of the first to fail.

    The message of that one has been printed when this returns. Raises UsageError for a file that cannot be used,
    MachineError when the processes cannot be started, Stopped when a signal ended them all.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is loaded, here and in each process
    wanted = read_launch_file(file)
    os.environ.update(wanted.environment)
    os.environ |= {OUR_LAUNCHER: str(os.getpid()), LAUNCH_FILE: str(Path(file).resolve())}
    if wanted.machines > 1 and (interface := _interface_towards(wanted.address, wanted.port)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SAVING_SECONDS)
    with tempfile.TemporaryDirectory(prefix="trainkit-launch-") as logs, _SignalsObeyed(logs) as signals:
        return _run(wanted, file, arguments, logs, signals)


def _run(wanted: Launch, file: str, arguments: Sequence[str], logs: str, signals: _SignalsObeyed) -> int:
    """Start the processes and watch them to their end; see :func:`launch`."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what failed says so itself
    options: dict[str, Any] = {
        "min_nodes": wanted.machines,
        "max_nodes": wanted.machines,
        "nproc_per_node": wanted.processes,
        "logs_specs": DefaultLogsSpecs(log_dir=logs),
        "run_id": "trainkit",
        "max_restarts": 0,
        "rdzv_backend": "static" if wanted.machines > 1 else "c10d",
        "rdzv_endpoint": f"{wanted.address}:{wanted.port}" if wanted.machines > 1 else "localhost:0",
        "rdzv_configs": {"rank": wanted.machine, "timeout": MEETING_SECONDS},
        "signals_to_handle": "",  # a second one would end it while the processes save
    }
    known = {field.name for field in fields(LaunchConfig)}
    config = LaunchConfig(**{name: value for name, value in options.items() if name in known})
    try:
        with signals.telling(SignalException), _stopped_ones_killed() if wanted.machines > 1 else nullcontext():
            elastic_launch(config, sys.executable)("-m", "trainkit", *arguments)
    except ChildFailedError as error:
        return _exit_code(error)
    except SignalException as error:
        said = first_exit_code()
        if said is None:
            raise _stopped(error.sigval) from None
        return said
    except (OSError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise MachineError(
                f"main_process_port: {wanted.port} is in use on this machine; take another on all machines, or check "
                "machine_rank"
            ) from error
        reason = first_line(error)
        raise MachineError(f"{file}: the processes could not be started: {reason}") from error
    return 0


def read_launch_file(file: str) -> Launch:
    """Read an Accelerate launch file. Raises UsageError, naming the key, for what this program cannot do."""
    if not Path(file).is_file():
        raise UsageError(f"--launch: {file} is no file; configs/ddp.yaml and configs/fsdp2.yaml are examples")
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        written = yaml.safe_load(Path(file).read_bytes())
        _check_keys(file, written)
        config: Any = load_config_from_file(file)
    except UsageError:
        raise
    except Exception as error:  # whatever its reader makes of a file that is none
        reason = first_line(error, 160)
        raise UsageError(f"{file}: is no launch file of Accelerate's: {reason}") from error
    machines, total = int(config.num_machines or 1), int(config.num_processes)
    machine, port = int(config.machine_rank or 0), int(config.main_process_port or 0)
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    if kind not in KINDS:
        raise UsageError(f"{file}: distributed_type: {kind} is not supported; one of {', '.join(KINDS)}")
    if str(config.mixed_precision or "no") != "no":
        raise UsageError(f'{file}: mixed_precision: leave it "no"; `precision` in the recipe decides')
    if total < 1 or machines < 1 or total % machines:
        raise UsageError(
            f"{file}: num_processes: {total} is no number of processes for {machines} machines; it counts those on all "
            "of them, the same number on each"
        )
    if not 0 <= machine < machines:
        raise UsageError(f"{file}: machine_rank: {machine} of {machines} machines; they count from 0")
    if machines > 1 and not (config.main_process_ip and port):
        raise UsageError(f"{file}: main_process_ip and main_process_port: needed where there are several machines")
    processes = total // machines
    return Launch(
        machines=machines,
        machine=machine,
        processes=processes,
        address=str(config.main_process_ip or "localhost"),
        port=port,
        environment=_environment(config, kind, processes, file),
    )


def _check_keys(file: str, written: Mapping[str, Any]) -> None:
    """Raise UsageError for a key that would have no effect, and for a word where a number belongs."""
    for key, value in written.items():
        if key not in READ and value not in WITHOUT_EFFECT.get(key, ()):
            raise UsageError(f"{file}: {key}: has no effect here; take it out")
        if key in NUMBERS and not isinstance(value, int):
            raise UsageError(f"{file}: {key}: {value!r} is no whole number")


def _environment(config: Any, kind: str, processes: int, file: str) -> dict[str, str]:
    """What tells the processes how they are to share the work, in the names of ``accelerate launch``."""
    found: dict[str, str] = {}
    if config.use_cpu:
        found["ACCELERATE_USE_CPU"] = "true"
    elif getattr(config, "gpu_ids", None) not in (None, "all"):
        found["CUDA_VISIBLE_DEVICES"] = str(config.gpu_ids)
    wrapping = {str(key): str(value) for key, value in (config.fsdp_config or {}).items()}
    if kind == "FSDP" or wrapping:
        if wrapping.get("fsdp_version") != "2":
            raise UsageError(f"{file}: fsdp_config.fsdp_version: set it to 2; the first version is not supported")
        if len(wrapping) > 1:
            other = next(key for key in wrapping if key != "fsdp_version")
            raise UsageError(f"{file}: fsdp_config.{other}: has no effect here; only fsdp_version may be given")
        found |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    if "OMP_NUM_THREADS" not in os.environ and processes > 1:
        found["OMP_NUM_THREADS"] = str(max(1, _cores() // processes))
    return found


def _cores() -> int:
    """How many this program may use: a batch system may have given it some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _interface_towards(address: str, port: int) -> str | None:
    """The network interface by which this machine reaches that address; None where it does not.

    gloo would take the one that the machine's own name stands for, which on many is the loopback.
    """
    import psutil

    own = address_towards(address, port)
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, ends in interfaces if any(end.address == own for end in ends)), None)


def _stopped(number: signal.Signals) -> Stopped:
    return Stopped(
        f"{number.name} before a process had anything to save; the same command goes on from here",
        by_keyboard=number is signal.SIGINT,
    )


class _SignalsObeyed:
    """In here a signal raises Stopped; while torch's agent runs, the exception of its own that makes it stop all.

    The agent passes the first signal on and waits for the processes. After that a Ctrl+C goes to them as it is, since a
    second one has a meaning for them, and other signals change nothing: they are stopping. (They are in sessions of
    their own, so that a terminal does not reach them.)

    Machines wait for each other inside of torch, where no handler runs: there a thread hears of the signal and ends
    this process, without ``logs``. A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    """

    def __init__(self, logs: str) -> None:
        self._logs = logs
        self._tell: Callable[[str, signal.Signals], Exception] | None = None
        self._is_told = False
        self._over = threading.Event()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in heeded()}
        self._heard, self._written = os.pipe()
        os.set_blocking(self._written, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        self._watching = threading.Thread(target=self._end_where_no_handler_runs, name="signals", daemon=True)
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._written)
        self._watching.join()
        os.close(self._heard)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def telling(self, exception: Callable[[str, signal.Signals], Exception]) -> Iterator[None]:
        """In here the agent runs, and ``exception`` is what it stops at."""
        self._tell = exception
        try:
            yield
        finally:
            self._tell = None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        import psutil

        received = signal.Signals(number)
        if not self._is_told:
            self._is_told = True
            raise _stopped(received) if self._tell is None else self._tell(f"got {received.name}", received)
        if received is signal.SIGINT:
            for process in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGINT)

    def _end_where_no_handler_runs(self) -> None:
        import psutil

        this = psutil.Process()
        while number := os.read(self._heard, 1):
            if signal.Signals(number[0]) not in self._previous:
                continue
            # Processes that are there are told, and the handler waits for them.
            if not (this.children() or self._over.wait(HEARD_SECONDS) or this.children()):
                name = signal.Signals(number[0]).name
                _say(f"{name} while this machine waited for the others; the same command goes on from here")
                shutil.rmtree(self._logs, ignore_errors=True)
                os._exit(EXIT_CTRL_C if name == "SIGINT" else EXIT_RESUMABLE)


@contextmanager
def _stopped_ones_killed() -> Iterator[None]:
    """In here a process that stays stopped is killed: it obeys no other signal, and the run has ended without it.

    The processes beside it do that at once (:mod:`trainkit.training.heartbeats`); this is for one without any.
    """
    over = threading.Event()
    watching = threading.Thread(target=_kill_stopped_ones, args=(over,), name="stopped processes", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def _kill_stopped_ones(over: threading.Event) -> None:
    import psutil

    looks: dict[int, int] = {}
    while not over.wait(LOOK_SECONDS):
        for process in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                stopped = process.status() == psutil.STATUS_STOPPED
                looks[process.pid] = looks.get(process.pid, 0) + 1 if stopped else 0
                if looks[process.pid] * LOOK_SECONDS >= STOPPED_SECONDS:
                    process.kill()


def _exit_code(error: ChildFailedError) -> int:
    """That of the process whose message was printed; where none said why it ended, that is said here."""
    said = first_exit_code()
    if said is not None:
        return said
    # In the order in which they ended; those that the agent stopped in turn come last.
    killed = [(rank, -failure.exitcode) for rank, failure in error.failures.items() if failure.exitcode < 0]
    if killed:
        rank, number = killed[0]
        _say(
            f"process {rank} was killed ({signal.Signals(number).name}), and the others were stopped; the same command "
            "continues from the newest checkpoint"
        )
        return EXIT_CTRL_C if number == signal.SIGINT else EXIT_RESUMABLE
    _, failure = error.get_first_failure()
    if failure.exitcode == EXIT_RESUMABLE:
        _say(f"{LostProcessError()}")
    return int(failure.exitcode)


def _say(line: str) -> None:
    from trainkit.console import Console

    Console().error(line)
