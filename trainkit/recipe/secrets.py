"""Access tokens and passwords: how they are recognised, so that they are never copied and never said.

A recipe is written into the run folder, the report and the model card, and errors are pasted into questions to others.
So a recipe and a command line that hold a secret are refused, and what is said of errors has secrets taken out. The
shapes are those that the services document; a secret without a shape is known where it is the value of an environment
variable whose name says so.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHAPES = (
    r"\bhf_[A-Za-z0-9]{16,}",  # Hugging Face
    r"\b(?:sk|rk|pk)[-_][A-Za-z0-9_-]{20,}",  # OpenAI, Anthropic, Stripe
    r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,})",  # GitHub, GitLab
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",  # AWS
    r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",  # Slack
    r"\bAIza[\w-]{35}",  # Google
    r"\b(?:npm_[A-Za-z0-9]{36}|pypi-[\w-]{20,})",
    r"\bdapi[0-9a-f]{32}\b",  # Databricks
    r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}",  # JSON Web Token (RFC 7519)
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)",  # user:password@host
    r"(?<=[?&])(?:access_token|api_key|password|sig|token|X-Amz-Signature)=[^&\s]+",
    r"\bBearer [\w.~+/-]{16,}",  # RFC 6750
)
_SHAPE = re.compile("|".join(_SHAPES))
_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL|_PAT$", re.IGNORECASE)
_SHORTEST = 8
"""Characters; shorter values of such variables are switches and names."""


def without_secrets(text: str) -> str:
    """``text`` with every secret replaced by ``***``.

    >>> without_secrets("https://me:hunter2@host/x and hf_abcdefghijklmnopqrst")
    'https://***@host/x and ***'
    """
    for value in secrets_of_environment():
        text = text.replace(value, "***")
    return _SHAPE.sub("***", text)


def holds_secret(text: str, of_environment: Sequence[str] | None = None) -> bool:
    """Whether a secret stands in ``text``; who asks often passes :func:`secrets_of_environment`.

    >>> holds_secret("https://huggingface.co/owner/name:tag"), holds_secret("s3://key:secret@bucket/x")
    (False, True)
    """
    values = secrets_of_environment() if of_environment is None else of_environment
    return bool(_SHAPE.search(text)) or any(value in text for value in values)


def secrets_of_environment() -> tuple[str, ...]:
    """Values of variables that hold a secret by their name; the longest first, and no paths of files that hold one."""
    values = {value for name, value in os.environ.items() if _NAME.search(name)}
    kept = (value for value in values if len(value) >= _SHORTEST and not value.startswith(("/", "~", ".")))
    return tuple(sorted(kept, key=len, reverse=True))
