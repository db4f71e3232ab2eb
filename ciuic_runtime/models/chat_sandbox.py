"""A jinja2 sandbox in which every operation is counted and every value is measured, so that no template runs away.
Knows what is counted; what a chat template is given, and how a failure is told, is `chat_template.py`'s business.

jinja2's own sandbox keeps templates from reaching Python's internals but lets them loop, and build values of any size.
Here the parsed template is rewritten before it is compiled: loops, literals, `~`, comparisons and slices go through
filters of ours; calls, operators, filters and output pass hooks that the sandbox has anyway. What is not on a list of
harmless functions, methods and filters cannot be called. Constants are not folded while compiling."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any, cast

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace, pass_context
from jinja2.visitor import NodeTransformer

from ciuic_runtime.models import chat_bounds as bounds

MAX_STEPS = 250_000  # loop rounds, calls, operators, filters
MAX_SECONDS = 5.0  # looked at in every step; a step itself is bounded by the size of values


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILTERS = _names(
    """abs capitalize count d default dictsort first float groupby int items last length list lower map max min reject
    rejectattr reverse round select selectattr sort string title trim truncate unique upper urlencode wordcount"""
)
_METHODS: dict[type, frozenset[str]] = {
    str: _names(
        """capitalize casefold center count endswith find format index isalnum isalpha isascii isdecimal isdigit
        isidentifier islower isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix
        removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase
        title upper zfill"""
    ),
    dict: _names("copy get items keys values"),
    list: _names("copy count index"),
    tuple: _names("count index"),
    LoopContext: _names("cycle changed"),
    Cycler: _names("next reset"),
}
_EACH, _TEXT, _MADE, _JOINED, _SCANNED = " each", " text", " made", " joined", " scanned"  # no template can name these


class Budget:
    """What one rendering may still use."""

    def __init__(self, units: int) -> None:
        self.steps, self.units = MAX_STEPS, units
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self, units: int = 0) -> None:
        self.steps -= 1
        self.units -= units
        if self.steps < 0:
            raise bounds.Exceeded(f"takes more than {MAX_STEPS} steps")
        if self.units < 0:
            raise bounds.Exceeded("handles more text than a conversation of this length can need")
        if time.monotonic() > self.deadline:
            raise bounds.Exceeded(f"takes longer than {MAX_SECONDS:g} s")

    def value(self, value: Any) -> Any:
        """The value, measured; what would be computed only when iterated over is computed now."""
        if isinstance(value, (Iterator, bounds.Views)):
            value = [self._counted(item) for item in value]
        self.step(bounds.measure(value))
        return value

    def _counted(self, item: Any) -> Any:
        self.step()
        return item


BUDGET: ContextVar[Budget] = ContextVar("chat_template_budget")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles with `compile_bounded`; rendering needs a Budget in BUDGET."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, functions: Mapping[str, Callable[..., Any]], filters: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_output,
            extensions=[LoopControlExtension, _Generation],
        )
        known: dict[str, Callable[..., Any]] = {"range": safe_range, "dict": dict, "namespace": Namespace}
        known |= {"cycler": Cycler, "joiner": Joiner, **functions}
        self.globals = dict(known)
        self._callable = tuple(known.values())
        plain = {name: FILTERS[name] for name in _FILTERS}
        self.filters = {name: _guarded(f) for name, f in {**plain, **bounds.FILTERS, **filters}.items()}
        self.filters |= {_EACH: _each, _TEXT: _text, _MADE: _made, _JOINED: _joined, _SCANNED: _scanned}
        self.tests = {name: _guarded(cast(Callable[..., Any], test)) for name, test in TESTS.items()}

    def compile_bounded(self, source: str) -> Any:
        tree = _Rewriter().visit(self.parse(source))
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get()
        budget.step(bounds.measure_arguments(args, kwargs))
        if not isinstance(function, Undefined):
            self._check_callable(function, args, kwargs)
        return budget.value(super().call(context, function, *args, **kwargs))

    def _check_callable(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(function, (Macro, Joiner)) or any(function is known for known in self._callable):
            return
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if name not in _METHODS.get(type(owner), ()):
            raise SecurityError(f"calls {name or type(function).__name__}, which is not allowed")
        bounds.check_method(owner, name, args, kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        bounds.check_operator(operator, left, right)
        return BUDGET.get().value(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self._not_internal(obj, attribute, super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self._not_internal(obj, argument, super().getitem(obj, argument))

    def _not_internal(self, obj: Any, name: Any, found: Any) -> Any:
        """jinja2 takes an internal attribute that is not there for an undefined one, and shows nothing."""
        if isinstance(found, Undefined) and isinstance(name, str) and name.startswith("__"):
            raise SecurityError(f"reaches for the attribute {name!r} of {type(obj).__name__}, which is not allowed")
        return found

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"reaches for the attribute {attribute!r} of {type(obj).__name__}, which is not allowed")


class _Generation(Extension):
    """{% generation %} marks what the model wrote, for training; it changes nothing here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it from the class)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Rewriter(NodeTransformer):
    """Sends what jinja2 would do without asking through the filters below."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateSyntaxError("recursive loops are not supported", node.lineno)
        text = _text_length(node)
        self.generic_visit(node)
        node.iter = _filter(cast(nodes.Expr, node.iter), _EACH)
        node.body.insert(0, _charge(node, text))
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        text = _text_length(node)
        self.generic_visit(node)
        node.body.insert(0, _charge(node, text))
        return node

    visit_CallBlock = visit_Macro

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, _MADE) if getattr(node, "ctx", "load") == "load" else node

    visit_Tuple = visit_Dict = visit_List

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filter(node.expr, _SCANNED)
        for operand in node.ops:
            operand.expr = _filter(operand.expr, _SCANNED)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter(node.node, _SCANNED)
        return node


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _charge(node: nodes.Node, text: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_filter(nodes.Const(text, lineno=node.lineno), _TEXT), lineno=node.lineno)


def _text_length(node: nodes.Node) -> int:
    return sum(len(data.data) for data in node.find_all(nodes.TemplateData))


def _each(iterable: Any) -> Iterator[Any]:
    for item in iterable:
        BUDGET.get().step()
        yield item


def _text(length: int) -> None:
    BUDGET.get().step(length)


def _made(value: Any) -> Any:
    return BUDGET.get().value(value)


def _joined(parts: list[Any]) -> str:
    BUDGET.get().step(bounds.measure(parts))
    return "".join(map(str, parts))


def _scanned(value: Any) -> Any:
    BUDGET.get().step(len(value) if isinstance(value, (str, list, tuple)) else 0)
    return value


@pass_context  # so that jinja2 does not call it while compiling
def _output(context: Context, value: Any) -> Any:
    BUDGET.get().step(bounds.measure([value]))
    return value


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps the mark by which jinja2 passes its context first
    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if hasattr(function, "jinja_pass_arg") else args
        budget = BUDGET.get()
        budget.step(bounds.measure_arguments(given, kwargs))
        bounds.check_numbers(given[1:], kwargs)
        return budget.value(function(*args, **kwargs))

    return guarded
