"""JSON files and their fields, read with a one-line complaint about whatever is not as it must be.
Knows types and ranges; what the fields of a model mean is `config.py`'s business."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any, Final

from ciuic_runtime.devices.errors import InvalidInput

MAX_CONFIG_BYTES = 10_000_000
REQUIRED: Final = object()  # as a default: the field must be there


def read_json_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The one JSON object in a file; InvalidInput for anything else, however large or deep."""
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise InvalidInput(f"{path} {problem}; a checkpoint folder holds config.json beside its weights")
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error
    if len(text) > max_bytes:
        raise InvalidInput(f"{path} is larger than {max_bytes // 10**6} MB; that is no {path.name}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error).split("\n")[0]
        raise InvalidInput(f"{path} is not valid JSON ({reason}); download it again") from None
    if not isinstance(value, dict):
        raise InvalidInput(f"{path} holds {show(value)}, not a JSON object")
    return value


def show(value: object) -> str:
    """A value as it stands in an error message: short and on one line."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 60, 60
    return {"None": "null", "True": "true", "False": "false"}.get(text := short.repr(value), text)


class Fields:
    """A JSON object read field by field, each checked for type and range; `where` begins every message.

    Where a default is given, null counts as missing, as transformers' own configs have it."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def wrong(self, name: str, allowed: str) -> InvalidInput:
        if self.values.get(name) is None and name not in self.values:
            return InvalidInput(f"{self.where}: {name} is missing; {allowed}")
        return InvalidInput(f"{self.where}: {name} is {show(self.values[name])}; {allowed}")

    def is_null(self, name: str) -> bool:
        return name in self.values and self.values[name] is None

    def _get(self, name: str, default: object, allowed: str) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise self.wrong(name, allowed)
        return default

    def size(self, name: str, default: object = REQUIRED, maximum: int = 2**20, minimum: int = 1) -> int:
        allowed = f"it must be a whole number from {minimum} to {maximum}"
        value = self._get(name, default, allowed)
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.wrong(name, allowed)
        return value

    def number(self, name: str, default: object = REQUIRED, minimum: float = 0.0, maximum: float = 1e15) -> float:
        allowed = f"it must be a number from {minimum:g} to {maximum:g}"
        value = self._get(name, default, allowed)
        if type(value) not in (int, float) or not minimum <= value <= maximum:  # NaN is in no range
            raise self.wrong(name, allowed)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default, "")
        if type(value) is not bool:
            raise self.wrong(name, "it must be true or false")
        return value

    def choice(self, name: str, allowed: tuple[str, ...], default: object = REQUIRED, what: str = "supported") -> str:
        sentence = f"{what}: {', '.join(allowed)}"
        value = self._get(name, default, sentence)
        if type(value) is not str or value not in allowed:
            raise self.wrong(name, sentence)
        return value

    def section(self, name: str) -> Fields | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "it must be an object or null")
        return Fields(value, f"{self.where}: {name}")

    def token_ids(self, name: str, vocab_size: int, default: int | None = None) -> tuple[int, ...]:
        """An id, a list of ids, or null; an absent field gives the default, if the vocabulary has it."""
        value = self.values.get(name, REQUIRED)
        if value is REQUIRED:
            return (default,) if default is not None and default < vocab_size else ()
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if len(ids) > 1000 or any(type(i) is not int or not 0 <= i < vocab_size for i in ids):
            raise self.wrong(name, f"it must be null, a token id below vocab_size ({vocab_size}), or a list of them")
        return tuple(dict.fromkeys(ids))
