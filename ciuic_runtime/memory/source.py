"""Where pages come from when a slot wants them: a packed folder, read past the page cache by threads of C++; any other
checkpoint, whose pages are gathered and packed by threads of Python. Knows no budget and decides no order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from errno import ECANCELED
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

import torch

from ciuic_runtime.devices.backend import host_buffer
from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.memory.page_store import CHECKED_NBYTES, PageStore
from ciuic_runtime.models.checkpoint import Checkpoint
from ciuic_runtime.models.pages import fill_page

if TYPE_CHECKING:
    from ciuic_runtime.memory._page_reader import PageReader
    from ciuic_runtime.models.packed_checkpoint import PackedCheckpoint

# More threads wake more often beside kernels that have every core; fewer, or whole pages, leave a page that is waited
# for behind others (benchmarks/results, paging).
IO_THREADS, PIECE_NBYTES = 4, 1 << 20
AT_ONCE = 32  # pieces of a table that are read, and then checked
_LOOK = 0.25  # s between two looks at Ctrl-C while waiting


@dataclass(frozen=True, slots=True)
class Finished:
    """A read that has ended, well or not."""

    ticket: int
    error: CiuicError | None
    start: float  # s, as time.perf_counter()
    end: float
    cancelled: bool = False  # it was not wanted any more, and its slot is not filled


class PageSource(Protocol):
    """Reads under way are known by tickets. One thread calls; others read."""

    @property
    def slower(self) -> str:
        """Why pages come slower than they could, for people; "" where they do not."""

    def submit(self, page: str, into: torch.Tensor, order: int) -> int:
        """Begins to fill `into` (uint8, on the host); nobody may touch it until the read has finished. Those of smaller
        order come first."""

    def rows(self, page: str, offsets: Sequence[int], nbytes: int, into: torch.Tensor) -> None:
        """Reads so many bytes at each of these offsets in a page, side by side into `into`, uint8; waits for them.

        Raises InvalidInput where they cannot be had, or the page's bytes are not its own."""

    def promote(self, ticket: int) -> None:
        """Somebody waits for it now: it comes before all that has an order above 0."""

    def cancel(self, ticket: int) -> bool:
        """Whether the read was taken back before it began; else it finishes, perhaps as cancelled."""

    def finished(self, seconds: float) -> list[Finished]:
        """Reads that have ended since the last call; waits so long for the first."""

    def check(self, page: str, data: torch.Tensor) -> None:
        """Raises InvalidInput where the bytes are not this page's."""

    def drain(self) -> None:
        """Waits for the reads under way and forgets them."""

    def close(self) -> None:
        """Returns when nothing is written to any more."""


