"""What a chat template does with the texts of messages, read from its Jinja tree without running it.

Most templates look at roles and put texts in their places. For such a template a rendering follows from its shape, and
conversations need not be rendered one by one. The reading is cautious: whatever it does not know makes the answer no.

Every expression is of a kind: it may hold the list of messages, one message, the text of a message as it stands or
without the white space around it, or a text with other words; or it holds nothing of a text (None), which is said of
roles, loop counters, tools, and of every part of a message but its text: the question is asked of conversations
without tools in which messages have a role and a text that is not blank, and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jinja2 import nodes

Kind = Literal["messages", "message", "text", "joined"] | None

_TYPE_TESTS = frozenset(
    {"defined", "undefined", "none", "string", "mapping", "sequence", "iterable", "number", "boolean"}
)
_METHODS = frozenset({*dir(dict), *dir(list), *dir(str)})
_COUNTERS = frozenset(
    {"index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0", "cycle"}
)
"""What may be asked of ``loop``. The rest of it holds the items of the loop, which may be messages."""
_MARKUP = frozenset({"safe", "e", "escape", "forceescape"})
"""Filters whose result escapes whatever is added to it (``markupsafe.Markup``)."""
_ROUNDS = 8  # of learning what names hold; more than any template needs, and each can only add names


class _LooksIntoTextsError(Exception):
    """Something was met that may depend on what a message says."""


def only_places_texts(tree: nodes.Template) -> bool:
    """Whether the template's output depends on the texts of messages only by holding them.

    >>> from jinja2 import Environment
    >>> parse = Environment().parse
    >>> only_places_texts(parse("{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{% endfor %}"))
    True
    >>> only_places_texts(parse("{% for m in messages %}{% if 'x' in m.content %}y{% endif %}{% endfor %}"))
    False
    """
    if not (_asks_loops_for_counts_alone(tree) and _raises_where_it_says_so(tree) and _adds_texts_as_they_are(tree)):
        return False
    reading = _Reading()
    try:
        for _ in range(_ROUNDS):
            known = dict(reading.kinds), set(reading.mixed)
            reading.statements(tree.body)
            if (reading.kinds, reading.mixed) == known:
                return True
    except _LooksIntoTextsError:
        return False
    return False


def _asks_loops_for_counts_alone(tree: nodes.Template) -> bool:
    """Whether every ``loop`` stands before one of its counters: other uses of it may lead to its items."""
    from jinja2 import nodes

    met = sum(one.name == "loop" for one in tree.find_all(nodes.Name))
    asked: list[tuple[nodes.Node, object]] = [(one.node, one.attr) for one in tree.find_all(nodes.Getattr)]
    asked += [(one.node, getattr(one.arg, "value", None)) for one in tree.find_all(nodes.Getitem)]
    counters = sum(isinstance(of, nodes.Name) and of.name == "loop" and name in _COUNTERS for of, name in asked)
    return met == counters


def _raises_where_it_says_so(tree: nodes.Template) -> bool:
    """Whether ``raise_exception`` is what it is called, and no name of the template's own."""
    from jinja2 import nodes

    given = [one.name for one in tree.find_all(nodes.Name) if one.ctx != "load"]
    return "raise_exception" not in [*given, *(one.name for one in tree.find_all(nodes.Macro))]


def _adds_texts_as_they_are(tree: nodes.Template) -> bool:
    """Whether no part is markup, which escapes the texts that are added to it."""
    from jinja2 import nodes

    for one in tree.find_all(nodes.Filter):
        applied = [getattr(argument, "value", None) for argument in one.args[:1]] if one.name == "map" else []
        if one.name in _MARKUP or not _MARKUP.isdisjoint(applied) or None in applied:
            return False
    return next(tree.find_all((nodes.EvalContextModifier, nodes.ScopedEvalContextModifier)), None) is None


