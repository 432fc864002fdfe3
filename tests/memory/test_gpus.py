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


def test_where_none_is_near_that_is_not_said() -> None:
    with pytest.raises(
        UsageError, match=r"`quantum` is not known; known are b200-180gb, .* and 20 more \(conf"
    ) as caught:
        find_gpu("quantum")
    assert "near" not in str(caught.value)
    assert len(str(caught.value)) <= 200


@pytest.mark.parametrize(
    ("printed", "name"),
    [
        ("Tesla T4", "t4-16gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-80gb"),
        ("NVIDIA H100 NVL", "h100-nvl-94gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("Tesla V100-PCIE-32GB", "v100-32gb"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada-48gb"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000-96gb"),
        ("NVIDIA RTX A6000", "rtx-a6000-48gb"),
        ("NVIDIA GeForce RTX 3060", "rtx-3060-12gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("a100-80", "a100-80gb"),
        ("4090-24", "rtx-4090-24gb"),
    ],
)
def test_a_gpu_as_nvidia_smi_prints_it(printed: str, name: str) -> None:
    assert find_gpu(printed).name == name


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("NVIDIA A100-SXM-64GB", "a100-80gb|a100-40gb"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx-4090"),
        ("NVIDIA GeForce RTX 3060 Ti", "rtx-3060"),
        ("NVIDIA RTX 6000", "rtx-6000-ada"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("v100-80", "v100-32gb|v100-16gb"),
    ],
)
def test_a_name_that_may_mean_another_memory_is_refused(typed: str, near: str) -> None:
    with pytest.raises(UsageError, match=rf"is not known; near: .*({near})"):
        find_gpu(typed)


def test_usable_memory_is_a_little_below_what_is_sold() -> None:
    for name, gpu in known_gpus().items():
        sold = int(name.rpartition("-")[2].removesuffix("gb"))
        assert 0.89 * sold * GIB < gpu.usable_bytes < sold * GIB, name


def test_every_spelling_means_one_gpu() -> None:
    spellings = [spelling for gpu in known_gpus().values() for spelling in (gpu.name, *gpu.aliases)]
    assert len(spellings) == len(set(spellings))
