"""Has this machine hold memory, for whoever asks for it next.

A virtual machine may have given free memory back to its host, which takes long to hand it out again (0.4 GB/s for each
processor where this was tried, against 6 to 12 GB/s of memory that the machine still had). What a program needs for its
own work is measured on memory that another program has just let go of."""

from __future__ import annotations

import subprocess
import sys

_TOUCH = """
import mmap, sys
held = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held.madvise(mmap.MADV_HUGEPAGE)
some = bytes(1 << 20)
for at in range(0, len(held), len(some)):
    held[at : at + len(some)] = some[: len(held) - at]
"""


def have_memory_at_hand(nbytes: int) -> None:
    """So many bytes of free memory belong to this machine for the next seconds; raises SystemExit if they cannot."""
    code = subprocess.run([sys.executable, "-c", _TOUCH, str(nbytes)], check=False).returncode
    if code:
        raise SystemExit(f"{nbytes / 1e9:.1f} GB of memory cannot be had for a moment (code {code}); lower the limit")
