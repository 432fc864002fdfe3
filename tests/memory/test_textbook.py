"""The founding figures, to the digit."""

from __future__ import annotations

from trainkit.memory.textbook import Column, columns, lines

GIB = 2**30


def figures(parameters: int, trained_by_lora: int = 0) -> list[str]:
    return [f"{line.sizes_bytes[0] / GIB:.2f}" for line in lines([Column("", parameters)], trained_by_lora)]


def test_nominally_seventy_billion() -> None:
    assert figures(70 * 10**9)[:3] == ["260.77", "1043.08", "1043.08"]
    assert lines([Column("", 70 * 10**9)], 0)[2].sizes_bytes == (1120 * 10**9,)


def test_the_exact_models() -> None:
    assert figures(68_976_648_192)[:2] == ["256.96", "1027.83"]
    assert figures(70_553_706_496)[:2] == ["262.83", "1051.33"]


def test_autocast_adds_two_bytes_and_lora_leaves_the_frozen_base() -> None:
    *_, autocast, lora = lines([Column("", 10**9)], 10**6)
    assert autocast.sizes_bytes == (18 * 10**9,)
    assert lora.sizes_bytes == (2 * 10**9 + 16 * 10**6,)


def test_an_alias_stands_beside_all_its_namesakes_and_a_name_for_itself() -> None:
    alias = columns("llama-70b", Column("llama-3.3-70b", 70_553_706_496))
    assert [column.name for column in alias] == ["70b", "llama-3.3-70b", "llama-2-70b"]
    named = columns("llama-3.1-8b", Column("llama-3.1-8b", 8_030_261_248))
    assert [column.name for column in named] == ["8b", "llama-3.1-8b"]


def test_a_name_that_tells_no_size_is_counted_exactly_and_only_so() -> None:
    for name in ("phi-4", "gpt2-xl", "mixtral-8x7b"):
        assert columns(name, Column(name, 10**9)) == [Column(name, 10**9)]
