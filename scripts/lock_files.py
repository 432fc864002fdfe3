"""What `scripts/lock` writes: every package of the README's commands, with its version and the hashes of its files.

    core.txt    what trainkit needs, and what builds it
    torch.txt   torch: one version, and every build of it that is known
    cuda.txt    what torch's builds for CUDA need beside it
    dev.txt     what the tests and checks need beside core.txt

The versions are those of `scripts/constraints.txt`. Each line is for every system and Python that trainkit runs on; pip
installs the lines whose condition holds.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
FOLDER = SCRIPTS / "locked"
BESIDE_TORCH = re.compile(r"(nvidia|cuda)-|triton\b")
HASH = re.compile(r"--hash=(sha256:[0-9a-f]{64})")
OPTIONS = ("--universal", "--python-version", "3.11", "--generate-hashes", "--no-header", "--no-annotate")


def blocks_of(text: str) -> dict[str, str]:
    r"""The requirements of a lock by name, each with its hashes; what is no requirement is left out.

    >>> blocks_of("--index-url x\na==1 \\\n    --hash=sha256:0\nb==2 ; python_version < '3' \\\n    --hash=sha256:1\n")
    {'a': 'a==1 \\\n    --hash=sha256:0\n', 'b': "b==2 ; python_version < '3' \\\n    --hash=sha256:1\n"}
    """
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines(keepends=True):
        if start := re.match(r"([A-Za-z0-9][\w.-]*)==", line):
            name = start[1].lower().replace("_", "-")
            found[name] = found.get(name, "") + line  # of several versions each has its condition
        elif name and line.lstrip().startswith("--hash="):
            found[name] += line
    return found


def with_hashes(block: str, more: set[str]) -> str:
    r"""The block with ``more`` hashes beside its own, sorted.

    >>> one, two = ("sha256:" + digit * 64 for digit in "01")
    >>> with_hashes(f"a==1 \\\n    --hash={two}\n", {one}) == f"a==1 \\\n    --hash={one} \\\n    --hash={two}\n"
    True
    """
    first = block.splitlines()[0].rstrip("\\ ")
    return " \\\n    ".join([first, *(f"--hash={one}" for one in sorted({*HASH.findall(block), *more}))]) + "\n"


def split(core: str, everything: str, builds_of_torch: set[str]) -> dict[str, str]:
    """The four files by name, of two locks: what trainkit needs, and that with what its tests need."""
    needed, all_of_it = blocks_of(core), blocks_of(everything)
    beside = {name for name in needed if BESIDE_TORCH.match(name)}
    names = {
        "core.txt": needed.keys() - beside - {"torch"},
        "torch.txt": {"torch"},
        "cuda.txt": beside,
        "dev.txt": all_of_it.keys() - needed.keys(),
    }
    blocks = all_of_it | needed
    blocks["torch"] = with_hashes(blocks["torch"], builds_of_torch)
    return {file: "".join(blocks[name] for name in sorted(chosen)) for file, chosen in names.items()}


def main() -> None:
    """Ask pip's index for every file of every version, and write the locks."""
    parser = argparse.ArgumentParser(description="Write scripts/locked anew.")
    parser.add_argument("--scratch", type=Path, required=True, help="an empty folder, which is left to the caller")
    scratch: Path = parser.parse_args().scratch
    (scratch / "build.in").write_text("hatchling\n")
    texts = []
    for number, extras in enumerate(((), ("--extra", "dev", "--extra", "qlora"))):
        output = scratch / f"{number}.txt"
        sources = (SCRIPTS.parent / "pyproject.toml", scratch / "build.in", "-c", SCRIPTS / "constraints.txt")
        compiler = (sys.executable, "-m", "uv", "pip", "compile", "--system-certs", "--quiet")
        subprocess.run([*compiler, *OPTIONS, *extras, *sources, "-o", output], check=True)
        texts.append(output.read_text())
    torch = blocks_of(texts[0])["torch"].split()[0]
    # What this machine's pip gets may be a build that the index above does not list: a CPU build of torch's own index.
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch / "torch", torch], check=True
    )
    builds = {f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}" for file in (scratch / "torch").iterdir()}
    before = FOLDER / "torch.txt"
    if before.is_file() and (known := blocks_of(before.read_text()).get("torch", "")).split()[:1] == [torch]:
        builds |= set(HASH.findall(known))
    FOLDER.mkdir(exist_ok=True)
    for file, text in split(texts[0], texts[1], builds).items():
        (FOLDER / file).write_text(text)
        print(f"{FOLDER / file}: {len(blocks_of(text))} packages")


if __name__ == "__main__":
    main()
