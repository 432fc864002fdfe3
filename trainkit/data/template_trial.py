"""A template's first run, in a process of its own whose memory and time the system bounds.

Inside of one step of a rendering (a filter, a format, a comparison) nothing can be interrupted, and a template may make
such a step as large as it likes. So before a template is compiled here, it is compiled and tried on two short
conversations elsewhere: if that takes more than a template ever needs, nothing has happened to this process.
"""

from __future__ import annotations

import os
import resource
import signal
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

TRIAL_SECONDS = 5
"""Of the processor; the system ends the trial a second later at the latest."""
TRIAL_BYTES = 2**30
"""More than this process has when the trial begins."""
_OUT_OF_MEMORY = 3


def check_on_trial(trial: Callable[[], None], name: str) -> None:
    """Raise ModelError where ``trial`` takes too much time or memory; whatever else it raises is left to the real run.

    It runs in a fork: what it changes stays there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 on: there may be threads; none is needed there
        child = os.fork()
    if child == 0:
        os._exit(_outcome(trial))
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        raise ModelError(
            f"{name}: runs for more than {TRIAL_SECONDS} seconds on two short conversations; set data.chat_template to "
            "another"
        )
    if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == _OUT_OF_MEMORY:
        raise ModelError(
            f"{name}: needs more than {TRIAL_BYTES / 2**30:g} GiB of memory for two short conversations; set "
            "data.chat_template to another"
        )


def _outcome(trial: Callable[[], None]) -> int:
    """The exit status of the fork: how the trial went under its limits."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
        most = pages * resource.getpagesize() + TRIAL_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (TRIAL_SECONDS, TRIAL_SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        trial()
    except MemoryError:
        return _OUT_OF_MEMORY
    except BaseException as error:  # nothing may leave the fork
        return _OUT_OF_MEMORY if isinstance(error.__cause__, MemoryError) else 0
    return 0
