"""The fields of a GGUF file, read one by one, each checked for its type.
Knows nothing of what they mean; `gguf_config.py` and `gguf_rope.py` do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.config_fields import show
from ciuic_runtime.models.gguf_file import GgufFile


class GgufFields:
    """Typed access to the fields `<architecture>.<key>`, with messages that name the key."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._file, self._prefix = file, architecture + "."

    def get(self, key: str, kind: type[int] | type[float] | type[bool] | type[str], default: Any = None) -> Any:
        """The value, or the default; a list of one value per layer counts as that value if all are equal."""
        value: Any = self._file.fields.get(self._prefix + key)
        if isinstance(value, np.ndarray) and value.size and bool((value == value[0]).all()):
            value = value[0].item()
        if value is None:
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise self.error(f"{self._prefix}{key} is {show(value)}, not one value of type {kind.__name__}")
        return value

    def need(self, key: str, kind: type[int] | type[float]) -> Any:
        value = self.get(key, kind)
        if value is None:
            raise self.error(f"there is no field {self._prefix}{key}")
        return value

    def error(self, what: str) -> InvalidInput:
        return InvalidInput(f"{self._file.path}: {what}; convert the model anew with a current llama.cpp")
