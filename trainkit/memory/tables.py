"""The fact tables of ``configs/``: shapes of well-known models, memory of common GPUs. Torch-free."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterable


def configs_folder() -> Path:
    """Where ``configs/`` lies: in the installed package, or in the repository."""
    package = Path(__file__).resolve().parent.parent
    shipped = package / "shipped" / "configs"
    return shipped if shipped.is_dir() else package.parent / "configs"


def read_table(path: Path) -> dict[str, Any]:
    """A table as it stands in its file; libyaml's parser is taken where there is one, since it is four times faster."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(path.read_text(encoding="utf-8"))
    try:
        table: dict[str, Any] = loader.get_single_data()
    finally:
        loader.dispose()
    return table


def plain_name(name: str) -> str:
    """A name as the tables write it: small letters, words joined by hyphens.

    >>> plain_name("RTX 4090"), plain_name("Llama_3.1-8B")
    ('rtx-4090', 'llama-3.1-8b')
    """
    return re.sub(r"[\s_]+", "-", name.strip().lower())


def near_names(name: str, names: Iterable[str], most: int = 4) -> list[str]:
    """The names of a table that ``name`` may have meant, best first.

    >>> near_names("lama-3.1-8b", ["llama-3.1-8b", "llama-3.1-70b", "qwen3-8b"], most=2)
    ['llama-3.1-8b', 'llama-3.1-70b']
    """
    known = list(names)
    plain = plain_name(name)
    close = difflib.get_close_matches(plain, known, n=most, cutoff=0.6)
    family = re.match(r"[a-z]+", plain)
    same = [
        other
        for other in known
        if family and re.match(r"[a-z]+", other + "-", re.ASCII) and other.startswith(family[0])
    ]
    return list(dict.fromkeys([*close, *same]))[:most]
