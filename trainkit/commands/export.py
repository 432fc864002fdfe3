"""`trainkit export`: the result of a run in another form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainkit.console import Console
from trainkit.errors import UsageError
from trainkit.run_folder import RunFolder

if TYPE_CHECKING:
    from pathlib import Path

    from trainkit.model.trusted_code import Trust


def export(run: Path, *, trust: Trust | None = None, merge: bool, output: Path | None, json_output: bool) -> None:
    """Merge the adapter of ``run`` into its base model, verify it, and say what was verified.

    Raises UsageError without ``merge``: the run's final/ already is the adapter in peft's own format.
    """
    if not merge:
        raise UsageError(
            f"export: {RunFolder(run).final} already is the result, in the format of peft and transformers; "
            "--merge makes one model of adapter and base"
        )
    from trainkit.model.merging import merge_adapter

    with Console(json_only=json_output) as console:
        report = merge_adapter(run, output, trust)
        for sentence in report.sentences():
            console.show(sentence)
        console.show(f"written to {report.output}")
        console.result(report.to_json())
