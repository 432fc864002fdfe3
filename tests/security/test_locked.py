"""Every package of the README's two commands has one version and the hashes of its files, and none is missing."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
from lock_files import FOLDER, HASH, blocks_of, split
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LOCKS = {path.name: blocks_of(path.read_text()) for path in sorted(FOLDER.glob("*.txt"))}
LOCKED = {name: block for blocks in LOCKS.values() for name, block in blocks.items()}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "scripts" / "constraints.txt").read_text().splitlines()
    return {
        plain(name): version
        for name, _, version in (line.partition("==") for line in lines if "==" in line and line[0] != "#")
    }


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.name)
def test_every_line_is_a_version_with_hashes(path: Path) -> None:
    text = path.read_text()
    assert "".join(LOCKS[path.name].values()) == text  # nothing else stands there: no address, no option
    for block in LOCKS[path.name].values():
        for one in re.split(r"(?m)^(?=[a-z0-9])", block)[1:]:
            lines = one.rstrip().split(" \\\n    ")
            assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[\w.+!]+( ; .+)?", lines[0])
            assert len(lines) > 1
            assert all(HASH.fullmatch(line) for line in lines[1:])


def test_the_versions_are_those_of_the_constraints() -> None:
    locked = {name: Requirement(block.splitlines()[0].rstrip("\\ ")).specifier for name, block in LOCKED.items()}
    assert {name: str(locked[name]) for name in pins().keys() & locked.keys()} == {
        name: f"=={version}" for name, version in pins().items() if name in locked
    }


def test_no_package_stands_in_two_files() -> None:
    assert set(LOCKS) == {"core.txt", "cuda.txt", "dev.txt", "torch.txt"}
    assert sum(map(len, LOCKS.values())) == len(LOCKED)


@pytest.mark.parametrize(
    ("extras", "files"), [((), ("core.txt", "torch.txt")), (("dev", "qlora"), ("core.txt", "torch.txt", "dev.txt"))]
)
def test_what_is_needed_here_is_all_there(extras: tuple[str, ...], files: tuple[str, ...]) -> None:
    """From trainkit's own requirements on, along those of the packages that are installed."""
    there = set().union(*(LOCKS[file] for file in files))
    waiting, seen = [("trainkit", frozenset(extras))], set()
    missing = set()
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            requirements = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requirements):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
                waiting.append((plain(requirement.name), frozenset(requirement.extras)))
                missing |= {plain(requirement.name)} - there - LOCKS["cuda.txt"].keys()
    assert len(seen) > 30
    assert not missing


def test_the_split() -> None:
    digest = "sha256:" + "0" * 64
    core = f"torch==1 \\\n    --hash={digest}\nnvidia-nccl==2 \\\n    --hash={digest}\nb==1 \\\n    --hash={digest}\n"
    files = split(core, core + f"c==1 \\\n    --hash={digest}\n", {"sha256:" + "1" * 64})
    assert {name: list(blocks_of(text)) for name, text in files.items()} == {
        "core.txt": ["b"],
        "torch.txt": ["torch"],
        "cuda.txt": ["nvidia-nccl"],
        "dev.txt": ["c"],
    }
    assert len(HASH.findall(files["torch.txt"])) == 2