class _Reading:
    """One reading of a template; ``kinds`` is what names hold, ``mixed`` are names that may hold something else too."""

    def __init__(self) -> None:
        self.kinds: dict[str, Kind] = {"messages": "messages"}
        self.mixed: set[str] = set()

    def statements(self, body: Iterable[nodes.Node]) -> None:
        """Read statements in order."""
        from jinja2 import nodes

        for node in body:
            match node:
                case nodes.Output():
                    for part in node.nodes:
                        if not isinstance(part, nodes.TemplateData):
                            self._refuse(self.kind(part), {"messages", "message"})
                case nodes.If():
                    self._conditional(node)
                case nodes.For():
                    self._loop(node)
                case nodes.Assign():
                    self._assigned(node)
                case nodes.ExprStmt():
                    self.kind(node.node)
                case nodes.AssignBlock():
                    self._without_texts(node)
                    self._may_hold_others(node.target)
                case nodes.Macro() | nodes.FilterBlock() | nodes.CallBlock():
                    self._without_texts(node)
                case _:
                    raise _LooksIntoTextsError

    def _conditional(self, node: nodes.If) -> None:
        decided = self._decided(node.test)
        if decided is not False:
            self.statements(node.body)
        if decided is not True:
            self.statements(node.elif_)
            self.statements(node.else_)

    def _decided(self, test: nodes.Node) -> bool | None:
        """What a test of a text's type comes to; the outcome of other tests is not known here."""
        from jinja2 import nodes

        if isinstance(test, nodes.Not):
            inner = self._decided(test.node)
            return None if inner is None else not inner
        if isinstance(test, nodes.Test) and test.name == "string" and self._is_text_of_a_message(test.node):
            return True
        self._truth(test)
        return None

    def _is_text_of_a_message(self, node: nodes.Node) -> bool:
        """Whether an expression is the text of a message, or raises; a name may be undefined instead."""
        from jinja2 import nodes

        return isinstance(node, nodes.Getattr | nodes.Getitem) and self.kind(node) == "text" and self._is_sure(node)

    def _is_sure(self, node: nodes.Node) -> bool:
        """Whether an expression holds what it may hold, if anything."""
        from jinja2 import nodes

        match node:
            case nodes.Name():
                return node.name not in self.mixed
            case nodes.Getattr() | nodes.Getitem():
                return self._is_sure(node.node)
            case nodes.Filter():
                return node.node is not None and self._is_sure(node.node)
            case _:
                return False

    def _may_hold_others(self, target: nodes.Node) -> None:
        """The names of a target may hold something that is none of what is known of them."""
        from jinja2 import nodes

        named = [target] if isinstance(target, nodes.Name) else target.find_all(nodes.Name)
        self.mixed.update(one.name for one in named)

    def _loop(self, node: nodes.For) -> None:
        from jinja2 import nodes

        kind = self.kind(node.iter)
        self._refuse(kind, {"message", "text", "joined"})
        if kind == "messages":
            if not isinstance(node.target, nodes.Name):
                raise _LooksIntoTextsError
            self._holds(node.target.name, "message")
        if kind is None or not self._is_sure(node.iter):
            self._may_hold_others(node.target)
        if node.test is not None:
            self._truth(node.test)
        self.statements(node.body)
        self.statements(node.else_)

    def _assigned(self, node: nodes.Assign) -> None:
        from jinja2 import nodes

        kind = self.kind(node.node)
        if kind is None or not self._is_sure(node.node):
            self._may_hold_others(node.target)
        if isinstance(node.target, nodes.Name):
            self._holds(node.target.name, kind)
        else:
            self._refuse(kind, {"messages", "message", "text", "joined"})

    def _holds(self, name: str, kind: Kind) -> None:
        """A name that holds texts here and nothing of them there is said to hold texts; other mixtures are refused."""
        known = self.kinds.get(name)
        if kind is not None and known is not None and kind != known:
            raise _LooksIntoTextsError
        self.kinds[name] = kind or known

    def _without_texts(self, node: nodes.Node) -> None:
        """Refuse a part whose output can be worked on again, if any text can be in it."""
        from jinja2 import nodes

        held = {name for name, kind in self.kinds.items() if kind is not None}
        if any(name.name in held for name in node.find_all(nodes.Name)):
            raise _LooksIntoTextsError

    def _truth(self, node: nodes.Node) -> None:
        """An expression of which only the truth counts: a text is never blank, so it is true."""
        from jinja2 import nodes

        match node:
            case nodes.And() | nodes.Or():
                self._truth(node.left)
                self._truth(node.right)
            case nodes.Not():
                self._truth(node.node)
            case _:
                self.kind(node)

    def kind(self, node: nodes.Node) -> Kind:
        """What an expression may hold."""
        from jinja2 import nodes

        match node:
            case nodes.Const() | nodes.TemplateData():
                return None
            case nodes.Name():
                return self.kinds.get(node.name)
            case nodes.Getattr():
                return self._part(node.node, node.attr)
            case nodes.Getitem():
                return self._item(node)
            case nodes.Add():
                return self._joined([node.left, node.right])
            case nodes.Concat():
                return self._joined(node.nodes)
            case nodes.Filter():
                return self._filtered(node)
            case nodes.Test():
                return self._tested(node)
            case nodes.Compare():
                return self._compared(node)
            case nodes.And() | nodes.Or():
                return self._either(self.kind(node.left), self.kind(node.right))
            case nodes.Not():
                self._truth(node.node)
                return None
            case nodes.CondExpr():
                self._truth(node.test)
                other = None if node.expr2 is None else self.kind(node.expr2)
                return self._either(self.kind(node.expr1), other)
            case nodes.Call():
                return self._called(node)
            case nodes.List() | nodes.Tuple() | nodes.Dict() | nodes.Pair() | nodes.Keyword() | nodes.Slice():
                return self._nothing_in(node)
            case nodes.BinExpr() | nodes.UnaryExpr():
                return self._nothing_in(node)
            case _:
                raise _LooksIntoTextsError

    def _part(self, whole: nodes.Node, name: str) -> Kind:
        kind = self.kind(whole)
        if kind == "message" and name == "content":
            return "text"
        if kind is not None and (kind != "message" or name in _METHODS):
            raise _LooksIntoTextsError
        return None

    def _item(self, node: nodes.Getitem) -> Kind:
        from jinja2 import nodes

        kind = self.kind(node.node)
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return self._part(node.node, node.arg.value)
        if self.kind(node.arg) is not None or kind in {"message", "text", "joined"}:
            raise _LooksIntoTextsError
        if kind is None or isinstance(node.arg, nodes.Slice):
            return kind
        return "message"

    def _joined(self, parts: Iterable[nodes.Node]) -> Kind:
        kinds = {self.kind(part) for part in parts}
        if kinds & {"messages", "message"}:
            raise _LooksIntoTextsError
        return None if kinds == {None} else "joined"

    def _filtered(self, node: nodes.Filter) -> Kind:
        if node.node is None:  # of a filter block
            raise _LooksIntoTextsError
        kind = self.kind(node.node)
        if any(self.kind(one) is not None for one in (*node.args, *node.kwargs)) or node.dyn_args or node.dyn_kwargs:
            raise _LooksIntoTextsError
        if kind is None:
            return None
        if kind == "messages" and node.name in {"length", "count"}:
            return None
        if kind == "messages" and node.name in {"first", "last"}:
            return "message"
        if kind == "messages" and node.name == "list":
            return kind
        if (kind == "text" and node.name == "trim" and not node.args and not node.kwargs) or (
            kind in {"text", "joined"} and node.name == "string"
        ):
            return kind
        raise _LooksIntoTextsError

    def _tested(self, node: nodes.Test) -> Kind:
        if self.kind(node.node) is not None and node.name not in _TYPE_TESTS:
            raise _LooksIntoTextsError
        if any(self.kind(one) is not None for one in (*node.args, *node.kwargs)) or node.dyn_args or node.dyn_kwargs:
            raise _LooksIntoTextsError
        return None

    def _compared(self, node: nodes.Compare) -> Kind:
        from jinja2 import nodes

        others = [operand.expr for operand in node.ops]
        asks_for_field = isinstance(node.expr, nodes.Const) and [one.op for one in node.ops] in (["in"], ["notin"])
        if asks_for_field and self.kind(others[0]) == "message":  # which has a role and a text
            return None
        with_none = all(isinstance(other, nodes.Const) and other.value is None for other in others)
        if not with_none and any(self.kind(one) is not None for one in (node.expr, *others)):
            raise _LooksIntoTextsError
        self.kind(node.expr)
        return None

    def _either(self, left: Kind, right: Kind) -> Kind:
        if left is not None and right is not None and left != right:
            raise _LooksIntoTextsError
        return left or right

    def _called(self, node: nodes.Call) -> Kind:
        from jinja2 import nodes

        if isinstance(node.node, nodes.Name) and node.node.name == "raise_exception":
            return None  # nothing is rendered then, whatever the message of the exception
        self._refuse(self.kind(node.node), {"messages", "message", "text", "joined"})
        if node.dyn_args or node.dyn_kwargs:
            raise _LooksIntoTextsError
        return self._nothing_in(node)

    def _nothing_in(self, node: nodes.Node) -> Kind:
        if any(self.kind(child) is not None for child in node.iter_child_nodes()):
            raise _LooksIntoTextsError
        return None

    @staticmethod
    def _refuse(kind: Kind, kinds: set[str]) -> None:
        if kind in kinds:
            raise _LooksIntoTextsError
