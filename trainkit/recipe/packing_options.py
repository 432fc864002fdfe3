"""The recipe that the options of ``pack-data`` stand for, where no file is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainkit.errors import UsageError
from trainkit.recipe.reader import Flag
from trainkit.recipe.schema import Packing

if TYPE_CHECKING:
    from collections.abc import Sequence

KEYS = {
    "--data": "data.train",
    "--tokenizer": "model.name",
    "--sequence-length": "packing.sequence_length",
    "--chat-template": "data.chat_template",
}
HELP = "see `trainkit pack-data --help`"


@dataclass(frozen=True)
class PackingOptions:
    """What the command line says in place of a recipe."""

    data: tuple[str, ...] = ()
    tokenizer: str | None = None
    sequence_length: int | None = None
    chat_template: str | None = None

    def flags(self, recipe: str | None, overrides: Sequence[str]) -> list[Flag]:
        """The options as keys of a recipe; none where a ``recipe`` is given.

        What packing does not ask for (how long to train, where the run goes) gets a value that nothing reads. Raises
        UsageError for options beside a recipe, and where one that is needed is missing.
        """
        given = (self.data, self.tokenizer, self.sequence_length, self.chat_template)
        said = [option for option, value in zip(KEYS, given, strict=True) if value not in (None, ())]
        if recipe is not None:
            if said:
                raise UsageError(
                    f"{said[0]}: RECIPE says it already; leave one out, or override it: --set {KEYS[said[0]]}=VALUE"
                )
            return []
        if not said:
            raise UsageError(f"give a RECIPE, or --data and --tokenizer; {HELP}")
        for option in ("--data", "--tokenizer"):
            if option not in said:
                raise UsageError(f"{said[0]}: needs {option} beside it, or give a RECIPE; {HELP}")
        return self._flags(overrides)

    def _flags(self, overrides: Sequence[str]) -> list[Flag]:
        assert self.tokenizer is not None
        flags = [
            _flag("--data", f"[{', '.join(map(_quoted, self.data))}]"),
            _flag("--tokenizer", _quoted(self.tokenizer)),
            Flag("--data", "training.epochs", "1"),
            Flag("--data", "output_dir", "runs/packed"),
        ]
        if self.sequence_length is not None:
            flags.append(_flag("--sequence-length", str(self.sequence_length)))
            flags.append(Flag("--sequence-length", "training.tokens_per_step", str(max(1, self.sequence_length))))
            # The default overlap is more than a short row has room for.
            policy_is_given = any(one.partition("=")[0].strip() == "packing.long_documents" for one in overrides)
            if not policy_is_given and 0 <= self.sequence_length // 2 < Packing.overlap:
                flags.append(Flag("--sequence-length", "packing.overlap", str(self.sequence_length // 2)))
        if self.chat_template is not None:
            flags.append(_flag("--chat-template", _quoted(self.chat_template)))
        return flags


def _flag(option: str, value: str) -> Flag:
    return Flag(option, KEYS[option], value)


def _quoted(text: str) -> str:
    """Text as YAML that stays text."""
    return "'" + text.replace("'", "''") + "'"