class PackedSource:
    """Pages of a packed folder. Each is verified when it is first loaded, and again whenever its file has changed; of a
    table of which rows are read, the pieces in which they lie."""

    def __init__(self, store: PageStore, threads: int = IO_THREADS) -> None:
        try:
            from ciuic_runtime.memory._page_reader import PageReader
        except ImportError as error:
            raise InvalidInput(
                f"pages of {store.path} are read by a compiled part, which this installation lacks (no C++ compiler "
                "when it was installed); install it again with one, or run the model where it fits into memory"
            ) from error

        self._store, self._reader = store, PageReader(threads, PIECE_NBYTES)
        self._page: dict[int, str] = {}  # ticket -> page
        self._verified: set[str] = set()
        self._verified_pieces: dict[str, set[int]] = {}  # by page that is read by rows
        self._read_whole = ""  # a table that had to be, for some rows

    @property
    def reader(self) -> PageReader:
        return self._reader

    @property
    def slower(self) -> str:
        if self._read_whole:
            return (
                f"{self._store.path} was packed by an earlier version: all of page {self._read_whole} is read before "
                "its first row; pack the model again to start sooner"
            )
        if not self._reader.plain_nbytes:
            return ""
        return f"the file system of {self._store.path} refuses O_DIRECT: pages are read through the page cache"

    def submit(self, page: str, into: torch.Tensor, order: int) -> int:
        file, offset = self._store.file_of(page), self._store.offset(page)
        ticket = self._reader.submit(file.direct, file.plain, offset, into.numel(), into.data_ptr(), order)
        self._page[ticket] = page
        return ticket

    def rows(self, page: str, offsets: Sequence[int], nbytes: int, into: torch.Tensor) -> None:
        if page not in self._verified or not self._store.file_of(page).unchanged():
            self._verify_rows(page, offsets, nbytes)
        self._read_rows(page, offsets, nbytes, into)

    def _verify_rows(self, page: str, offsets: Sequence[int], nbytes: int) -> None:
        """The pieces of the page in which these rows lie, as far as they have not been yet."""
        store = self._store
        if not store.has_pieces(page):
            store.verify_stored(page)
            self._verified.add(page)
            self._read_whole = page
            return
        verified = self._verified_pieces.setdefault(page, set())
        if not store.file_of(page).unchanged():
            verified.clear()
        size = CHECKED_NBYTES
        touched = {n for at in offsets for n in range(at // size, (at + nbytes - 1) // size + 1)} - verified
        last, rest = divmod(store.pages[page], size)  # where the page ends, a piece may be shorter
        whole = sorted(touched - {last})
        for i in range(0, len(whole), AT_ONCE):
            self._verify_pieces(page, whole[i : i + AT_ONCE], size)
        if last in touched:
            self._verify_pieces(page, [last], rest)
        verified.update(touched)

    def _verify_pieces(self, page: str, numbers: Sequence[int], nbytes: int) -> None:
        pieces = host_buffer(nbytes * len(numbers)).view(len(numbers), nbytes)
        self._read_rows(page, [n * CHECKED_NBYTES for n in numbers], nbytes, pieces)
        for number, piece in zip(numbers, pieces, strict=True):
            self._store.verify_piece(page, number, piece)

    def _read_rows(self, page: str, offsets: Sequence[int], nbytes: int, into: torch.Tensor) -> None:
        file, begin = self._store.file_of(page), self._store.offset(page)
        places = [begin + offset for offset in offsets]
        errno, missing = self._reader.read_rows(file.direct, file.plain, places, nbytes, into.data_ptr())
        if errno:
            raise file.why_failed(page, os.strerror(errno))
        if missing:
            raise file.why_short(page, missing)

    def promote(self, ticket: int) -> None:
        self._reader.promote(ticket, 0)

    def cancel(self, ticket: int) -> bool:
        taken_back = self._reader.cancel(ticket)
        if taken_back:
            del self._page[ticket]
        return taken_back

    def finished(self, seconds: float) -> list[Finished]:
        return [self._finished(*done) for done in self._reader.finished(seconds)]

    def _finished(self, ticket: int, errno: int, missing: int, start: float, end: float) -> Finished:
        page = self._page.pop(ticket)
        error: CiuicError | None = None
        if errno == ECANCELED:
            return Finished(ticket, None, start, end, cancelled=True)
        if errno:
            error = self._store.file_of(page).why_failed(page, os.strerror(errno))
        elif missing:
            error = self._store.file_of(page).why_short(page, missing)
        return Finished(ticket, error, start, end)

    def check(self, page: str, data: torch.Tensor) -> None:
        if page not in self._verified or not self._store.file_of(page).unchanged():
            self._store.verify(page, data)
            self._verified.add(page)

    def drain(self) -> None:
        for ticket in list(self._page):
            self._reader.cancel(ticket)
        while self._reader.in_flight:
            self._reader.finished(_LOOK)
        self._reader.finished(0)
        self._page.clear()

    def close(self) -> None:
        self._reader.stop()


class RepackingSource:
    """Pages of a checkpoint that holds tensors: each is gathered from them and packed as it is loaded, every time."""

    def __init__(self, checkpoint: Checkpoint, format: str, threads: int = 2) -> None:
        self._checkpoint, self._format = checkpoint, format
        self._pool = ThreadPoolExecutor(threads, "repack", torch.set_num_threads, (1,))
        self._done: SimpleQueue[Finished] = SimpleQueue()
        self._work: dict[int, Future[None]] = {}
        self._next = 1

    @property
    def slower(self) -> str:
        path = self._checkpoint.path
        if not self._checkpoint.files:
            return ""  # made in memory: there is nothing to pack
        return (
            f"{path} is not packed: each page is gathered and packed anew whenever it is read; try: ciuic pack {path}"
        )

    def submit(self, page: str, into: torch.Tensor, order: int) -> int:
        ticket, self._next = self._next, self._next + 1
        self._work[ticket] = self._pool.submit(self._fill, ticket, page, into)
        return ticket

    def rows(self, page: str, offsets: Sequence[int], nbytes: int, into: torch.Tensor) -> None:
        raise AssertionError(f"{page} is packed as it is read: it cannot be had by rows")

    def promote(self, ticket: int) -> None:
        """Pages come in the order in which they were asked for."""

    def cancel(self, ticket: int) -> bool:
        work = self._work.get(ticket)
        taken_back = work is not None and work.cancel()
        if taken_back:
            del self._work[ticket]
        return taken_back

    def finished(self, seconds: float) -> list[Finished]:
        found: list[Finished] = []
        try:
            found.append(self._done.get(timeout=seconds) if seconds > 0 else self._done.get_nowait())
            while True:
                found.append(self._done.get_nowait())
        except Empty:
            for done in found:
                self._work.pop(done.ticket, None)
            return found

    def check(self, page: str, data: torch.Tensor) -> None:
        """They were made here."""

    def drain(self) -> None:
        for work in self._work.values():
            work.cancel()
        wait(self._work.values())
        self.finished(0)
        self._work.clear()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self, ticket: int, page: str, into: torch.Tensor) -> None:
        start, error = perf_counter(), None
        try:
            fill_page(self._checkpoint, page, self._format, into)
        except CiuicError as raised:
            error = raised
        except Exception as raised:
            error = InvalidInput(f"{self._checkpoint.path}: page {page} cannot be packed: {raised}")
        self._done.put(Finished(ticket, error, start, perf_counter()))


def page_source(checkpoint: Checkpoint, format: str, io_threads: int | None = None) -> PageSource:
    if checkpoint.spec.packed:
        packed: PackedCheckpoint = checkpoint  # type: ignore[assignment]
        return PackedSource(packed.store, io_threads or IO_THREADS)
    return RepackingSource(checkpoint, format, io_threads or 2)
