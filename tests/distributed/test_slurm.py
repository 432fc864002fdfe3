"""The batch script of docs/distributed.md as it stands there, under stand-ins for SLURM's two programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.test_launching import free_port
from tests.distributed.workbench import ENVIRONMENT, REPOSITORY, Ended, Workbench, largest_difference

JOB = 17

# A task on each of two nodes; every process of every task gets SIGUSR1, as --signal has it for the steps of a job; ends
# with the highest exit code of its tasks.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
import psutil

command = sys.argv[1:]
assert command.pop(0) == "--kill-on-bad-exit=0"
tasks = []
for node in ("0", "1"):
    tasks.append(subprocess.Popen(command, env={{**os.environ, "SLURM_NODEID": node}}))

def warn(number, frame):
    for task in tasks:
        root = psutil.Process(task.pid)
        for process in [*root.children(recursive=True), root]:
            process.send_signal(signal.SIGUSR1)

signal.signal(signal.SIGUSR1, warn)
sys.exit(max(task.wait() for task in tasks))
"""

SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo localhost; echo localhost; else echo "$@" >> "$REQUESTS"; fi
"""


def batch_script() -> str:
    """The first block of the page that begins as a batch script does."""
    page = (REPOSITORY / "docs" / "distributed.md").read_text()
    [script] = [block for block in page.split("```bash\n")[1:] if block.startswith("#!/bin/bash\n#SBATCH")]
    return script.split("```")[0]


class Cluster:
    """Two nodes that are this machine, without GPUs."""

    def __init__(self, folder: Path, bench: Workbench) -> None:
        self._bench = bench
        self.requests = folder / "requests"
        self.requests.touch()
        programs = folder / "programs"
        programs.mkdir(parents=True)
        beside = Path(sys.executable).parent
        for name, text in {
            "srun": SRUN,
            "scontrol": SCONTROL,
            "trainkit": f'#!/bin/bash\nexec {sys.executable} -m trainkit "$@"\n',
        }.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self._script = folder / "job.sh"
        # As it stands, but for the recipe's name, and the port, which another program may have here.
        script = batch_script().replace("recipe.yaml", '"$RECIPE"').replace("\nsrun", f"\nPORT={free_port()}\nsrun")
        self._script.write_text(script)
        self._environment = {
            **os.environ,
            **ENVIRONMENT,
            "PATH": os.pathsep.join([str(programs), str(beside), os.environ["PATH"]]),
            "PYTHONPATH": str(REPOSITORY),
            "TRAINKIT_CACHE": str(bench.root / "cache"),
            "TMPDIR": str(folder),
            "REQUESTS": str(self.requests),
            "SLURM_JOB_ID": str(JOB),
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "1",
        }

    def submit(self, recipe: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self._script)],
            cwd=self._bench.root,
            env={**self._environment, "RECIPE": str(recipe)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.fixture
def cluster(tmp_path: Path, bench: Workbench) -> Cluster:
    return Cluster(tmp_path, bench)


def ended(job: subprocess.Popen[str], recipe: Path) -> Ended:
    output, errors = job.communicate(timeout=240)
    return Ended(job.returncode, output, errors, recipe.with_suffix(""))


@pytest.mark.long
def test_the_warning_saves_and_puts_the_job_back_into_the_queue(cluster: Cluster, bench: Workbench) -> None:
    reference = bench.run(bench.recipe("slurm-one"))
    recipe = bench.recipe("slurm")
    metrics = recipe.with_suffix("") / "metrics.jsonl"
    job = cluster.submit(recipe)
    deadline = time.monotonic() + 240
    while not (metrics.exists() and '"step": 6, "epoch"' in metrics.read_text()):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    [srun] = [child for child in psutil.Process(job.pid).children() if "srun" in " ".join(child.cmdline())]
    srun.send_signal(signal.SIGUSR1)
    warned = ended(job, recipe)
    assert warned.code == 75, warned.said
    assert cluster.requests.read_text() == f"requeue {JOB}\n"
    lines = warned.error_lines()  # of each node's launcher, with the command that goes on there
    assert len(lines) == 2, warned.said
    for line in lines:
        # A process may hear of it from its launcher first, which stops what it has started.
        assert line.startswith(("error: SIGUSR1 after step ", "error: SIGTERM after step "))
    assert sorted(line.rsplit("/", 1)[1] for line in lines) == [f"launch-{JOB}-{node}.yaml" for node in ("0", "1")]

    again = ended(cluster.submit(recipe), recipe)
    assert again.code == 0, again.said
    assert cluster.requests.read_text() == f"requeue {JOB}\n"
    assert "x 2 processes" in again.output
    difference = largest_difference(again, reference)
    print(f"the batch script: largest relative difference in metrics.jsonl {difference:.1e}")
    assert difference <= 1e-6
