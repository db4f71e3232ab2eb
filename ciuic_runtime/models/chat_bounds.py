"""How large the values of a chat template are, and how large an operation's result would be, before it is carried out.
Knows plain data (strings, numbers, lists, dicts) and one fixed size for all; steps are counted elsewhere."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, ItemsView, KeysView, Mapping, ValuesView
from typing import Any

from jinja2.utils import Namespace

MAX_SIZE = 1 << 23  # characters of one value, an entry of a list counting as ENTRY of them
ENTRY = 64
MAX_NUMBER = 10_000  # as an argument that sets a width, a count or a precision
MAX_BITS = 1 << 16  # of a whole number
Views = (ItemsView, KeysView, ValuesView)


class Exceeded(Exception):
    """A template's value or work is out of bounds; the message completes "the chat template ..."."""


def measure(value: Any) -> int:
    """The size of a value as a tree: what is contained twice counts twice, as it does when it is written out."""
    if isinstance(value, str):
        return _bounded(len(value))
    total, rest, first = 0, [value], True
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            total += ENTRY * len(item)
            _bounded(total)
            rest.extend(item.keys())
            rest.extend(item.values())
        elif isinstance(item, (list, tuple)):
            total += ENTRY * len(item)
            _bounded(total)
            rest.extend(item)
        elif isinstance(item, int):
            total += 1 + item.bit_length() // 3
        elif isinstance(item, Namespace) and not first:
            raise Exceeded("puts a namespace into a list or into text, which is not supported")
        total, first = total + 1, False
        _bounded(total)
    return total


def measure_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    return _bounded(sum(map(measure, args)) + sum(map(measure, kwargs.values())))


def check_numbers(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Numbers given to a filter or method set widths, counts and precisions."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (int, float)) and not abs(value) <= MAX_NUMBER:
            raise Exceeded(f"gives {value:.6g} to a filter or method, where at most {MAX_NUMBER} is supported")


def check_operator(operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, str):
        _check_percent(left, right)
    elif operator == "*":
        _check_product(left, right)
    elif operator == "**":
        _check_power(left, right)
    elif isinstance(left, int) and isinstance(right, int):
        _check_bits(max(left.bit_length(), right.bit_length()))
    elif operator == "+":
        _bounded(measure(left) + measure(right))


def check_method(owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if not isinstance(owner, str):
        return
    if name in ("center", "ljust", "rjust", "zfill"):
        check_numbers(args, kwargs)
    elif name == "replace":
        _check_replace(owner, *args[:2])
    elif name == "join":
        _check_join(owner, *args[:1])
    elif name == "format":
        _check_format(owner, measure_arguments(args, kwargs))


def _bounded(size: int) -> int:
    if size > MAX_SIZE:
        raise Exceeded(f"makes a value of more than {MAX_SIZE} characters")
    return size


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise Exceeded(f"makes a number of more than {MAX_BITS} bits")


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, (str, list, tuple)) or isinstance(right, (str, list, tuple)):
        times, value = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(times, int):
            _bounded(max(times, 0) * max(1, measure(value)))
    elif isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(max(left.bit_length(), 1) * abs(right))


def _check_percent(template: str, values: Any) -> None:
    if re.search(r"%[^a-zA-Z%]*(\*|\d{4})", template):
        raise Exceeded("formats text with a width of more than 999, or one taken from a value")
    _bounded(len(template) + template.count("%") * (1000 + measure([values])))


def _check_format(template: str, arguments: int) -> None:
    if re.search(r"\{[^}]*(\{|\d{4})", template.replace("{{", "")):
        raise Exceeded("formats text with a width of more than 999, or one taken from a value")
    _bounded(len(template) + template.count("{") * (1000 + arguments))


def _check_replace(text: str, old: Any = "", new: Any = "") -> None:
    if isinstance(old, str) and isinstance(new, str):
        _bounded(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _check_join(separator: str, items: Any = ()) -> None:
    count = len(items) if isinstance(items, (str, list, tuple, Mapping)) else 0
    _bounded(measure(items) + count * len(separator))


def _replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(value), str(old), str(new)
    _check_replace(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _join(items: Any, separator: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        raise Exceeded("uses join with an attribute, which is not supported; map(attribute=...) before it is")
    parts, separator = [str(item) for item in items], str(separator)
    _check_join(separator, parts)
    return separator.join(parts)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text, margin = str(value), width if isinstance(width, str) else " " * width
    lines = text.splitlines()
    _bounded(len(text) + (len(lines) + 1) * (len(margin) + 1))
    shown = [margin + line if (line or blank) and (i or first) else line for i, line in enumerate(lines)]
    return "\n".join(shown) + ("\n" if text.endswith("\n") else "")


def _format(template: Any, *args: Any, **kwargs: Any) -> str:
    values = kwargs or args
    _check_percent(str(template), [*args, *kwargs.values()])
    return f"{str(template) % values}"


FILTERS: dict[str, Callable[..., Any]] = {
    "replace": _replace,
    "join": _join,
    "indent": _indent,
    "format": _format,
    "safe": str,
    "e": lambda text: html.escape(str(text)),
    "escape": lambda text: html.escape(str(text)),
}
