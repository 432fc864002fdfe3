"""Chat templates: which one a run uses, and rendering within limits.

A template comes with a model, so it is somebody else's program. It runs in the sandbox that transformers runs it in,
and here it may also neither run nor write without end.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trainkit.data.template_reading import only_places_texts
from trainkit.data.template_trial import check_on_trial
from trainkit.errors import ModelError, UsageError
from trainkit.run_folder import expanded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import jinja2
    from transformers import PreTrainedTokenizerBase

    from trainkit.data.conversations import Message

SHIPPED_TEMPLATES = Path(__file__).resolve().parent.parent / "shipped" / "templates"

OUTPUT_PER_INPUT = 50
OUTPUT_ALLOWANCE = 1_000_000
"""A rendering may have this many characters, and OUTPUT_PER_INPUT for each character of the conversation."""
PROCESSOR_SECONDS = 5.0
"""Time for one rendering, in seconds of this thread's processor, so that a busy machine does not matter."""
LARGEST_OPERAND = 10_000_000
"""Characters, items or bits that a multiplication or power inside a template may make."""


class TemplateProblem(Exception):  # noqa: N818 - a rendering that did not come out, to be told with its example
    """A template raised, left the sandbox or went over a limit; the text says which."""


def shipped_template_names() -> list[str]:
    """Names that ``data.chat_template`` knows without a file."""
    return sorted(path.stem for path in SHIPPED_TEMPLATES.glob("*.jinja"))


class ChatTemplate:
    """The Jinja program that turns messages into the text a model is trained on. Raises ModelError if it is none.

    ``only_places_texts``: what it writes depends on the texts of messages only by holding them.
    """

    def __init__(self, text: str, name: str, special_tokens: Mapping[str, Any]) -> None:
        import jinja2

        self.text = text
        self.name = name
        self._special_tokens = dict(special_tokens)
        self._watch = _Watch()
        check_on_trial(self._on_trial, name)
        try:
            self._compiled, self.only_places_texts = _compile(text, self._watch)
        except jinja2.TemplateError as error:
            line = f":{error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ModelError(f"{name}{line}: the chat template is not valid Jinja: {_first_line(error)}") from error

    def _on_trial(self) -> None:
        """Compile, which computes constants already, and render without and with what not every conversation has."""
        from trainkit.data.conversations import Message

        self._compiled, _ = _compile(self.text, self._watch)
        plain = [Message("user", "Hello"), Message("assistant", "Hello yourself")]
        tool = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}
        for messages, tools in ((plain, None), ([Message("system", "Be kind."), *plain], [tool])):
            try:
                self.render(messages, tools)
            except TemplateProblem as error:
                if isinstance(error.__cause__, MemoryError):
                    raise

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, generation_prompt: bool = False
    ) -> str:
        """The conversation as text, as ``tokenizer.apply_chat_template(..., tokenize=False)`` gives it.

        Raises TemplateProblem when the template raises or goes over a limit.
        """
        chat = [as_template_input(message) for message in messages]
        schemas = None if tools is None else list(tools)
        limit = OUTPUT_ALLOWANCE + OUTPUT_PER_INPUT * _characters(messages, schemas)
        self._watch.start(limit)
        try:
            return "".join(
                self._watch.outputs(
                    self._compiled.generate(
                        messages=chat,
                        tools=schemas,
                        documents=None,
                        add_generation_prompt=generation_prompt,
                        **self._special_tokens,
                    )
                )
            )
        except TemplateProblem:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            raise TemplateProblem(_first_line(error)) from error


def find_template(
    tokenizer: PreTrainedTokenizerBase, chosen: str | None, *, adds_bos: bool, tools: bool = False
) -> ChatTemplate:
    """The template that ``data.chat_template`` names, or the tokenizer's own for None.

    ``adds_bos``: the tokenizer begins a plain text with its BOS token; a shipped template then begins with it too.
    Raises UsageError when the recipe names none that exists, ModelError when the tokenizer has none.
    """
    special = tokenizer.special_tokens_map
    if chosen is None:
        own = tokenizer.chat_template
        if isinstance(own, dict):  # several by name, as transformers chooses among them
            own = own.get("tool_use" if tools and "tool_use" in own else "default")
        if own is None:
            raise ModelError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; set data.chat_template to "
                f"{' or '.join(shipped_template_names())} (shipped), or to a .jinja file"
            )
        return ChatTemplate(own, f"{tokenizer.name_or_path}: chat template", special)
    if chosen in shipped_template_names():
        text = (SHIPPED_TEMPLATES / f"{chosen}.jinja").read_text(encoding="utf-8")
        if "eos_token" in text and tokenizer.eos_token is None:
            raise ModelError(
                f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token, which the chat template "
                f"{chosen} ends a turn with; set data.chat_template to another"
            )
        return ChatTemplate("{{- bos_token }}" + text if adds_bos else text, chosen, special)
    names = ", ".join(shipped_template_names())
    try:
        text = expanded(chosen).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"data.chat_template: {chosen}: {reason}; give a .jinja file or one of {names}") from error
    return ChatTemplate(text, chosen, special)


