"""Memory that this machine holds, to be given to whoever asks next.

A virtual machine may have given free memory back to its host, which takes long to hand it out again (0.4 GB/s for each
processor where this was tried, against 6 to 12 GB/s of memory that the machine still had). What a program needs for its
own work is measured on memory that a ballast held until just before."""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType

_HOLD = """
import mmap, sys
held = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held.madvise(mmap.MADV_HUGEPAGE)
for at in range(0, len(held), mmap.PAGESIZE):
    held[at] = 1
print(flush=True)
sys.stdin.read()
"""


class Ballast:
    """Holds so many bytes, touched, until it is dropped, or the `with` ends; outside of any limit on its user."""

    def __init__(self, nbytes: int) -> None:
        command = [sys.executable, "-c", _HOLD, str(nbytes)]
        self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        if not self._holder.stdout.readline():
            raise SystemExit(f"{nbytes / 1e9:.1f} GB of memory cannot be held for a moment; lower the limit")

    def drop(self) -> None:
        if self._holder.stdin is not None:
            self._holder.stdin.close()
        self._holder.wait()

    def __enter__(self) -> Ballast:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.drop()
