"""How fast a packed folder's own pages come from disk by the reader that paging uses, at this moment.
Knows no cache of figures: what a disk gives changes from minute to minute, and looking takes half a second."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Event

import torch

from ciuic_runtime.memory.arena import HostArena
from ciuic_runtime.memory.page_store import PageStore
from ciuic_runtime.memory.source import IO_THREADS, PIECE_NBYTES
from ciuic_runtime.models.config import load_spec

READER = "ciuic_runtime.memory._page_reader"
SECONDS, WINDOWS = 0.6, 3
USUAL = 2e9  # bytes/s: of a small folder no more is read than a few times all of it
IN_FLIGHT = 4  # pages asked for at once
PAIRS, MEMORY_SECONDS, MEMORY_NBYTES = 5, 0.06, 128 << 20  # of looks at memory, alone and beside reads
LEAST_SECONDS = 0.1  # of reading a folder: smaller ones are not looked at beside memory


class PageStream:
    """Pages of one size of a packed folder, read in a random order, always some at once; nothing is kept."""

    def __init__(self, folder: str | Path, io_threads: int = IO_THREADS) -> None:
        from ciuic_runtime.memory._page_reader import PageReader

        self._store = PageStore(folder)
        self.nbytes = statistics.mode(self._store.pages.values())  # of a page: what most are as large as
        self.pages = [page for page, size in self._store.pages.items() if size == self.nbytes]
        random.Random(time.perf_counter_ns()).shuffle(self.pages)  # others than those that the disk remembers
        arena = HostArena(IN_FLIGHT * self.nbytes)
        self._free = [arena.take(self.nbytes).zero_() for _ in range(IN_FLIGHT)]
        self._reading: dict[int, torch.Tensor] = {}
        self._reader = PageReader(io_threads, PIECE_NBYTES)
        self._asked = 0

    def run(self, more: Callable[[], bool]) -> int:
        """Reads as long as `more`; the bytes that came."""
        done = 0
        while self._reading or more():
            while self._free and more():
                self._ask(self._free.pop())
            for ticket, errno, *_ in self._reader.finished(0.1):
                if errno:
                    raise OSError(errno, os.strerror(errno), str(self._store.path))
                self._free.append(self._reading.pop(ticket))
                done += self.nbytes
        return done

    def rate(self, seconds: float) -> float:
        """Bytes/s of at least one page."""
        start = time.perf_counter()
        left = iter([True])
        done = self.run(lambda: next(left, False) or time.perf_counter() - start < seconds)
        return done / (time.perf_counter() - start)

    def _ask(self, slot: torch.Tensor) -> None:
        page = self.pages[self._asked % len(self.pages)]
        file, offset = self._store.file_of(page), self._store.offset(page)
        ticket = self._reader.submit(file.direct, file.plain, offset, slot.numel(), slot.data_ptr(), self._asked)
        self._reading[ticket] = slot
        self._asked += 1

    def close(self) -> None:
        self._reader.stop()
        self._store.close()


@dataclass(frozen=True, slots=True)
class ReadRate:
    bandwidth: float  # bytes/s
    taken: float  # s per byte that all cores read memory less: what comes goes through it, and cores ask and are woken


def read_rate(folder: str | Path) -> ReadRate | None:
    """Of reading pages in any order; None where nothing is packed, or there is no compiled reader."""
    if not Path(folder).is_dir() or not load_spec(folder).packed or find_spec(READER) is None:
        return None
    stream = PageStream(folder)
    try:
        seconds = min(SECONDS, 4 * len(stream.pages) * stream.nbytes / USUAL) / WINDOWS
        bandwidth = statistics.median(stream.rate(seconds) for _ in range(WINDOWS))
        return ReadRate(bandwidth, _taken(stream) if seconds * WINDOWS >= LEAST_SECONDS else 0.0)
    finally:
        stream.close()


def _taken(stream: PageStream) -> float:
    """The middle of several pairs of looks: memory is by turns half as fast, with nothing read beside it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0.0, statistics.median(_taken_once(stream, cores) for _ in range(PAIRS)))


def _taken_once(stream: PageStream, cores: int) -> float:
    from ciuic_runtime.devices import _probe

    def memory() -> float:
        return _probe.read_bandwidth(MEMORY_NBYTES, cores, MEMORY_SECONDS, 1)[0]

    alone, enough = memory(), Event()
    with ThreadPoolExecutor(1) as pool:
        start = time.perf_counter()
        reading = pool.submit(stream.run, lambda: not enough.is_set())
        try:
            beside = memory()
        finally:
            enough.set()
        nbytes = reading.result()
        seconds = time.perf_counter() - start
    return (1 - beside / alone) * seconds / nbytes
