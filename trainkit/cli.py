"""The command line: each command parses, then calls one function of ``commands/``; every failure ends here.

What a user did wrong is one line on stderr and an exit code; a bug of ours is a traceback in a file, and one line that
says where. Results go to stdout. Heavy libraries are imported by the commands, so that help and refusals are instant.
"""

import contextlib
import errno
import os
import re
import select
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trainkit import __version__
from trainkit.console import Console
from trainkit.errors import DataError, MachineError, RecipeErrors, Stopped, TrainkitError, UsageError, first_line
from trainkit.launched import check_environment, has_our_launcher, is_first_to_fail, launched, terminal
from trainkit.model.trusted_code import FLAG, place_in_trusted_code, read_trust
from trainkit.recipe.packing_options import PackingOptions
from trainkit.recipe.reader import Flag, ReadRecipe, read_recipe
from trainkit.recipe.schema import Packing
from trainkit.recipe.secrets import holds_secret, without_secrets
from trainkit.run_folder import DISK_FULL, RunFolder
from trainkit.signals import EXIT_CTRL_C, said_of

EXIT_BUG, EXIT_USAGE, EXIT_MODEL, EXIT_MACHINE = 1, 2, 4, 5
DISK_REFUSES = frozenset({errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG})
TOO_MANY_FILES = frozenset({errno.EMFILE, errno.ENFILE})

app = typer.Typer(
    name="trainkit",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)


@dataclass
class Session:
    """One call of the program: what the handling of failures must know."""

    debug: bool = False
    run_folder: RunFolder | None = None


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a recipe that ships with trainkit.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the recipe, as section.key=value; the value is YAML, null unsets. Repeatable.",
    ),
]
TrustOption = Annotated[
    str | None,
    typer.Option(
        FLAG,
        metavar="REPO@COMMIT",
        help="Run the Python code that comes with the model: that of this hub id at this commit, and no other.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def _print_version(asked: bool) -> None:
    if asked:
        Console().show(f"trainkit {__version__}")
        raise typer.Exit


@app.callback(
    invoke_without_command=True,
    epilog="""\b
Exit codes:
  0 finished and verified    4 model, tokenizer, adapter  7 diverged
  1 bug of trainkit          5 machine                   75 stopped, resumable
  2 recipe or usage          6 checkpoint or resume     130 Ctrl+C
  3 data""",
)
def trainkit(
    context: typer.Context,
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,  # noqa: ARG001
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune language models from a YAML recipe."""
    if context.invoked_subcommand is None:
        Console().note(context.get_help())
        raise typer.Exit(EXIT_USAGE)


@app.command(
    "fine-tune",
    epilog="""\b
Examples:
  trainkit fine-tune quickstart
  trainkit fine-tune recipe.yaml --set training.learning_rate=1e-4""",
)
def fine_tune_command(
    context: typer.Context,
    recipe: RecipeArgument,
    *,
    overrides: SetOption = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew instead of resuming the run in output_dir.")
    ] = False,
    launch: Annotated[
        str | None,
        typer.Option("--launch", metavar="FILE", help="Train in the processes that this file asks for."),
    ] = None,
    trust_remote_code: TrustOption = None,
    json_output: JsonOption = False,
) -> None:
    """Train what the recipe says, and leave the result in its output_dir.

    The same command run again resumes a run that was stopped.
    """
    check_environment()
    trust = read_trust(trust_remote_code)
    read = _read(context, recipe, overrides, of_run=True)
    if launch is not None:
        from trainkit.commands.launch import launch as in_processes

        options = [option for value in overrides or () for option in ("--set", value)]
        options += [] if trust is None else [FLAG, str(trust)]
        options += ["--fresh"] * fresh + ["--json"] * json_output + ["--debug"] * _session(context).debug
        raise typer.Exit(in_processes(launch, ["fine-tune", *options, "--", recipe]))
    from trainkit.commands.fine_tune import fine_tune

    fine_tune(read, trust=trust, fresh=fresh, json_output=json_output)


@app.command(
    "inspect-data",
    epilog="""\b
Example:
  trainkit inspect-data recipe.yaml --examples 5""",
)
def inspect_data_command(
    context: typer.Context,
    recipe: RecipeArgument,
    *,
    overrides: SetOption = None,
    examples: Annotated[int, typer.Option("--examples", metavar="N", min=1, help="How many examples to show.")] = 3,
    trust_remote_code: TrustOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show examples token by token, with what is trained highlighted."""
    trust = read_trust(trust_remote_code)
    read = _read(context, recipe, overrides)
    from trainkit.commands.inspect_data import inspect_data

    inspect_data(read, trust=trust, examples=examples, json_output=json_output)


class FormChoice(StrEnum):
    """What ``--format`` may be."""

    store = "store"
    parquet = "parquet"


@app.command(
    "pack-data",
    epilog="""\b
The rows lie in $TRAINKIT_CACHE (default ~/.cache/trainkit), and fine-tune
with the same recipe finds them there; --output names another place. What the
options do not say, --set does: --set packing.long_documents=drop.

\b
Examples:
  trainkit pack-data recipe.yaml
  trainkit pack-data recipe.yaml --set packing.sequence_length=4096 --json
  trainkit pack-data --data train.jsonl --tokenizer models/my-model \\
      --sequence-length 4096 --format parquet --output packed""",
)
def pack_data_command(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A recipe file or a shipped recipe; or give --data and --tokenizer."),
    ] = None,
    *,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="FILE", help="A data file or folder, or a hub id. Repeatable."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="PATH", help="A folder with a tokenizer, or a hub id; needs no model."),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option("--sequence-length", metavar="N", help=f"Tokens in a row (default {Packing.sequence_length})."),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template",
            metavar="NAME",
            help="chatml, plain, or a .jinja file (default: the tokenizer's own).",
        ),
    ] = None,
    overrides: SetOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Where the rows go; for parquet, FILE.parquet too."),
    ] = None,
    form: Annotated[
        FormChoice, typer.Option("--format", help="store: what fine-tune reads; parquet: what TRL and datasets read.")
    ] = FormChoice.store,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw lengths, fill and padding: .png, .svg or .html."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Encode and pack again, and replace the rows that are there.")
    ] = False,
    trust_remote_code: TrustOption = None,
    json_output: JsonOption = False,
) -> None:
    """Pack the data into rows, and report where every token went.

    Reads no weights. Compares the rows with padding and with the fewest there can be.
    """
    trust = read_trust(trust_remote_code)
    options = PackingOptions(tuple(data or ()), tokenizer, sequence_length, chat_template)
    read = _read(context, recipe, overrides, flags=options.flags(recipe, overrides or ()))
    from trainkit.commands.pack_data import pack_data

    pack_data(read, trust=trust, output=output, form=form.value, plot=plot, force=force, json_output=json_output)


