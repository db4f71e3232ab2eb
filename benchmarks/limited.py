"""One enforced memory limit for whoever runs: a memory cgroup (v1 or v2), made for a program and removed after it.
The system counts everything in it, the page cache included, and reports the peak from outside the process.

Needs root, or a cgroup that was delegated to this user."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

ROOT = Path("/sys/fs/cgroup")
_V1, _V2 = ("memory.limit_in_bytes", "memory.max_usage_in_bytes"), ("memory.max", "memory.peak")


class MemoryLimit:
    """A cgroup while the `with` lasts. `command(...)` is the program, started inside; there is no swap here."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        parent, (limit, self._peak_file) = _parent()
        self._folder = parent / f"ciuic-benchmark-{os.getpid()}-{time.monotonic_ns()}"
        try:
            self._folder.mkdir()
            (self._folder / limit).write_text(str(nbytes))
        except OSError as error:
            raise SystemExit(f"no memory cgroup can be made in {parent} ({error.strerror}): run as root") from error

    def command(self, command: list[str]) -> list[str]:
        enter = f'echo $$ > {self._folder}/cgroup.procs && exec "$@"'
        return ["sh", "-c", enter, "sh", *command]

    @property
    def peak(self) -> int:
        """Bytes, the most that was charged at once: programs' own memory, page cache, kernel's for them."""
        return int((self._folder / self._peak_file).read_text())

    def close(self) -> None:
        for _ in range(100):
            try:
                self._folder.rmdir()
                return
            except OSError:  # the program has only just ended
                time.sleep(0.1)
        raise SystemExit(f"{self._folder} cannot be removed: something still runs in it")

    def __enter__(self) -> MemoryLimit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _parent() -> tuple[Path, tuple[str, str]]:
    """The cgroup of this process as far as memory is concerned, and how its files are called."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return ROOT / "memory" / path.lstrip("/"), _V1
    path = Path("/proc/self/cgroup").read_text().splitlines()[0].split(":", 2)[2]
    return ROOT / path.lstrip("/"), _V2
