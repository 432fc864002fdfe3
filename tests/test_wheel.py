"""The wheel: complete, lean, and enough by itself to run what ships in it from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MOST_BYTES = 6 * 2**20


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from this tree, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    return next(folder.glob("trainkit-*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel; the packages it needs are this environment's."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    # The .pth files of a folder added by a .pth file are not read: this tree's own editable install stays out.
    Path(site.strip(), "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


def run(command: list[str | Path], folder: Path) -> str:
    """What a program prints when it runs in ``folder`` as if nothing else of this machine were trainkit's."""
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    finished = subprocess.run(
        command, cwd=folder, env=cleared | {"HOME": str(folder)}, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_everything_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    contained = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "trainkit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    forced = {
        f"trainkit/shipped/{path.relative_to(REPOSITORY)}"
        for folder in ("recipes", "configs")
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file()
    }
    assert contained == package | forced
    assert "trainkit/shipped/recipes/quickstart.yaml" in contained
    assert "trainkit/shipped/models/tiny/model.safetensors" in contained
    assert "trainkit/shipped/data/quickstart/train.jsonl" in contained


def test_the_wheel_is_small_and_carries_its_licence(wheel: Path) -> None:
    assert wheel.stat().st_size < MOST_BYTES
    assert [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("licenses/LICENSE")]


def test_the_installed_wheel_knows_its_recipes_from_any_folder(installed: Path, tmp_path: Path) -> None:
    where = run([installed / "python", "-c", "import trainkit; print(trainkit.__file__)"], tmp_path)
    assert where.startswith(str(installed.parent))
    assert "name: tiny" in run([installed / "trainkit", "show", "quickstart"], tmp_path)
    assert "fine-tune" in run([installed / "trainkit", "--help"], tmp_path)


@pytest.mark.long
def test_the_installed_wheel_fine_tunes_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    run([installed / "trainkit", "fine-tune", "quickstart"], tmp_path)
    final = tmp_path / "runs" / "quickstart" / "final"
    assert (final / "adapter_model.safetensors").is_file()
    assert (final / "README.md").is_file()
