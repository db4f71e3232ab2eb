"""Files are written whole or not at all.
Knows nothing of what is in them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ciuic_runtime.devices.errors import InvalidInput


def check_can_write(path: str | Path) -> None:
    """Raises InvalidInput now, not after long work, where a file could not be written later."""
    path = Path(path)
    if path.is_dir():
        raise InvalidInput(f"cannot write {path}: it is a folder; give a file name")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InvalidInput(f"cannot write {path}: {path.parent} is missing or not writable; choose another folder")


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Writes `content` beside `path` and moves it there in one step; raises InvalidInput where that is not possible."""
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InvalidInput(
            f"cannot write {path}: {error.strerror}; choose a folder that exists and is writable"
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        os.unlink(name)
        raise InvalidInput(f"cannot write {path}: {error.strerror}") from error


def read_entries(path: Path, version: int, key: str) -> dict[str, Any]:
    """What a cache of ours holds under `key`; nothing where it is absent, damaged or of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("version") != version:
        return {}
    entries = content.get(key)
    return entries if isinstance(entries, dict) else {}
