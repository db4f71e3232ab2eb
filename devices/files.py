"""Files are written whole or not at all.
Knows nothing of what is in them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ciuic_runtime.devices.errors import InvalidInput


def write_whole(path: str | Path, text: str) -> None:
    """Writes `text` beside `path` and moves it there in one step; raises InvalidInput where that is not possible."""
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InvalidInput(
            f"cannot write {path}: {error.strerror}; choose a folder that exists and is writable"
        ) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        os.unlink(name)
        raise InvalidInput(f"cannot write {path}: {error.strerror}") from error
