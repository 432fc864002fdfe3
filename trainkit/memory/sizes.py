"""Amounts of memory as people write and read them: GiB is 2^30 bytes, GB is 10^9."""

from __future__ import annotations

import re

from trainkit.errors import UsageError

GIB, MIB = 2**30, 2**20
_UNITS = {"gib": GIB, "gb": 10**9, "mib": MIB, "mb": 10**6, "tib": 2**40, "tb": 10**12}


def size_in_bytes(text: str, option: str) -> int:
    """Bytes of an amount with its unit. Raises UsageError, which names ``option``, for anything else.

    >>> size_in_bytes("24GiB", "--memory"), size_in_bytes("24 GB", "--memory"), size_in_bytes(".5gib", "--memory")
    (25769803776, 24000000000, 536870912)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    unit = match and _UNITS.get(match[2].lower())
    if match and not match[2]:
        raise UsageError(
            f"{option}: {text} has no unit; write {match[1]}GiB (2^30 bytes, what torch and nvidia-smi count in) or "
            f"{match[1]}GB (10^9 bytes)"
        )
    if match and (letter := match[2].upper()) in {"G", "M", "T"}:
        power = {"M": 20, "G": 30, "T": 40}[letter]
        raise UsageError(
            f"{option}: {text} may be one of two units; write {match[1]}{letter}iB (2^{power} bytes, what torch and "
            f"nvidia-smi count in) or {match[1]}{letter}B (10^{power // 10 * 3} bytes)"
        )
    if not match or not unit:
        raise UsageError(f"{option}: `{text[:40]}` is no amount of memory; write a number and a unit, as 24GiB or 80GB")
    amount = round(float(match[1]) * unit)
    if not 0 < amount < 2**63:
        raise UsageError(f"{option}: {text[:40]} must be above 0 and below 8 million TiB")
    return amount


def gib(size_bytes: float) -> str:
    """An amount in GiB, or in MiB where that says more.

    >>> gib(70e9 * 4), gib(1024 * 2**30), gib(5 * 2**20), gib(0)
    ('260.77 GiB', '1,024.00 GiB', '5.0 MiB', '0 MiB')
    """
    if abs(size_bytes) < 0.1 * GIB:
        return f"{size_bytes / MIB:,.1f} MiB" if size_bytes else "0 MiB"
    return f"{size_bytes / GIB:,.2f} GiB"


def gib_and_gb(size_bytes: float) -> str:
    """An amount in GiB with the same in GB beside it.

    >>> gib_and_gb(70e9 * 16)
    '1,043.08 GiB (1,120.00 GB)'
    """
    return f"{size_bytes / GIB:,.2f} GiB ({size_bytes / 1e9:,.2f} GB)"
