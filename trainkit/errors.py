"""Everything that may go wrong, as one small tree. Each branch has its exit code.

    TrainkitError                 our own: one line for the user, never a traceback
    ├── UsageError       2        the recipe or the command line
    │   └── RecipeErrors 2        all mistakes of one recipe at once, a line each
    ├── DataError        3        examples, files, columns, masks
    ├── ModelError       4        model folder, tokenizer, chat template, adapter
    ├── MachineError     5        memory, disk, device, a missing extra
    ├── CheckpointError  6        a checkpoint, or a resume that does not match
    ├── DivergedError    7        a loss, gradient or weight that is not finite; updates that change nothing
    └── Stopped      75 / 130     a signal, with the state saved (75), or Ctrl+C (130)
        └── LostProcessError 75   another process of the run is gone

Any other exception is a bug of trainkit: exit code 1, the traceback goes to a file, one line says where.

A message names the place first (``file:line``, recipe key, example), then what is wrong, then what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence


class TrainkitError(Exception):
    """A failure that is not trainkit's bug; ``str(error)`` is the one line that the user reads."""

    exit_code: ClassVar[int]


class UsageError(TrainkitError):
    """The recipe or the command line asks for something that cannot be."""

    exit_code = 2


class RecipeErrors(UsageError):  # noqa: N818 - it holds several
    """All mistakes of one recipe; ``lines`` holds one complete message for each."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class DataError(TrainkitError):
    """A data source, an example or a mask is not what training needs.

    ``example`` holds lines to be shown below the message: one example, token by token.
    """

    exit_code = 3

    def __init__(self, message: str, *, example: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.example = tuple(example)


class ModelError(TrainkitError):
    """A model folder, tokenizer, chat template or adapter cannot be used."""

    exit_code = 4


class MachineError(TrainkitError):
    """What this machine cannot do: memory, disk, device, or an optional package that is not installed."""

    exit_code = 5


class CheckpointError(TrainkitError):
    """A checkpoint is damaged, or does not belong to this run."""

    exit_code = 6


class DivergedError(TrainkitError):
    """Training produced a number that is not finite, or moved nothing; what it led to was not saved."""

    exit_code = 7


class Stopped(TrainkitError):  # noqa: N818 - a stop is no error of the run
    """A signal ended the run and its state is saved.

    The exit code depends on the signal: 130 for Ctrl+C, 75 (EX_TEMPFAIL, "try again") for any other.
    ``launcher_tells``: a launcher of ours knows more of the reason than the process that it stopped, and says it.
    """

    exit_code = 75

    def __init__(self, message: str, *, by_keyboard: bool, launcher_tells: bool = False) -> None:
        super().__init__(message)
        self.by_keyboard = by_keyboard
        self.launcher_tells = launcher_tells


class LostProcessError(Stopped):
    """Another process of the run is gone or does not answer. Why, is for that one to say, or for who started it."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this run is gone or does not answer, so this one stopped too; the same command "
            "continues from the newest checkpoint",
            by_keyboard=False,
            launcher_tells=True,
        )


def first_line(error: BaseException, limit: int = 120) -> str:
    r"""The first line of what another library says, cut to ``limit`` characters; its type where it says nothing.

    >>> first_line(ValueError("no such thing\nat all")), first_line(KeyError())
    ('no such thing', 'KeyError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]