class AdapterChoice(StrEnum):
    """What ``--adapter`` may be."""

    none = "none"
    lora = "lora"
    qlora = "qlora"


class ShardChoice(StrEnum):
    """What ``--shard`` may be."""

    none = "none"
    ddp = "ddp"
    fsdp2 = "fsdp2"


class ViewChoice(StrEnum):
    """What ``--view`` may be."""

    textbook = "textbook"


@app.command(
    "estimate-memory",
    epilog="""\b
Nothing is downloaded but the config.json of a hub id that is not known. With
--gpu or --memory, exit code 5 says that not even one row fits.

\b
Examples:
  trainkit estimate-memory recipe.yaml --gpu h100-80gb
  trainkit estimate-memory --model llama-3.1-8b --adapter lora --memory 24GiB
  trainkit estimate-memory --model llama-70b --view textbook
  trainkit estimate-memory --fits 24GiB --sequence-length 4096""",
)
def estimate_memory_command(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A recipe file or a shipped recipe; or give --model.")
    ] = None,
    *,
    overrides: SetOption = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="A known model, a folder with config.json, or a hub id."),
    ] = None,
    adapter: Annotated[
        AdapterChoice | None, typer.Option("--adapter", help="How it trains; none: every weight.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", metavar="TYPE", help="fp32, fp16 or bf16; auto takes the GPU's best.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option("--sequence-length", metavar="N", min=8, help="Tokens in a row.")
    ] = None,
    micro_batch_size: Annotated[
        str | None,
        typer.Option("--micro-batch-size", metavar="N", help="Rows in a forward pass; auto: as many as fit."),
    ] = None,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Recompute activations in the backward pass.")
    ] = False,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", metavar="NAME", help="adamw, adamw_8bit, adafactor or sgd.")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", min=1, help="How many GPUs share the step.")] = 1,
    shard: Annotated[
        ShardChoice | None, typer.Option("--shard", help="How they share it.", show_default="ddp with several GPUs")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="GPU", help="Does it fit on this GPU? As h100-80gb.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Does it fit into this much? As 24GiB.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Trace the step even where a formula is known.")] = False,
    view: Annotated[
        ViewChoice | None, typer.Option("--view", help="textbook: bytes a parameter and nothing else.")
    ] = None,
    fits: Annotated[
        str | None,
        typer.Option("--fits", metavar="SIZE", help="List every known model by the cheapest method that fits."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the step: .png, .svg or .html.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Estimate the peak memory of a run, before anything is downloaded.

    Options stand for keys of a recipe, and go before the file's own values.
    """
    from trainkit.commands.estimate_memory import estimate_memory
    from trainkit.memory.subject import Request

    request = Request(
        recipe=recipe,
        overrides=tuple(overrides or ()),
        model=model,
        adapter=adapter.value if adapter else None,
        precision=precision,
        sequence_length=sequence_length,
        micro_batch_size=_rows(micro_batch_size),
        activation_checkpointing=activation_checkpointing,
        optimizer=optimizer,
        gpus=gpus,
        shard=shard.value if shard else None,
        gpu=gpu,
        memory=memory,
        exact=exact,
        textbook=view is not None,
        fits=fits,
        plot=plot,
    )
    estimate_memory(request, json_output=json_output)


@app.command(
    "show",
    epilog="""\b
Example:
  trainkit show recipe.yaml --set packing.sequence_length=512""",
)
def show_command(context: typer.Context, recipe: RecipeArgument, *, overrides: SetOption = None) -> None:
    """Print the recipe as resolved: every key, where its value comes from, what it means.

    The output is a recipe itself.
    """
    read = _read(context, recipe, overrides)
    from trainkit.commands.show import show

    Console().show(show(read).rstrip("\n"))


@app.command(
    "schema",
    epilog="""\b
Example:
  trainkit schema > recipe.schema.json""",
)
def schema_command() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from trainkit.commands.schema import schema

    Console().show(schema())


@app.command(
    "export",
    epilog="""\b
Example:
  trainkit export runs/quickstart --merge --output merged""",
)
def export_command(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The output_dir of a finished run.")],
    *,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter into its base model, and verify it.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Where the result goes.", show_default="RUN/merged")
    ] = None,
    trust_remote_code: TrustOption = None,
    json_output: JsonOption = False,
) -> None:
    """Turn the result of a run into another form."""
    trust = read_trust(trust_remote_code)
    _session(context).run_folder = RunFolder(run)
    from trainkit.commands.export import export

    export(run, trust=trust, merge=merge, output=output, json_output=json_output)


def _rows(text: str | None) -> int | Literal["auto"] | None:
    """What ``--micro-batch-size`` gives. Raises UsageError."""
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if not re.fullmatch(r"0*[1-9][0-9]{0,17}", text):
        raise UsageError(f"--micro-batch-size: expected a whole number above 0, or `auto`; got `{text[:40]}`")
    return int(text)


def _session(context: typer.Context) -> Session:
    session = context.obj
    assert isinstance(session, Session)
    return session


def _read(
    context: typer.Context,
    recipe: str | None,
    overrides: list[str] | None,
    *,
    flags: Sequence[Flag] = (),
    of_run: bool = False,
) -> ReadRecipe:
    """The recipe, with its warnings said; a bug from here on is written into its run folder, if it is a run's."""
    read = read_recipe(recipe, overrides or (), flags)
    if of_run:
        _session(context).run_folder = RunFolder(Path(read.recipe.output_dir))
    console = Console()
    for line in read.warnings if launched().speaks and not has_our_launcher() else ():  # which has said them
        console.warn(without_secrets(line))
    return read


def run(arguments: Sequence[str]) -> int:
    """Run one command line; what comes back is the exit code. Raises nothing."""
    session = Session(debug="--debug" in arguments)
    try:
        _check_arguments(arguments)
        _check_place()
        # --debug may stand anywhere: it is typed when the command has just failed
        code = _invoke([argument for argument in arguments if argument != "--debug"], session)
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        received, code = said_of(error)
        line = "interrupted" if code == EXIT_CTRL_C else f"interrupted ({received.name})"
        # A command with no run folder leaves nothing, so that there is nothing to say of it.
        more = "" if session.run_folder is None else " before there was anything to save"
        return _say(error, [line + more], code, session)
    except Exception as error:
        return _failed(error, session)
    return code


def _check_arguments(arguments: Sequence[str]) -> None:
    """Raise UsageError for a secret among them: other users of this machine can read a command line."""
    for number, argument in enumerate(arguments, start=1):
        if holds_secret(argument):
            raise UsageError(
                f"argument {number} holds what looks like an access token or a password; give it through the "
                "environment (HF_TOKEN, WANDB_API_KEY, ...) or log in with the service's own program"
            )


def _check_place() -> None:
    """Raise MachineError where the current folder has been deleted: libraries end the process when they ask for it."""
    try:
        Path.cwd()
    except OSError as error:
        raise MachineError(f"the current folder is gone ({error.strerror}); change to one that is there") from error


def _invoke(arguments: list[str], session: Session) -> int:
    # Not through typer's own main: it would turn failures into its own messages and exit codes.
    command: Any = typer.main.get_command(app)
    try:
        with command.make_context("trainkit", arguments, obj=session) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    return 0


def _failed(error: Exception, session: Session) -> int:
    """Say what went wrong; what comes back is the exit code."""
    if isinstance(error, TrainkitError):
        code = EXIT_CTRL_C if isinstance(error, Stopped) and error.by_keyboard else error.exit_code
        if isinstance(error, Stopped) and error.launcher_tells and has_our_launcher():
            return code
        lines = error.lines if isinstance(error, RecipeErrors) else [str(error).replace("\n", "\\n")]
        return _say(error, lines, code, session, below=error.example if isinstance(error, DataError) else ())
    if hasattr(error, "format_message"):
        # an error of typer's (of click's, in its older versions): they share no public class
        return _say(error, [_usage_message(error)], EXIT_USAGE, session)
    if isinstance(error, BrokenPipeError) and _stdout_takes_no_more():
        return 0  # `| head` has read enough
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        _stdout_takes_no_more()
        where = f"{error.filename}: " if error.filename else ""
        line = f"{where}no space left on the disk; free some and run the same command again"
        return _say(error, [line], EXIT_MACHINE, session)
    if isinstance(error, OSError) and error.errno in DISK_REFUSES:
        place = error.filename or (session.run_folder.root if session.run_folder else "the disk")
        line = f"{place}: {error.strerror}; mend that and run the same command again"
        return _say(error, [line], EXIT_MACHINE, session)
    if isinstance(error, OSError) and error.errno in TOO_MANY_FILES:
        line = "this machine lets no more files be open; raise the limit (`ulimit -n`) and run the same command again"
        return _say(error, [line], EXIT_MACHINE, session)
    if isinstance(error, MemoryError):
        return _say(error, ["this machine is out of memory"], EXIT_MACHINE, session)
    if place := place_in_trusted_code(error):
        line = f"{place}: the model's own code failed: {type(error).__name__}: {first_line(error)}; ask who wrote it"
        return _say(error, [line], EXIT_MODEL, session)
    return _bug(error, session)


def _say(error: BaseException, lines: Sequence[str], code: int, session: Session, below: Sequence[str] = ()) -> int:
    if not is_first_to_fail(code):
        return code
    console = Console(stderr=terminal())
    if session.debug:
        for line in _traceback(error).splitlines():
            console.note(line)
    for line in lines:
        console.error(without_secrets(line))
    for line in below:
        console.note(without_secrets(line))
    return code


def _usage_message(error: Any) -> str:
    message = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "trainkit"
    return f"{message}{' See' if message.endswith('?') else '; see'} `{command} --help`"


def _stdout_takes_no_more() -> bool:
    """Whether stdout's reader has left or its disk is full; if so, what is still to be written goes nowhere.

    Otherwise the interpreter would try to write it at its end, fail again, and change the exit code.
    """
    try:
        sys.stdout.flush()
        useless = _reader_has_left(sys.stdout.fileno())  # without a buffer there is nothing to flush
    except ValueError:  # closed, or no stream of the system's
        return False
    except OSError:
        useless = True
    if useless:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return useless


def _reader_has_left(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(flags & (select.POLLERR | select.POLLHUP) for _, flags in poll.poll(0))


def _bug(error: Exception, session: Session) -> int:
    """Write the traceback where it can be found, and say so in one line."""
    if not is_first_to_fail(EXIT_BUG):
        return EXIT_BUG
    what = f"{type(error).__name__}: {' '.join(without_secrets(str(error)).split())}"[:120]
    text = f"trainkit {__version__}, Python {sys.version.split()[0]}\n{_traceback(error)}"
    console = Console(stderr=terminal())
    for path in _crash_files(session.run_folder):
        with contextlib.suppress(OSError):
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            if session.debug:
                console.note(text)
            console.error(f"this is a bug of trainkit ({what}); please report it with {path}")
            return EXIT_BUG
    console.note(text)
    console.error(f"this is a bug of trainkit ({what}); please report it with the lines above")
    return EXIT_BUG


def _crash_files(run_folder: RunFolder | None) -> list[Path]:
    """Where a crash report may go, best first: into the run's own folder, here, the folder of temporary files."""
    name = f"trainkit-crash-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    ours = [run_folder.crash] if run_folder and run_folder.marker.is_file() else []
    return [*ours, Path(name), Path(tempfile.gettempdir()) / name]


def _traceback(error: BaseException) -> str:
    return without_secrets("".join(traceback.format_exception(error)))
