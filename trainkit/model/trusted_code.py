"""Python code that comes with a model of the hub: run only where a command names its repository and its commit.

A recipe cannot ask for it: one from somebody else must not decide what runs on this machine. What is run is what lies
in the snapshot of that commit, and where transformers itself has the architecture or the tokenizer, no code at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainkit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trainkit.model.locating import ModelLocation

FLAG = "--trust-remote-code"
MODULES = "transformers_modules"  # the package that transformers copies such code into, and imports it from
COMMIT = re.compile(r"[0-9a-f]{40}")
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
REFERENCE = re.compile(r"(?:(?P<repository>.+)--)?(?P<module>[A-Za-z_]\w*)\.[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class Trust:
    """The one repository of the hub whose code may be run, as ``owner/name``, and the commit; 40 hexadecimal digits."""

    repository: str
    commit: str

    def __str__(self) -> str:
        """As the flag is written."""
        return f"{self.repository}@{self.commit}"


def read_trust(text: str | None) -> Trust | None:
    """What ``--trust-remote-code TEXT`` says; None without it. Raises UsageError unless it is repository and commit.

    >>> str(read_trust("owner/name@" + "0123456789ABCDEF0123" * 2))
    'owner/name@0123456789abcdef01230123456789abcdef0123'
    """
    if text is None:
        return None
    repository, at, commit = text.rpartition("@")
    if not at or not REPOSITORY.fullmatch(repository):
        raise UsageError(
            f"{FLAG}: {text[:120]!r} is not OWNER/NAME@COMMIT; write the model's id on the hub, and the commit whose "
            "code you have read"
        )
    if not COMMIT.fullmatch(commit.lower()):
        raise UsageError(
            f"{FLAG}: {commit[:60]!r} is no whole commit, and what a branch or a shortened one stands for may change; "
            "write all 40 hexadecimal digits"
        )
    return Trust(repository, commit.lower())


def needless(trust: Trust) -> UsageError:
    """For a flag that would have no effect."""
    return UsageError(
        f"{FLAG}: {trust.repository} needs no code of its own, transformers itself knows it: none was run; leave the "
        "flag out"
    )


def code_options(code: Trust | None) -> dict[str, Any]:
    """What says to a loader of transformers whether code may be run; code that a file names by its hub id is pinned."""
    if code is None:
        return {"trust_remote_code": False}
    return {"trust_remote_code": True, "code_revision": code.commit}


def needs_code(values: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a model that transformers has no code for, and names code that comes with it.

    Where transformers knows the type and an architecture, its own code is what is run, whatever else is named.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if not values.get("auto_map"):
        return False
    if values.get("model_type") not in CONFIG_MAPPING_NAMES:
        return True
    named = values.get("architectures") or []
    return bool(named) and "AutoModelForCausalLM" in values["auto_map"] and not known_causal(named)


def known_causal(named: Sequence[str]) -> bool:
    """Whether one of the classes is a causal language model of transformers' own."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return not set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()).isdisjoint(named)


def how_to_trust(location: ModelLocation) -> str:
    """What to do about code that comes with a model, which is not run without a flag, or not at all."""
    if location.hub_id is None:
        return f"which is not run from a folder, as that has no commit; give its hub id, with {FLAG} OWNER/NAME@COMMIT"
    return (
        f"which is not run unasked; if you have read it and trust it, add {FLAG} {location.hub_id}@{location.revision}"
    )


def is_of_trusted_code(thing: object) -> bool:
    """Whether the class of ``thing`` is not of an installed package but came with a model."""
    return type(thing).__module__.split(".")[0] == MODULES


def place_in_trusted_code(error: BaseException) -> str | None:
    """``file:line`` of the model's own code that an error came through, the innermost; None where it did not."""
    place = None
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if str(frame.f_globals.get("__name__", "")).split(".")[0] == MODULES:
            place = f"{frame.f_code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place