def as_template_input(message: Message) -> dict[str, Any]:
    """The message as templates know it. Reasoning also gets the second name that some templates read it under."""
    fields = {"role": message.role, "content": message.content, **message.extras}
    given = {name: value for name, value in fields.items() if value is not None}
    if "reasoning_content" in given:
        given.setdefault("thinking", given["reasoning_content"])
    return given


def _characters(messages: Sequence[Message], tools: list[Any] | None) -> int:
    """How much text a template is given."""
    content = sum(len(message.content) for message in messages)
    extras = sum(len(json.dumps(dict(message.extras), default=str)) for message in messages if message.extras)
    return content + extras + (len(json.dumps(tools, default=str)) if tools else 0)


class _Watch:
    """Stops a template that runs or writes too long; asked at each output, call and turn of a loop."""

    def __init__(self) -> None:
        self._end_seconds = 0.0
        self._characters = 0

    def start(self, characters: int) -> None:
        """A new rendering, of at most so many characters."""
        self._end_seconds = time.thread_time() + PROCESSOR_SECONDS
        self._characters = characters

    def check(self) -> None:
        """Raise TemplateProblem when the time is up."""
        if time.thread_time() > self._end_seconds:
            raise TemplateProblem(f"it ran for more than {PROCESSOR_SECONDS:g} seconds")

    def turns(self, iterable: Iterable[Any]) -> Iterator[Any]:
        """The turns of a loop."""
        for item in iterable:
            self.check()
            yield item

    def outputs(self, parts: Iterable[str]) -> Iterator[str]:
        """The parts that the template writes."""
        for part in parts:
            self._characters -= len(part)
            if self._characters < 0:
                raise TemplateProblem("it writes far more than it was given")
            self.check()
            yield part


def _compile(text: str, watch: _Watch) -> tuple[jinja2.Template, bool]:
    """``text`` compiled in the sandbox of transformers, with ``watch`` put into its loops and calls.

    And whether it only puts texts in their places (:mod:`trainkit.data.template_reading`).

    A loop is watched through a filter around what it iterates over, a call through the hook that the sandbox has for
    every call, and ``*`` and ``**`` through its hook for operators. An attribute that the sandbox hides raises instead
    of being empty text. The overlay leaves transformers' own cached environment as it is.
    """
    import jinja2
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # Of an empty text: compiling the template there would compute its constant products before they are watched.
    sandbox: Any = _compile_jinja_template("").environment.overlay()
    plain_call = sandbox.call

    def call(context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        watch.check()
        return plain_call(context, function, *args, **kwargs)

    sandbox.call = call
    # The day on which rows are made must not show in them; templates that can do without it have a date of their own.
    sandbox.globals = {name: value for name, value in sandbox.globals.items() if name != "strftime_now"}
    sandbox.unsafe_undefined = _out_of_bounds
    sandbox.intercepted_binops = frozenset({"*", "**"})
    sandbox.call_binop = partial(_bounded, sandbox.binop_table)
    sandbox.filters = {**sandbox.filters, "trainkit_watched": watch.turns}
    tree = sandbox.parse(text)
    places_only = only_places_texts(tree)
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "trainkit_watched", [], [], None, None, lineno=loop.lineno)
    code = sandbox.compile(tree, "chat template", "chat template")
    return jinja2.Template.from_code(sandbox, code, sandbox.make_globals(None)), places_only


def _out_of_bounds(_: Any, attribute: str) -> NoReturn:
    raise TemplateProblem(f"it reaches for `{attribute}`, which the sandbox does not give to a template")


def _bounded(table: Mapping[str, Callable[[Any, Any], Any]], _: Any, operator: str, left: Any, right: Any) -> Any:
    """A product or power, unless it would be enormous: one operation cannot be interrupted once it runs."""
    if operator == "**":
        size = left.bit_length() * abs(right) if isinstance(left, int) and isinstance(right, int) else 0
    else:
        sizes = [len(side) if isinstance(side, str | list | tuple) else side for side in (left, right)]
        repeats = any(isinstance(side, str | list | tuple) for side in (left, right))
        size = sizes[0] * sizes[1] if repeats and all(isinstance(one, int) for one in sizes) else 0
    if size > LARGEST_OPERAND:
        raise TemplateProblem(f"`{operator}` would make {size:,} characters; the limit is {LARGEST_OPERAND:,}")
    return table[operator](left, right)


def _first_line(error: Exception) -> str:
    """The error in one line, with its kind where the text alone would not say it."""
    import jinja2

    text = (str(error).strip().splitlines() or [""])[0][:160]
    if isinstance(error, jinja2.TemplateError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
