"""Reading a job file: what a key may hold, and in which line it is, so that every mistake is said with its place.
Knows no key by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.toml import Key
from ciuic_runtime.schedulers.placement import shown

Found = TypeVar("Found")
_HEADER = re.compile(r"\s*\[\[?\s*([\w.-]+)\s*\]\]?\s*(?:#.*)?$")


@dataclass(frozen=True)
class JobFile:
    """The job file, for saying where a mistake is."""

    path: Path
    text: str
    begun: bool

    def fail(self, message: str, table: str = "", key: str = "") -> NoReturn:
        line = self.line_of(table, key) if table or key else None
        where = f"job {self.path}" + (f", line {line}" if line else "")
        inside = f"[{table}] " if table and key else ""
        raise InvalidInput(f"{where}: {inside}{message}")

    def found(self, table: str, key: str, look: Callable[[Path], Found], path: Path) -> Found:
        """What `look` finds at a path that a key names."""
        try:
            return look(path)
        except InvalidInput as error:
            self.fail(str(error), table, key)

    def beside(self, path: str) -> Path:
        """Paths are from the folder that the job file is in."""
        return (self.path.resolve().parent / Path(path).expanduser()).resolve()

    def read(self, values: Mapping[str, Any], keys: Mapping[str, Key], table: str = "") -> dict[str, Any]:
        """A table's values, each as its key reads it."""
        found = {}
        for key, value in values.items():
            try:
                found[key] = keys[key].read(value)
            except ValueError:  # InvalidInput is one
                self.fail(f"{key} is {shown(value)}; allowed: {keys[key].allowed}", table, key)
        return found

    def line_of(self, table: str, key: str = "", number: int = 1) -> int | None:
        """Where a key is, or the header of a table (of tables of one name, the `number`th); None: it is not seen."""
        current, seen = "", 0
        for at, line in enumerate(self.text.split("\n"), 1):
            if header := _HEADER.match(line):
                current = header[1]
                seen += current == table
                if (not key and current == table and seen == number) or (key and not table and current == key):
                    return at
            elif key and current == table and re.match(rf"\s*([\"']?){re.escape(key)}\1\s*[=.]", line):
                return at
        return None


# What a key may hold


def whole(low: int, high: int, what: str) -> Key:
    def read(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(value)
        return value

    return Key(f"a whole number of {what} from {low} to {high}", read)


def number(low: float, high: float, open_low: bool = False) -> Key:
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(value)  # NaN is in no range
        if open_low and value == low:
            raise ValueError(value)
        return float(value)

    return Key(f"a number {'above' if open_low else 'from'} {low:g}{' up' if open_low else ''} to {high:g}", read)


def choice(*values: str) -> Key:
    def read(value: Any) -> str:
        if value not in values:
            raise ValueError(value)
        return str(value)

    return Key(" or ".join(f'"{v}"' for v in values), read)


def text(what: str, *endings: str) -> Key:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not value.strip() or (endings and Path(value).suffix not in endings):
            raise ValueError(value)
        return value

    return Key(what, read)


def checked(what: str, check: Callable[[str], Any]) -> Key:
    def read(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(value)
        check(value)
        return value

    return Key(what, read)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def _texts(value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(v, str) and v for v in given):
        raise ValueError(value)
    return tuple(given)


FLAG = Key("true or false", _flag)
TEXTS = Key("a text, or a list of them", _texts)
