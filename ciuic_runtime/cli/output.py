"""What every command prints: one JSON object or text on stdout, what goes on on stderr, one line for what went wrong.
Knows no command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any


def result(as_json: bool, document: dict[str, Any], text: Callable[[], str]) -> None:
    if as_json:
        print_json(document)
    else:
        print(text())


def print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document))


def say(what: str) -> None:
    print(f"ciuic: {what}", file=sys.stderr)


def fail(as_json: bool, error: BaseException, message: str, code: int) -> int:
    message = " ".join(message.split())
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": message, "exit_code": code}})
    elif message:
        print(f"ciuic: {message}", file=sys.stderr)
    return code
