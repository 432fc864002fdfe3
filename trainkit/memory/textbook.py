"""The arithmetic of textbooks: bytes a parameter, and nothing else. Torch-free.

Training in fp32 with Adam keeps four numbers of 4 bytes a parameter: the weight, its gradient, and two moments. Mixed
precision as Micikevicius et al. described it (arXiv 1710.03740, section 3.1) keeps a 16-bit weight and gradient and an
fp32 master weight beside the moments: 2 + 2 + 4 + 4 + 4, the same 16 bytes. What the step itself needs (activations,
logits, buffers) is in neither.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainkit.memory.models import KnownModel, known_models
from trainkit.memory.sizes import GIB

FP32_BYTES = 4
ADAM_BYTES = 16
AUTOCAST_BYTES = 2  # the 16-bit copies of the weights that torch.autocast keeps from their first use to the pass's end
FROZEN_BYTES = 2
LEFT_OUT = (
    "torch.autocast (precision bf16, fp16) keeps all of it in fp32, 16 bytes too, and adds 16-bit copies in the pass.",
    "In none of this: activations, logits, buffers, the allocator, the device's context. Leave --view out to see them.",
)
NOMINAL = re.compile(r"(?P<family>[a-z]+)[a-z0-9.-]*?-(?P<billions>[0-9]+(?:\.[0-9]+)?)b(?:-|$)")


@dataclass(frozen=True)
class Column:
    """A number of parameters, and what it is called."""

    name: str
    parameters: int


@dataclass(frozen=True)
class Line:
    """A row of the textbook's table: what is counted, how, and its bytes for each column."""

    what: str
    how: str
    sizes_bytes: tuple[int, ...]


def columns(asked: str, exact: Column) -> list[Column]:
    """The nominal number where a name tells one, the exact model, then its namesakes of the same nominal size.

    >>> [(column.name, column.parameters) for column in columns("llama-70b", Column("llama-3.3-70b", 70553706496))]
    [('70b', 70000000000), ('llama-3.3-70b', 70553706496), ('llama-2-70b', 68976648192)]
    """
    nominal = NOMINAL.search(asked.lower()) or NOMINAL.search(exact.name)
    if nominal is None:
        return [exact]
    billions = float(nominal["billions"])
    found = [Column(f"{nominal['billions']}b", round(billions * 1e9)), exact]
    if asked != exact.name:  # an alias stands for more than one model
        for model in known_models().values():
            if _is_namesake(model, nominal) and model.parameters not in {column.parameters for column in found}:
                found.append(Column(model.name, model.parameters))
    return found


def lines(counted: list[Column], trained_by_lora: int) -> list[Line]:
    """What the textbook counts, then what it leaves out of the model's states.

    ``trained_by_lora`` are the parameters of a LoRA adapter on the exact model; the other columns are given as many.

    >>> [f"{size / 2**30:.2f}" for line in lines([Column("70b", 70 * 10**9)], 0)[:3] for size in line.sizes_bytes]
    ['260.77', '1043.08', '1043.08']
    """
    numbers = [column.parameters for column in counted]

    def line(what: str, how: str, bytes_each: int, trained: int = 0) -> Line:
        return Line(what, how, tuple(bytes_each * number + ADAM_BYTES * trained for number in numbers))

    return [
        line("weights in fp32", "4 bytes a parameter", FP32_BYTES),
        line("training in fp32", "4 × (weight, grad, m, v)", ADAM_BYTES),
        line("training in mixed precision", "2 + 2 + 4 + 4 + 4", ADAM_BYTES),
        line("… by autocast, forward", "16 + 2 for 16-bit copies", ADAM_BYTES + AUTOCAST_BYTES),
        line("what LoRA leaves of it", "2 frozen + 16 trained", FROZEN_BYTES, trained_by_lora),
    ]


def as_gib(size_bytes: int) -> str:
    """An amount as the table writes it.

    >>> as_gib(1120 * 10**9), as_gb(1120 * 10**9)
    ('1043.08 GiB', '1120 GB')
    """
    return f"{size_bytes / GIB:.2f} GiB"


def as_gb(size_bytes: int) -> str:
    """The same amount in the unit beside it."""
    return f"{size_bytes / 1e9:.2f} GB".replace(".00 ", " ")


def units_explained(table: list[Line]) -> str:
    """What the two units are, by a figure of the table: the first column's, trained in mixed precision."""
    size = table[2].sizes_bytes[0]
    return f"GiB is 2^30 bytes and GB is 10^9: {as_gib(size)} and {as_gb(size)} are one amount."


def _is_namesake(model: KnownModel, nominal: re.Match[str]) -> bool:
    other = NOMINAL.search(model.name)
    return bool(other) and other.groups() == nominal.groups()  # type: ignore[union-attr]
