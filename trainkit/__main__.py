"""``python -m trainkit`` and the ``trainkit`` program."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

from trainkit.signals import heed, heed_no_more, said_of


def main() -> None:
    """Run the command line and leave with its exit code."""
    # Threads of a kernel wait for each other by spinning. Where other programs want the same cores, a long spin keeps
    # the thread that is waited for from running at all; a short one costs nothing on an idle machine. OpenMP's runtime
    # reads this when torch loads it.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

    # Libraries that count their users do not, unless the user says so.
    for name in ("DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "true")

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed when the program began: what is said goes nowhere
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - until the program ends

    heed()
    # Looking for cycles in what stays to the end finds nothing, and takes a tenth of a short command's time.
    gc.disable()
    try:
        from trainkit.cli import run

        gc.freeze()
        gc.enable()
        exit_code = run(sys.argv[1:])
    except KeyboardInterrupt as interrupt:  # while the command line was loaded, or a failure was being told
        received, exit_code = said_of(interrupt)
        sys.stderr.write(f"error: interrupted ({received.name})\n")
    heed_no_more()
    if "torch" not in sys.modules:  # with it, what other libraries have open may hang on a cycle
        gc.freeze()
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
