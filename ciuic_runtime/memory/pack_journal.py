"""What an unfinished packing has written so far: a line per page with its checksum, so that it can be gone on with.
Knows neither pages nor formats; whether a page that it names is really there, the page writer looks up."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ciuic_runtime.devices.errors import InvalidInput

NAME = "packing.jsonl"


class PackJournal:
    """The journal in `folder`, which is made if it is not there; locked until it is closed.

    `heading`, its first line, is what is packed into what: another one than is written there is refused."""

    def __init__(self, folder: Path, heading: Mapping[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        self._file = (folder / NAME).open("a+", encoding="utf-8")
        try:
            self._lock(folder)
            self.written: dict[str, str] = self._read(folder, dict(heading))  # page -> checksum
        except BaseException:
            self._file.close()
            raise

    def add(self, page: str, checksum: str) -> None:
        self._line({"page": page, "checksum": checksum})

    def __enter__(self) -> PackJournal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def _lock(self, folder: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidInput(f"another process is writing {folder}; wait for it, or give another folder") from None

    def _read(self, folder: Path, heading: dict[str, Any]) -> dict[str, str]:
        self._file.seek(0)
        lines = [entry for line in self._file if (entry := entry_of(line))]
        if not lines:
            self._file.truncate(0)
            self._line(heading)
            return {}
        if lines[0] != heading:
            raise InvalidInput(
                f"{folder} is left from packing another checkpoint or in another format; remove it, or name another"
            )
        self._file.write("\n")  # ends a line that was cut off
        return {line["page"]: line["checksum"] for line in lines[1:] if line.keys() == {"page", "checksum"}}

    def _line(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


def entry_of(line: str) -> dict[str, Any]:
    """{} for a line that was cut off."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
