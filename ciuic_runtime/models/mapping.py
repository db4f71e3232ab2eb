"""Hints to the system about ranges of a mapped file; where it does not take hints, nothing happens.
Knows no file format."""

from __future__ import annotations

import mmap
from contextlib import suppress


def advise(mapped: mmap.mmap, advice: str, begin: int, end: int) -> None:
    """`advice` (MADV_WILLNEED, MADV_DONTNEED) for the pages that hold the bytes from `begin` to before `end`."""
    first = begin // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first and (number := getattr(mmap, advice, None)) is not None:
        with suppress(OSError):
            mapped.madvise(number, first, end - first)
