"""Where a device's slots lie: one range of addresses on the host, whose memory comes when it is first written, or in
advance, and goes back when it is discarded; blocks of the backend elsewhere. Knows bytes, not what is in them."""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from typing import Protocol
from weakref import ref

import torch

from ciuic_runtime.devices.backend import PAGE, Backend
from ciuic_runtime.devices.errors import OutOfMemory
from ciuic_runtime.devices.units import format_bytes

_SMALL = 64  # bytes that sizes below a page are rounded to
_HUGE = 2 << 20  # bytes of a huge page
# Not counted as used until it is; Python names it from 3.13 on, and these systems all have the same number.
_SAME = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if _SAME else 0)
_LEAST = 1 << 30  # bytes of address space taken at once
_POPULATE_WRITE = 23  # advice of Linux 5.14 and later
_TOUCHED_AT_ONCE = 16 << 20  # bytes


def slot_size(nbytes: int) -> int:
    """Bytes that a slot for `nbytes` occupies: whole pages, below a page multiples of 64."""
    return -(-nbytes // PAGE) * PAGE if nbytes > PAGE - _SMALL else -(-nbytes // _SMALL) * _SMALL


class Arena(Protocol):
    """Hands out memory that keeps its address until it is discarded."""

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], page aligned from one page upwards."""

    def discard(self, slot: torch.Tensor) -> bool:
        """The memory goes back to the device. Whether the slot can be used again, with whatever content."""

    def touch_ahead(self, nbytes: int) -> None:
        """Memory of the next so many bytes is had from the system while other things go on: it may come more slowly
        than a disk fills it."""

    def touch_no_further(self) -> None:
        """What was touched ahead and not taken goes back."""


class HostArena:
    """Address space is reserved in large ranges; huge pages back it where the system has them."""

    def __init__(self, reserve: int = _LEAST) -> None:
        """`reserve`: bytes that will probably be taken in all; more can be."""
        self._reserve = max(reserve, _LEAST)
        self._range: torch.Tensor | None = None
        self._used = 0
        self._mapped: list[tuple[int, mmap.mmap]] = []  # address, mapping
        self._toucher: Thread | None = None
        self._enough = Event()

    def take(self, nbytes: int) -> torch.Tensor:
        size = slot_size(nbytes)
        if size >= PAGE:
            self._used = -(-self._used // PAGE) * PAGE
        if self._range is None or self._used + size > self._range.numel():
            self._range, self._used = self._map(size), 0
        slot = self._range[self._used : self._used + nbytes]
        self._used += size
        return slot

    def touch_ahead(self, nbytes: int) -> None:
        self.touch_no_further()
        if sys.platform != "linux" or nbytes <= 0:
            return
        if self._range is None:
            self._range, self._used = self._map(nbytes), 0
        self._enough.clear()
        end = min(self._range.numel(), self._used + nbytes)
        toucher = Thread(target=_touch, args=(ref(self), self._range, end), name="touch", daemon=True)
        with suppress(RuntimeError):  # the system gives no more threads: memory comes when it is written
            toucher.start()
            self._toucher = toucher

    def touch_no_further(self) -> None:
        if self._toucher is None:
            return
        self._enough.set()
        self._toucher.join()
        self._toucher = None
        assert self._range is not None
        if self._used < self._range.numel():
            self.discard(self._range[self._used :])

    def rest_of(self, memory: torch.Tensor) -> int | None:
        """Where the part begins that has not been taken, of the range that is in use; None once it is enough."""
        return None if self._enough.is_set() or self._range is not memory else self._used // PAGE * PAGE

    def discard(self, slot: torch.Tensor) -> bool:
        address = slot.data_ptr()
        begin, mapped = next(m for m in self._mapped if 0 <= address - m[0] < len(m[1]))
        first, end = -(-(address - begin) // PAGE) * PAGE, (address - begin + slot.numel()) // PAGE * PAGE
        if end > first and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED, first, end - first)
        return True

    def _map(self, least: int) -> torch.Tensor:
        """Address space for what is still to come, or as much of it as the system gives."""
        nbytes = max(self._reserve, least)
        while True:
            try:
                mapped = mmap.mmap(-1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
                break
            except OSError as error:
                if nbytes == least:
                    raise OutOfMemory(
                        f"the system refuses {format_bytes(least)} of address space ({error.strerror}); ask for a "
                        "smaller memory budget, or allow this process more (ulimit -v)", need=least,
                    ) from error  # fmt: skip
                nbytes = max(least, nbytes // 2)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a system without huge pages: smaller ones do
                mapped.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        self._mapped.append((whole.data_ptr(), mapped))
        start = -whole.data_ptr() % _HUGE
        return whole[start : start + nbytes]


class BackendArena:
    """Slots one by one from a backend whose memory is its own."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def take(self, nbytes: int) -> torch.Tensor:
        return self._backend.allocate(nbytes)

    def discard(self, slot: torch.Tensor) -> bool:
        self._backend.free(slot)
        return False

    def touch_ahead(self, nbytes: int) -> None:
        """A backend's memory is there when it is taken."""

    def touch_no_further(self) -> None:
        """Nothing was touched."""


def _touch(arena: ref[HostArena], memory: torch.Tensor, end: int) -> None:
    """What lies behind what has been taken so far, while somebody has the arena. A system that cannot do it is not
    asked again."""
    populate, at = _madvise(), 0
    while (owner := arena()) is not None and (begin := owner.rest_of(memory)) is not None:
        del owner
        at = max(at, begin)
        size = min(_TOUCHED_AT_ONCE, end - at) // PAGE * PAGE
        if size <= 0 or populate(memory.data_ptr() + at, size, _POPULATE_WRITE):
            return
        at += size


def _madvise() -> Callable[[int, int, int], int]:
    """The system's own, since Python's holds the interpreter's lock meanwhile."""
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    advise: Callable[[int, int, int], int] = found
    return advise


def arena_of(backend: Backend | None, reserve: int) -> Arena:
    """The arena of a device; None stands for the host."""
    return HostArena(reserve) if backend is None or backend.host_memory else BackendArena(backend)
