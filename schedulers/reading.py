"""JSON values as the dataclasses that they stand for, by following annotations; anything else is one line that names
the place. Knows no schedule: whatever is made of frozen facts is read back by this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ciuic_runtime.devices.errors import InvalidInput

LARGEST = 2**60  # bytes, and every other count


def read_as(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`, or InvalidInput."""
    if is_dataclass(kind):
        return _read_fields(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else read_as(next(k for k in args if k is not type(None)), value, where)
    if origin is Literal:
        return value if isinstance(value, str) and value in args else refuse(value, where, f"one of {', '.join(args)}")
    if origin is tuple:
        fixed = args[-1] is not Ellipsis
        if not isinstance(value, list) or (fixed and len(value) != len(args)):
            refuse(value, where, f"a list of {len(args)}" if fixed else "a list")
        return tuple(read_as(args[0], item, f"{where} {i}") for i, item in enumerate(value, 1))
    if origin is Mapping:
        if not isinstance(value, dict):
            refuse(value, where, "an object")
        return {key: read_as(args[1], item, f"{where}: {key}") for key, item in value.items()}
    return _read_plain(kind, value, where)


def _read_plain(kind: type, value: Any, where: str) -> Any:
    if kind is float:
        # The comparison refuses NaN and whole numbers too large for a float.
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 <= value <= 1e300
        return float(value) if good else refuse(value, where, "a number")
    if kind is int:
        good = type(value) is int and 0 <= value <= LARGEST
        return value if good else refuse(value, where, "a whole number from 0 to 2**60")
    assert kind in (str, bool), kind
    return value if isinstance(value, kind) else refuse(value, where, "a text" if kind is str else "true or false")


def _read_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        refuse(value, where, "an object")
    hints = get_type_hints(kind)
    if strange := value.keys() - hints.keys():
        raise InvalidInput(f"{where}: unknown key {min(strange)}; allowed: {', '.join(hints)}")
    for item in fields(kind):
        if item.name not in value and item.default is MISSING and item.default_factory is MISSING:
            raise InvalidInput(f"{where} has no {item.name}; it must have {', '.join(hints)}")
    return kind(**{name: read_as(hints[name], item, f"{where}: {name}") for name, item in value.items()})


def refuse(value: Any, where: str, allowed: str) -> Any:
    raise InvalidInput(f"{where} is {shown(value)}; it must be {allowed}")


def shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**50 else "a very large number"
    return text if len(text) <= 80 else text[:77] + "..."
