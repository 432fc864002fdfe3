"""Whether every process of a run was given the same: what is not would train on in silence, to replicas that differ.

A launcher hands one recipe to the processes of its machine. Nothing but this makes two machines have the same one.
"""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trainkit import __version__
from trainkit.errors import UsageError
from trainkit.model.trusted_code import FLAG
from trainkit.training.processes import gathered
from trainkit.training.run_record import flattened, shortened, shown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from accelerate import Accelerator

    from trainkit.recipe.precision import PrecisionName
    from trainkit.recipe.schema import Recipe

MOST_LETTERS = 30  # of a value or a host in the message


@dataclass(frozen=True)
class Given:
    """What a process was given: ``choices`` by the name that a user knows each by, and fingerprints of content."""

    host: str
    choices: dict[str, Any]
    data_key: str
    base_model: str


def given_here(
    recipe: Recipe,
    *,
    output_dir: Path,
    precision: PrecisionName,
    shards: bool,
    trusted_code: str,
    data_key: str,
    base_model: str,
) -> Given:
    """What this process was given; ``output_dir`` and ``precision`` as the recipe's come out on this machine."""
    choices = {
        "the version of trainkit": __version__,
        "distributed_type": "FSDP2" if shards else "DDP",
        FLAG: trusted_code or "not given",
        **flattened(asdict(recipe)),
        "output_dir": str(output_dir),
        "precision": precision,
    }
    return Given(socket.gethostname(), choices, data_key, base_model)


def check_agreement(accelerator: Accelerator, given: Given) -> None:
    """Raise the same UsageError in every process unless all were given the same; every process must ask."""
    everyone = [Given(**json.loads(one)) for one in gathered(accelerator, json.dumps(asdict(given)).encode())]
    if said := disagreement(everyone):
        raise UsageError(said)


def disagreement(everyone: Sequence[Given]) -> str | None:
    """What the first process that differs from process 0 has otherwise; None where all have the same.

    >>> one = Given("node1", {"training.seed": 42}, "a", "b")
    >>> disagreement([one, Given("node2", {"training.seed": 1}, "c", "b")])
    'process 1 (node2): training.seed is 1, and 42 in process 0; give the same command on every machine'
    >>> disagreement([one, one]) is None
    True
    """
    first, *others = everyone
    for rank, other in enumerate(others, 1):
        place = f"process {rank} ({shortened(other.host, MOST_LETTERS)})"
        names = [*first.choices, *(name for name in other.choices if name not in first.choices)]
        differing = [name for name in names if first.choices.get(name) != other.choices.get(name)]
        if differing:
            theirs, ours = (
                shortened(shown(one.choices.get(differing[0])), MOST_LETTERS).replace("\n", " ")
                for one in (other, first)
            )
            more = f" ({len(differing) - 1} more differ)" if len(differing) > 1 else ""
            return (
                f"{place}: {differing[0]} is {theirs}, and {ours} in process 0{more}; "
                "give the same command on every machine"
            )
        if first.data_key != other.data_key:
            return (
                f"{place}: data.train: its data, tokenizer or chat template are another copy than those of process 0; "
                "give it the same files"
            )
        if first.base_model != other.base_model:
            return f"{place}: model.name: its base model is another copy than that of process 0; give it the same files"
    return None
