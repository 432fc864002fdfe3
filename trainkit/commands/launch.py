"""`trainkit fine-tune --launch FILE`: start the processes that a launch file asks for, and end as they end.

The file is one of Accelerate's (``accelerate config`` writes such), and ``accelerate launch`` reads it too. Processes
are started, watched and stopped by torch's elastic agent. Each of them runs the same command without ``--launch``.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.errors import MachineError, Stopped, UsageError
from trainkit.launched import first_exit_code

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

EXIT_RESUMABLE, EXIT_CTRL_C = 75, 130
KINDS = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP")
SAVING_SECONDS = 600  # after a signal processes have this long to save before they are killed
MEETING_SECONDS = 900  # machines may be started one after another


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
    wanted = read_launch_file(file)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what failed says so itself
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.update(wanted.environment)
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SAVING_SECONDS)
    with tempfile.TemporaryDirectory(prefix="trainkit-launch-") as logs:
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
            "signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        }
        known = {field.name for field in fields(LaunchConfig)}
        config = LaunchConfig(**{name: value for name, value in options.items() if name in known})
        try:
            elastic_launch(config, sys.executable)("-m", "trainkit", *arguments)
        except ChildFailedError as error:
            return _exit_code(error)
        except SignalException as error:
            received = signal.Signals(error.sigval)
            raise Stopped(
                f"{received.name}: every process was told to save and stop; the same command goes on from there",
                by_keyboard=received is signal.SIGINT,
            ) from None
        except (OSError, RuntimeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            raise MachineError(f"{file}: the processes could not be started: {reason}") from error
    return 0


def read_launch_file(file: str) -> Launch:
    """Read an Accelerate launch file. Raises UsageError, naming the key, for what this program cannot do."""
    if not Path(file).is_file():
        raise UsageError(f"--launch: {file} is no file; configs/ddp.yaml and configs/fsdp2.yaml are examples")
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        config: Any = load_config_from_file(file)
    except Exception as error:  # whatever its reader makes of a file that is none
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UsageError(f"{file}: is no launch file of Accelerate's: {reason}") from error
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    if kind not in KINDS:
        raise UsageError(f"{file}: distributed_type: {kind} is not supported; one of {', '.join(KINDS)}")
    if str(config.mixed_precision or "no") != "no":
        raise UsageError(f'{file}: mixed_precision: leave it "no"; `precision` in the recipe decides')
    if getattr(config, "parallelism_config", None):
        raise UsageError(f"{file}: parallelism_config: has no effect here; docs/scale.md says what to take instead")
    machines, total = int(config.num_machines or 1), int(config.num_processes or 1)
    if total < 1 or total % machines:
        raise UsageError(f"{file}: num_processes: {total} is the number on all {machines} machines together")
    if machines > 1 and not (config.main_process_ip and config.main_process_port):
        raise UsageError(f"{file}: main_process_ip and main_process_port: needed where there are several machines")
    processes = total // machines
    return Launch(
        machines=machines,
        machine=int(config.machine_rank or 0),
        processes=processes,
        address=str(config.main_process_ip or "localhost"),
        port=int(config.main_process_port or 0),
        environment=_environment(config, kind, processes, file),
    )


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
        found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    return found


def _exit_code(error: ChildFailedError) -> int:
    """That of the process whose message was printed; where a signal killed one, that is said, and it can go on."""
    rank, failure = error.get_first_failure()
    code, said = failure.exitcode, first_exit_code()
    if code >= 0:
        return code if said is None else said
    from trainkit.console import Console

    name = signal.Signals(-code).name
    Console().error(
        f"process {rank} was killed ({name}), and the others were stopped; the same command continues from the newest "
        "checkpoint"
    )
    return EXIT_CTRL_C if -code == signal.SIGINT else EXIT_RESUMABLE
