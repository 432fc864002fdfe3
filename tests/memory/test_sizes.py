from __future__ import annotations

import pytest

from trainkit.errors import UsageError
from trainkit.memory.sizes import size_in_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("24GiB", 24 * 2**30), ("24 gib", 24 * 2**30), ("80GB", 80 * 10**9), ("0.5TiB", 2**39), ("512MiB", 2**29)),
        (".5GiB", 2**29),
    ],
)
def test_an_amount_with_its_unit(text: str, size: int) -> None:
    assert size_in_bytes(text, "--memory") == size


def test_a_number_without_a_unit_names_both_units() -> None:
    with pytest.raises(UsageError, match=r"--memory: 24 has no unit; write 24GiB .* or 24GB"):
        size_in_bytes("24", "--memory")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("24G", r"24GiB \(2\^30 bytes, .* or 24GB \(10\^9 bytes\)"),
        ("512 m", r"512MiB \(2\^20 bytes, .* or 512MB \(10\^6 bytes\)"),
        (".5T", r"\.5TiB \(2\^40 bytes, .* or \.5TB \(10\^12 bytes\)"),
    ],
)
def test_a_letter_alone_is_offered_as_both_units(text: str, choice: str) -> None:
    with pytest.raises(UsageError, match=rf"^--memory: {text} may be one of two units; write {choice}$"):
        size_in_bytes(text, "--memory")


@pytest.mark.parametrize("text", ["", "GiB", "24 giga", "-3GiB", "1e3GiB", "24.GiB", "24K", "١GiB", "24GiB please"])
def test_anything_else_is_no_amount(text: str) -> None:
    with pytest.raises(UsageError, match="is no amount of memory; write a number and a unit, as 24GiB"):
        size_in_bytes(text, "--fits")


@pytest.mark.parametrize("text", ["0GiB", "9999999999999TiB"])
def test_an_amount_that_cannot_be(text: str) -> None:
    with pytest.raises(UsageError, match="must be above 0 and below"):
        size_in_bytes(text, "--memory")
