"""Bodies into requests, and what a client is told about one that is none: which field, what it was, what it must be.
Knows JSON and pydantic's errors; which fields there are is `protocol.py`'s business."""

from __future__ import annotations

import re
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from ciuic_runtime.models.config_fields import show
from ciuic_runtime.server.errors import ApiError, invalid
from ciuic_runtime.server.protocol import FOREIGN, Fields

_FORMS = {
    "prompt": "it must be a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": "it must be a text that is not empty, or a list of up to 4 of them",
    "content": 'it must be a text, or a list of parts {"type": "text", "text": ...}',
}

Kind = TypeVar("Kind", bound=Fields)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """Raises ApiError (400) for whatever is not such a request."""
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body is not JSON that can be read ({error}); send one object, in UTF-8") from None
    if not isinstance(values, dict):
        raise invalid(f"the body is {show(values)}; send one JSON object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _explained(error.errors(include_url=False, include_context=False)) from None


def _explained(errors: list[ErrorDetails]) -> ApiError:
    """The first field that is wrong; of the forms that it might have had, the one that came furthest."""
    mine = [e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
    error = max(mine, key=lambda e: len(e["loc"]))
    loc = [part for part in error["loc"] if not _names_a_form(part)]
    name = next((part for part in reversed(loc) if isinstance(part, str)), "")
    if name in _FORMS and error["type"] != "missing":
        error, loc = min(mine, key=lambda e: len(e["loc"])), loc[: loc.index(name) + 1]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    given = f"{param} is {show(error['input'])}"
    if error["type"] == "missing":
        return invalid(f"{param} is missing", param, "missing_required_parameter")
    if name in FOREIGN:
        return invalid(f"{given}: {FOREIGN[name]}", param, "unsupported_parameter")
    if error["type"] == "extra_forbidden":
        return invalid(f"unknown parameter: '{param}'", param, "unknown_parameter")
    wanted = _FORMS.get(name) or re.sub("^(Input|List|String|Dictionary) should", "it should", error["msg"])
    return invalid(f"{given}; {wanted}{_only_text(loc, error)}", param, "invalid_value")


def _names_a_form(part: int | str) -> bool:
    """pydantic puts the alternatives of a union into the path."""
    return isinstance(part, str) and ("[" in part or part in ("str", "constrained-str"))


def _only_text(loc: list[int | str], error: ErrorDetails) -> str:
    if loc[-1:] == ["type"] and "content" in loc:
        return ": images, audio and files are not supported"
    if loc[-1:] == ["role"] and error["input"] in ("tool", "function"):
        return ": tool calls are not supported"
    return ""
