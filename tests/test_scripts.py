"""The one-word verbs on a machine that lacks something, in a folder whose name has a space."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAMS = ["bash", "env", "dirname", "cat", "cksum", "rm", "sed", "tee"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What `scripts/` needs of a clone, without a .venv, and a `bin` with no Python in it."""
    root = tmp_path / "a clone"
    shutil.copytree(REPOSITORY / "scripts", root / "scripts")
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    (root / "bin").mkdir()
    for name in PROGRAMS:
        found = shutil.which(name)
        assert found is not None
        (root / "bin" / name).symlink_to(found)
    return root


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def call(
    clone: Path, verb: str, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [clone / "scripts" / verb, *arguments],
        cwd=clone.parent,
        env={"PATH": str(clone / "bin"), **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_any_python_the_message_says_which_to_install(clone: Path) -> None:
    done = call(clone, "quickstart")
    assert done.returncode == 5
    assert done.stderr.startswith("no Python 3.11, 3.12 or 3.13 on PATH; install one, or name it: TRAINKIT_PYTHON=")
    assert not (clone / ".venv").exists()


def test_a_python_without_venv_is_named(clone: Path) -> None:
    program(clone / "bin" / "python3.12", 'case "$2" in *venv*) exit 1;; esac')
    done = call(clone, "test")
    assert done.returncode == 5
    assert done.stderr.startswith("python3.12 cannot make virtual environments; install its venv package")


def test_an_installation_happens_once_and_again_when_the_pins_change(clone: Path) -> None:
    python = clone / ".venv" / "bin" / "python"
    program(python, 'test "$2" != pip || echo "$@" >> "$(dirname "$0")/../pip.log"')
    program(clone / ".venv" / "bin" / "trainkit", 'echo "trainkit $@"')
    log = clone / ".venv" / "pip.log"

    first = call(clone, "quickstart", "--fresh")
    assert (first.returncode, first.stdout) == (0, "trainkit fine-tune quickstart --fresh\n")
    installed = log.read_text().splitlines()
    download, torch, core = installed[:-1]
    assert " download " in download
    assert download.endswith(" torch==2.13.0")
    assert torch.endswith("/torch-wheel/torch-*.whl")
    assert core.endswith("--require-hashes -r " + str(clone / "scripts" / "locked" / "core.txt"))
    assert all("--no-deps" in line for line in installed)
    assert installed[-1].endswith(f"--no-build-isolation --editable {clone}")

    again = call(clone, "quickstart")
    assert (again.returncode, again.stderr) == (0, "")
    assert log.read_text().splitlines() == installed

    with (clone / "scripts" / "locked" / "core.txt").open("a") as lock:
        lock.write("another==1\n")
    assert call(clone, "quickstart").returncode == 0
    assert len(log.read_text().splitlines()) == 2 * len(installed)


def test_a_failing_pip_ends_the_script_and_leaves_it_to_go_on_later(clone: Path) -> None:
    program(clone / ".venv" / "bin" / "python", 'test "$2" != pip')
    done = call(clone, "quickstart")
    assert done.returncode == 5
    assert "pip could not download torch==2.13.0; its reason stands above" in done.stderr
    assert not (clone / ".venv" / "installed-core").exists()


def test_a_build_of_torch_that_is_not_locked_is_taken_only_when_it_is_asked_for(clone: Path) -> None:
    python = 'case "$1 $2" in "-c "*hashlib*) exit 1;; "-m pip") echo "$@" >> "$(dirname "$0")/../pip.log";; esac'
    program(clone / ".venv" / "bin" / "python", python)
    program(clone / ".venv" / "bin" / "trainkit", "")
    done = call(clone, "quickstart")
    assert done.returncode == 5
    assert "TRAINKIT_TORCH_BY_VERSION=1" in done.stderr
    assert len((clone / ".venv" / "pip.log").read_text().splitlines()) == 1  # nothing was installed
    done = call(clone, "quickstart", environment={"TRAINKIT_TORCH_BY_VERSION": "1"})
    assert done.returncode == 0
    assert "whatever its hash" in done.stderr


def test_builds_of_torch_for_cuda_get_what_they_need(clone: Path) -> None:
    python = 'case "$1 $2" in "-c "*metadata*) exit 1;; "-m pip") echo "$@" >> "$(dirname "$0")/../pip.log";; esac'
    program(clone / ".venv" / "bin" / "python", python)
    program(clone / ".venv" / "bin" / "trainkit", "")
    assert call(clone, "quickstart").returncode == 0
    names = [line.rpartition("/")[2] for line in (clone / ".venv" / "pip.log").read_text().splitlines()]
    assert names[1:4] == ["torch-*.whl", "cuda.txt", "core.txt"]
