"""Renders a conversation with the template that came with a model, which is a program from somewhere else.
Knows what a template may see and how much it may do; how that is enforced is `chat_sandbox.py`'s knowledge.

Guaranteed for any template and any conversation, in this process and without signals or threads: rendering ends, with
text or with InvalidInput, within MAX_SECONDS and one bounded step; it makes no value and no output of more than
MAX_SIZE characters; it calls nothing but macros, harmless methods of plain data and the functions listed here; it
reaches no attribute that begins with an underscore, changes nothing it was given, and reads no files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.chat_bounds import MAX_SIZE, Exceeded, measure
from ciuic_runtime.models.chat_sandbox import BUDGET, BoundedEnvironment, Budget
from ciuic_runtime.models.config_fields import show

MAX_SOURCE = 128 * 1024  # characters of a template; the longest published ones have about 20 thousand
MAX_DEPTH = 64  # of nested lists and objects in messages and variables
_BASE_UNITS = 1 << 27  # characters handled over a whole rendering, and so many times those of the conversation:
_UNITS_PER_CHARACTER = 256
_ADVICE = "give the whole prompt as text instead, or another template"


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
) -> str:
    """The conversation as text; `variables` are what else the template may use: bos_token, tools, enable_thinking."""
    _check_messages(messages)
    given = {"tools": None, "documents": None, **variables}
    given |= {"messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt}
    try:
        _check_plain(given, 0)
        units = _BASE_UNITS + _UNITS_PER_CHARACTER * measure(given)
        compiled = _compile(template)
        token = BUDGET.set(Budget(units))
        try:
            return _collect(compiled.generate(given))
        finally:
            BUDGET.reset(token)
    except InvalidInput:
        raise
    except (Exceeded, SecurityError) as error:
        raise InvalidInput(f"the chat template {_brief(error)}; {_ADVICE}") from error
    except TemplateSyntaxError as error:
        raise InvalidInput(
            f"the chat template is not valid at line {error.lineno}: {_brief(error)}; {_ADVICE}"
        ) from error
    except Exception as error:  # whatever a foreign program may raise: an undefined name, a wrong type, recursion
        kind = "" if isinstance(error, TemplateError) else f" ({type(error).__name__})"
        raise InvalidInput(f"the chat template refuses this conversation{kind}: {_brief(error)}; {_ADVICE}") from error


def _collect(pieces: Any) -> str:
    """Pieces are counted as they come; the sandbox has charged them, so that this is the last of two bounds."""
    collected: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_SIZE:
            raise Exceeded(f"writes more than {MAX_SIZE} characters")
        collected.append(piece)
    return "".join(collected)


@lru_cache(maxsize=32)
def _compile(source: str) -> Any:
    if len(source) > MAX_SOURCE:
        raise Exceeded(f"is {len(source)} characters long, where at most {MAX_SOURCE} are supported")
    return _environment().compile_bounded(source)


@lru_cache(maxsize=1)
def _environment() -> BoundedEnvironment:
    return BoundedEnvironment({"raise_exception": _raise_exception, "strftime_now": _strftime_now}, {"tojson": _tojson})


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise InvalidInput(f"messages must be a list of objects with role and content, not {type(messages).__name__}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidInput(f"message {i} is {show(message)}; it must be an object with role and content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise InvalidInput(f"message {i} has the role {show(role)}; give a string such as 'user' or 'assistant'")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise InvalidInput(f"message {i} has the content {show(content)}; it must be a string")


def _check_plain(value: Any, depth: int) -> None:
    """Only data gets into the sandbox: nothing in it can be called or has attributes of interest."""
    if depth > MAX_DEPTH:
        raise InvalidInput(f"messages and template variables must not be nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidInput(f"template variables and their fields have strings as names, not {show(key)}")
            _check_plain(item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_plain(item, depth + 1)
    elif value is not None and type(value) not in (str, int, float, bool):
        raise InvalidInput(f"template variables must be plain data, not {type(value).__name__}")


def _raise_exception(message: Any = "") -> None:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 200 or re.search(r"\d{3}", pattern):
        raise Exceeded("formats the date with a very long or wide pattern")
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: no escaping for HTML."""
    if indent is not None and indent > 32:
        raise Exceeded(f"indents JSON by {indent}, where at most 32 is supported")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
