"""Hints to the system about ranges of a mapped file; where it does not take hints, nothing happens.
Knows no file format."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path


def read_ahead(path: Path, begin: int, end: int) -> None:
    """The bytes will be looked at soon. (Not by madvise, during which Python keeps the interpreter's lock.)"""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, begin, end - begin, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)


def forget(mapped: mmap.mmap, begin: int, end: int) -> None:
    """Takes the pages of a range out of this process; whoever looks at them again faults them in again."""
    first = begin // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first and hasattr(mmap, "MADV_DONTNEED"):
        with suppress(OSError):
            mapped.madvise(mmap.MADV_DONTNEED, first, end - first)
