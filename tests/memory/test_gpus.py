from __future__ import annotations

import pytest

from trainkit.errors import UsageError
from trainkit.memory.gpus import find_gpu, known_gpus
from trainkit.memory.sizes import GIB


@pytest.mark.parametrize("typed", ["h100-80gb", "H100", "NVIDIA H100", "h100_80GB"])
def test_a_gpu_by_its_spellings(typed: str) -> None:
    gpu = find_gpu(typed)
    assert (gpu.name, gpu.capability) == ("h100-80gb", (9, 0))


@pytest.mark.parametrize("typed", ["rtx-4090", "4090", "RTX4090", "GeForce RTX 4090"])
def test_a_geforce_by_its_number(typed: str) -> None:
    assert find_gpu(typed).name == "rtx-4090-24gb"


def test_an_unknown_gpu_names_the_near_ones() -> None:
    with pytest.raises(UsageError, match="--gpu: `h10-80gb` is not known; near: h100-80gb"):
        find_gpu("h10-80gb")
    with pytest.raises(UsageError, match="is not known; near: b200-180gb, h200-141gb"):
        find_gpu("quantum")


def test_usable_memory_is_a_little_below_what_is_sold() -> None:
    for name, gpu in known_gpus().items():
        sold = int(name.rpartition("-")[2].removesuffix("gb"))
        assert 0.89 * sold * GIB < gpu.usable_bytes < sold * GIB, name


def test_every_spelling_means_one_gpu() -> None:
    spellings = [spelling for gpu in known_gpus().values() for spelling in (gpu.name, *gpu.aliases)]
    assert len(spellings) == len(set(spellings))
